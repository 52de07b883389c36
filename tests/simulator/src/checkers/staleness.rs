//! A client can't hurt: no replica that nothing was done to goes stale or is evicted, whatever clients send.

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
