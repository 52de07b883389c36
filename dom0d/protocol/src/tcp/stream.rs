//! The recorded bytes of one direction of a conversation: a contiguous part, which servers may be fed from, and what
//! arrived beyond gaps.

use core::ops::Range;
use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// Small adjacent chunks with the same mark are joined up to this size, in bytes.
const JOINED_CHUNK: usize = 8 << 10;

/// Adjacent bytes beyond a gap are joined into runs of about this size, in bytes.
const JOINED_RUN: usize = 256 << 10;

/// Overhead of a run in bytes. It counts towards limits: otherwise tiny segments would take far more memory than the
/// limits allow (rule 6).
const RUN: usize = 96;

/// A run of bytes recorded at once.
#[derive(Debug, Serialize, Deserialize)]
struct Chunk {
    start: u64,
    /// Mark in the record (see [`crate::record`]): a server must produce all answers before it first (rule 3).
    mark: u64,
    #[serde(with = "serde_bytes")]
    bytes: Vec<u8>,
}

impl Chunk {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

/// The result of an insertion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inserted {
    /// First position at which the bytes contradict recorded ones. The recorded bytes stay.
    pub(crate) conflict: Option<u64>,
    /// The contiguous part grew.
    pub(crate) grew: bool,
    /// Bytes beyond the limit were refused.
    pub(crate) refused: bool,
}

/// Recorded bytes by position. The first copy wins: recorded bytes never change (rule 2).
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Stream {
    chunks: VecDeque<Chunk>,
    end: u64,
    pending: BTreeMap<u64, ByteBuf>,
    /// Position of the latest bytes that arrived beyond a gap.
    latest: u64,
    retained: usize,
    /// Like `retained`, for the bytes beyond gaps alone.
    beyond: usize,
}

/// Most runs beyond gaps that a SACK report considers. The sender retransmits any further ones needlessly.
const REPORTED_RUNS: usize = 64;

impl Stream {
    /// An empty stream whose next byte has position `start`.
    pub(crate) fn new(start: u64) -> Self {
        Self {
            chunks: VecDeque::new(),
            end: start,
            pending: BTreeMap::new(),
            latest: start,
            retained: 0,
            beyond: 0,
        }
    }

    /// First retained position.
    pub(crate) fn base(&self) -> u64 {
        self.chunks.front().map_or(self.end, |chunk| chunk.start)
    }

    /// End of the contiguous part.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// End of everything, gaps included.
    pub(crate) fn highest(&self) -> u64 {
        self.pending.last_key_value().map_or(self.end, |(start, bytes)| start + bytes.len() as u64)
    }

    /// Bytes held, including the overhead of holding them.
    pub(crate) fn retained(&self) -> usize {
        self.retained
    }

    /// The part of [`Self::retained`] that lies beyond gaps.
    pub(crate) fn beyond(&self) -> usize {
        self.beyond
    }

    /// Records `bytes` at `position`, unless the stream would then hold more than `limit`. Bytes that join the
    /// contiguous part now get `mark`, including earlier ones whose gap closes.
    pub(crate) fn insert(&mut self, position: u64, bytes: &[u8], mark: u64, limit: usize) -> Inserted {
        let mut inserted = Inserted::default();
        let before = self.end;
        let stop = position + bytes.len() as u64;
        // Compare the part that is recorded already; do not copy it.
        let known = self.base().max(position)..self.end.min(stop);
        if known.start < known.end {
            inserted.conflict = self.first_difference(known.clone(), slice(bytes, position, &known));
        }
        let new = self.end.max(position)..stop;
        if new.start < new.end {
            if self.retained + (new.end - new.start) as usize + RUN > limit {
                inserted.refused = true;
            } else if new.start == self.end && self.pending.is_empty() {
                self.append(slice(bytes, position, &new), mark);
            } else {
                let conflict = self.insert_pending(new.start, slice(bytes, position, &new));
                inserted.conflict = inserted.conflict.or(conflict);
                self.close_up(mark);
            }
        }
        inserted.grew = self.end > before;
        inserted
    }

    /// Overwrites `bytes`, a later copy at `position`, with what is recorded there.
    pub(crate) fn restore(&self, position: u64, bytes: &mut [u8]) {
        let stop = position + bytes.len() as u64;
        let mut put = |start: u64, held: &[u8]| {
            let part = start.max(position)..stop.min(start + held.len() as u64);
            let old = slice(held, start, &part);
            if let Some(place) = part.start.checked_sub(position).and_then(|at| bytes.get_mut(at as usize..))
            {
                place[..old.len()].copy_from_slice(old);
            }
        };
        for chunk in self.chunks.range(self.index_of(position)..).take_while(|chunk| chunk.start < stop) {
            put(chunk.start, &chunk.bytes);
        }
        let first = self.pending.range(..=position).next_back().map_or(position, |(run, _)| *run);
        for (run, held) in self.pending.range(first..stop.max(first)) {
            put(*run, held);
        }
    }

    /// Whether the stream holds exactly `bytes` from `position` on, without a gap.
    pub(crate) fn says(&self, position: u64, bytes: &[u8]) -> bool {
        let range = position..position.saturating_add(bytes.len() as u64);
        self.base() <= range.start && range.end <= self.end && self.first_difference(range, bytes).is_none()
    }

    /// Moves the end on by `count` bytes that need not be held. Does nothing and returns false if the stream holds any
    /// bytes.
    pub(crate) fn skip(&mut self, count: u64) -> bool {
        let is_empty = self.chunks.is_empty() && self.pending.is_empty();
        if is_empty {
            self.end += count;
        }
        is_empty
    }

    fn append(&mut self, bytes: &[u8], mark: u64) {
        self.retained += bytes.len();
        self.end += bytes.len() as u64;
        match self.chunks.back_mut() {
            Some(last) if last.mark == mark && last.bytes.len() + bytes.len() <= JOINED_CHUNK => {
                last.bytes.extend_from_slice(bytes);
            }
            _ => {
                let start = self.end - bytes.len() as u64;
                self.chunks.push_back(Chunk { start, mark, bytes: bytes.to_vec() });
                self.retained += RUN;
            }
        }
    }

    /// Fills the gaps among pending runs; overlaps are compared.
    fn insert_pending(&mut self, start: u64, bytes: &[u8]) -> Option<u64> {
        let stop = start + bytes.len() as u64;
        let mut conflict = None;
        let mut gaps = Vec::new();
        let mut at = start;
        let first = self
            .pending
            .range(..=start)
            .next_back()
            .filter(|(run, held)| *run + held.len() as u64 > start)
            .map_or(start, |(run, _)| *run);
        for (&run, held) in self.pending.range(first..stop) {
            if run > at {
                gaps.push(at..run);
            }
            let overlap = run.max(start)..stop.min(run + held.len() as u64);
            let (new, old) = (slice(bytes, start, &overlap), slice(held, run, &overlap));
            if let Some(index) = new.iter().zip(old).position(|(new, old)| new != old) {
                conflict = conflict.or(Some(overlap.start + index as u64));
            }
            at = at.max(overlap.end);
        }
        if at < stop {
            gaps.push(at..stop);
        }
        for gap in gaps {
            let new = slice(bytes, start, &gap);
            self.latest = gap.start;
            let before = self.retained;
            self.retained += new.len();
            match self.pending.range_mut(..gap.start).next_back() {
                Some((run, held)) if *run + held.len() as u64 == gap.start && held.len() < JOINED_RUN => {
                    held.extend_from_slice(new);
                }
                _ => {
                    self.retained += RUN;
                    self.pending.insert(gap.start, ByteBuf::from(new));
                }
            }
            self.beyond += self.retained - before;
        }
        conflict
    }

    /// The ranges that arrived beyond gaps, in the order of a SACK report: first the range with the latest bytes (RFC
    /// 2018 §4), then the others from the lowest on.
    pub(crate) fn islands(&self) -> impl Iterator<Item = Range<u64>> {
        let mut islands: Vec<Range<u64>> = Vec::new();
        let latest = self.pending.range(..=self.latest).next_back();
        for (run, held) in self.pending.iter().take(REPORTED_RUNS).chain(latest) {
            let end = run + held.len() as u64;
            match islands.last_mut() {
                Some(last) if last.end >= *run => last.end = last.end.max(end),
                _ => islands.push(*run..end),
            }
        }
        if let Some(at) = islands.iter().position(|island| island.contains(&self.latest)) {
            islands[..=at].rotate_right(1);
        }
        islands.into_iter()
    }

    /// Moves pending runs that touch the contiguous part over to it.
    fn close_up(&mut self, mark: u64) {
        while let Some(entry) = self.pending.first_entry().filter(|entry| *entry.key() == self.end) {
            let bytes = entry.remove();
            self.retained -= bytes.len() + RUN;
            self.beyond -= bytes.len() + RUN;
            self.append(&bytes, mark);
        }
    }

    fn first_difference(&self, range: Range<u64>, bytes: &[u8]) -> Option<u64> {
        let mut at = range.start;
        for held in self.slices(range.clone()) {
            let offset = (at - range.start) as usize;
            let theirs = &bytes[offset..offset + held.len()];
            if held != theirs {
                let index = held.iter().zip(theirs).position(|(a, b)| a != b)?;
                return Some(at + index as u64);
            }
            at += held.len() as u64;
        }
        None
    }

    /// The retained, contiguous bytes of `range`, in pieces. Parts of `range` outside `base()..end()` are left out.
    pub(crate) fn slices(&self, range: Range<u64>) -> impl Iterator<Item = &[u8]> + '_ {
        let first = self.index_of(range.start);
        self.chunks
            .range(first.min(self.chunks.len())..)
            .take_while({
                let end = range.end;
                move |chunk| chunk.start < end
            })
            .map(move |chunk| {
                let part = range.start.max(chunk.start)..range.end.min(chunk.end());
                slice(&chunk.bytes, chunk.start, &part)
            })
            .filter(|piece| !piece.is_empty())
    }

    /// Copies `range` (as in [`Stream::slices`]).
    pub(crate) fn copy(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity((range.end.saturating_sub(range.start)) as usize);
        for piece in self.slices(range) {
            bytes.extend_from_slice(piece);
        }
        bytes
    }

    /// The mark of the byte at `position`, and the end of a run of bytes with that mark.
    pub(crate) fn mark_at(&self, position: u64) -> Option<(u64, u64)> {
        let chunk = self.chunks.get(self.index_of(position))?;
        (position >= chunk.start && position < chunk.end()).then(|| (chunk.mark, chunk.end()))
    }

    fn index_of(&self, position: u64) -> usize {
        self.chunks.partition_point(|chunk| chunk.end() <= position)
    }

    /// Forgets bytes before `position`. It drops whole chunks only, so a few more may stay.
    pub(crate) fn release(&mut self, position: u64) {
        while self.chunks.front().is_some_and(|chunk| chunk.end() <= position) {
            if let Some(chunk) = self.chunks.pop_front() {
                self.retained -= chunk.bytes.len() + RUN;
            }
        }
        // An idle conversation keeps no allocation here.
        if self.chunks.is_empty() && self.chunks.capacity() > 0 {
            self.chunks = VecDeque::new();
        }
    }
}

/// The part `range` of `bytes`, whose first byte has position `start`.
fn slice<'a>(bytes: &'a [u8], start: u64, range: &Range<u64>) -> &'a [u8] {
    bytes
        .get((range.start.saturating_sub(start)) as usize..(range.end.saturating_sub(start)) as usize)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 1 << 20;

    #[test]
    fn gaps_close_and_the_first_copy_wins() {
        let mut stream = Stream::new(1);
        assert!(!stream.insert(4, b"def", 0, LIMIT).grew);
        assert!(!stream.insert(8, b"h", 0, LIMIT).grew);
        let inserted = stream.insert(1, b"abcX", 0, LIMIT);
        assert_eq!((inserted.conflict, inserted.grew), (Some(4), true));
        assert_eq!(stream.end(), 7);
        stream.insert(5, b"efgh!", 0, LIMIT);
        assert_eq!(stream.copy(1..10), b"abcdefgh!");
        assert_eq!(stream.retained(), 9 + RUN);
        assert_eq!(stream.insert(2, b"bXd", 0, LIMIT).conflict, Some(3));
    }

    #[test]
    fn what_is_held_is_known_and_only_what_is_not_can_be_skipped() {
        let mut stream = Stream::new(1);
        assert!(stream.skip(2));
        stream.insert(3, b"cd", 0, LIMIT);
        stream.insert(5, b"ef", 1, LIMIT);
        assert!(stream.says(3, b"cdef") && stream.says(4, b"de") && stream.says(7, b""));
        assert!(!stream.says(4, b"dX") && !stream.says(6, b"fg") && !stream.says(2, b"bc"));
        assert!(!stream.says(u64::MAX, b"c"));
        assert!(!stream.skip(1));
        stream.release(7);
        assert!(stream.skip(1));
        stream.insert(9, b"i", 0, LIMIT);
        assert!(!stream.skip(1), "there is something beyond a gap");
        assert_eq!(stream.end(), 8);
    }

    #[test]
    fn marks_stay_apart_and_release_is_by_chunk() {
        let mut stream = Stream::new(1);
        stream.insert(1, b"ab", 5, LIMIT);
        stream.insert(3, b"cd", 6, LIMIT);
        assert_eq!(stream.mark_at(2), Some((5, 3)));
        assert_eq!(stream.mark_at(3), Some((6, 5)));
        assert_eq!(stream.mark_at(5), None);
        stream.release(2);
        assert_eq!(stream.base(), 1);
        stream.release(3);
        assert_eq!((stream.base(), stream.retained()), (3, 2 + RUN));
        assert_eq!(stream.insert(1, b"XX", 0, LIMIT).conflict, None);
    }

    #[test]
    fn a_later_copy_is_restored_to_the_first() {
        let mut stream = Stream::new(1);
        stream.insert(1, b"ab", 5, LIMIT);
        stream.insert(3, b"cd", 6, LIMIT);
        stream.insert(7, b"gh", 6, LIMIT);
        for (position, restored) in [(0, &b"?abcd??gh?"[..]), (2, b"bc"), (8, b"h?"), (5, b"??"), (20, b"?")]
        {
            let mut copy = vec![b'?'; restored.len()];
            stream.restore(position, &mut copy);
            assert_eq!(copy, restored, "{position}");
        }
    }

    #[test]
    fn what_is_beyond_gaps_is_reported_latest_first() {
        let mut stream = Stream::new(0);
        for start in [10, 30, 20, 12, 32] {
            stream.insert(start, b"xy", 0, LIMIT);
        }
        assert_eq!(stream.islands().collect::<Vec<_>>(), [30..34, 10..14, 20..22]);
        for start in (40..1_000).step_by(4) {
            stream.insert(start, b"xy", 0, LIMIT);
        }
        assert_eq!(stream.islands().next(), Some(996..998));
        assert_eq!(stream.islands().nth(1), Some(10..14));
        stream.insert(0, &[0; 40], 0, LIMIT);
        assert_eq!(stream.islands().next(), Some(44..46));
    }

    #[test]
    fn the_limit_refuses_whole_segments() {
        let mut stream = Stream::new(0);
        assert!(!stream.insert(0, b"abc", 0, 2 * RUN + 4).refused);
        assert!(stream.insert(3, b"de", 0, 2 * RUN + 4).refused);
        assert_eq!(stream.end(), 3);
    }

    #[test]
    fn tiny_runs_can_not_take_more_memory_than_the_limit() {
        let limit = 64 << 10;
        let mut stream = Stream::new(0);
        for position in (2..200_000).step_by(2) {
            stream.insert(position, b"x", 0, limit);
        }
        assert!(stream.retained() <= limit);
        assert!(stream.pending.len() * RUN <= limit, "{} runs", stream.pending.len());
        assert_eq!(stream.beyond(), stream.retained());
        stream.insert(0, b"ab", 0, 2 * limit);
        stream.insert(3, b"d", 0, 2 * limit);
        stream.release(stream.end());
        assert_eq!(stream.retained(), stream.pending.len() * (1 + RUN));
        assert_eq!(stream.beyond(), stream.retained());
    }
}
