//! Comparison of answers, by position, with ranges that may differ.

use crate::config::Mask;
use crate::tcp::stream::Stream;

/// Bytes before a compared position that must stay retained so that a mask's prefix can be found:
/// the longest prefix and the longest range.
pub(crate) const LOOKBACK: u64 = 64 + 256;

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compared {
    /// Equal (or masked) up to this position.
    Equal(u64),
    /// Different at this position.
    Diverged(u64),
}

/// Compares `theirs` with what the client was `sent`, from `from` up to the end of the shorter.
///
/// A difference counts as masked when `sent` has a mask's prefix right before a range that contains
/// it. Looking only at differences makes masks free for answers that agree.
pub(crate) fn compare(masks: &[Mask], sent: &Stream, theirs: &Stream, from: u64) -> Compared {
    let to = sent.end().min(theirs.end());
    let mut at = from;
    while at < to {
        let Some(difference) = first_difference(sent, theirs, at, to) else {
            return Compared::Equal(to.max(from));
        };
        match masks.iter().find_map(|mask| masked_until(mask, sent, difference)) {
            Some(end) => at = end,
            None => return Compared::Diverged(difference),
        }
    }
    Compared::Equal(to.max(from))
}

fn first_difference(sent: &Stream, theirs: &Stream, from: u64, to: u64) -> Option<u64> {
    let mut ours = sent.slices(from..to);
    let mut other = theirs.slices(from..to);
    let (mut a, mut b): (&[u8], &[u8]) = (&[], &[]);
    let mut at = from;
    while at < to {
        if a.is_empty() {
            a = ours.next()?;
        }
        if b.is_empty() {
            b = other.next()?;
        }
        let length = a.len().min(b.len());
        if a[..length] != b[..length] {
            let index = a.iter().zip(b).position(|(a, b)| a != b)?;
            return Some(at + index as u64);
        }
        at += length as u64;
        (a, b) = (&a[length..], &b[length..]);
    }
    None
}

/// If `position` lies in a masked range of `sent`, the range's end.
fn masked_until(mask: &Mask, sent: &Stream, position: u64) -> Option<u64> {
    let (prefix, length) = (mask.prefix.len() as u64, u64::from(mask.length));
    let start = position.saturating_sub(prefix + length - 1).max(sent.base());
    let window = sent.copy(start..position);
    // The latest occurrence that still covers `position`.
    let occurrence = window.windows(mask.prefix.len()).rposition(|bytes| bytes == mask.prefix)?;
    let range = start + occurrence as u64 + prefix;
    (position < range + length).then_some(range + length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(bytes: &[u8]) -> Stream {
        let mut stream = Stream::new(1);
        stream.insert(1, bytes, 0, 1 << 20);
        stream
    }

    #[test]
    fn a_different_date_is_harmless_and_a_different_body_is_not() {
        let masks = [Mask::http_date()];
        let sent = stream(b"HTTP/1.1 200 OK\r\nDate: Mon, 23 Nov 2026 10:00:00 GMT\r\n\r\nbody");
        let same = stream(b"HTTP/1.1 200 OK\r\nDate: Tue, 24 Nov 2026 11:00:01 GMT\r\n\r\nbody");
        let other = stream(b"HTTP/1.1 200 OK\r\nDate: Tue, 24 Nov 2026 11:00:01 GMT\r\n\r\nbXdy");
        assert_eq!(compare(&masks, &sent, &same, 1), Compared::Equal(sent.end()));
        assert_eq!(compare(&masks, &sent, &other, 1), Compared::Diverged(sent.end() - 3));
        assert_eq!(compare(&[], &sent, &same, 1), Compared::Diverged(24));
    }

    #[test]
    fn the_shorter_answer_limits_the_comparison() {
        assert_eq!(compare(&[], &stream(b"abc"), &stream(b"abcdef"), 1), Compared::Equal(4));
        assert_eq!(compare(&[], &stream(b"abc"), &stream(b"ab"), 1), Compared::Equal(3));
    }
}
