//! The progress of the present epoch's recuperation.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::follower::queue::Queue;
use crate::key::ConversationId;
use crate::record::Record;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Recuperation {
    /// Conversations that are still in recuperation.
    pub(crate) pending: BTreeSet<ConversationId>,
    pub(crate) recuperated: u64,
    pub(crate) reset: u64,
    /// No byte of this epoch was sent to a client yet.
    pub(crate) first_byte_due: bool,
    /// Length of the record at the cutover: up to here the new OVM is fed in the order of the record (rule 3).
    pub(crate) mark: u64,
    /// The end of this recuperation was reported, or there is none to report.
    pub(crate) reported: bool,
}

impl Recuperation {
    /// No conversation is left in recuperation, and that was not reported yet.
    pub(crate) fn is_to_be_reported(&self) -> bool {
        !self.reported && self.pending.is_empty()
    }

    /// The OVM has not produced every answer that clients were sent before it was promoted.
    pub(crate) fn is_catching_up(&self, queue: &Queue, record: &Record) -> bool {
        queue.ovm().is_some_and(|ovm| record.cursor(ovm) < self.mark)
    }

    /// Notes that a conversation is in recuperation, or no longer.
    pub(crate) fn set_pending(&mut self, id: ConversationId, is_pending: bool) {
        if is_pending {
            self.pending.insert(id);
        } else {
            self.pending.remove(&id);
        }
    }
}
