//! One service at run time: its engine, its plane and its servers, and what each tells the others.
//!
//! Everything here runs on the data-path thread and never waits.

mod beginning;
mod copying;
mod joining;
mod overview;
mod server;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::mpsc;

use understudy_api::config::{self, Allowed, Direct, Fence, OnShutdownRequest, OwnConnections};
use understudy_protocol::{Effect, EventKind, Evidence, Instant, ServerId, StaleReason};

use self::copying::Copying;
use crate::clock;
use crate::containment::{Part, Refusal, RuleSet};
use crate::domain::{DomainId, DomainRef, KnownDomain};
use crate::host::DomainState;
use crate::host::fencing::Job;
use crate::host::liveness::PausePolicy;
use crate::link::device::{Device, mac_text};
use crate::link::vif::{Arrival, GuestVif, Interface};
use crate::plane::{Inbound, Origin, Plane};
use crate::report::{DaemonEvent, Happening, Reporter};
use crate::store::memory::{InStep, ServiceMemory};
use crate::store::succession::Engine;

pub(crate) use beginning::{leave_nothing, remove_strays};
pub(crate) use server::{Place, Server};

/// Packets sent in one go before others have their turn.
const BURST: u32 = 256;

/// Destinations of a replica's own connections that are told and kept.
const DESTINATIONS: usize = 16;

/// Domains whose names are kept for the events and counts of former servers.
const NAMES: usize = 64;

/// What one service needs of the data path around it.
pub(crate) struct Surroundings<'a> {
    /// Where events go.
    pub(crate) reporter: &'a Reporter,
    /// Where orders to domains go.
    pub(crate) jobs: &'a mpsc::Sender<Job>,
    /// The next server id of the daemon.
    pub(crate) next_server: &'a mut u32,
    /// Where a service says whose domain it pauses or destroys.
    pub(crate) doomed: &'a mut Vec<Doomed>,
}

/// A domain that a service pauses or destroys to fence it: it is lost to whatever else it serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Doomed {
    /// Which life of which domain.
    pub(crate) domain: DomainId,
    /// What the service found against it.
    pub(crate) evidence: Evidence,
}

/// See the module.
pub(crate) struct Service {
    /// Its place in the configuration.
    index: usize,
    /// What the operator decided.
    pub(crate) config: config::Service,
    /// The protocol.
    pub(crate) engine: Engine,
    /// How packets come and go.
    pub(crate) plane: Plane,
    /// Every domain that could serve, in the queue or not, by its current id.
    pub(crate) servers: BTreeMap<ServerId, Server>,
    /// What outlives this process.
    pub(crate) memory: ServiceMemory,
    /// Roles or rules' subjects changed since this was last cleared.
    pub(crate) rules_changed: bool,
    /// The memory changed since this was last cleared.
    pub(crate) memory_changed: bool,
    /// What a successor must know changed since this was last cleared, other than with the rules.
    pub(crate) surroundings_changed: bool,
    /// It goes on where another process was, and opens its interfaces again, since then.
    opening: Option<Instant>,
    /// Server ids below this one were given out by another process.
    pub(crate) first_server: u32,
    bridge: Option<String>,
    in_step: Option<InStep>,
    /// Who has everything may have changed since this was last cleared.
    equals_changed: bool,
    /// What an operator was last told that the service waits for.
    question: Option<String>,
    /// The copy that clients are held for.
    copying: Option<Copying>,
    /// What the engine found against the OVM, to be acted upon once the plane is stopped.
    suspicion: Option<(ServerId, Evidence)>,
    /// A segment of a client came, in this process.
    clients_seen: bool,
    names: BTreeMap<ServerId, DomainRef>,
    unusable: BTreeMap<DomainId, KnownDomain>,
    /// Every vif that a domain of the service has, by name.
    vifs: BTreeMap<String, GuestVif>,
    /// Frames that the kernel's rules refused.
    pub(crate) refused: BTreeMap<&'static str, u64>,
    /// Servers to be reported as fenced when rules of this version are in force.
    isolating: Vec<(ServerId, Option<u64>)>,
    /// Where replicas tried to open connections of their own, and how often.
    own_connections: BTreeMap<ServerId, BTreeMap<SocketAddr, u64>>,
    /// How long the evictions for the last and for the slowest faulty RVM kept the packet path waiting.
    evictions_ns: Option<(u64, u64)>,
}

impl Service {
    /// A service without a place and without servers, around this engine.
    fn new(
        index: usize,
        config: config::Service,
        engine: Engine,
        mut memory: ServiceMemory,
        plane: Plane,
    ) -> Self {
        let in_step = memory.take_in_step();
        Self {
            index,
            equals_changed: false,
            question: None,
            copying: None,
            engine,
            plane,
            config,
            servers: BTreeMap::new(),
            memory,
            rules_changed: false,
            // What a clean end left must not count again after an unclean one.
            memory_changed: in_step.is_some(),
            surroundings_changed: false,
            opening: None,
            first_server: 1,
            in_step,
            suspicion: None,
            clients_seen: false,
            bridge: None,
            names: BTreeMap::new(),
            unusable: BTreeMap::new(),
            vifs: BTreeMap::new(),
            refused: Refusal::ALL.map(|refusal| (refusal.name(), 0)).into(),
            isolating: Vec::new(),
            own_connections: BTreeMap::new(),
            evictions_ns: None,
        }
    }

    /// The operator's name of it.
    pub(crate) fn name(&self) -> &str {
        &self.config.engine.name
    }

    /// The PSC has its place.
    pub(crate) fn anchored(
        &mut self,
        now: Instant,
        bridge: String,
        far_end: Device,
        around: &mut Surroundings<'_>,
    ) {
        self.plane.set_anchor(now, far_end);
        let mac = mac_text(self.config.psc_mac);
        self.daemon_event(now, DaemonEvent::PscReady { bridge: bridge.clone(), mac }, around);
        self.bridge = Some(bridge);
    }

    /// A domain can be used from now on, or its lost interface is open again. `rules_version` is that
    /// of the rules that will hold its vif.
    pub(crate) fn arrived(
        &mut self,
        now: Instant,
        arrival: &Arrival,
        vif: Interface,
        rules_version: u64,
        around: &mut Surroundings<'_>,
    ) {
        let life = DomainId { uuid: arrival.domain.uuid, domid: arrival.domain.domid };
        self.unusable.remove(&life);
        if let Some(id) = self.find_life(life) {
            self.plane.add_server(id, vif, arrival.mac, &arrival.addresses);
            self.server_mut(id, |server| server.vif_opened(arrival));
            self.rules_changed = true;
            return;
        }
        let id = ServerId(*around.next_server);
        *around.next_server += 1;
        let place = if self.memory.is_detached(arrival.domain.uuid) {
            Place::Detached
        } else {
            Place::Preparing(rules_version)
        };
        self.plane.add_server(id, vif, arrival.mac, &arrival.addresses);
        self.remember_name(id, &arrival.domain);
        self.servers.insert(id, Server::new(arrival, place));
        self.rules_changed = true;
        self.daemon_event(now, DaemonEvent::DomainAppeared { domain: arrival.domain.clone() }, around);
    }

    /// A domain lives on under another number, behind another vif, which is opened once it is connected.
    pub(crate) fn moved(
        &mut self,
        now: Instant,
        from: DomainId,
        to: &DomainRef,
        vif: &str,
        around: &mut Surroundings<'_>,
    ) {
        let Some(id) = self.find_life(from) else {
            return;
        };
        let now_at = DomainId { uuid: to.uuid, domid: to.domid };
        self.unusable.remove(&now_at);
        self.server_mut(id, |server| server.move_to(to.clone(), vif.to_owned()));
        self.remember_name(id, to);
        self.rules_changed = true;
        if self.servers[&id].fenced {
            // The toolstack lets it run there.
            self.fence_domain(id, now_at, around);
        }
        self.daemon_event(now, DaemonEvent::DomainMoved { server: id, from_domid: from.domid }, around);
    }

    /// A domain, or the vif it served through, is gone.
    pub(crate) fn departed(&mut self, now: Instant, life: DomainId, around: &mut Surroundings<'_>) {
        self.unusable.remove(&life);
        let Some(id) = self.find_life(life) else {
            return;
        };
        if self.is_queued(id) {
            self.accuse(now, id, Evidence::DomainGone, around);
        }
        self.copying_lost(now, id, around);
        self.plane.move_server(id, None);
        self.rules_changed = true;
        let event = DaemonEvent::DomainGone { domain: self.servers[&id].domain.clone() };
        // An OVM that nobody could replace stays in the engine's books, and so here.
        if self.is_queued(id) {
            self.server_mut(id, |server| (server.running, server.gone) = (false, true));
        } else {
            self.servers.remove(&id);
        }
        self.daemon_event(now, event, around);
    }

    /// Another service fences a domain. What it found is all that there is to find here too.
    pub(crate) fn doomed(&mut self, now: Instant, doomed: Doomed, around: &mut Surroundings<'_>) {
        let Some(id) = self.find_life(doomed.domain).filter(|&id| self.is_queued(id)) else {
            return;
        };
        self.server_mut(id, |server| server.doomed = Some(doomed.evidence));
        self.surroundings_changed = true;
        self.accuse(now, id, doomed.evidence, around);
    }

    /// Gives evidence to the engine: an OVM is deposed for it, an RVM evicted, which is timed.
    fn accuse(&mut self, now: Instant, id: ServerId, evidence: Evidence, around: &mut Surroundings<'_>) {
        if self.engine.ovm() == Some(id) {
            return self.cut_over(now, around, |engine| engine.handle_evidence(now, id, evidence));
        }
        let begun = std::time::Instant::now();
        self.engine.handle_evidence(now, id, evidence);
        let took_ns = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let slowest_ns = self.evictions_ns.map_or(0, |(_, slowest_ns)| slowest_ns);
        self.evictions_ns = Some((took_ns, slowest_ns.max(took_ns)));
        self.drain(now, around);
    }

    /// Does what may depose the OVM. Before, the plane passes nothing any more, and the engine hears all that was
    /// passed: it must know of every byte that the client has.
    pub(crate) fn cut_over<T>(
        &mut self,
        now: Instant,
        around: &mut Surroundings<'_>,
        act: impl FnOnce(&mut Engine) -> T,
    ) -> T {
        self.engine.set_urgent(true);
        if self.plane.stop() {
            while let Some(inbound) = self.plane.rest() {
                hear(&mut self.engine, now, &inbound);
                self.drain(now, around);
            }
            self.engine.handle_plane_stopped();
        }
        let result = act(&mut self.engine);
        self.drain(now, around);
        if self.plane.is_stopped() {
            // Nobody else could serve.
            self.plane.set_ovm(self.engine.ovm());
        }
        self.engine.set_urgent(false);
        result
    }

    /// A domain has another name.
    pub(crate) fn renamed(&mut self, life: DomainId, name: &str) {
        if let Some(id) = self.find_life(life) {
            self.server_mut(id, |server| name.clone_into(&mut server.domain.name));
            self.surroundings_changed = true;
            self.memory.rename(life.uuid, name);
            self.memory_changed = true;
            let domain = self.servers[&id].domain.clone();
            self.remember_name(id, &domain);
        }
    }

    /// A domain matches, and can't be used for a reason.
    pub(crate) fn unusable(&mut self, now: Instant, known: KnownDomain, around: &mut Surroundings<'_>) {
        let life = DomainId { uuid: known.domain.uuid, domid: known.domain.domid };
        self.daemon_event(
            now,
            DaemonEvent::NotAttached { domain: known.domain.clone(), reason: known.reason.clone() },
            around,
        );
        self.unusable.insert(life, known);
    }

    /// The toolstack asks a domain to shut down.
    pub(crate) fn shutdown_requested(
        &mut self,
        now: Instant,
        life: DomainId,
        request: String,
        around: &mut Surroundings<'_>,
    ) {
        let Some(id) = self.find_life(life).filter(|&id| self.is_queued(id)) else {
            return;
        };
        let is_ovm = self.engine.ovm() == Some(id);
        // A save asks the guest to suspend, and brings it back.
        let ends = request != "suspend";
        self.daemon_event(now, DaemonEvent::ShutdownRequested { server: id, request }, around);
        if is_ovm
            && ends
            && self.config.on_shutdown_request == OnShutdownRequest::Switchover
            && let Err(error) = self.cut_over(now, around, |engine| engine.switchover(now, None))
        {
            tracing::warn!(service = self.name(), %error, "the OVM is being shut down and nothing can take over");
        }
    }

    /// Rules of a version are in force: whoever waited for them may join.
    pub(crate) fn rules_applied(&mut self, now: Instant, version: u64, around: &mut Surroundings<'_>) {
        for server in self.servers.values_mut() {
            if matches!(server.place, Place::Preparing(needs) if needs <= version) {
                server.place = Place::Waiting;
            }
        }
        self.join(now, around);
        self.copying_rules_applied(version);
        let isolated: Vec<ServerId> = self
            .isolating
            .extract_if(.., |(_, needs)| needs.is_some_and(|needs| needs <= version))
            .map(|(server, _)| server)
            .collect();
        for server in isolated {
            let by = Fence::Isolate.name();
            self.daemon_event(now, DaemonEvent::Fenced { server, by }, around);
        }
    }

    /// Which version of the rules holds what was asked for up to now.
    pub(crate) fn rules_sent(&mut self, version: u64) {
        for (_, needs) in &mut self.isolating {
            needs.get_or_insert(version);
        }
        if let Some(copying) = &mut self.copying {
            copying.needs.get_or_insert(version);
        }
    }

    /// Looks at every server's domain, and tells the engine what is to be told.
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
            // What is told of a domain may be what leads to a cutover.
            self.engine.set_urgent(true);
            if let Some(running) = verdict.running {
                self.engine.handle_running(now, id, running);
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

    /// Hands packets from the plane to the engine and back; `true` if there may be more at once.
    pub(crate) fn forward(&mut self, now: Instant, around: &mut Surroundings<'_>) -> bool {
        let mut any = false;
        while let Some(inbound) = self.plane.receive(now) {
            any = true;
            let first = !self.clients_seen && matches!(inbound.from, Origin::Client(_));
            hear(&mut self.engine, now, &inbound);
            if first {
                self.see_client();
            }
            self.drain(now, around);
        }
        while let Some((server, sign)) = self.plane.notes.take_sign() {
            any = true;
            self.engine.handle_sign(now, server, sign);
            self.drain(now, around);
        }
        self.note_own_connections(now, around);
        self.hand_over();
        self.follow_suspicion(now, around);
        any
    }

    /// A replica's own connections go nowhere: whose service opens some is no replica of one whose OVM's are answered.
    fn note_own_connections(&mut self, now: Instant, around: &mut Surroundings<'_>) {
        for (id, to) in self.plane.notes.take_own_connections() {
            let is_rvm = self.is_queued(id) && self.engine.ovm() != Some(id);
            // What passes is the operator's choice.
            if !is_rvm || self.config.allow.contains(&Allowed::Tcp(to.port())) {
                continue;
            }
            self.own_connections.retain(|id, _| self.servers.contains_key(id));
            let known = self.own_connections.entry(id).or_default();
            if known.is_empty() && self.config.own_connections == OwnConnections::Refuse {
                self.engine.handle_own_connection(now, id);
            }
            let is_new = known.len() < DESTINATIONS && !known.contains_key(&to);
            if let Some(times) = known.get_mut(&to) {
                *times += 1;
            } else if is_new {
                known.insert(to, 1);
                self.daemon_event(now, DaemonEvent::OwnConnection { server: id, to }, around);
            }
        }
    }

    /// Lets the plane pass by itself what it may, once all that it told was heard.
    fn hand_over(&mut self) {
        if self.plane.take_untold() {
            self.engine.handle_untold();
            self.surroundings_changed = true;
        }
        for _ in 0..BURST {
            if !self.plane.is_idle() {
                return;
            }
            match self.engine.poll_handover() {
                Some(handover) => self.plane.hand_over(&handover),
                None => return,
            }
        }
    }

    /// The engine found evidence while the plane was passing by itself.
    fn follow_suspicion(&mut self, now: Instant, around: &mut Surroundings<'_>) {
        if let Some((accused, evidence)) = self.suspicion.take() {
            self.cut_over(now, around, |engine| engine.handle_confirmed(now, accused, evidence));
            self.suspicion = None;
        }
    }

    /// Calls the engine if its time has come, and sends what a burst left over.
    pub(crate) fn timeout(&mut self, now: Instant, around: &mut Surroundings<'_>) -> bool {
        if self.engine.poll_timeout().is_some_and(|due| due <= now) {
            self.engine.handle_timeout(now);
        }
        let more = self.drain(now, around);
        self.follow_suspicion(now, around);
        more
    }

    /// When [`Service::timeout`] or the plane must be called next.
    pub(crate) fn next_timeout(&mut self, now: Instant) -> Option<Instant> {
        let plane = self.plane.tick(now);
        let engine = self.engine.poll_timeout().filter(|_| self.opening.is_none());
        plane.into_iter().chain(engine).min()
    }

    /// Carries out what the engine wants; `true` if packets are left to send.
    pub(crate) fn drain(&mut self, now: Instant, around: &mut Surroundings<'_>) -> bool {
        if self.opening.is_some() {
            return false;
        }
        while let Some(effect) = self.engine.poll_effect() {
            match effect {
                Effect::Cutover { to, .. } => {
                    self.plane.set_ovm(Some(to));
                    self.rules_changed = true;
                    if let Some(server) = self.servers.get(&to) {
                        self.memory.begin(&server.domain);
                        self.memory_changed = true;
                    }
                }
                Effect::Fence(id) => self.fence(id, around),
                Effect::Ask(server) => self.plane.ask(server),
                Effect::StopPlane { accused, evidence } => self.suspicion = Some((accused, evidence)),
                Effect::Extend { place, bounds } => self.plane.extend(place, bounds),
                Effect::TakeBack { client, psc } => self.plane.take_back(client, psc),
                Effect::Event(event) => {
                    self.note(&event.kind);
                    // To the engine these happen at the instant of their cause; in force they are now.
                    let carried_out = matches!(
                        event.kind,
                        EventKind::CutOver { .. }
                            | EventKind::FirstByte { .. }
                            | EventKind::Recuperated { .. }
                    );
                    let at = if carried_out { clock::now() } else { event.at };
                    let happening = Happening::Protocol(event.kind);
                    self.report(at, happening, around);
                }
            }
        }
        let mut packets = 0;
        let mut more = true;
        while more && packets < BURST {
            packets += 1;
            match self.engine.poll_transmit(now) {
                Some(packet) => self.plane.transmit(&packet),
                None => more = false,
            }
        }
        self.engine.drained(now, packets);
        more
    }

    fn fence(&mut self, id: ServerId, around: &mut Surroundings<'_>) {
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

    fn fence_domain(&self, id: ServerId, domain: DomainId, around: &Surroundings<'_>) {
        let job = Job::Fence { service: self.index, server: id, domain, by: self.config.fence };
        if around.jobs.send(job).is_err() {
            tracing::error!(
                service = self.name(),
                "the fencing thread has ended; only the data path keeps the deposed OVM silent"
            );
        }
    }

    /// What an event of the engine means for a server's place.
    fn note(&mut self, kind: &EventKind) {
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

    /// All vifs of the service's domains.
    pub(crate) fn set_vifs(&mut self, vifs: BTreeMap<String, GuestVif>) {
        self.vifs = vifs;
        self.rules_changed = true;
    }

    /// Adds this service's part to the rules.
    pub(crate) fn add_rules(&self, rules: &mut RuleSet) {
        let mut add = |name: &str, (mac, index), server: Option<&Server>, is_ovm| {
            let vif = rules.vifs.entry(name.to_owned()).or_default();
            (vif.mac, vif.index) = (mac, index);
            vif.parts.push(Part {
                service: self.index,
                is_ovm,
                addresses: server.map(|server| server.addresses.clone()).unwrap_or_default(),
                ports: self.config.engine.ports.clone(),
                psc: self.config.engine.psc.clone(),
                psc_mac: self.config.psc_mac,
                allow: self.config.allow.clone(),
                direct: self.config.direct == Direct::Allow,
            });
        };
        for (name, vif) in &self.vifs {
            match self.hold(vif) {
                Hold::Free => {}
                Hold::Server(server, is_ovm) => add(name, (vif.mac, vif.index), Some(server), is_ovm),
                Hold::NoServer { is_ovm } => add(name, (vif.mac, vif.index), None, is_ovm),
            }
        }
        // Of those that another process had, and of one that was moved, nothing else may be known yet.
        let ovm = self.engine.ovm();
        for (&id, server) in &self.servers {
            if server.is_contained() && !server.gone && !self.vifs.contains_key(&server.vif) {
                add(&server.vif, (server.mac, None), Some(server), ovm == Some(id));
            }
        }
    }

    /// How a vif is held. As a replica's, unless there is a reason: a domain that is starting, can't be used, or was
    /// a server until a moment ago must not be heard either.
    fn hold(&self, vif: &GuestVif) -> Hold<'_> {
        let life = DomainId { uuid: vif.domain.uuid, domid: vif.domain.domid };
        let former =
            || self.servers.iter().find(|(_, server)| server.domain.uuid == life.uuid).map(|(&id, _)| id);
        let id = self.find_life(life).or_else(|| if vif.is_incoming { former() } else { None });
        let ovm = self.engine.ovm();
        match id.and_then(|id| Some((id, self.servers.get(&id)?))) {
            Some((_, server)) if !server.is_contained() => Hold::Free,
            Some((id, server)) => Hold::Server(server, ovm == Some(id)),
            None if self.memory.is_detached(life.uuid) => Hold::Free,
            None => Hold::NoServer { is_ovm: ovm.is_none() && self.may_serve_first(&vif.domain) },
        }
    }

    /// Interfaces from which nothing passes but what the operator allows.
    pub(super) fn contained(&self) -> Vec<String> {
        let mut rules = RuleSet::default();
        self.add_rules(&mut rules);
        let vifs = rules.vifs.into_iter().filter(|(_, vif)| !vif.parts.iter().any(|part| part.is_ovm));
        vifs.map(|(name, _)| name).collect()
    }

    /// The server that is this life of a domain.
    pub(crate) fn find_life(&self, life: DomainId) -> Option<ServerId> {
        let mut servers = self.servers.iter();
        servers.find(|(_, server)| server.life() == life).map(|(&id, _)| id)
    }

    /// Whether a server is in the queue.
    pub(crate) fn is_queued(&self, id: ServerId) -> bool {
        self.servers.get(&id).is_some_and(|server| server.place == Place::Queued)
    }

    /// Changes a server, if it is there.
    pub(crate) fn server_mut(&mut self, id: ServerId, change: impl FnOnce(&mut Server)) {
        if let Some(server) = self.servers.get_mut(&id) {
            change(server);
        }
    }

    /// The domain behind an id, also of a former server.
    pub(crate) fn domain(&self, id: ServerId) -> Option<&DomainRef> {
        let server = self.servers.get(&id).map(|server| &server.domain);
        server.or_else(|| self.names.get(&id))
    }

    fn remember_name(&mut self, id: ServerId, domain: &DomainRef) {
        if self.names.len() >= NAMES && !self.names.contains_key(&id) {
            self.names.pop_first();
        }
        self.names.insert(id, domain.clone());
    }

    /// Tells whoever listens about something that happened around the engine.
    pub(crate) fn daemon_event(&self, now: Instant, event: DaemonEvent, around: &Surroundings<'_>) {
        self.report(now, Happening::Daemon(event), around);
    }

    fn report(&self, at: Instant, happening: Happening, around: &Surroundings<'_>) {
        around.reporter.report(at, Some(self.name()), happening, |id| self.domain(id).cloned());
    }
}

/// How a vif is held.
enum Hold<'a> {
    /// Not at all.
    Free,
    /// As the vif of this server, which is the OVM or not.
    Server(&'a Server, bool),
    /// As that of a domain that is no server, but may be the OVM soon.
    NoServer { is_ovm: bool },
}

/// Tells the engine of a packet.
fn hear(engine: &mut Engine, now: Instant, inbound: &Inbound<'_>) {
    match inbound.from {
        Origin::Client(link) => engine.handle_client(now, link, &inbound.packet, inbound.passage),
        Origin::Server(id) => engine.handle_server(now, id, &inbound.packet, inbound.passage),
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
