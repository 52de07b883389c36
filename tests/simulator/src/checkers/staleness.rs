//! Rule 11, for replicas: whatever clients send, no replica becomes stale or is evicted unless a fault of the run struck it.

use std::collections::BTreeSet;

use understudy_protocol::{EventKind, ServerId};

use super::Checker;
use crate::observer::{Observer, Seen};

#[derive(Default)]
pub(crate) struct Staleness {
    blemished: BTreeSet<ServerId>,
}

impl Checker for Staleness {
    fn rule(&self) -> &'static str {
        "no replica goes stale by a client"
    }

    fn see(&mut self, _: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Blemish(server) => {
                self.blemished.insert(*server);
            }
            Seen::Event(EventKind::Stale { server, reason } | EventKind::Evicted { server, reason })
                if !self.blemished.contains(server) =>
            {
                return Err(format!("{server:?} is stale ({reason:?}), but nothing is wrong with it"));
            }
            _ => {}
        }
        Ok(())
    }
}
