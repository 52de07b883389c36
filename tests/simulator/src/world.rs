//! One run: hosts, links, dom0 with the engine, and what happens to them in virtual time.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet};

use understudy_protocol::{
    Destination, Effect, EventKind, Evidence, Instant, LinkAddress, OperatorError, Role, Seeding, ServerId,
    ServerSpec, ServerStatus, Service, ServiceConfig,
};

use crate::checkers::{self, Checker, Licence};
use crate::client::{Agreement, Client};
use crate::coverage::Coverage;
use crate::fault::{Fault, Join, Scheduled, Target, When};
use crate::forge;
use crate::guest::{Guest, Health};
use crate::knobs::Knobs;
use crate::link::Link;
use crate::observer::{Conversation, Observer, Seen};
use crate::prng::{Prng, splitmix};
use crate::segment::Segment;
use crate::trace::Trace;
use crate::verdict;

const PORT: u16 = 6379;
/// Most servers in one run, those that went included.
const GUESTS: usize = 10;
/// A run that takes more steps than this does not end.
const STEPS: u64 = 3_000_000;
/// Virtual time after which connections that have not ended are stuck. smoltcp backs off up to
/// 60 s, so a few losses in a row take long.
const PATIENCE_US: u64 = 400_000_000;
/// Virtual time that servers are given to settle before their states are compared.
const SETTLE_US: u64 = 15_000_000;

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
    Fenced(ServerId),
    Strike(usize),
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
    /// Why a connection may come to harm, if it may.
    pub(crate) excuse: Option<&'static str>,
    /// Servers that may have lost conversations, or lose them when they serve; and why.
    impaired: BTreeMap<ServerId, &'static str>,
    /// Servers whose answers are not what the service would say, and whether one of them served.
    untrue: BTreeSet<ServerId>,
    pub(crate) untrue_served: bool,
    /// A server whose segments are not what a TCP would send served: then nobody can know what was said.
    lies_served: bool,
    last_status: u64,
    /// Handshakes that nobody but the OVM knew of when its service died.
    pub(crate) refused: BTreeSet<(SocketAddr, u32)>,
    /// Servers whose service died while they served.
    pub(crate) died: BTreeSet<ServerId>,
    /// How far each server was behind when the run was last about to end.
    standing: Vec<u64>,
    /// Faults, actions and promotions so far.
    story: String,
    bare: bool,
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
    /// `bare` leaves the engine out: clients talk to the first server, and nothing fails. What goes
    /// wrong then is the simulator's own fault.
    pub(crate) fn new(seed: u64, mut knobs: Knobs, trace: Trace, bare: bool) -> Self {
        if bare {
            knobs.faults.clear();
            knobs.guests.truncate(1);
            knobs.guest_links.truncate(1);
        }
        let mut config = ServiceConfig::new("sim", psc(), vec![PORT]);
        config.limits = knobs.limits;
        config.timing = knobs.timing;
        config.candidate = knobs.candidate;
        config.on_lag = knobs.on_lag;
        config.seed = seed;
        let licence = Licence {
            servers_in_order: knobs.guest_links.iter().all(crate::link::LinkKnobs::faithful),
            lag_limit_us: knobs.timing.lag_limit.as_micros() as u64,
            retained_limit: knobs.limits.lag_bytes * knobs.guests.len() as u64 * 2,
            equal_windows: false,
        };
        let clients: Vec<_> = knobs
            .clients
            .iter()
            .enumerate()
            .map(|(i, k)| {
                Client::new(
                    i,
                    k.clone(),
                    client_addresses(i),
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
            excuse: None,
            impaired: BTreeMap::new(),
            untrue: BTreeSet::new(),
            untrue_served: false,
            lies_served: false,
            last_status: 0,
            refused: BTreeSet::new(),
            died: BTreeSet::new(),
            standing: Vec::new(),
            story: String::new(),
            bare,
            clients,
            knobs,
        };
        world.begin();
        world
    }

    fn begin(&mut self) {
        for index in 0..self.knobs.guests.len() {
            let spec = self.add_guest(index);
            let result = if index == 0 {
                self.service.install_ovm(self.instant(), spec)
            } else {
                self.service.attach(self.instant(), spec, Seeding::AssumeIdentical)
            };
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

    /// Adds to the story that a failure is reported with.
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
            let finished = self.clients.iter().all(Client::finished);
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

    /// The OVM lacks something still, and gets on with it, or could not reach dom0 all the time.
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

    /// Where everybody stands, at the end of a trace.
    fn describe(&mut self) {
        let status = self.service.status();
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
        let for_dom0 = matches!(
            event,
            Event::FromClient(..) | Event::FromServer(..) | Event::EngineTimer | Event::DaemonPoll
        );
        if for_dom0 && self.now < self.starved_until {
            self.push(self.starved_until, event);
            return;
        }
        match event {
            Event::FromClient(client, packet) => self.client_says(client, &packet),
            Event::FromServer(guest, packet) => self.server_says(guest, &packet),
            Event::ToClient(client, packet) => {
                self.clients[client].receive(packet);
                self.poll_client(client);
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
                    self.service.handle_timeout(self.instant());
                    self.drain();
                    self.watch_timer_storm();
                }
            }
            Event::DaemonPoll => self.daemon_poll(),
            Event::Fenced(id) => self.fence_done(id),
            Event::Strike(index) => self.strike(index),
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

    // ---- dom0 -----------------------------------------------------------------------------------

    fn see(&mut self, seen: &Seen<'_>) {
        let silent = self.lies_served || self.observer.is_long_over(seen, self.now);
        for checker in self.checkers.iter_mut().filter(|_| !silent) {
            if let Err(text) = checker.see(&self.observer, self.now, seen) {
                let rule = checker.rule();
                self.observer.record(self.now, seen);
                self.fail(rule, text);
                return;
            }
        }
        self.observer.record(self.now, seen);
    }

    fn client_says(&mut self, client: usize, packet: &[u8]) {
        let mut whole = packet.to_vec();
        crate::disguise::complete_checksum(&mut whole);
        self.trace.packet(self.now, &format!("client {client} >"), &whole);
        if let Ok(segment) = Segment::parse(&whole) {
            self.see(&Seen::FromClient(&segment));
        }
        if self.bare && Segment::parse(&whole).is_ok() {
            let mut packet = whole;
            let to = self.guests[0].addresses.clone();
            crate::disguise::readdress(&mut packet, None, Some(&to));
            self.carry_to_server(0, packet);
        }
        if self.bare {
            return;
        }
        self.service.handle_client(self.instant(), link_address(client), packet);
        self.after_packet();
    }

    fn server_says(&mut self, guest: usize, packet: &[u8]) {
        let id = self.guests[guest].id;
        let mut whole = packet.to_vec();
        crate::disguise::complete_checksum(&mut whole);
        self.trace.packet(self.now, &format!("{id:?} >"), &whole);
        if let Ok(segment) = Segment::parse(&whole) {
            self.see(&Seen::FromServer(id, &segment));
        }
        if self.bare {
            let client = Segment::parse(&whole).ok().and_then(|s| {
                let to = s.dst.ip();
                self.clients.iter().position(|c| c.addresses.contains(&to))
            });
            crate::disguise::readdress(&mut whole, Some(&psc()), None);
            if let Some(client) = client {
                self.carry_to_client(client, whole);
            }
            return;
        }
        self.service.handle_server(self.instant(), id, packet);
        self.after_packet();
    }

    fn after_packet(&mut self) {
        self.drain();
        self.packets += 1;
        for index in 0..self.pending.len() {
            if self.pending[index].when == When::Packets(self.packets) {
                self.strike(index);
            }
        }
        if self.packets.is_multiple_of(64) || self.now > self.last_status + 1_000_000 {
            self.last_status = self.now;
            let status = self.service.status();
            self.see(&Seen::Status(&status));
        }
    }

    /// Drains the engine as its documentation says.
    fn drain(&mut self) {
        while let Some(effect) = self.service.poll_effect() {
            self.effect(effect);
        }
        while let Some(transmit) = self.service.poll_transmit(self.instant()) {
            // What led to it may have been found while working.
            while let Some(effect) = self.service.poll_effect() {
                self.effect(effect);
            }
            match transmit.to {
                Destination::Client(link) => self.transmit_to_client(link, transmit.packet),
                Destination::Server(id) => self.transmit_to_server(id, transmit.packet),
            }
            if self.failure.is_some() {
                return;
            }
        }
        while let Some(effect) = self.service.poll_effect() {
            self.effect(effect);
        }
        let Some(at) = self.service.poll_timeout() else {
            self.timer = None;
            return;
        };
        let lateness = self.rng.between(0, self.knobs.timer_lateness_us);
        let due = at.as_micros().max(self.now) + lateness;
        if self.timer != Some(due) && self.timer.is_none_or(|t| due < t || t < self.now) {
            self.timer = Some(due);
            self.push(due, Event::EngineTimer);
        }
    }

    fn transmit_to_client(&mut self, link: LinkAddress, packet: Vec<u8>) {
        let client = usize::from(link.0[5]);
        self.trace.packet(self.now, &format!("> client {client}"), &packet);
        let segment = match Segment::parse(&packet) {
            Ok(segment) => segment,
            Err(why) => {
                self.fail("well-formed", format!("a client is sent a packet with {why}"));
                return;
            }
        };
        let wrong = if !self.observer.psc.contains(&segment.src) {
            Some("does not come from the PSC")
        } else if !self.clients.get(client).is_some_and(|c| c.addresses.contains(&segment.dst.ip())) {
            Some("goes to another client's link address")
        } else if packet.len() > 9000 {
            Some("is longer than any MTU")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            let text = format!("a segment {wrong}: {segment}");
            self.fail("well-formed", text);
            return;
        }
        if segment.seq > u32::MAX - 70_000 && segment.syn {
            self.coverage.hit("wrap.server");
        }
        self.see(&Seen::ToClient(&segment));
        self.carry_to_client(client, packet);
    }

    fn carry_to_client(&mut self, client: usize, packet: Vec<u8>) {
        let queue = &mut self.queue;
        let queued = &mut self.queued;
        self.client_down[client].carry(self.now, packet, |at, packet| {
            *queued += 1;
            queue.insert((at, *queued), Event::ToClient(client, packet));
        });
    }

    fn transmit_to_server(&mut self, id: ServerId, packet: Vec<u8>) {
        self.trace.packet(self.now, &format!("> {id:?}"), &packet);
        let Some(guest) = self.guest_of(id) else {
            self.fail("well-formed", format!("a packet to {id:?}, which never was"));
            return;
        };
        let segment = match Segment::parse(&packet) {
            Ok(segment) => segment,
            Err(why) => {
                self.fail("well-formed", format!("{id:?} is sent a packet with {why}"));
                return;
            }
        };
        let wrong = if !self.guests[guest].addresses.contains(&segment.dst.ip()) {
            Some("does not go to the guest's own address")
        } else if packet.len() > usize::from(self.guests[guest].mtu()) && self.observer.ovm != Some(id) {
            Some("is longer than the vif's MTU")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            let text = format!("a segment {wrong}: {segment}");
            self.fail("well-formed", text);
            return;
        }
        if segment.seq > u32::MAX - 70_000 && segment.syn {
            self.coverage.hit("wrap.client");
        }
        self.see(&Seen::ToServer(id, &segment));
        self.carry_to_server(guest, packet);
    }

    fn carry_to_server(&mut self, guest: usize, packet: Vec<u8>) {
        let queue = &mut self.queue;
        let queued = &mut self.queued;
        self.guest_down[guest].carry(self.now, packet, |at, packet| {
            *queued += 1;
            queue.insert((at, *queued), Event::ToServer(guest, packet));
        });
    }

    fn effect(&mut self, effect: Effect) {
        self.trace.line(self.now, || format!("effect {effect:?}"));
        match effect {
            Effect::Cutover { from, to, .. } => {
                self.see(&Seen::Cutover { to });
                let Some(from) = from else { return };
                self.deposed = Some(from);
                self.promotions += 1;
                self.coverage.hit(match self.promotions {
                    1 => "promotion.first",
                    2 => "promotion.second",
                    3 => "promotion.third",
                    _ => "promotion.further",
                });
                self.note(format!("{from:?} -> {to:?}"));
                self.untrue_served |= self.untrue.contains(&to);
                self.lies_served |= self.observer.liars.contains(&to);
                if let Some(why) = self.impaired.get(&to) {
                    self.excuse.get_or_insert(why);
                }
                for index in 0..self.pending.len() {
                    if let When::AfterPromotion(n, wait) = self.pending[index].when
                        && n == self.promotions
                    {
                        self.push(self.now + wait, Event::Strike(index));
                    }
                }
            }
            Effect::Fence(id) => {
                let at = self.now + self.knobs.fence_us;
                self.push(at, Event::Fenced(id));
            }
            Effect::Event(event) => {
                self.event(&event.kind);
                self.see(&Seen::Event(&event.kind));
            }
        }
    }

    fn event(&mut self, kind: &EventKind) {
        match kind {
            EventKind::Suspected { server, evidence } => {
                // smoltcp does not always send into a window that opens again. That is no progress.
                let idle = self.guest_of(*server).is_some_and(|g| self.guests[g].holds_back(self.now));
                // Nor does it answer a repeated SYN before its own timer runs out.
                let deaf = self.guest_of(*server).is_some_and(|g| self.guests[g].is_half_open());
                if idle && *evidence == Evidence::NoProgress
                    || deaf && *evidence == Evidence::UnacknowledgedSegment
                {
                    self.blemish(*server);
                }
                self.note(format!("{evidence:?}"));
                self.coverage.hit(&format!("evidence.{evidence:?}"));
            }
            EventKind::NoCandidate { .. } => {
                self.coverage.hit("event.no candidate");
                self.excuse.get_or_insert("nothing was promotable");
            }
            EventKind::Seeded { server } | EventKind::Attached { server, seeded: true } => {
                self.coverage.hit("event.seeded");
                self.copy_state(*server);
            }
            EventKind::Evicted { .. } => self.coverage.hit("event.evicted"),
            EventKind::Stale { .. } => self.coverage.hit("event.stale"),
            EventKind::Diverged { .. } => self.coverage.hit("event.diverged"),
            EventKind::Recuperated { .. } => self.coverage.hit("event.recuperated"),
            EventKind::Unprotected { .. } => self.coverage.hit("event.unprotected"),
            EventKind::Reset { .. } => self.coverage.hit("event.reset"),
            _ => {}
        }
    }

    /// What an operator did who states that a server's state equals the OVM's.
    fn copy_state(&mut self, server: ServerId) {
        let ovm = self.service.ovm().and_then(|id| self.guest_of(id));
        if let (Some(ovm), Some(guest)) = (ovm, self.guest_of(server)) {
            self.guests[guest].shared = self.guests[ovm].shared.clone();
        }
    }

    fn daemon_poll(&mut self) {
        let mut evidence = Vec::new();
        for index in 0..self.guests.len() {
            let guest = &self.guests[index];
            let state = match guest.health {
                Health::Gone => Known::Gone,
                _ if guest.paused() => Known::Paused,
                _ => Known::Running,
            };
            if core::mem::replace(&mut self.known[index], state) == state {
                continue;
            }
            let id = guest.id;
            self.service.handle_running(self.instant(), id, state == Known::Running);
            match state {
                Known::Gone => evidence.push((id, Evidence::DomainGone)),
                Known::Paused if !self.fenced[index] => evidence.push((id, Evidence::DomainPaused)),
                _ => {}
            }
        }
        for (id, kind) in evidence {
            self.trace.line(self.now, || format!("daemon: {id:?} {kind:?}"));
            self.service.handle_evidence(self.instant(), id, kind);
        }
        self.drain();
    }

    /// Domain state changed; the daemon notices at its next look.
    fn domain_changed(&mut self) {
        let next = (self.now / self.knobs.poll_us + 1) * self.knobs.poll_us;
        self.push(next, Event::DaemonPoll);
    }

    fn fence_done(&mut self, id: ServerId) {
        if let Some(guest) = self.guest_of(id) {
            self.fenced[guest] = true;
            if self.guests[guest].health != Health::Gone {
                self.guests[guest].health = Health::Frozen;
            }
            self.domain_changed();
        }
    }

    // ---- faults ---------------------------------------------------------------------------------

    /// Something was done to a server: from now on it may be suspected.
    fn blemish(&mut self, id: ServerId) {
        self.see(&Seen::Blemish(id));
    }

    /// The server may have lost conversations, or lose them when it serves.
    fn impair(&mut self, id: ServerId, why: &'static str) {
        self.impaired.entry(id).or_insert(why);
        self.blemish(id);
    }

    fn resolve(&self, target: Target) -> Option<usize> {
        let id = match target {
            Target::Ovm => self.service.ovm(),
            Target::Deposed => self.deposed,
            Target::Rvm(n) => {
                let rvms: Vec<_> = self
                    .service
                    .status()
                    .servers
                    .iter()
                    .filter(|s| s.role == Role::Rvm)
                    .map(|s| s.server)
                    .collect();
                (!rvms.is_empty()).then(|| rvms[n % rvms.len()])
            }
        };
        id.and_then(|id| self.guest_of(id))
    }

    fn strike(&mut self, index: usize) {
        let fault = self.pending[index].fault;
        self.trace.line(self.now, || format!("fault {fault:?}"));
        self.note(format!("{fault:?}"));
        match fault {
            Fault::CutClient { client, us } => {
                self.client_up[client].cut(self.now + us);
                self.client_down[client].cut(self.now + us);
                self.coverage.hit("fault.cut client");
            }
            Fault::StarveDom0 { us } => {
                self.starved_until = self.now + us;
                self.coverage.hit("fault.starve dom0");
                // A starved host is slow for everybody; who is accused then is no matter here.
                for guest in 0..self.guests.len() {
                    let id = self.guests[guest].id;
                    self.blemish(id);
                }
            }
            Fault::Switchover => {
                let result = self.service.switchover(self.instant(), None);
                self.action("switchover", result.map(|_| ()));
            }
            Fault::Failover { force } => {
                let result = self.service.failover(self.instant(), None, force);
                if force && result.is_ok() {
                    self.excuse.get_or_insert("a forced failover");
                }
                self.action("failover", result.map(|_| ()));
            }
            Fault::Attach(join) => self.attach(join),
            Fault::Detach(target) => {
                if let Some(guest) = self.resolve(target) {
                    let id = self.guests[guest].id;
                    let result = self.service.detach(self.instant(), id);
                    self.action("detach", result);
                }
            }
            _ => self.strike_server(fault),
        }
        self.excuse_of_loss();
        self.drain();
    }

    fn action(&mut self, name: &str, result: Result<(), OperatorError>) {
        self.trace.line(self.now, || format!("{name}: {result:?}"));
        match result {
            Ok(()) => self.coverage.hit(&format!("action.{name}")),
            Err(_) => self.coverage.hit(&format!("action.{name} refused")),
        }
    }

    fn attach(&mut self, join: Join) {
        let index = self.guests.len();
        if index >= GUESTS {
            return;
        }
        let mut knobs = self.knobs.guests[0].clone();
        knobs.stack.timestamp_offset = self.rng.next() as u32;
        self.knobs.guests.push(knobs);
        for links in [&mut self.guest_up, &mut self.guest_down] {
            let knobs = crate::link::LinkKnobs { delay_us: 50, ..Default::default() };
            links.push(Link::new(knobs, Prng::fork(self.seed, "late link", index as u64)));
        }
        let spec = self.add_guest(index);
        let id = spec.id;
        let seeding = match join {
            Join::Unseeded => Seeding::Unseeded,
            Join::AssumeIdentical => Seeding::AssumeIdentical,
            Join::Drain { deadline_us } => {
                Seeding::Drain { deadline: self.instant() + Duration::from_micros(deadline_us) }
            }
        };
        let result = self.service.attach(self.instant(), spec, seeding);
        if result.is_err() {
            self.guests[index].health = Health::Gone;
        } else {
            self.impair(id, "joined later");
        }
        self.action("attach", result);
    }

    fn strike_server(&mut self, fault: Fault) {
        let (target, name) = match fault {
            Fault::Freeze(t) => (t, "freeze"),
            Fault::Thaw(t) => (t, if t == Target::Deposed { "thaw deposed" } else { "thaw" }),
            Fault::Crash(t) => (t, "crash"),
            Fault::Hang(t) => (t, "hang"),
            Fault::Spin(t) => (t, "spin"),
            Fault::Kill { target, .. } => (target, "kill"),
            Fault::Slow { target, .. } => (target, "slow"),
            Fault::WrongAnswer(t) => (t, "wrong answer"),
            Fault::Garbage { target, .. } => (target, "garbage"),
            Fault::Mutated { target, .. } => (target, "mutated"),
            Fault::ResetAll(t) => (t, "reset all"),
            Fault::CutServer { target, .. } => (target, "cut server"),
            _ => return,
        };
        let Some(index) = self.resolve(target) else {
            return;
        };
        let id = self.guests[index].id;
        let now = self.now;
        self.coverage.hit(&format!("fault.{name}"));
        if !matches!(fault, Fault::Thaw(_)) {
            self.impair(id, name_of_impairment(fault));
        }
        if matches!(fault, Fault::Mutated { .. }) {
            self.observer.liars.insert(id);
            // What it says of itself may look like an answer that the OVM does not begin.
            for id in self.guests.iter().map(|g| g.id).collect::<Vec<_>>() {
                self.blemish(id);
            }
        }
        if matches!(fault, Fault::Mutated { .. } | Fault::WrongAnswer(_)) {
            self.untrue.insert(id);
        }
        if self.service.ovm() == Some(id) && !matches!(fault, Fault::Thaw(_)) {
            self.excuse_of_blow(fault);
        }
        let guest = &mut self.guests[index];
        if guest.health == Health::Gone {
            return;
        }
        match fault {
            Fault::Freeze(_) => guest.health = Health::Frozen,
            Fault::Spin(_) => guest.health = Health::Spinning,
            Fault::Crash(_) => guest.health = Health::Gone,
            Fault::Hang(_) if guest.health == Health::Running => guest.health = Health::Hung,
            Fault::Thaw(_) => guest.thaw(),
            Fault::Kill { orderly, .. } => guest.kill_process(orderly),
            Fault::Slow { us, .. } => guest.slow_us = us,
            Fault::WrongAnswer(_) => guest.wrong_answer = true,
            Fault::CutServer { us, .. } => {
                self.guest_up[index].cut(now + us);
                self.guest_down[index].cut(now + us);
            }
            Fault::Garbage { packets, .. } => {
                for _ in 0..packets {
                    let packet = forge::noise(&mut self.rng);
                    self.guest_sends(index, packet);
                }
            }
            Fault::Mutated { packets, .. } => {
                for _ in 0..packets {
                    if self.recent[index].is_empty() {
                        break;
                    }
                    let model = self.rng.pick(&self.recent[index]).clone();
                    let packet = forge::mutated(&mut self.rng, &model);
                    self.guest_sends(index, packet);
                }
            }
            Fault::ResetAll(_) => self.reset_all(index),
            _ => {}
        }
        self.domain_changed();
        self.poll_guest(index);
    }

    /// Replicas that could take over, and that nothing was done to.
    fn healthy_replicas(&self) -> Vec<usize> {
        self.promotable_replicas()
            .into_iter()
            .filter(|&g| !self.impaired.contains_key(&self.guests[g].id))
            .collect()
    }

    fn promotable_replicas(&self) -> Vec<usize> {
        let status = self.service.status();
        let promotable = status.servers.iter().filter(|s| s.not_promotable.is_none());
        promotable.filter_map(|s| self.guest_of(s.server)).collect()
    }

    /// The last healthy replica may go while the OVM's fault is not seen yet, or the majority that it
    /// takes to see it.
    fn excuse_of_loss(&mut self) {
        let ovm = self.service.ovm().and_then(|id| self.guest_of(id));
        let Some(health) = ovm.map(|g| self.guests[g].health).filter(|h| *h != Health::Running) else {
            return;
        };
        let healthy = self.healthy_replicas().len();
        if healthy == 0 {
            self.excuse.get_or_insert("no healthy replica");
        } else if health == Health::Hung && healthy * 2 <= self.promotable_replicas().len() {
            self.excuse.get_or_insert("no majority of healthy replicas");
        }
    }

    /// Whether a fault of the OVM may harm connections by design: nobody healthy is there to take over,
    /// or what the fault shows is no evidence.
    fn excuse_of_blow(&mut self, fault: Fault) {
        if let (Fault::Kill { .. }, Some(ovm)) = (fault, self.service.ovm()) {
            self.died.insert(ovm);
        }
        let healthy = self.healthy_replicas();
        if healthy.is_empty() {
            self.excuse.get_or_insert("no healthy replica");
            return;
        }
        if let Fault::Kill { .. } = fault {
            let half_open = |c: &&Conversation| !c.established;
            self.refused
                .extend(self.observer.conversations.iter().filter(half_open).map(|c| (c.client, c.isn)));
            // A close is disputed by RVMs that have kept up within the hold, in several conversations.
            let prompt = healthy.iter().any(|&g| {
                let (guest, link) = (&self.knobs.guests[g], &self.knobs.guest_links.get(g));
                let quick = guest.think_us.1 <= 1000
                    && link.is_none_or(|l| l.delay_us + l.jitter_us <= 500 && l.faithful());
                let id = self.guests[g].id;
                let conversations = &self.observer.conversations;
                quick && conversations.iter().filter(|c| c.is_open() && c.kept_up(id)).count() > 2
            });
            if !prompt {
                self.excuse.get_or_insert("a close that nobody could dispute");
            }
        }
    }

    fn reset_all(&mut self, index: usize) {
        let id = self.guests[index].id;
        let mut resets = Vec::new();
        for conversation in &self.observer.conversations {
            if let Some(leg) = conversation.legs.get(&id)
                && let Some(iss) = leg.iss
            {
                let own = self
                    .observer
                    .servers
                    .get(&id)
                    .into_iter()
                    .flatten()
                    .find(|a| a.is_ipv6() == conversation.client.is_ipv6());
                let Some(own) = own else { continue };
                let seq = iss.wrapping_add(1).wrapping_add(leg.produced.contiguous() as u32);
                let ack = conversation.isn.wrapping_add(1).wrapping_add(leg.handed as u32);
                resets.push(forge::reset(*own, conversation.client, seq, Some(ack)));
            }
        }
        for packet in resets {
            self.guest_sends(index, packet);
        }
    }
}

fn name_of_impairment(fault: Fault) -> &'static str {
    match fault {
        Fault::Freeze(_) => "it was frozen",
        Fault::Crash(_) => "it crashed",
        Fault::Hang(_) => "it hung",
        Fault::Spin(_) => "it spun",
        Fault::Kill { .. } => "its service was killed",
        Fault::Slow { .. } => "it was slowed",
        Fault::WrongAnswer(_) => "it answered wrong",
        Fault::Garbage { .. } => "it sent garbage",
        Fault::Mutated { .. } => "it sent mutated segments",
        Fault::ResetAll(_) => "it reset its conversations",
        Fault::CutServer { .. } => "its link was cut",
        _ => "something was done to it",
    }
}
