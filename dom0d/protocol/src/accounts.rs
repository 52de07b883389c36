//! What conversations stand for in their service's sums and lists. It follows from each conversation alone, so nothing of it
//! is counted while a conversation works: what it was before is compared with what it is after.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::config::Limits;
use crate::counters::Counters;
use crate::key::{ConversationId, MAX_SERVERS};

/// What one conversation stands for. The default is the share of a conversation that does not exist.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Share {
    pub(crate) is_open: bool,
    /// Bytes that it keeps.
    pub(crate) retained: u64,
    /// What of that is beyond gaps, of client and OVM.
    pub(crate) beyond: u64,
    /// A FIN or RST of the OVM is held.
    pub(crate) is_held: bool,
    /// RVMs dispute that close.
    pub(crate) is_disputed: bool,
    pub(crate) is_recuperating: bool,
    /// It ended under an earlier OVM, and the present one has yet to end it.
    pub(crate) is_owed: bool,
    /// The client was sent bytes beyond a gap, up to here.
    pub(crate) gap: Option<u64>,
    /// By slot: what it means to each server.
    pub(crate) servers: [ServerShare; MAX_SERVERS],
}

/// What a conversation means to one server.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ServerShare {
    /// The conversation is open and the server covers it.
    pub(crate) covered: bool,
    /// The conversation is open and the server has diverged in it.
    pub(crate) diverged: bool,
    /// Bytes of both directions that the others have and the server has not.
    pub(crate) behind: u64,
    /// Bytes of its answers that are kept until they are compared.
    pub(crate) kept: u64,
}

/// The sums and lists of all conversations.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Accounts {
    open: u64,
    retained: u64,
    beyond: u64,
    owed: BTreeSet<ConversationId>,
    gaps: BTreeMap<ConversationId, u64>,
}

impl Accounts {
    /// Open conversations.
    pub(crate) fn open(&self) -> u64 {
        self.open
    }

    /// Bytes kept for all conversations.
    pub(crate) fn retained(&self) -> u64 {
        self.retained
    }

    /// Conversations that may still change the OVM's state: open ones, and those that it has yet to be given to the end.
    pub(crate) fn unsettled(&self) -> u64 {
        self.open + self.owed.len() as u64
    }

    /// Conversations whose client was sent bytes beyond a gap, and up to where. Once a gap closes, the client has answers
    /// behind it that a new OVM must give itself before anybody's next request: at a promotion they must be known.
    pub(crate) fn take_gaps(&mut self) -> impl Iterator<Item = (ConversationId, u64)> + use<> {
        core::mem::take(&mut self.gaps).into_iter()
    }

    /// Bytes that one direction of a conversation may hold now, if a segment is to join it that does (not) come behind a gap.
    pub(crate) fn room(&self, beyond: bool, limits: &Limits) -> usize {
        let full = self.retained >= limits.retained_bytes || (beyond && self.has_enough_beyond(limits));
        if full { 0 } else { limits.conversation_bytes as usize }
    }

    /// Who has bytes on the other side of a gap repeats them: so long as that closes first.
    fn has_enough_beyond(&self, limits: &Limits) -> bool {
        self.beyond >= limits.out_of_order_bytes
    }

    /// Counts a segment that found no [`Accounts::room`].
    pub(crate) fn count_refused(&self, beyond: bool, limits: &Limits, counters: &mut Counters) {
        if self.room(false, limits) == 0 {
            counters.retained_bytes += 1;
        } else if beyond && self.has_enough_beyond(limits) {
            counters.out_of_order_bytes += 1;
        } else {
            counters.conversation_bytes += 1;
        }
    }

    /// The conversation `id` was `before`, and is `after` now.
    pub(crate) fn settle(&mut self, id: ConversationId, before: &Share, after: &Share) {
        self.open = moved(self.open, before.is_open.into(), after.is_open.into());
        self.retained = moved(self.retained, before.retained, after.retained);
        self.beyond = moved(self.beyond, before.beyond, after.beyond);
        if after.is_owed {
            self.owed.insert(id);
        } else if !self.owed.is_empty() {
            self.owed.remove(&id);
        }
        if before.gap != after.gap {
            match after.gap {
                Some(highest) => self.gaps.insert(id, highest),
                None => self.gaps.remove(&id),
            };
        }
    }
}

/// A sum in which `after` takes the place of `before`.
pub(crate) const fn moved(sum: u64, before: u64, after: u64) -> u64 {
    (sum + after).saturating_sub(before)
}
