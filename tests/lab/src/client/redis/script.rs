//! What one Redis connection asks, and what one server would answer: predicted byte for byte.
//!
//! Each connection owns its keys, so its answers depend on nothing but its own earlier requests.
//! The answers are computed with a small model of the commands used; the model that follows the
//! acknowledged requests only is what a surviving server must hold.

use std::collections::BTreeMap;

use crate::client::random::Random;

/// Slots for plain values and for records, per connection: few, so that deletes and changes hit.
const SLOTS: u64 = 8;
/// The APPEND log starts anew at this length, so that a long run's verification stays small.
const LOG_LIMIT: usize = 16 << 10;

/// One command on the connection's own keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Set {
        slot: u64,
        value: String,
    },
    Get {
        slot: u64,
    },
    Del {
        slot: u64,
    },
    Incr,
    Append {
        token: String,
    },
    ClearLog,
    Push {
        item: String,
    },
    /// Insert or change a field of a record.
    Record {
        slot: u64,
        field: u64,
        value: String,
    },
    /// Delete a record.
    Forget {
        slot: u64,
    },
    Transaction(Vec<Op>),
}

impl Op {
    /// Commands that change something, transactions counted by their parts.
    pub(crate) fn writes(&self) -> u64 {
        match self {
            Op::Get { .. } => 0,
            Op::Transaction(ops) => ops.iter().map(Op::writes).sum(),
            _ => 1,
        }
    }

    /// The command as RESP arrays, appended to `out`.
    pub(crate) fn encode(&self, prefix: &str, out: &mut Vec<u8>) {
        let key = |name: &str| format!("{prefix}:{name}");
        match self {
            Op::Set { slot, value } => command(out, &["SET", &key(&format!("v{slot}")), value]),
            Op::Get { slot } => command(out, &["GET", &key(&format!("v{slot}"))]),
            Op::Del { slot } => command(out, &["DEL", &key(&format!("v{slot}"))]),
            Op::Incr => command(out, &["INCR", &key("n")]),
            Op::Append { token } => command(out, &["APPEND", &key("log"), token]),
            Op::ClearLog => command(out, &["DEL", &key("log")]),
            Op::Push { item } => command(out, &["RPUSH", &key("list"), item]),
            Op::Record { slot, field, value } => {
                command(out, &["HSET", &key(&format!("r{slot}")), &format!("f{field}"), value])
            }
            Op::Forget { slot } => command(out, &["DEL", &key(&format!("r{slot}"))]),
            Op::Transaction(ops) => {
                command(out, &["MULTI"]);
                for op in ops {
                    op.encode(prefix, out);
                }
                command(out, &["EXEC"]);
            }
        }
    }
}

/// What a server holds of one connection's keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Model {
    pub(crate) values: BTreeMap<u64, String>,
    pub(crate) counter: i64,
    pub(crate) log: String,
    pub(crate) list: Vec<String>,
    pub(crate) records: BTreeMap<u64, BTreeMap<u64, String>>,
}

impl Model {
    /// Changes the model as the command changes a server, and appends the server's answer to `out`.
    pub(crate) fn apply(&mut self, op: &Op, out: &mut Vec<u8>) {
        match op {
            Op::Set { slot, value } => {
                self.values.insert(*slot, value.clone());
                out.extend_from_slice(b"+OK\r\n");
            }
            Op::Get { slot } => match self.values.get(slot) {
                Some(value) => bulk(out, value),
                None => out.extend_from_slice(b"$-1\r\n"),
            },
            Op::Del { slot } => integer(out, i64::from(self.values.remove(slot).is_some())),
            Op::Incr => {
                self.counter += 1;
                integer(out, self.counter);
            }
            Op::Append { token } => {
                self.log.push_str(token);
                integer(out, self.log.len() as i64);
            }
            Op::ClearLog => {
                integer(out, i64::from(!self.log.is_empty()));
                self.log.clear();
            }
            Op::Push { item } => {
                self.list.push(item.clone());
                integer(out, self.list.len() as i64);
            }
            Op::Record { slot, field, value } => {
                let record = self.records.entry(*slot).or_default();
                integer(out, i64::from(record.insert(*field, value.clone()).is_none()));
            }
            Op::Forget { slot } => integer(out, i64::from(self.records.remove(slot).is_some())),
            Op::Transaction(ops) => {
                out.extend_from_slice(b"+OK\r\n");
                for _ in ops {
                    out.extend_from_slice(b"+QUEUED\r\n");
                }
                out.extend_from_slice(format!("*{}\r\n", ops.len()).as_bytes());
                for op in ops {
                    self.apply(op, out);
                }
            }
        }
    }
}

/// The sequence of requests of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    random: Random,
    sequence: u64,
    log_bytes: usize,
}

impl Script {
    pub(crate) fn new(seed: u64) -> Self {
        Self { random: Random::new(seed), sequence: 0, log_bytes: 0 }
    }

    /// The next request: insertions, changes and deletions, singly and as transactions, each marked
    /// with the request's number.
    pub(crate) fn next(&mut self) -> Op {
        self.sequence += 1;
        if self.random.below(8) == 0 {
            let parts = 2 + self.random.below(3);
            Op::Transaction((0..parts).map(|_| self.single()).collect())
        } else {
            self.single()
        }
    }

    fn single(&mut self) -> Op {
        let n = self.sequence;
        let slot = self.random.below(SLOTS);
        match self.random.below(16) {
            0..=3 => Op::Set { slot, value: self.value() },
            4 | 5 => Op::Get { slot },
            6 => Op::Del { slot },
            7 | 8 => Op::Incr,
            9 | 10 if self.log_bytes > LOG_LIMIT => {
                self.log_bytes = 0;
                Op::ClearLog
            }
            9 | 10 => {
                let token = format!("<{n}>");
                self.log_bytes += token.len();
                Op::Append { token }
            }
            11 | 12 => Op::Push { item: n.to_string() },
            13 | 14 => Op::Record { slot, field: self.random.below(4), value: self.value() },
            _ => Op::Forget { slot },
        }
    }

    /// Mostly short values, now and then one that needs several segments.
    fn value(&mut self) -> String {
        let length = match self.random.below(32) {
            0 => 4_000 + self.random.below(4_000),
            _ => 8 + self.random.below(200),
        };
        let letter = char::from(b'a' + (self.random.below(26) as u8));
        let mut value = format!("{}-", self.sequence);
        value.extend(std::iter::repeat_n(letter, length as usize));
        value
    }
}

/// One command as a RESP array of bulk strings.
pub(crate) fn command(out: &mut Vec<u8>, words: &[&str]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        bulk(out, word);
    }
}

fn bulk(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(format!("${}\r\n", text.len()).as_bytes());
    out.extend_from_slice(text.as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn integer(out: &mut Vec<u8>, value: i64) {
    out.extend_from_slice(format!(":{value}\r\n").as_bytes());
}
