//! Reports events: to the stream that `understudy events` follows, and to the log.

mod event;

use std::collections::BTreeMap;
use std::sync::Arc;

use understudy_protocol::{EventKind, Instant, ServerId};

pub(crate) use self::event::{DaemonEvent, EVENTS_KEPT, Events, Happening, TimedEvent};
use crate::clock;
use crate::domain::DomainRef;

/// Sends events to their stream and to the log.
#[derive(Clone)]
pub(crate) struct Reporter {
    events: Events,
}

impl Reporter {
    /// Reports into `events`.
    pub(crate) fn new(events: Events) -> Self {
        Self { events }
    }

    /// Reports that something happened at `at`; `name` gives the domains behind server ids.
    pub(crate) fn report(
        &self,
        at: Instant,
        service: Option<&str>,
        happening: Happening,
        name: impl Fn(ServerId) -> Option<DomainRef>,
    ) {
        let domains = servers_of(&happening).into_iter().filter_map(|id| Some((id.0, name(id)?))).collect();
        let ago = u64::try_from(clock::now().since(at).as_micros()).unwrap_or(0);
        let event = TimedEvent {
            unix_us: clock::unix_us().saturating_sub(ago),
            monotonic_us: at.as_micros(),
            service: service.map(str::to_owned),
            domains,
            kind: happening,
        };
        log(&event);
        // Nobody may be listening.
        let _ = self.events.send(Arc::new(event));
    }
}

fn log(event: &TimedEvent) {
    let service = event.service.as_deref().unwrap_or("-");
    let domains = names(&event.domains);
    match &event.kind {
        // Events of single clients: too many for a log that somebody reads.
        Happening::Protocol(
            kind @ (EventKind::Diverged { .. } | EventKind::Unprotected { .. } | EventKind::Reset { .. }),
        ) => tracing::debug!(service, domains, ?kind),
        Happening::Protocol(
            kind @ (EventKind::NoCandidate { .. }
            | EventKind::Suspected { .. }
            | EventKind::Evicted { .. }
            | EventKind::Recovering { .. }
            | EventKind::Stale { .. }
            | EventKind::DrainFailed { .. }),
        ) => tracing::warn!(service, domains, ?kind),
        Happening::Daemon(
            kind @ (DaemonEvent::Problem { .. }
            | DaemonEvent::FenceFailed { .. }
            | DaemonEvent::Restored { .. }
            | DaemonEvent::NotAttached { .. }),
        ) => tracing::warn!(service, domains, ?kind),
        Happening::Protocol(kind) => tracing::info!(service, domains, ?kind),
        Happening::Daemon(kind) => tracing::info!(service, domains, ?kind),
    }
}

fn names(domains: &BTreeMap<u32, DomainRef>) -> String {
    let names: Vec<String> = domains.iter().map(|(id, domain)| format!("{id}={}", domain.name)).collect();
    names.join(" ")
}

fn servers_of(happening: &Happening) -> Vec<ServerId> {
    match happening {
        Happening::Protocol(kind) => match kind {
            EventKind::Attached { server, .. }
            | EventKind::Detached { server }
            | EventKind::Evicted { server, .. }
            | EventKind::Stale { server, .. }
            | EventKind::Seeded { server }
            | EventKind::DrainFailed { server, .. }
            | EventKind::Suspected { server, .. }
            | EventKind::Recovering { server }
            | EventKind::Recovered { server }
            | EventKind::Diverged { server, .. } => vec![*server],
            EventKind::CutOver { from, to, .. } => from.iter().chain([to]).copied().collect(),
            EventKind::NoCandidate { server, because, .. } => {
                let others = because.iter().map(|(id, _)| *id);
                server.iter().copied().chain(others).collect()
            }
            EventKind::FirstByte { .. }
            | EventKind::Held
            | EventKind::Released { .. }
            | EventKind::Recuperated { .. }
            | EventKind::Unprotected { .. }
            | EventKind::Reset { .. } => Vec::new(),
        },
        Happening::Daemon(event) => match event {
            DaemonEvent::Fenced { server, .. }
            | DaemonEvent::FenceFailed { server, .. }
            | DaemonEvent::DomainMoved { server, .. }
            | DaemonEvent::MaintenanceBegan { server, .. }
            | DaemonEvent::MaintenanceEnded { server }
            | DaemonEvent::OwnConnection { server, .. }
            | DaemonEvent::ShutdownRequested { server, .. } => vec![*server],
            DaemonEvent::PscReady { .. }
            | DaemonEvent::Restored { .. }
            | DaemonEvent::TakenOver { .. }
            | DaemonEvent::DomainAppeared { .. }
            | DaemonEvent::DomainGone { .. }
            | DaemonEvent::NotAttached { .. }
            | DaemonEvent::Problem { .. }
            | DaemonEvent::Solved { .. } => Vec::new(),
        },
    }
}
