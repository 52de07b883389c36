//! What the hypervisor says of a service's domains, and what the engine is told of it.

use understudy_driver::Engine as _;
use understudy_protocol::{Evidence, Input, Instant, ServerId};

use super::{Doomed, Service, Surroundings};
use crate::host::DomainState;
use crate::host::liveness::PausePolicy;
use crate::report::DaemonEvent;

impl Service {
    /// Looks at every server's domain, and tells the engine what changed.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        domains: &[DomainState],
        starved: bool,
        around: &mut Surroundings<'_>,
    ) {
        let policy =
            PausePolicy { grace: self.config.pause_grace, maintenance_limit: self.config.maintenance_limit };
        let mut told = Vec::new();
        for (&id, server) in &mut self.servers {
            let state = domains
                .iter()
                .find(|state| state.domid == server.domain.domid && state.uuid == server.domain.uuid);
            let excuse = server.excuse();
            let verdict = server.watch.look(now, state, excuse, policy, starved);
            if let Some(running) = verdict.running {
                server.running = running;
            }
            if verdict.running.is_some() || verdict.evidence.is_some() {
                self.surroundings_changed = true;
                told.push((id, verdict));
            }
        }
        for (id, verdict) in told {
            if verdict.running == Some(true) {
                self.maintenance_ended(now, id, around);
                self.server_mut(id, |server| server.doomed = None);
            }
            if !self.is_queued(id) {
                continue;
            }
            // This may lead to a cutover.
            self.engine.set_urgent(true);
            if let Some(running) = verdict.running {
                self.engine.tell(now, Input::Running { server: id, running });
            }
            if let Some(evidence) = verdict.evidence {
                self.accuse(now, id, evidence, around);
            }
            self.engine.set_urgent(false);
            self.drain(now, around);
        }
    }

    /// A domain's announced maintenance begins: an operator's pause is on its way.
    pub(crate) fn maintenance_began(&mut self, now: Instant, id: ServerId, around: &mut Surroundings<'_>) {
        self.server_mut(id, |server| server.announced = Some(now));
        self.surroundings_changed = true;
        let limit = self.config.maintenance_limit.as_millis();
        self.daemon_event(
            now,
            DaemonEvent::MaintenanceBegan { server: id, limit_ms: u64::try_from(limit).unwrap_or(u64::MAX) },
            around,
        );
    }

    /// A domain runs again, or was never paused.
    pub(crate) fn maintenance_ended(&mut self, now: Instant, id: ServerId, around: &mut Surroundings<'_>) {
        let announced = self.servers.get_mut(&id).and_then(|server| server.announced.take());
        if announced.is_some() {
            self.surroundings_changed = true;
            self.daemon_event(now, DaemonEvent::MaintenanceEnded { server: id }, around);
        }
    }

    /// Another service fences a domain. Its evidence counts here, too.
    pub(crate) fn doomed(&mut self, now: Instant, doomed: Doomed, around: &mut Surroundings<'_>) {
        let Some(id) = self.find_life(doomed.domain).filter(|&id| self.is_queued(id)) else {
            return;
        };
        self.server_mut(id, |server| server.doomed = Some(doomed.evidence));
        self.surroundings_changed = true;
        self.accuse(now, id, doomed.evidence, around);
    }

    /// Gives evidence to the engine: an OVM is deposed for it, an RVM evicted, which is timed.
    pub(super) fn accuse(
        &mut self,
        now: Instant,
        id: ServerId,
        evidence: Evidence,
        around: &mut Surroundings<'_>,
    ) {
        let input = Input::Evidence { server: id, evidence };
        if self.engine.ovm() == Some(id) {
            let _ = self.cut_over(now, around, Some(input));
            return;
        }
        let begun = std::time::Instant::now();
        self.engine.tell(now, input);
        let took_ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let slowest_ns = self.evictions_ns.map_or(0, |(_, slowest_ns)| slowest_ns);
        self.evictions_ns = Some((took_ns, slowest_ns.max(took_ns)));
        self.drain(now, around);
    }
}
