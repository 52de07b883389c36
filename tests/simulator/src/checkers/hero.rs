//! Rule 5, no stale hero: an unasked promotion goes to a server that has missed nothing, as far as
//! the engine itself has said.

use std::collections::BTreeMap;

use understudy_protocol::{EventKind, Evidence, ServerId};

use super::Checker;
use crate::observer::{Observer, Seen};

#[derive(Default)]
pub(crate) struct StaleHero {
    /// Why each server may not be promoted unasked.
    barred: BTreeMap<ServerId, String>,
}

impl Checker for StaleHero {
    fn rule(&self) -> &'static str {
        "no stale hero"
    }

    fn see(&mut self, _: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Event(EventKind::Attached { server, seeded }) if !seeded => {
                self.barred.insert(*server, "attached unseeded".into());
            }
            Seen::Event(EventKind::Seeded { server } | EventKind::Recovered { server }) => {
                self.barred.remove(server);
            }
            Seen::Event(EventKind::Stale { server, reason }) => {
                self.barred.insert(*server, format!("stale: {reason:?}"));
            }
            Seen::Event(EventKind::Evicted { server, reason }) => {
                self.barred.insert(*server, format!("evicted: {reason:?}"));
            }
            Seen::Event(EventKind::Detached { server }) => {
                self.barred.insert(*server, "detached".into());
            }
            Seen::Event(EventKind::Suspected { server, evidence }) => {
                self.barred.insert(*server, format!("deposed: {evidence:?}"));
            }
            Seen::Event(EventKind::NoCandidate { server: Some(server), .. }) => {
                // It stays the OVM, whose state counts.
                self.barred.remove(server);
            }
            Seen::Event(EventKind::CutOver { to, evidence, .. }) => {
                if let Some(why) = self.barred.remove(to)
                    && *evidence != Some(Evidence::Operator)
                {
                    return Err(format!("{to:?} is promoted although {why}"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
