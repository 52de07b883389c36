//! TCP options (RFC 9293 §3.2, RFC 7323, RFC 2018).

use core::ops::Range;

use serde::{Deserialize, Serialize};

const END: u8 = 0;
const NOP: u8 = 1;
pub(crate) const MSS: u8 = 2;
pub(crate) const WINDOW_SCALE: u8 = 3;
pub(crate) const SACK_PERMITTED: u8 = 4;
pub(crate) const SACK: u8 = 5;
pub(crate) const TIMESTAMPS: u8 = 8;
/// RFC 2385.
pub(crate) const MD5: u8 = 19;
/// RFC 5925.
pub(crate) const AO: u8 = 29;

/// Most SACK blocks that fit if there is no other option (RFC 2018 §3).
pub(crate) const MAX_SACK_BLOCKS: usize = 4;

/// Most bytes of options in a TCP header (RFC 9293 §3.1: a data offset of 15 words).
const MAX_LENGTH: usize = 40;

/// RFC 7323 §2.3: a larger shift counts as 14.
const MAX_WINDOW_SHIFT: u8 = 14;

/// SACK blocks as sequence numbers, left edge and right edge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SackBlocks {
    blocks: [(u32, u32); MAX_SACK_BLOCKS],
    len: u8,
}

impl SackBlocks {
    pub(crate) fn push(&mut self, left: u32, right: u32) {
        if let Some(block) = self.blocks.get_mut(usize::from(self.len)) {
            *block = (left, right);
            self.len += 1;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.blocks[..usize::from(self.len)].iter().copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same blocks, moved by `delta` in sequence space.
    pub(crate) fn moved(mut self, delta: u32) -> Self {
        for block in &mut self.blocks[..usize::from(self.len)] {
            *block = (block.0.wrapping_add(delta), block.1.wrapping_add(delta));
        }
        self
    }
}

/// The options that Understudy understands. It repeats no others (Fast Open, MPTCP, ...) in what it sends: a server
/// that never sees an option never relies on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Options {
    pub(crate) mss: Option<u16>,
    pub(crate) window_shift: Option<u8>,
    pub(crate) sack_permitted: bool,
    /// TSval, TSecr.
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) sack: SackBlocks,
    /// TCP-MD5 (RFC 2385) or TCP-AO (RFC 5925): the segment can't be rewritten.
    pub(crate) authenticated: bool,
}

impl Options {
    /// Reads all options; `None` if an option overruns the header or has an impossible length.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut options = Self::default();
        for option in each(bytes) {
            let option = option?;
            let value = &bytes[option.start + 2..option.end];
            match (bytes[option.start], value.len()) {
                (MSS, 2) => options.mss = Some(be16(value)),
                (WINDOW_SCALE, 1) => options.window_shift = Some(value[0].min(MAX_WINDOW_SHIFT)),
                (SACK_PERMITTED, 0) => options.sack_permitted = true,
                (SACK, len) if len % 8 == 0 => {
                    for block in value.chunks_exact(8) {
                        options.sack.push(be32(block), be32(&block[4..]));
                    }
                }
                (TIMESTAMPS, 8) => options.timestamps = Some((be32(value), be32(&value[4..]))),
                (MD5 | AO, _) => options.authenticated = true,
                (MSS | WINDOW_SCALE | SACK_PERMITTED | SACK | TIMESTAMPS, _) => return None,
                _ => {}
            }
        }
        Some(options)
    }

    /// Appends the options, padded to a multiple of four with NOPs in front (as Linux lays them out).
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        if let Some(mss) = self.mss {
            out.extend_from_slice(&[2, 4]);
            out.extend_from_slice(&mss.to_be_bytes());
        }
        if let Some((value, echo)) = self.timestamps {
            out.extend_from_slice(if self.sack_permitted { &[4, 2, 8, 10] } else { &[1, 1, 8, 10] });
            out.extend_from_slice(&value.to_be_bytes());
            out.extend_from_slice(&echo.to_be_bytes());
        } else if self.sack_permitted {
            out.extend_from_slice(&[1, 1, 4, 2]);
        }
        if let Some(shift) = self.window_shift {
            out.extend_from_slice(&[1, 3, 3, shift]);
        }
        if !self.sack.is_empty() {
            // With padding, the same options may need more room than in a hostile sender's layout.
            let room = MAX_LENGTH.saturating_sub(out.len() + 4) / 8;
            let blocks = room.min(usize::from(self.sack.len));
            if blocks == 0 {
                return;
            }
            out.extend_from_slice(&[1, 1, 5, 2 + 8 * blocks as u8]);
            for (left, right) in self.sack.iter().take(blocks) {
                out.extend_from_slice(&left.to_be_bytes());
                out.extend_from_slice(&right.to_be_bytes());
            }
        }
    }
}

/// The range of each option in `bytes`, except NOPs, up to the end of the list (RFC 9293 §3.2). `None` for an option
/// with an impossible length: nothing after it can be read.
pub(crate) fn each(bytes: &[u8]) -> impl Iterator<Item = Option<Range<usize>>> + '_ {
    let mut at = 0;
    core::iter::from_fn(move || {
        while bytes.get(at) == Some(&NOP) {
            at += 1;
        }
        let begins = at;
        bytes.get(begins).filter(|kind| **kind != END)?;
        let length = bytes.get(begins + 1).map_or(0, |length| usize::from(*length));
        at = if length < 2 { usize::MAX } else { begins + length };
        Some((at <= bytes.len()).then_some(begins..at))
    })
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_options_read_back() {
        let mut sack = SackBlocks::default();
        sack.push(1, 2);
        sack.push(u32::MAX, 5);
        let options = Options {
            mss: Some(1460),
            window_shift: Some(7),
            sack_permitted: true,
            timestamps: Some((1, 2)),
            sack,
            authenticated: false,
        };
        let mut bytes = Vec::new();
        options.write(&mut bytes);
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(Options::parse(&bytes), Some(options));
    }

    #[test]
    fn whatever_is_read_fits_when_written() {
        // MSS, timestamps and three SACK blocks: 40 bytes unpadded, 44 padded.
        let mut bytes = vec![2, 4, 5, 0xb4, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 5, 26];
        bytes.extend([7; 24]);
        let options = Options::parse(&bytes).unwrap();
        let mut written = Vec::new();
        options.write(&mut written);
        assert!(written.len() <= 40, "{}", written.len());
        assert_eq!(Options::parse(&written).unwrap().timestamps, Some((1, 2)));
    }

    #[test]
    fn impossible_lengths_are_refused() {
        for bytes in [&[2, 4, 5][..], &[8, 0], &[8, 1], &[5], &[3, 4, 1, 1], &[99, 200]] {
            assert_eq!(Options::parse(bytes), None, "{bytes:?}");
        }
        assert!(Options::parse(&[0, 2, 0]).is_some());
        assert!(Options::parse(&[1, 1, 34, 4, 1, 2]).is_some());
    }
}
