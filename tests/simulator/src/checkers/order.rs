//! Rule 3, cause before effect: client bytes that dom0 got after it had sent an answer are handed
//! to a server only when that server itself has said as much.

use std::collections::BTreeSet;

use understudy_protocol::{EventKind, ServerId};

use super::{Checker, Licence};
use crate::hostile::is_hostile;
use crate::observer::{Observer, Seen};

pub(crate) struct CauseBeforeEffect {
    lag_limit_us: u64,
    /// Servers that left the queue or became stale: the order does not apply to them.
    excused: BTreeSet<ServerId>,
}

impl CauseBeforeEffect {
    pub(crate) fn new(licence: &Licence) -> Self {
        Self { lag_limit_us: licence.lag_limit_us, excused: BTreeSet::new() }
    }
}

impl Checker for CauseBeforeEffect {
    fn rule(&self) -> &'static str {
        "cause before effect"
    }

    fn see(&mut self, observer: &Observer, at: u64, seen: &Seen<'_>) -> Result<(), String> {
        match seen {
            Seen::Event(
                EventKind::Stale { server, .. }
                | EventKind::Evicted { server, .. }
                | EventKind::Detached { server },
            ) => {
                self.excused.insert(*server);
                Ok(())
            }
            Seen::Event(EventKind::Attached { server, seeded }) => {
                if !seeded {
                    self.excused.insert(*server);
                }
                Ok(())
            }
            Seen::Event(EventKind::Seeded { server }) => {
                self.excused.remove(server);
                Ok(())
            }
            Seen::ToServer(server, segment)
                if !segment.payload.is_empty()
                    && !self.excused.contains(server)
                    && !observer.liars.contains(server) =>
            {
                self.handed(observer, at, *server, segment)
            }
            _ => Ok(()),
        }
    }
}

impl CauseBeforeEffect {
    fn handed(
        &self,
        observer: &Observer,
        at: u64,
        server: ServerId,
        segment: &crate::segment::Segment<'_>,
    ) -> Result<(), String> {
        let Some(conversation) = observer.conversation_of(segment.src, segment.dst) else {
            return Ok(());
        };
        if observer.is_refused(conversation, server) {
            return Ok(());
        }
        let start = conversation.client_position(segment.seq).max(0) as u64;
        let end = start + segment.payload.len() as u64;
        let handed = conversation.legs.get(&server).map_or(0, |leg| leg.handed);
        let attached = observer.attached.get(&server).copied().unwrap_or(0);
        // Bytes handed before were judged then; of the new ones, the latest to arrive decides.
        let latest =
            conversation.arrivals.iter().filter(|a| a.0 < end && a.1 > start.max(handed)).max_by_key(|a| a.2);
        let Some(&(_, _, order, arrived)) = latest else {
            return Ok(());
        };
        if at.saturating_sub(arrived) > self.lag_limit_us {
            return Ok(());
        }
        for other in &observer.conversations {
            let needed = other.sent_before(order);
            let hostile = is_hostile(other.client.ip());
            let over = other.client_reset || other.reset_to_client;
            if needed == 0 || other.began < attached || over || hostile {
                continue;
            }
            let leg = other.legs.get(&server);
            let produced = leg.map_or(0, |leg| leg.produced.contiguous());
            if produced >= needed || leg.is_some_and(|leg| leg.reset) || other.diverged(server) {
                continue;
            }
            return Err(format!(
                "{server:?} is handed bytes {start}..{end} of {}, which came after {} had been answered up to {needed}; there {server:?} is at {produced} ({segment})",
                segment.src, other.client
            ));
        }
        Ok(())
    }
}
