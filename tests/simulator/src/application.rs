//! The service that runs in every server: its answers are a function of a connection's request
//! bytes and of the state that requests shared between connections left, of nothing else.
//!
//! A request is an operation (one byte), a length (four bytes, big endian) and that many bytes.
//! Every answer carries a digest of all earlier requests of the connection (or of the key), so a
//! lost, doubled or reordered request shows in every later answer.

use crate::prng::splitmix;

/// Request operations.
pub(crate) mod op {
    /// Answers the payload itself.
    pub(crate) const ECHO: u8 = b'E';
    /// Appends the payload to the connection's log.
    pub(crate) const APPEND: u8 = b'A';
    /// Appends the payload (without its first byte) to the shared log that its first byte names.
    pub(crate) const SHARED: u8 = b'S';
    /// The payload is a length in four bytes: answers as many bytes.
    pub(crate) const GET: u8 = b'G';
    /// Takes the payload in as it comes and answers its digest.
    pub(crate) const PUT: u8 = b'P';
    /// Answers and closes.
    pub(crate) const QUIT: u8 = b'Q';
}

/// Keys of shared logs.
pub(crate) const KEYS: usize = 4;

/// Largest payload of an operation that is taken in whole.
const WHOLE_LIMIT: usize = 64 << 10;

/// Most bytes that are given at once.
const GET_LIMIT: usize = 1 << 20;

/// A log reduced to its length and digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Log {
    pub(crate) entries: u64,
    pub(crate) digest: u64,
}

impl Log {
    fn append(&mut self, bytes: &[u8]) {
        self.entries += 1;
        self.digest = digest(self.digest, bytes);
    }

    fn answer(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.entries.to_be_bytes());
        // No answer ends in a zero byte: see the disguise's false keepalives.
        out.extend_from_slice(&(self.digest | 1).to_be_bytes());
    }
}

/// A digest that can be continued at any byte boundary.
fn digest(mut digest: u64, bytes: &[u8]) -> u64 {
    for &b in bytes {
        digest = (digest ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
        digest ^= digest >> 29;
    }
    digest
}

/// State that all connections of a server share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shared {
    pub(crate) logs: [Log; KEYS],
}

#[derive(Clone, Debug)]
enum Reading {
    Header,
    Whole { op: u8, length: usize },
    Stream { remaining: usize, digest: u64 },
    Closed,
}

/// One connection's half-parsed input and log.
#[derive(Clone, Debug)]
pub(crate) struct Session {
    log: Log,
    buffer: Vec<u8>,
    reading: Reading,
}

impl Session {
    pub(crate) fn new() -> Self {
        Self { log: Log::default(), buffer: Vec::new(), reading: Reading::Header }
    }

    /// The service will say no more: what it has to send, then FIN.
    pub(crate) fn closed(&self) -> bool {
        matches!(self.reading, Reading::Closed)
    }

    /// The client's FIN: the service says what it counted and closes.
    pub(crate) fn end_of_input(&mut self, out: &mut Vec<u8>) {
        if !self.closed() {
            out.push(b'F');
            self.log.answer(out);
            self.reading = Reading::Closed;
        }
    }

    pub(crate) fn input(&mut self, mut bytes: &[u8], shared: &mut Shared, out: &mut Vec<u8>) {
        loop {
            match self.reading {
                Reading::Closed => return,
                Reading::Header => {
                    if !self.fill(&mut bytes, 5) {
                        return;
                    }
                    let op = self.buffer[0];
                    let length =
                        u32::from_be_bytes([self.buffer[1], self.buffer[2], self.buffer[3], self.buffer[4]])
                            as usize;
                    self.buffer.clear();
                    self.log.append(&[op]);
                    self.reading = if op == op::PUT {
                        Reading::Stream { remaining: length, digest: 0 }
                    } else if length <= WHOLE_LIMIT {
                        Reading::Whole { op, length }
                    } else {
                        Reading::Closed
                    };
                }
                Reading::Stream { remaining, digest: sum } => {
                    let take = remaining.min(bytes.len());
                    let sum = digest(sum, &bytes[..take]);
                    bytes = &bytes[take..];
                    if take < remaining {
                        self.reading = Reading::Stream { remaining: remaining - take, digest: sum };
                        return;
                    }
                    self.log.append(&sum.to_be_bytes());
                    out.push(op::PUT);
                    self.log.answer(out);
                    self.reading = Reading::Header;
                }
                Reading::Whole { op, length } => {
                    if !self.fill(&mut bytes, length) {
                        return;
                    }
                    let payload = core::mem::take(&mut self.buffer);
                    self.reading = Reading::Header;
                    self.execute(op, &payload, shared, out);
                }
            }
        }
    }

    /// Moves input to the buffer until that holds `length` bytes; false if input runs out before.
    fn fill(&mut self, bytes: &mut &[u8], length: usize) -> bool {
        let take = (length - self.buffer.len()).min(bytes.len());
        self.buffer.extend_from_slice(&bytes[..take]);
        *bytes = &bytes[take..];
        self.buffer.len() == length
    }

    fn execute(&mut self, op: u8, payload: &[u8], shared: &mut Shared, out: &mut Vec<u8>) {
        out.push(op);
        match op {
            op::ECHO => out.extend_from_slice(payload),
            op::SHARED => {
                let key = usize::from(payload.first().copied().unwrap_or(0)) % KEYS;
                shared.logs[key].append(payload.get(1..).unwrap_or(&[]));
                shared.logs[key].answer(out);
            }
            op::GET => {
                let length =
                    payload.first_chunk().map_or(0, |n| u32::from_be_bytes(*n) as usize).min(GET_LIMIT);
                let start = out.len();
                let mut word = self.log.digest;
                while out.len() < start + length {
                    word = splitmix(word);
                    out.extend_from_slice(&word.to_be_bytes());
                }
                out.truncate(start + length);
                if let Some(last) = out.last_mut() {
                    *last |= 1;
                }
            }
            op::QUIT => {
                self.log.answer(out);
                self.reading = Reading::Closed;
            }
            _ => {
                self.log.append(payload);
                self.log.answer(out);
            }
        }
    }
}

/// The bytes of one request.
pub(crate) fn request(op: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(5 + payload.len());
    bytes.push(op);
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}
