//! The sums and lists of a service over its conversations. Each conversation's share follows from that conversation
//! alone. So nothing is counted while a conversation works: the service compares its share before the turn with its
//! share after.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::config::Limits;
use crate::counters::Counters;
use crate::key::{ConversationId, MAX_SERVERS};

/// What one conversation contributes. The default is the share of a conversation that does not exist.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Share {
    pub(crate) is_open: bool,
    /// Bytes that the conversation keeps.
    pub(crate) retained: u64,
    /// Of these, the bytes of client and OVM that lie beyond gaps.
    pub(crate) beyond: u64,
    /// A FIN or RST of the OVM is held.
    pub(crate) is_held: bool,
    /// RVMs dispute that FIN or RST.
    pub(crate) is_disputed: bool,
    pub(crate) is_recuperating: bool,
    /// The conversation ended under an earlier OVM, and the present OVM has not ended it yet.
    pub(crate) is_owed: bool,
    /// The client was sent bytes beyond a gap, up to this down position.
    pub(crate) gap: Option<u64>,
    /// By slot: the share of each server.
    pub(crate) servers: [ServerShare; MAX_SERVERS],
}

/// What a conversation contributes to one server's sums.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ServerShare {
    /// The conversation is open and the server covers it.
    pub(crate) covered: bool,
    /// The conversation is open and the server has diverged in it.
    pub(crate) diverged: bool,
    /// Bytes of both directions that the server has not acknowledged or not produced.
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

    /// Conversations that may still change the OVM's state: open ones, and those whose last bytes the OVM still lacks.
    pub(crate) fn unsettled(&self) -> u64 {
        self.open + self.owed.len() as u64
    }

    /// Conversations whose client was sent bytes beyond a gap, each with the end of those bytes. Once the gap closes,
    /// the client has seen these answers, so a new OVM must produce them before it is given any client's next request
    /// (rule 3). Hence a promotion appends them to the record.
    pub(crate) fn take_gaps(&mut self) -> impl Iterator<Item = (ConversationId, u64)> + use<> {
        core::mem::take(&mut self.gaps).into_iter()
    }

    /// Bytes that one direction of a conversation may hold now, for a segment that lies beyond a gap (`beyond`) or not.
    pub(crate) fn room(&self, beyond: bool, limits: &Limits) -> usize {
        let full = self.retained >= limits.retained_bytes || (beyond && self.has_enough_beyond(limits));
        if full { 0 } else { limits.conversation_bytes as usize }
    }

    /// The daemon keeps as many bytes beyond gaps as it may. Senders retransmit the rest once the gaps have closed.
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

    /// Replaces the share `before` of the conversation `id` by `after`.
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
