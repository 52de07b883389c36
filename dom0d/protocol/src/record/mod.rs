//! The record: what clients and OVM said, once, in order, over the whole service. It keeps cause before effect (rule
//! 3).
//!
//! Answers that clients were sent are entries of a log. A client byte carries a *mark*: the length
//! of the log when it was recorded. It may be handed to an RVM once that RVM's cursor has reached the
//! mark, that is, once the RVM has itself produced every answer before it.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::key::{ConversationId, MAX_SERVERS, Slot};

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    conversation: ConversationId,
    /// The answer up to this position was sent.
    position: u64,
}

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    first: u64,
    entries: VecDeque<Entry>,
    /// Highest mark given out: an entry at or beyond it may still grow.
    marked: u64,
    cursors: [u64; MAX_SERVERS],
    /// Conversations that wait for a cursor to reach a mark.
    waiting: [BTreeMap<(u64, ConversationId), ()>; MAX_SERVERS],
}

impl Record {
    /// The mark for client bytes recorded now.
    pub(crate) fn mark(&mut self) -> u64 {
        self.marked = self.length();
        self.marked
    }

    /// Entries ever logged.
    pub(crate) fn length(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// A client was sent the answer in `conversation` up to `position`.
    pub(crate) fn answered(&mut self, conversation: ConversationId, position: u64) {
        let length = self.length();
        match self.entries.back_mut() {
            // No client byte was recorded since, so none can depend on the difference.
            Some(last) if last.conversation == conversation && self.marked < length => {
                last.position = last.position.max(position);
                // A cursor that had passed the shorter entry must wait for the longer one.
                for cursor in &mut self.cursors {
                    *cursor = (*cursor).min(length - 1);
                }
            }
            _ => self.entries.push_back(Entry { conversation, position }),
        }
    }

    /// Whether bytes that were recorded at `mark` may be handed to the server in `slot`. If not, [`Record::advance`]
    /// wakes `conversation` once they may.
    pub(crate) fn permits(&mut self, slot: Slot, mark: u64, conversation: ConversationId) -> bool {
        if mark <= self.cursors[slot.index()] {
            return true;
        }
        self.waiting[slot.index()].insert((mark, conversation), ());
        false
    }

    /// The first entry that the server in `slot` has not produced yet.
    pub(crate) fn cursor(&self, slot: Slot) -> u64 {
        self.cursors[slot.index()]
    }

    /// The conversation whose answer the server in `slot` must produce next.
    pub(crate) fn awaited(&self, slot: Slot) -> Option<ConversationId> {
        let index = usize::try_from(self.cursors[slot.index()].checked_sub(self.first)?).ok()?;
        self.entries.get(index).map(|entry| entry.conversation)
    }

    /// Entries that the server in `slot` has yet to produce.
    pub(crate) fn outstanding(&self, slot: Slot) -> u64 {
        self.length() - self.cursors[slot.index()]
    }

    /// Whether conversations wait for the server in `slot`.
    pub(crate) fn is_waiting(&self, slot: Slot) -> bool {
        !self.waiting[slot.index()].is_empty()
    }

    /// Moves the cursor of `slot` over the entries for which `produced` is true, and calls `wake` for each conversation
    /// that may continue. True if the cursor moved.
    pub(crate) fn advance(
        &mut self,
        slot: Slot,
        mut produced: impl FnMut(ConversationId, u64) -> bool,
        mut wake: impl FnMut(ConversationId),
    ) -> bool {
        let cursor = &mut self.cursors[slot.index()];
        let before = *cursor;
        while let Some(entry) = self.entries.get((*cursor - self.first) as usize) {
            if !produced(entry.conversation, entry.position) {
                break;
            }
            *cursor += 1;
        }
        let (cursor, waiting) = (*cursor, &mut self.waiting[slot.index()]);
        while let Some(entry) = waiting.first_entry().filter(|entry| entry.key().0 <= cursor) {
            wake(entry.remove_entry().0.1);
        }
        cursor > before
    }

    /// The server in `slot` begins at the end of the record: earlier entries do not concern it.
    pub(crate) fn start(&mut self, slot: Slot) {
        self.cursors[slot.index()] = self.length();
        self.waiting[slot.index()].clear();
    }

    /// Forgets entries that no slot of `followers` has yet to produce.
    pub(crate) fn release(&mut self, followers: impl Iterator<Item = Slot>) {
        let oldest = followers.map(|slot| self.cursors[slot.index()]).min().unwrap_or(self.length());
        while self.first < oldest && self.entries.pop_front().is_some() {
            self.first += 1;
        }
        // Cursors of slots without a follower must not point before the first entry that is left.
        for cursor in &mut self.cursors {
            *cursor = (*cursor).max(self.first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ConversationId = ConversationId::for_tests(1);
    const B: ConversationId = ConversationId::for_tests(2);

    #[test]
    fn bytes_wait_for_the_answers_that_preceded_them() {
        let mut record = Record::default();
        let slot = Slot::for_tests(1);
        record.answered(A, 10);
        let mark = record.mark();
        assert!(!record.permits(slot, mark, B));
        let mut woken = Vec::new();
        record.advance(slot, |_, position| position <= 9, |conversation| woken.push(conversation));
        assert!(woken.is_empty());
        record.advance(slot, |_, position| position <= 10, |conversation| woken.push(conversation));
        assert_eq!(woken, [B]);
        assert!(record.permits(slot, mark, B));
    }

    #[test]
    fn an_entry_grows_only_while_nobody_depends_on_it() {
        let mut record = Record::default();
        record.answered(A, 10);
        record.answered(A, 20);
        assert_eq!(record.length(), 1);
        assert_eq!(record.mark(), 1);
        record.answered(A, 30);
        assert_eq!(record.length(), 2);
        record.release(core::iter::empty());
        assert_eq!(record.length(), 2);
        assert_eq!(record.outstanding(Slot::for_tests(1)), 0);
    }
}
