//! How the present epoch's recuperation goes.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::follower::queue::Queue;
use crate::key::ConversationId;
use crate::record::Record;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Recuperation {
    /// Conversations still in it.
    pub(crate) pending: BTreeSet<ConversationId>,
    pub(crate) recuperated: u64,
    pub(crate) reset: u64,
    /// No byte of this epoch was sent to a client yet.
    pub(crate) first_byte_due: bool,
    /// Length of the service-wide record at the cutover: the new OVM is fed in its order up to here.
    pub(crate) mark: u64,
    /// The end of this recuperation was told, or there is none.
    pub(crate) reported: bool,
}

impl Recuperation {
    /// No conversation is left in it, and nobody was told.
    pub(crate) fn is_to_be_reported(&self) -> bool {
        !self.reported && self.pending.is_empty()
    }

    /// The OVM has not produced every answer that clients were sent before it was promoted.
    pub(crate) fn is_catching_up(&self, queue: &Queue, record: &Record) -> bool {
        queue.ovm().is_some_and(|ovm| record.cursor(ovm) < self.mark)
    }

    /// A conversation is in it, or no longer.
    pub(crate) fn set_pending(&mut self, id: ConversationId, is_pending: bool) {
        if is_pending {
            self.pending.insert(id);
        } else {
            self.pending.remove(&id);
        }
    }
}
