//! Closes of the OVM that wait for an RVM to do the same, in all conversations: several that nobody shares are evidence (e).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::key::{ConversationId, Key};

/// Refused handshakes counted while closes are held; more tell no more.
const REFUSALS: usize = 16;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Closes {
    /// Conversations in which a FIN or RST of the OVM is held.
    held: BTreeSet<ConversationId>,
    /// Those among them whose close RVMs dispute.
    disputed: BTreeSet<ConversationId>,
    /// Handshakes that the OVM refused meanwhile.
    refused: BTreeSet<Key>,
}

impl Closes {
    /// No close is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Conversations whose close RVMs dispute.
    pub(crate) fn disputed(&self) -> usize {
        self.disputed.len()
    }

    /// Conversations beside this one whose close RVMs dispute, and handshakes that were refused: each is a conversation too.
    pub(crate) fn unshared_beside(&self, id: ConversationId) -> usize {
        self.disputed() - usize::from(self.disputed.contains(&id)) + self.refused.len()
    }

    /// The OVM refused a handshake.
    pub(crate) fn note_refusal(&mut self, key: Key) {
        if self.refused.len() < REFUSALS {
            self.refused.insert(key);
        }
    }

    /// A conversation's close is held now, or no longer.
    pub(crate) fn set(&mut self, id: ConversationId, is_held: bool, is_disputed: bool) {
        set(&mut self.held, id, is_held);
        set(&mut self.disputed, id, is_disputed);
        if self.held.is_empty() {
            self.refused.clear();
        }
    }

    /// What the former OVM wanted to close is its successor's to decide.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

fn set(list: &mut BTreeSet<ConversationId>, id: ConversationId, belongs: bool) {
    if belongs {
        list.insert(id);
    } else {
        list.remove(&id);
    }
}
