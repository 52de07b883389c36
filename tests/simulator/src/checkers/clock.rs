//! Rule 2, for timestamps (RFC 7323): a client's peer clock never runs backwards over a promotion, and no
//! host is echoed a timestamp that it never sent.

use std::collections::BTreeMap;

use super::{Checker, Licence};
use crate::observer::{Observer, Seen};

#[derive(Default)]
struct Latest {
    /// Highest TSval sent, and highest of the epochs before `epoch`.
    tsval: u32,
    earlier: Option<u32>,
    epoch: u64,
}

pub(crate) struct Clock {
    in_order: bool,
    latest: BTreeMap<usize, Latest>,
}

impl Clock {
    pub(crate) fn new(licence: &Licence) -> Self {
        Self { in_order: licence.servers_in_order, latest: BTreeMap::new() }
    }
}

fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

impl Checker for Clock {
    fn rule(&self) -> &'static str {
        "timestamps"
    }

    fn see(&mut self, observer: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::ToClient(segment) => {
                let Some(index) = observer.index_of(segment.dst, segment.src) else {
                    return Ok(());
                };
                let Some((tsval, tsecr)) = segment.timestamps else {
                    return Ok(());
                };
                let conversation = &observer.conversations[index];
                if segment.ack.is_some() && !conversation.client_tsvals.contains(&tsecr) {
                    return Err(format!(
                        "{} is echoed timestamp {tsecr}, which it never sent ({segment})",
                        segment.dst
                    ));
                }
                if segment.rst {
                    return Ok(());
                }
                if segment.syn && conversation.reset_to_client {
                    // A client that still waits for a SYN-ACK knows no clock yet.
                    self.latest.remove(&index);
                }
                let latest = self.latest.entry(index).or_insert(Latest {
                    tsval,
                    earlier: None,
                    epoch: observer.epoch,
                });
                if latest.epoch != observer.epoch {
                    latest.epoch = observer.epoch;
                    latest.earlier = Some(latest.tsval);
                }
                let bound = if self.in_order { Some(latest.tsval) } else { latest.earlier };
                if let Some(bound) = bound
                    && before(tsval, bound)
                {
                    return Err(format!(
                        "{} is sent timestamp {tsval} after {bound} ({segment})",
                        segment.dst
                    ));
                }
                if before(latest.tsval, tsval) {
                    latest.tsval = tsval;
                }
                Ok(())
            }
            Seen::ToServer(server, segment) if !observer.liars.contains(server) => {
                let Some(conversation) = observer.conversation_of(segment.src, segment.dst) else {
                    return Ok(());
                };
                let (Some((_, tsecr)), Some(_), Some(leg)) =
                    (segment.timestamps, segment.ack, conversation.legs.get(server))
                else {
                    return Ok(());
                };
                let judged = leg.iss.is_some() && !segment.rst && !observer.is_refused(conversation, *server);
                if judged && !leg.tsvals.contains(&tsecr) {
                    return Err(format!(
                        "{server:?} is echoed timestamp {tsecr}, which it never sent to {} ({segment})",
                        segment.src
                    ));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
