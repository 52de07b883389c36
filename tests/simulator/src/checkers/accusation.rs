//! Rule 11, a client is no witness: only a server that a fault of the run struck is suspected.

use std::collections::BTreeSet;

use understudy_protocol::{EventKind, Evidence, ServerId};

use super::Checker;
use crate::observer::{Observer, Seen};

#[derive(Default)]
pub(crate) struct Accusation {
    blemished: BTreeSet<ServerId>,
}

impl Checker for Accusation {
    fn rule(&self) -> &'static str {
        "no false accusation"
    }

    fn see(&mut self, observer: &Observer, _: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Blemish(server) => {
                self.blemished.insert(*server);
            }
            Seen::Event(EventKind::Suspected { server, evidence })
                if *evidence != Evidence::Operator && !self.blemished.contains(server) =>
            {
                // A lying replica's segments may look like an answer that the OVM does not begin, or like a conversation
                // that continues.
                let by_witnesses = matches!(evidence, Evidence::NoProgress | Evidence::UnsharedClose);
                if by_witnesses && !observer.liars.is_empty() {
                    return Ok(());
                }
                return Err(format!("{server:?} is suspected of {evidence:?}, but nothing is wrong with it"));
            }
            _ => {}
        }
        Ok(())
    }
}
