//! Follows the engine's outputs: fences a deposed OVM, and notes where the engine put each server.

use understudy_api::config::Fence;
use understudy_protocol::{EventKind, Evidence, ServerId, StaleReason};

use super::{Doomed, Place, Service, Surroundings};
use crate::domain::DomainId;
use crate::host::fencing::Job;

impl Service {
    /// Fences a deposed OVM as the operator configured it.
    pub(super) fn fence(&mut self, id: ServerId, around: &mut Surroundings<'_>) {
        let by = self.config.fence;
        let Some(server) = self.servers.get_mut(&id) else {
            return;
        };
        server.doomed = None;
        let evidence = server.accused.take().unwrap_or(Evidence::Operator);
        server.fenced = by == Fence::Pause;
        server.place = Place::Left(format!(
            "deposed, and fenced ({}); repair it, resume it if it is paused, bring its state up to date, then attach it",
            by.name()
        ));
        let life = server.life();
        self.rules_changed = true;
        if by == Fence::Isolate {
            self.isolating.push((id, None));
            return;
        }
        around.doomed.push(Doomed { domain: life, evidence });
        self.fence_domain(id, life, around);
    }

    pub(super) fn fence_domain(&self, id: ServerId, domain: DomainId, around: &Surroundings<'_>) {
        let job = Job::Fence { service: self.index, server: id, domain, by: self.config.fence };
        if around.jobs.send(job).is_err() {
            tracing::error!(
                service = self.name(),
                "the fencing thread has ended; only the data path keeps the deposed OVM silent"
            );
        }
    }

    /// What an event of the engine means for a server's place.
    pub(super) fn note(&mut self, kind: &EventKind) {
        self.equals_changed |= matches!(
            kind,
            EventKind::Attached { .. }
                | EventKind::Seeded { .. }
                | EventKind::Stale { .. }
                | EventKind::Evicted { .. }
                | EventKind::Detached { .. }
                | EventKind::CutOver { .. }
        );
        let (id, reason) = match kind {
            EventKind::Released { reason } => return self.copying_ended(*reason),
            EventKind::Evicted { server, reason } => (
                *server,
                format!("evicted ({}); bring its state up to date, then attach it", stale_text(*reason)),
            ),
            EventKind::Detached { server } => {
                // An operator's doing is noted where the operator's command is carried out.
                (*server, "left the queue; attach it to have it back".to_owned())
            }
            EventKind::Suspected { server, evidence } => {
                return self.server_mut(*server, |server| server.accused = Some(*evidence));
            }
            EventKind::NoCandidate { server: Some(server), .. } | EventKind::Recovered { server } => {
                return self.server_mut(*server, |server| server.accused = None);
            }
            _ => return,
        };
        self.rules_changed = true;
        if self.is_queued(id) {
            self.server_mut(id, |server| server.place = Place::Left(reason));
        }
    }
}

fn stale_text(reason: StaleReason) -> &'static str {
    match reason {
        StaleReason::NotSeeded => "never seeded",
        StaleReason::MissedBytes => "missed bytes",
        StaleReason::UncoveredConversation => "a conversation could not be replicated to it",
        StaleReason::TookMore => "took what the OVM refused",
        StaleReason::Deposed => "deposed, and did not catch up",
        StaleReason::Lagged => "fell behind",
    }
}
