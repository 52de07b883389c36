//! Rule 11, for replicas: whatever clients send, no replica becomes stale or is evicted unless a fault of the run struck it.

use std::collections::BTreeSet;

use understudy_protocol::{EventKind, ServerId, StaleReason};

use super::Checker;
use crate::observer::{Observer, Seen};

#[derive(Default)]
pub(crate) struct Staleness {
    blemished: BTreeSet<ServerId>,
    killed: BTreeSet<ServerId>,
    ovm: Option<ServerId>,
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
            Seen::Killed(server) => {
                self.killed.insert(*server);
            }
            Seen::Event(EventKind::CutOver { to, .. }) => self.ovm = Some(*to),
            // The kernel of a killed service refuses what replicas took.
            Seen::Event(EventKind::Stale { reason: StaleReason::TookMore, .. })
                if self.ovm.is_some_and(|ovm| self.killed.contains(&ovm)) => {}
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
