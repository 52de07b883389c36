//! What happened, line by line: printed at once when asked to, else reduced to a digest by which two
//! runs of a seed can be compared.

use core::fmt::Write as _;
use std::io::Write as _;

use crate::prng::splitmix;
use crate::segment::Segment;

pub(crate) struct Trace {
    verbose: bool,
    digest: u64,
}

impl Trace {
    pub(crate) fn new(verbose: bool) -> Self {
        Self { verbose, digest: 0 }
    }

    pub(crate) fn digest(&self) -> u64 {
        self.digest
    }

    fn absorb(&mut self, at: u64, bytes: &[u8]) {
        let mut digest = splitmix(self.digest ^ at);
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            digest = splitmix(digest ^ u64::from_le_bytes(word));
        }
        self.digest = digest;
    }

    pub(crate) fn line(&mut self, at: u64, text: impl FnOnce() -> String) {
        let text = text();
        self.absorb(at, text.as_bytes());
        if self.verbose {
            self.print(at, &text);
        }
    }

    pub(crate) fn packet(&mut self, at: u64, direction: &str, packet: &[u8]) {
        self.absorb(at, packet);
        if self.verbose {
            let mut text = String::new();
            match Segment::parse(packet) {
                Ok(segment) => {
                    let _ = write!(text, "{segment}");
                }
                Err(why) => {
                    let _ = write!(text, "{} bytes: {why}", packet.len());
                }
            }
            self.print(at, &format!("{direction:<16} {text}"));
        }
    }

    fn print(&self, at: u64, text: &str) {
        let (s, us) = (at / 1_000_000, at % 1_000_000);
        // Whoever reads this may have read enough.
        let _ = writeln!(std::io::stdout(), "{s:>4}.{us:06} {text}");
    }
}
