//! One run: hosts and links, what happens to them in virtual time, and when the run ends.
//!
//! `dom0` drives the engine, `strikes` makes faults, `excuses` knows the harm that they may do by design.

mod dom0;
mod excuses;
mod hostile;
mod plane;
mod strikes;

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::collections::{BTreeMap, BTreeSet};

use understudy_driver::Suspicion;
use understudy_protocol::{
    Command, Input, Instant, LinkAddress, Role, Seeding, ServerId, ServerSpec, ServerStatus, Service,
    ServiceConfig,
};

use crate::checkers::{self, Checker, Licence};
use crate::client::{Agreement, Client};
use crate::coverage::Coverage;
use crate::fault::{Scheduled, When};
use crate::guest::Guest;
use crate::knobs::Knobs;
use crate::link::Link;
use crate::observer::Observer;
use crate::prng::{Prng, splitmix};
use crate::trace::Trace;
use crate::{Path, verdict};

const PORT: u16 = 6379;
/// Most servers in one run, former ones included.
const GUESTS: usize = 10;
/// After this many steps a run counts as endless.
const STEPS: u64 = 3_000_000;
/// Virtual time after which connections that have not ended are stuck. smoltcp backs off up to
/// 60 s, so a few losses in a row take long.
const PATIENCE_US: u64 = 400_000_000;
/// Virtual time that servers are given to settle before their states are compared.
const SETTLE_US: u64 = 15_000_000;

/// An ARP or ND question for a guest's address, or its answer; here these are no IP packets.
const LINK_QUESTION: Vec<u8> = Vec::new();
const LINK_ANSWER: Vec<u8> = Vec::new();

/// Why a run failed.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    pub(crate) rule: String,
    pub(crate) at: u64,
    pub(crate) text: String,
}

#[derive(Debug)]
enum Event {
    FromClient(usize, Vec<u8>),
    FromServer(usize, Vec<u8>),
    ToClient(usize, Vec<u8>),
    ToServer(usize, Vec<u8>),
    WakeClient(usize),
    WakeServer(usize),
    EngineTimer,
    DaemonPoll,
    /// The daemon looks at what the plane passed.
    Look,
    Fenced(ServerId),
    Strike(usize),
    /// A hostile client sends a forged segment: which client, which segment.
    Shoot(usize, usize),
}

/// What the daemon knows of a domain's state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Running,
    Paused,
    Gone,
}

pub(crate) struct World {
    pub(crate) knobs: Knobs,
    seed: u64,
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    steps: u64,
    pub(crate) clients: Vec<Client>,
    pub(crate) guests: Vec<Guest>,
    known: Vec<Known>,
    /// Domains that the daemon itself paused.
    fenced: Vec<bool>,
    client_wakes: Vec<Option<u64>>,
    guest_wakes: Vec<Option<u64>>,
    client_up: Vec<Link>,
    client_down: Vec<Link>,
    guest_up: Vec<Link>,
    guest_down: Vec<Link>,
    /// The last packets that each server sent, to forge from.
    recent: Vec<Vec<Vec<u8>>>,
    pub(crate) service: Service,
    suspicion: Option<Suspicion>,
    timer: Option<u64>,
    /// Timer calls that asked for another at the same moment.
    timer_storm: u32,
    starved_until: u64,
    packets: u64,
    pending: Vec<Scheduled>,
    pub(crate) promotions: u64,
    deposed: Option<ServerId>,
    pub(crate) agreement: Agreement,
    pub(crate) observer: Observer,
    checkers: Vec<Box<dyn Checker>>,
    pub(crate) coverage: Coverage,
    pub(crate) trace: Trace,
    failure: Option<Failure>,
    rng: Prng,
    /// When the engine is restored.
    restores: Prng,
    /// What hostile clients choose, and how many shots they have left.
    hostile: Prng,
    shots: usize,
    /// Why connections may be harmed by design, if they may.
    pub(crate) excuse: Option<&'static str>,
    /// Servers that may have lost conversations, or may lose them when they serve, and why.
    impaired: BTreeMap<ServerId, &'static str>,
    /// Servers whose answers are wrong, and whether one of them served.
    untrue: BTreeSet<ServerId>,
    /// Servers that reset their conversations, and whether one served before dom0 had heard of it.
    pub(crate) resetters: BTreeSet<ServerId>,
    pub(crate) forgetful_served: bool,
    pub(crate) untrue_served: bool,
    /// A server served whose segments no TCP sends: then the streams are unknown.
    pub(crate) lies_served: bool,
    last_status: u64,
    /// Handshakes that nobody but the OVM knew of when its service died.
    pub(crate) refused: BTreeSet<(SocketAddr, u32)>,
    /// Conversations in which a replica had kept up when the OVM's service died.
    pub(crate) disputable: BTreeSet<(SocketAddr, u32)>,
    /// Servers whose service died.
    pub(crate) killed: BTreeSet<ServerId>,
    /// Servers whose service died while they served.
    pub(crate) died: BTreeSet<ServerId>,
    /// Clients' sockets in whose name the daemon asked for a service.
    own_syns: BTreeSet<SocketAddr>,
    /// A replica was evicted because its link was slow.
    pub(crate) lost_behind_lossy: bool,
    /// How far each server was behind when the run was last about to end.
    standing: Vec<u64>,
    /// Faults, actions and promotions so far.
    story: String,
    bare: bool,
    /// The plane that passes conversations by itself, if there is one.
    plane: Option<plane::Plane>,
}

fn psc() -> Vec<IpAddr> {
    vec![
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, 100)),
        IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x100)),
    ]
}

fn guest_addresses(index: usize) -> Vec<IpAddr> {
    vec![
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, 11 + index as u8)),
        IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x11 + index as u16)),
    ]
}

fn client_addresses(index: usize) -> Vec<IpAddr> {
    vec![
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, 200 + index as u8)),
        IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x200 + index as u16)),
    ]
}

fn link_address(index: usize) -> LinkAddress {
    LinkAddress([2, 0, 0, 0, 1, index as u8])
}

impl World {
    /// [`Path::Bare`] leaves the engine out: clients talk to the first server, and there are no faults. A failure is then
    /// the simulator's own.
    pub(crate) fn new(seed: u64, mut knobs: Knobs, trace: Trace, path: Path) -> Self {
        let bare = path == Path::Bare;
        if bare {
            knobs.faults.clear();
            knobs.guests.truncate(1);
            knobs.guest_links.truncate(1);
        }
        let mut config = ServiceConfig::new("sim", psc(), vec![PORT]);
        config.limits = knobs.limits;
        if path == Path::Kernel {
            // From streams of their own, so that a seed's other choices are the same on all paths.
            let mut rng = Prng::fork(seed, "ahead", 0);
            if rng.percent(50) {
                config.limits.ahead_bytes = rng.log_between(16 << 10, 1 << 20) as u32;
            }
        }
        config.timing = knobs.timing;
        config.candidate = knobs.candidate;
        config.on_lag = knobs.on_lag;
        config.seed = seed;
        let licence = Licence {
            // Passed segments overtake those that wait for the daemon.
            servers_in_order: path != Path::Kernel
                && knobs.guest_links.iter().all(crate::link::LinkKnobs::faithful),
            lag_limit_us: knobs.timing.lag_limit.as_micros() as u64,
            retained_limit: knobs.limits.lag_bytes * knobs.guests.len() as u64 * 2,
            equal_windows: false,
            hostile: !knobs.hostile.is_empty(),
        };
        let clients: Vec<_> = knobs
            .clients
            .iter()
            .enumerate()
            .map(|(i, k)| {
                Client::new(
                    i,
                    k.clone(),
                    match i.checked_sub(knobs.clients.len() - knobs.hostile.len()) {
                        Some(hostile) => crate::hostile::addresses(hostile),
                        None => client_addresses(i),
                    },
                    psc(),
                    PORT,
                    splitmix(seed ^ (0x1000 + i as u64)),
                )
            })
            .collect();
        let link = |name: &str, i: usize, k: &crate::link::LinkKnobs| {
            Link::new(k.clone(), Prng::fork(seed, name, i as u64))
        };
        let links = |name: &str, all: &[crate::link::LinkKnobs]| {
            all.iter().enumerate().map(|(i, k)| link(name, i, k)).collect::<Vec<_>>()
        };
        let mut world = Self {
            seed,
            now: 0,
            queue: BTreeMap::new(),
            queued: 0,
            steps: 0,
            client_wakes: vec![None; clients.len()],
            guests: Vec::new(),
            known: Vec::new(),
            fenced: Vec::new(),
            guest_wakes: Vec::new(),
            client_up: links("client up", &knobs.client_links),
            client_down: links("client down", &knobs.client_links),
            guest_up: links("guest up", &knobs.guest_links),
            guest_down: links("guest down", &knobs.guest_links),
            recent: Vec::new(),
            service: Service::new(config),
            suspicion: None,
            timer: None,
            timer_storm: 0,
            starved_until: 0,
            packets: 0,
            pending: knobs.faults.clone(),
            promotions: 0,
            deposed: None,
            agreement: Agreement::new(),
            observer: Observer::new(psc().into_iter().map(|a| SocketAddr::new(a, PORT)).collect()),
            checkers: checkers::all(&licence),
            coverage: Coverage::default(),
            trace,
            failure: None,
            rng: Prng::fork(seed, "world", 0),
            restores: Prng::fork(seed, "restores", 1),
            hostile: Prng::fork(seed, "hostile", 1),
            shots: 0,
            excuse: None,
            impaired: BTreeMap::new(),
            untrue: BTreeSet::new(),
            resetters: BTreeSet::new(),
            forgetful_served: false,
            untrue_served: false,
            lies_served: false,
            last_status: 0,
            refused: BTreeSet::new(),
            died: BTreeSet::new(),
            disputable: BTreeSet::new(),
            killed: BTreeSet::new(),
            own_syns: BTreeSet::new(),
            lost_behind_lossy: false,
            standing: Vec::new(),
            story: String::new(),
            bare,
            plane: (path == Path::Kernel).then(plane::Plane::default),
            clients,
            knobs,
        };
        if world.plane.is_some() {
            world.tell(Input::PlanePasses);
        }
        world.begin();
        world
    }

    fn begin(&mut self) {
        for index in 0..self.knobs.guests.len() {
            let spec = self.add_guest(index);
            let result = self.command(match index {
                0 => Command::InstallOvm(spec),
                _ => Command::Attach { spec, seeding: Seeding::AssumeIdentical },
            });
            if index == 0 {
                self.observer.ovm = Some(self.guests[0].id);
            }
            if let Err(error) = result {
                self.fail("operator", format!("server {index} is refused: {error}"));
            }
            if !self.knobs.guest_links[index].faithful() {
                self.blemish(ServerId(index as u32 + 1));
            }
        }
        for client in 0..self.clients.len() {
            self.wake_client(client);
        }
        self.load_volleys();
        for (i, scheduled) in self.pending.clone().into_iter().enumerate() {
            if let When::At(at) = scheduled.when {
                self.push(at, Event::Strike(i));
            }
        }
        self.drain();
    }

    fn add_guest(&mut self, index: usize) -> ServerSpec {
        let id = ServerId(index as u32 + 1);
        let knobs = &self.knobs.guests[index];
        let guest = Guest::new(
            id,
            knobs.clone(),
            guest_addresses(index),
            PORT,
            splitmix(self.seed ^ (0x2000 + index as u64)),
        );
        let spec = ServerSpec { id, addresses: guest.addresses.clone(), mtu: guest.mtu() };
        self.observer.server_joins(id, guest.addresses.iter().map(|a| SocketAddr::new(*a, PORT)).collect());
        self.guests.push(guest);
        self.known.push(Known::Running);
        self.fenced.push(false);
        self.guest_wakes.push(None);
        self.recent.push(Vec::new());
        spec
    }

    fn instant(&self) -> Instant {
        Instant::from_micros(self.now)
    }

    fn push(&mut self, at: u64, event: Event) {
        self.queued += 1;
        self.queue.insert((at.max(self.now), self.queued), event);
    }

    /// Adds to the trace that a failure is reported with.
    fn note(&mut self, what: String) {
        self.story.push_str(&format!("; {}.{:06} {what}", self.now / 1_000_000, self.now % 1_000_000));
    }

    pub(crate) fn fail(&mut self, rule: &str, text: String) {
        if self.failure.is_none() {
            self.trace.line(self.now, || format!("FAILED {rule}: {text}"));
            self.failure = Some(Failure { rule: rule.to_owned(), at: self.now, text: text + &self.story });
        }
    }

    /// Runs to the end; the failure, if there was one.
    pub(crate) fn run(&mut self) -> Option<Failure> {
        let mut settled_at = None;
        while self.failure.is_none() {
            self.steps += 1;
            if self.steps > STEPS {
                self.fail("liveness", "the run does not end".into());
                break;
            }
            let finished = self.clients[..self.honest()].iter().all(Client::finished) && self.shots == 0;
            if finished && settled_at.is_none() {
                settled_at = Some(self.now + SETTLE_US);
            }
            let limit = settled_at.unwrap_or(PATIENCE_US);
            let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= limit) else {
                self.now = limit;
                if settled_at.is_some() && self.is_settling() {
                    settled_at = Some(limit + SETTLE_US);
                    continue;
                }
                break;
            };
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            self.handle(event);
        }
        if self.failure.is_none() {
            let verdict = verdict::judge(self);
            if let Err((rule, text)) = verdict {
                self.fail(rule, text);
            }
        }
        self.describe();
        self.failure.clone()
    }

    /// Whether the OVM still lacks something and makes progress, or could not reach dom0 at times.
    fn is_settling(&mut self) -> bool {
        let status = self.service.status();
        let catches_up = |s: &ServerStatus| s.role != Role::Rvm && s.behind_bytes > 0;
        let behind = status.recuperating > 0 || status.servers.iter().any(catches_up);
        let standing = status.servers.iter().map(|s| s.behind_bytes).collect();
        let moved = core::mem::replace(&mut self.standing, standing) != self.standing;
        let links = self.guest_up.iter().chain(&self.guest_down);
        let cut = links.map(Link::cut_until).max().unwrap_or(0) + SETTLE_US > self.now;
        behind && (moved || cut) && self.now < PATIENCE_US
    }

    /// The state of every host, for the end of a trace.
    fn describe(&mut self) {
        let status = self.service.status();
        if status.counters.get("ahead_bytes").is_some_and(|times| *times > 0) {
            self.coverage.hit("plane.bounded");
        }
        for server in &status.servers {
            self.trace.line(self.now, || format!("{server:?}"));
        }
        for c in &self.observer.conversations {
            self.trace.line(self.now, || {
                let legs: Vec<_> = c
                    .legs
                    .iter()
                    .map(|(id, l)| {
                        let end = if l.fin.is_some() { " FIN" } else { "" };
                        let reset = if l.reset { " RST" } else { "" };
                        format!("{}: got {} said {}{end}{reset}", id.0, l.handed, l.produced.contiguous())
                    })
                    .collect();
                format!(
                    "{}: client sent {}{}{} and was sent {}{}{}; servers {}",
                    c.client,
                    c.received.contiguous(),
                    if c.client_fin.is_some() { " FIN" } else { "" },
                    if c.client_reset { " RST" } else { "" },
                    c.sent.contiguous(),
                    if c.sent_fin.is_some() { " FIN" } else { "" },
                    if c.reset_to_client { " RST" } else { "" },
                    legs.join(", ")
                )
            });
        }
        for conversation in self.service.conversations(0, 1000) {
            self.trace.line(self.now, || format!("{conversation:?}"));
        }
    }

    fn handle(&mut self, event: Event) {
        let for_dom0 = match &event {
            Event::FromServer(_, packet) if *packet == LINK_ANSWER => true,
            // The kernel is not starved with the daemon.
            Event::FromClient(..) | Event::FromServer(..) => self.plane.is_none(),
            Event::EngineTimer | Event::DaemonPoll | Event::Look => true,
            _ => false,
        };
        if for_dom0 && self.now < self.starved_until {
            self.push(self.starved_until, event);
            return;
        }
        match event {
            Event::FromClient(client, packet) => self.client_says(client, &packet),
            Event::FromServer(guest, packet) if packet == LINK_ANSWER => self.sign_of(guest),
            Event::FromServer(guest, packet) => self.server_says(guest, &packet),
            Event::ToClient(client, packet) => {
                self.clients[client].receive(packet);
                self.poll_client(client);
            }
            Event::ToServer(guest, packet) if packet == LINK_QUESTION => {
                if self.guests[guest].stack_runs() {
                    self.guest_sends(guest, LINK_ANSWER);
                }
            }
            Event::ToServer(guest, packet) => {
                self.guests[guest].receive(packet);
                self.poll_guest(guest);
            }
            Event::WakeClient(client) => {
                if self.client_wakes[client] == Some(self.now) {
                    self.client_wakes[client] = None;
                    self.poll_client(client);
                }
            }
            Event::WakeServer(guest) => {
                if self.guest_wakes[guest] == Some(self.now) {
                    self.guest_wakes[guest] = None;
                    self.poll_guest(guest);
                }
            }
            Event::EngineTimer => {
                if self.timer == Some(self.now) || self.timer.is_some_and(|t| t <= self.now) {
                    self.timer = None;
                    self.tell(Input::Timeout);
                    self.drain();
                    self.settle();
                    self.watch_timer_storm();
                }
            }
            Event::DaemonPoll => self.daemon_poll(),
            Event::Look => self.look_at_ring(),
            Event::Fenced(id) => self.fence_done(id),
            Event::Strike(index) => self.strike(index),
            Event::Shoot(client, shot) => self.shoot(client, shot),
        }
    }

    fn watch_timer_storm(&mut self) {
        if self.timer.is_some_and(|t| t <= self.now + 1) {
            self.timer_storm += 1;
            if self.timer_storm > 10_000 {
                self.fail(
                    "bounded",
                    "the engine asks for its timer again and again without time passing".into(),
                );
            }
        } else {
            self.timer_storm = 0;
        }
    }

    // ---- hosts ----------------------------------------------------------------------------------

    fn wake_client(&mut self, client: usize) {
        self.client_wakes[client] = Some(self.now);
        self.push(self.now, Event::WakeClient(client));
    }

    fn poll_client(&mut self, index: usize) {
        let packets = self.clients[index].poll(self.now, &mut self.agreement);
        let packets = self.twist(index, packets);
        for packet in packets {
            let queue = &mut self.queue;
            let queued = &mut self.queued;
            self.client_up[index].carry(self.now, packet, |at, packet| {
                *queued += 1;
                queue.insert((at, *queued), Event::FromClient(index, packet));
            });
        }
        let next = self.clients[index].poll_at(self.now);
        if let Some(at) = next
            && self.client_wakes[index].is_none_or(|w| at < w || w < self.now)
        {
            // A stack that wants to be polled again at once is given a moment.
            let at = at.max(self.now + 1);
            self.client_wakes[index] = Some(at);
            self.push(at, Event::WakeClient(index));
        }
        if core::mem::take(&mut self.agreement.released) {
            for other in 0..self.clients.len() {
                self.wake_client(other);
            }
        }
    }

    fn poll_guest(&mut self, index: usize) {
        let packets = self.guests[index].poll(self.now);
        for packet in packets {
            let recent = &mut self.recent[index];
            if recent.len() >= 16 {
                recent.remove(0);
            }
            recent.push(packet.clone());
            self.guest_sends(index, packet);
        }
        let next = self.guests[index].poll_at(self.now);
        if let Some(at) = next
            && self.guest_wakes[index].is_none_or(|w| at < w || w < self.now)
        {
            let at = at.max(self.now + 1);
            self.guest_wakes[index] = Some(at);
            self.push(at, Event::WakeServer(index));
        }
    }

    fn guest_sends(&mut self, index: usize, packet: Vec<u8>) {
        let queue = &mut self.queue;
        let queued = &mut self.queued;
        self.guest_up[index].carry(self.now, packet, |at, packet| {
            *queued += 1;
            queue.insert((at, *queued), Event::FromServer(index, packet));
        });
    }

    pub(crate) fn guest_of(&self, id: ServerId) -> Option<usize> {
        self.guests.iter().position(|g| g.id == id)
    }
}
