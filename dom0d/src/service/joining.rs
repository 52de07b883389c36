//! How domains join a service's queue: which, in which role, and when.

use understudy_api::config::AttachAs;
use understudy_driver::Engine as _;
use understudy_protocol::{Command, Input, Instant, OperatorError, Seeding, ServerId};

use super::{Place, Server, Service, Surroundings};
use crate::domain::DomainRef;
use crate::plane::Change;
use crate::report::DaemonEvent;
use crate::store::memory::InStep;

impl Service {
    /// Puts the waiting servers into the queue as the configuration says, the OVM first.
    pub(super) fn join(&mut self, now: Instant, around: &mut Surroundings<'_>) {
        let mut waiting: Vec<ServerId> = self
            .servers
            .iter()
            .filter(|(_, server)| server.place == Place::Waiting)
            .map(|(&id, _)| id)
            .collect();
        if self.engine.ovm().is_none() {
            let Some(ovm) = waiting.iter().copied().find(|&id| self.serves_first(id)) else {
                return self.ask_operator(now, around);
            };
            if let Some(last) = self.memory.overrules(|name, uuid| self.config.ovm.matches(name, uuid)) {
                tracing::warn!(service = self.name(), last, configured = %self.config.ovm, "the domain that served last serves; the configured one is for a service without clients: understudy switchover moves it");
            }
            match self.engine.command(now, Command::InstallOvm(self.servers[&ovm].spec(ovm))) {
                Ok(()) => self.queued(now, ovm, around),
                Err(error) => return self.held(now, ovm, error, around),
            }
            waiting.retain(|&id| id != ovm);
        }
        for id in waiting {
            let spec = self.servers[&id].spec(id);
            let mut attached = Err(OperatorError::NothingLeft);
            if self.is_identical(id) {
                let (spec, seeding) = (spec.clone(), Seeding::AssumeIdentical);
                attached = self.engine.command(now, Command::Attach { spec, seeding });
            }
            // If that is refused because conversations are open, it joins unseeded: fed, and seeded later.
            if attached.is_err() {
                attached = self.engine.command(now, Command::Attach { spec, seeding: Seeding::Unseeded });
            }
            match attached {
                Ok(()) => self.queued(now, id, around),
                Err(error) => self.held(now, id, error, around),
            }
        }
    }

    /// Whether a server that appears equals the OVM: because the operator says so of every new domain and no client was served
    /// yet, or because it did when the last dom0d ended and no client has come since.
    fn is_identical(&self, id: ServerId) -> bool {
        let server = &self.servers[&id];
        let new = !self.memory.served && !self.memory.has_seen(server.domain.uuid);
        let ovm = self.engine.ovm().and_then(|id| self.servers.get(&id));
        let in_step = self.in_step.as_ref().is_some_and(|left| {
            Some(left.ovm) == ovm.map(Server::life) && left.rvms.contains(&server.life())
        });
        (self.config.attach == AttachAs::AssumeIdentical && new) || (in_step && !self.clients_seen)
    }

    /// A clean end: records which replicas equal the OVM.
    pub(crate) fn farewell(&mut self) {
        let status = self.engine.status();
        let life = |id: ServerId| self.servers.get(&id).map(Server::life);
        if let Some(ovm) = self.engine.ovm().and_then(life) {
            let in_step = status.servers.iter().filter(|s| s.not_promotable.is_none() && s.behind_bytes == 0);
            let rvms = in_step.filter_map(|server| life(server.server)).collect();
            self.memory.set_in_step(InStep { ovm, rvms });
            self.memory_changed = true;
        }
    }

    /// Notes the first segment of a client.
    pub(super) fn see_client(&mut self) {
        let counters = self.engine.status().counters;
        self.clients_seen = counters.get("client_segments").is_some_and(|&segments| segments > 0);
        self.memory_changed |= self.clients_seen && !self.memory.served;
        self.memory.served |= self.clients_seen;
    }

    /// Whether a server is the one to serve first.
    fn serves_first(&self, id: ServerId) -> bool {
        self.may_serve_first(&self.servers[&id].domain)
    }

    /// Whether a domain is the one to serve first.
    pub(super) fn may_serve_first(&self, domain: &DomainRef) -> bool {
        self.memory.serves(domain).unwrap_or_else(|| self.config.ovm.matches(&domain.name, domain.uuid))
    }

    /// What a service without an OVM waits for, if only an operator can say who serves.
    pub(super) fn question(&self) -> Option<String> {
        self.memory.question(self.name(), self.servers.values().map(|server| &server.domain))
    }

    /// Reports once what an operator must decide.
    fn ask_operator(&mut self, now: Instant, around: &Surroundings<'_>) {
        if let Some(message) = self.question().filter(|question| self.question.as_ref() != Some(question)) {
            self.question = Some(message.clone());
            self.daemon_event(now, DaemonEvent::Problem { message }, around);
        }
    }

    /// Records which replicas equal the OVM, if that changed.
    pub(crate) fn note_equals(&mut self) {
        if std::mem::take(&mut self.equals_changed) && self.engine.ovm().is_some() {
            let status = self.engine.status();
            let ovm = self.engine.ovm();
            let equal = status.servers.iter().filter(|s| s.stale.is_none() && Some(s.server) != ovm);
            let equals: Vec<_> =
                equal.filter_map(|s| self.servers.get(&s.server)).map(|server| &server.domain).collect();
            self.memory_changed |= self.memory.set_equals(&equals);
        }
    }

    fn queued(&mut self, now: Instant, id: ServerId, around: &mut Surroundings<'_>) {
        self.server_mut(id, |server| {
            server.place = Place::Queued;
        });
        let server = &self.servers[&id];
        let uuid = server.domain.uuid;
        if !server.running {
            self.engine.tell(now, Input::Running { server: id, running: false });
        }
        self.memory_changed |= self.memory.see(uuid);
        self.rules_changed = true;
        self.plane.change(Change::Ovm(self.engine.ovm()));
        self.drain(now, around);
    }

    fn held(&mut self, now: Instant, id: ServerId, error: OperatorError, around: &mut Surroundings<'_>) {
        let reason = error.to_string();
        let event =
            DaemonEvent::NotAttached { domain: self.servers[&id].domain.clone(), reason: reason.clone() };
        self.server_mut(id, |server| server.place = Place::Held(reason));
        self.rules_changed = true;
        self.daemon_event(now, event, around);
    }

    /// Puts a server into the queue under a new id: the engine takes each id once.
    pub(crate) fn attach(
        &mut self,
        now: Instant,
        id: ServerId,
        seeding: Seeding,
        around: &mut Surroundings<'_>,
    ) -> Result<ServerId, OperatorError> {
        let new = ServerId(*around.next_server);
        let spec = self.servers[&id].spec(new);
        self.engine.command(now, Command::Attach { spec, seeding })?;
        *around.next_server += 1;
        if let Some(mut server) = self.servers.remove(&id) {
            server.fenced = false;
            (server.accused, server.doomed) = (None, None);
            self.remember_name(new, &server.domain);
            self.servers.insert(new, server);
        }
        self.plane.change(Change::Renamed { from: id, to: new });
        let uuid = self.servers[&new].domain.uuid;
        self.memory.set_detached(uuid, false);
        self.memory_changed = true;
        self.queued(now, new, around);
        Ok(new)
    }

    /// Makes a server the OVM of a service that has none, because an operator asked for it.
    pub(crate) fn install(
        &mut self,
        now: Instant,
        id: ServerId,
        around: &mut Surroundings<'_>,
    ) -> Result<(), OperatorError> {
        let spec = self.servers[&id].spec(id);
        self.cut_over(now, around, Some(Input::Command(Command::InstallOvm(spec))))?;
        self.queued(now, id, around);
        if let Some(message) = self.question.take() {
            self.daemon_event(now, DaemonEvent::Solved { message }, around);
        }
        self.join(now, around);
        Ok(())
    }
}
