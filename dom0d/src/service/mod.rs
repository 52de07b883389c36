//! One service at run time: its engine, its plane and its servers, and what each tells the others.
//!
//! Everything here runs on the data-path thread and never waits.

mod beginning;
mod coming;
mod containing;
mod copying;
mod driving;
mod following;
mod joining;
mod overview;
mod server;
mod watching;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::mpsc;

use understudy_api::config::{self, Allowed, OwnConnections};
use understudy_driver::{Engine as _, Suspicion};
use understudy_protocol::{Evidence, Input, Instant, ServerId};

use self::copying::Copying;
use self::driving::hear;
use crate::containment::Refusal;
use crate::domain::{DomainId, DomainRef, KnownDomain};
use crate::host::fencing::Job;
use crate::link::vif::GuestVif;
use crate::plane::{FastPath, Origin, Plane};
use crate::report::{DaemonEvent, Happening, Reporter};
use crate::store::memory::{InStep, ServiceMemory};
use crate::store::succession::Engine;

pub(crate) use beginning::{leave_nothing, remove_strays};
pub(crate) use server::{Place, Server};

/// Destinations of a replica's own connections that are kept and reported.
const DESTINATIONS: usize = 16;

/// Domains whose names are kept for the events and counts of former servers.
const NAMES: usize = 64;

/// What a service uses of the data path around it.
pub(crate) struct Surroundings<'a> {
    /// Where events go.
    pub(crate) reporter: &'a Reporter,
    /// Where jobs on domains go.
    pub(crate) jobs: &'a mpsc::Sender<Job>,
    /// The next server id of the daemon.
    pub(crate) next_server: &'a mut u32,
    /// Domains that a service pauses or destroys, for the other services.
    pub(crate) doomed: &'a mut Vec<Doomed>,
}

/// A domain that a service pauses or destroys to fence it: every other service that it serves loses it too.
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
    /// What the kernel's rules depend on changed since this was last cleared.
    pub(crate) rules_changed: bool,
    /// The memory changed since this was last cleared.
    pub(crate) memory_changed: bool,
    /// What a successor must know changed since this was last cleared, other than with the rules.
    pub(crate) surroundings_changed: bool,
    /// It resumes where another process was killed, and has been reopening its interfaces since then.
    opening: Option<Instant>,
    /// Server ids below this one were given out by another process.
    pub(crate) first_server: u32,
    bridge: Option<String>,
    in_step: Option<InStep>,
    /// Which replicas equal the OVM may have changed since this was last cleared.
    equals_changed: bool,
    /// The decision that the service waits for, as the operator was last told.
    question: Option<String>,
    /// The copy that clients are held for.
    copying: Option<Copying>,
    /// What the engine found against the OVM, to be acted upon once the plane is stopped.
    suspicion: Option<Suspicion>,
    /// A client has sent a segment to this process.
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
    /// How long the last and the slowest eviction of a faulty RVM kept the packet path waiting, in nanoseconds.
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
            // What a clean end left counts once: not again after an unclean end.
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
            self.engine.tell(now, Input::Sign { server, sign });
            self.drain(now, around);
        }
        self.note_own_connections(now, around);
        if self.plane.fast.as_mut().is_some_and(FastPath::take_untold) {
            self.engine.tell(now, Input::Untold);
            self.surroundings_changed = true;
        }
        self.settle(now, around);
        any
    }

    /// A replica's own connections are dropped, while the OVM's are answered: such a replica does not stay equal.
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
                self.engine.tell(now, Input::OwnConnection { server: id });
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

    /// Tells the engine if its time has come, and carries out what a burst left over.
    pub(crate) fn timeout(&mut self, now: Instant, around: &mut Surroundings<'_>) -> bool {
        if self.engine.next_timeout().is_some_and(|due| due <= now) {
            self.engine.tell(now, Input::Timeout);
        }
        let more = self.drain(now, around);
        self.settle(now, around);
        more
    }

    /// When [`Service::timeout`] or the plane must be called next.
    pub(crate) fn next_timeout(&mut self, now: Instant) -> Option<Instant> {
        let plane = self.plane.tick(now);
        let engine = self.engine.next_timeout().filter(|_| self.opening.is_none());
        plane.into_iter().chain(engine).min()
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

    pub(super) fn remember_name(&mut self, id: ServerId, domain: &DomainRef) {
        if self.names.len() >= NAMES && !self.names.contains_key(&id) {
            self.names.pop_first();
        }
        self.names.insert(id, domain.clone());
    }

    /// Reports something that happened around the engine.
    pub(crate) fn daemon_event(&self, now: Instant, event: DaemonEvent, around: &Surroundings<'_>) {
        self.report(now, Happening::Daemon(event), around);
    }

    fn report(&self, at: Instant, happening: Happening, around: &Surroundings<'_>) {
        around.reporter.report(at, Some(self.name()), happening, |id| self.domain(id).cloned());
    }
}
