//! The portable data plane, the paper's own construction: libpcap on the vif backends and on the PSC's
//! anchor, everything rewritten by the engine and injected again.
//!
//! What a guest sends is taken at its vif and kept from the bridge by nft rules (see [`crate::containment`]).
//! What clients send to the PSC's MAC ends at the anchor. Frames for a guest go to its vif itself,
//! never through the bridge.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::poll::PollFlags;
use understudy_protocol::{Destination, Instant, LinkAddress, Passage, ServerId, Sign, Transmit};

use super::neighbours::{Neighbour, Neighbours, Question, Response};
use super::{Bytes, Inbound, Loss, Origin, Plane};
use crate::link::device::{Device, Lost, SendError, mac_text};
use crate::link::frame::{self, Arp, Content, Frame, Mac, Solicitation, is_unicast};
use crate::link::psc::Psc;
use crate::link::vif::Interface;

/// Bytes taken from the anchor and from the OVM before the others have their turn: one super-packet, which
/// makes some forty segments for each server.
const TURN: usize = 65_536;

/// The same for an RVM: room for the acknowledgments of such a super-packet, and no more for a flood.
const RVM_TURN: usize = 32_768;

/// What the smallest frame counts for: its cost is not in its bytes.
const LEAST_COST: usize = 1_024;

/// When the PSC is announced after it came up, for those that missed the first time.
const EARLY_ANNOUNCEMENTS: [Duration; 3] =
    [Duration::from_millis(0), Duration::from_millis(1_000), Duration::from_millis(2_000)];

/// How often the PSC is announced after that: before bridges forget its MAC (300 s by default).
const ANNOUNCEMENT_INTERVAL: Duration = Duration::from_secs(60);

/// Signs of an OVM's life that wait to be taken: those of one round, each asked address once.
const SIGNS: usize = 64;

/// Attempts of RVMs to open connections that are kept to be told.
const OWN_CONNECTIONS: usize = 64;

/// Least time between two defences of the PSC's addresses (RFC 5227 §2.4).
const DEFEND_INTERVAL: Duration = Duration::from_secs(10);

/// A service's interfaces on the portable plane.
pub(crate) struct PcapPlane {
    psc: Psc,
    anchor: Option<Port>,
    servers: BTreeMap<ServerId, Server>,
    ovm: Option<ServerId>,
    neighbours: Neighbours,
    announced: usize,
    announce_at: Option<Instant>,
    defended: Option<Instant>,
    /// Whose turns are left until the next poll.
    turns: VecDeque<Turn>,
    /// The frame at hand.
    received: Vec<u8>,
    /// The frame being built.
    sending: Vec<u8>,
    losses: Vec<Loss>,
    /// Of the OVM's, not taken yet.
    signs: VecDeque<Sign>,
    own_connections: Vec<(ServerId, SocketAddr)>,
    counters: Counters,
}

struct Server {
    port: Port,
    mac: Mac,
    addresses: Vec<IpAddr>,
}

/// An interface that has something to be taken.
#[derive(Clone, Copy)]
struct Turn {
    /// Whose; `None` is the anchor.
    from: Option<ServerId>,
    /// What may still be taken, in bytes.
    left: usize,
    /// When what it has is taken, it is lost.
    is_down: bool,
}

/// An interface; without a device once that was lost.
struct Port {
    device: Option<Device>,
    lost_before: Lost,
}

impl Port {
    fn new(device: Device) -> Self {
        Self { device: Some(device), lost_before: Lost::default() }
    }
}

#[derive(Default)]
struct Counters {
    client_frames: u64,
    server_frames: u64,
    sent_to_clients: u64,
    sent_to_servers: u64,
    send_queue_full: u64,
    send_too_long: u64,
    send_interface_down: u64,
    send_failed: u64,
    no_interface: u64,
    no_link_address: u64,
    other_vlan_refused: u64,
    malformed: u64,
    neighbour_answers: u64,
    neighbour_questions: u64,
    signs_asked: u64,
    psc_conflicts: u64,
    own_connection_attempts: u64,
    capture_dropped: u64,
    capture_truncated: u64,
}

/// What a frame means for this plane.
enum Meaning {
    /// A packet for the engine, in this part of the frame at hand.
    Packet(Origin, std::ops::Range<usize>),
    /// Dealt with, or nothing to do.
    Done,
}

impl PcapPlane {
    /// A plane without interfaces.
    pub(crate) fn new(psc: Psc) -> Self {
        Self {
            psc,
            anchor: None,
            servers: BTreeMap::new(),
            ovm: None,
            neighbours: Neighbours::default(),
            announced: 0,
            announce_at: None,
            defended: None,
            turns: VecDeque::new(),
            received: Vec::with_capacity(65_536),
            sending: Vec::with_capacity(65_536),
            losses: Vec::new(),
            signs: VecDeque::new(),
            own_connections: Vec::new(),
            counters: Counters::default(),
        }
    }

    /// Takes the next frame from one interface, if there is one.
    fn take(&mut self, from: Option<ServerId>) -> Option<Frame> {
        let vlan = self.psc.vlan;
        let port = match from {
            None => self.anchor.as_mut(),
            Some(id) => self.servers.get_mut(&id).map(|server| &mut server.port),
        };
        match port?.device.as_mut()?.receive(&mut self.received) {
            Ok(true) => {
                let frame = frame::parse(&self.received);
                Some(frame.unwrap_or(Frame {
                    destination: [0; 6],
                    source: [0; 6],
                    vlan,
                    content: Content::Malformed,
                }))
            }
            Ok(false) => None,
            Err(error) => {
                self.lose(from, error.to_string());
                None
            }
        }
    }

    /// An interface gives nothing any more. The socket says so once, and libpcap, which then asks whether the interface
    /// is still there, keeps that to itself where it is about to go.
    fn lose(&mut self, from: Option<ServerId>, error: String) {
        let port = match from {
            None => self.anchor.as_mut(),
            Some(id) => self.servers.get_mut(&id).map(|server| &mut server.port),
        };
        if port.and_then(|port| port.device.take()).is_some() {
            self.losses.push(Loss { server: from, error });
        }
    }

    fn network_frame(&mut self, now: Instant, frame: Frame) -> Meaning {
        if self.is_of_another_vlan(&frame) {
            if self.is_for_psc(&frame) {
                self.refuse_vlan(&frame);
            }
            return Meaning::Done;
        }
        match frame.content {
            Content::Ip(range) => {
                if frame.destination != self.psc.mac {
                    return Meaning::Done;
                }
                if !is_unicast(frame.source) {
                    self.counters.malformed += 1;
                    return Meaning::Done;
                }
                self.counters.client_frames += 1;
                if let Some(address) = source_address(&self.received[range.clone()]) {
                    self.learn(address, frame.source, None);
                }
                return Meaning::Packet(Origin::Client(LinkAddress(frame.source)), range);
            }
            Content::Arp(arp) => self.network_arp(now, arp),
            Content::Solicitation(solicitation) => {
                if let Some(link) = solicitation.link {
                    self.learn(solicitation.source.into(), link, None);
                }
                if self.psc.v6 == Some(solicitation.target) {
                    self.answer_for_psc(&solicitation, frame.source);
                }
            }
            Content::Advertisement(advertisement) => {
                if self.psc.v6 == Some(advertisement.target) {
                    self.defend(now, advertisement.link.unwrap_or(frame.source));
                } else if let Some(link) = advertisement.link {
                    self.learn(advertisement.target.into(), link, Some(advertisement.router));
                }
            }
            Content::Malformed => self.counters.malformed += 1,
            Content::ManyTags | Content::Other => {}
        }
        Meaning::Done
    }

    fn is_of_another_vlan(&self, frame: &Frame) -> bool {
        frame.vlan != self.psc.vlan || frame.content == Content::ManyTags
    }

    /// Of what the bridge floods to all its VLANs, only this would be answered in the PSC's own.
    fn is_for_psc(&self, frame: &Frame) -> bool {
        frame.destination == self.psc.mac
            || match &frame.content {
                Content::Arp(arp) => self.psc.v4 == Some(arp.target),
                Content::Solicitation(solicitation) => self.psc.v6 == Some(solicitation.target),
                _ => false,
            }
    }

    /// Counted always, told once: a service in another VLAN than its clients would otherwise just not answer.
    fn refuse_vlan(&mut self, frame: &Frame) {
        self.counters.other_vlan_refused += 1;
        if self.counters.other_vlan_refused == 1 {
            tracing::warn!(
                sender = mac_text(frame.source),
                vlan = ?frame.vlan,
                service_vlan = ?self.psc.vlan,
                psc_v4 = ?self.psc.v4,
                psc_v6 = ?self.psc.v6,
                "frames of another VLAN than the service's are refused; where its clients or guests should be in that one, correct the service's `vlan`"
            );
        }
    }

    fn network_arp(&mut self, now: Instant, arp: Arp) {
        if !arp.sender.is_unspecified() && self.psc.v4 == Some(arp.sender) {
            return self.defend(now, arp.sender_mac);
        }
        self.learn(arp.sender.into(), arp.sender_mac, None);
        if arp.request && self.psc.v4 == Some(arp.target) {
            self.counters.neighbour_answers += 1;
            let reply = frame::arp_reply(self.psc.mac, arp.target, arp.sender_mac, arp.sender);
            self.send_to_network(&reply);
        }
    }

    fn answer_for_psc(&mut self, solicitation: &Solicitation, asker_mac: Mac) {
        self.counters.neighbour_answers += 1;
        // A probe for a free address is answered to all nodes (RFC 4861 §7.2.4).
        let to = (!solicitation.source.is_unspecified())
            .then_some((solicitation.link.unwrap_or(asker_mac), solicitation.source));
        let answer = frame::advertisement(self.psc.mac, solicitation.target, false, to);
        self.send_to_network(&answer);
    }

    /// Somebody else says that it has the PSC's address.
    fn defend(&mut self, now: Instant, claimant: Mac) {
        self.counters.psc_conflicts += 1;
        if self.defended.is_some_and(|at| now.since(at) < DEFEND_INTERVAL) {
            return;
        }
        self.defended = Some(now);
        tracing::warn!(
            claimant = mac_text(claimant),
            psc_v4 = ?self.psc.v4,
            psc_v6 = ?self.psc.v6,
            "another machine claims the PSC's address; take it from that machine, or give the service another PSC"
        );
        self.announce();
    }

    fn server_frame(&mut self, now: Instant, server: ServerId, frame: Frame) -> Meaning {
        if self.is_of_another_vlan(&frame) {
            self.refuse_vlan(&frame);
            return Meaning::Done;
        }
        let is_rvm = self.ovm != Some(server);
        if !is_rvm {
            self.note_sign(&frame.content);
        }
        match frame.content {
            Content::Ip(range) => {
                if let Some(to) = opens(&self.received[range.clone()]) {
                    // The OVM's go on to the bridge.
                    if is_rvm {
                        self.counters.own_connection_attempts += 1;
                        if self.own_connections.len() < OWN_CONNECTIONS {
                            self.own_connections.push((server, to));
                        }
                    }
                    return Meaning::Done;
                }
                self.counters.server_frames += 1;
                return Meaning::Packet(Origin::Server(server), range);
            }
            // The OVM's questions are answered by the network; an RVM's never reach it.
            Content::Arp(arp) if is_rvm && arp.request => {
                let is_probe = arp.sender.is_unspecified() || arp.sender == arp.target;
                if !is_probe {
                    self.question(
                        now,
                        Question {
                            server,
                            asker: arp.sender.into(),
                            asker_mac: arp.sender_mac,
                            target: arp.target.into(),
                        },
                    );
                }
            }
            Content::Solicitation(solicitation) if is_rvm && !solicitation.source.is_unspecified() => {
                self.question(
                    now,
                    Question {
                        server,
                        asker: solicitation.source.into(),
                        asker_mac: solicitation.link.unwrap_or(frame.source),
                        target: solicitation.target.into(),
                    },
                );
            }
            Content::Malformed => self.counters.malformed += 1,
            _ => {}
        }
        Meaning::Done
    }

    /// What the OVM says to its neighbours, it says because it lives.
    fn note_sign(&mut self, content: &Content) {
        let target = match content {
            // A probe or an announcement asks for nobody.
            Content::Arp(arp) if arp.request && arp.sender != arp.target && !arp.sender.is_unspecified() => {
                Some(arp.target.into())
            }
            Content::Solicitation(asks) if !asks.source.is_unspecified() => Some(asks.target.into()),
            Content::Arp(_) | Content::Solicitation(_) | Content::Advertisement(_) => None,
            _ => return,
        };
        let sign = match target {
            Some(target) => {
                let link = self.neighbours.get(target).map(|neighbour| LinkAddress(neighbour.mac));
                Sign::Asked { target, link }
            }
            None => Sign::Answered,
        };
        if self.signs.len() < SIGNS && !self.signs.contains(&sign) {
            self.signs.push_back(sign);
        }
    }

    fn question(&mut self, now: Instant, question: Question) {
        let psc = Neighbour { mac: self.psc.mac, router: false };
        if self.psc.has(question.target) {
            return self.answer(question, psc);
        }
        match self.neighbours.ask(now, question) {
            Response::Answer(neighbour) => self.answer(question, neighbour),
            Response::AnswerWithPsc => self.answer(question, psc),
            Response::Wait => {}
            Response::Ask => {
                self.counters.neighbour_questions += 1;
                let ask = match (question.target, self.psc.v4, self.psc.v6) {
                    (IpAddr::V4(target), Some(psc), _) => frame::arp_request(self.psc.mac, psc, target),
                    (IpAddr::V6(target), _, Some(psc)) => frame::solicitation(self.psc.mac, psc, target),
                    // The PSC has no address to ask from; a family that it does not serve.
                    _ => return,
                };
                self.send_to_network(&ask);
            }
        }
    }

    pub(super) fn learn(&mut self, address: IpAddr, mac: Mac, router: Option<bool>) {
        for question in self.neighbours.learn(address, mac, router) {
            if let Some(neighbour) = self.neighbours.get(address) {
                self.answer(question, neighbour);
            }
        }
    }

    fn answer(&mut self, question: Question, neighbour: Neighbour) {
        let frame = match (question.target, question.asker) {
            (IpAddr::V4(target), IpAddr::V4(asker)) => {
                frame::arp_reply(neighbour.mac, target, question.asker_mac, asker)
            }
            (IpAddr::V6(target), IpAddr::V6(asker)) => frame::advertisement(
                neighbour.mac,
                target,
                neighbour.router,
                Some((question.asker_mac, asker)),
            ),
            _ => return,
        };
        self.counters.neighbour_answers += 1;
        let sent = match self.servers.get_mut(&question.server) {
            Some(Server { port: Port { device: Some(device), .. }, .. }) => device.send(&frame, None),
            _ => return,
        };
        self.count_send(sent);
    }

    fn announce(&mut self) {
        if let Some(v4) = self.psc.v4 {
            self.send_to_network(&frame::arp_announcement(self.psc.mac, v4));
        }
        if let Some(v6) = self.psc.v6 {
            self.send_to_network(&frame::advertisement(self.psc.mac, v6, false, None));
        }
    }

    fn send_to_network(&mut self, frame: &[u8]) {
        let device = self.anchor.as_mut().and_then(|port| port.device.as_mut());
        match device.map(|device| device.send(frame, None)) {
            Some(sent) => self.count_send(sent),
            None => self.counters.no_interface += 1,
        }
    }

    fn count_send(&mut self, sent: Result<(), SendError>) {
        let counter = match sent {
            Ok(()) => return,
            Err(SendError::QueueFull) => &mut self.counters.send_queue_full,
            Err(SendError::TooLong) => &mut self.counters.send_too_long,
            Err(SendError::Down) => &mut self.counters.send_interface_down,
            Err(SendError::Other) => &mut self.counters.send_failed,
        };
        *counter += 1;
    }

    /// Adds up what the interfaces lost so far, before one of them is replaced or closed.
    fn note_lost(&mut self) {
        let servers = self.servers.values_mut().map(|server| &mut server.port);
        for port in self.anchor.iter_mut().chain(servers) {
            if let Some(device) = port.device.as_mut() {
                let lost = device.lost();
                self.counters.capture_dropped += lost.dropped.saturating_sub(port.lost_before.dropped);
                self.counters.capture_truncated += lost.truncated.saturating_sub(port.lost_before.truncated);
                port.lost_before = lost;
            }
        }
    }
}

impl Plane for PcapPlane {
    fn name(&self) -> &'static str {
        "pcap"
    }

    fn set_anchor(&mut self, now: Instant, far_end: Device) {
        self.note_lost();
        self.anchor = Some(Port::new(far_end));
        self.announced = 0;
        self.announce_at = Some(now);
    }

    fn is_anchored(&self) -> bool {
        self.anchor.as_ref().is_some_and(|anchor| anchor.device.is_some())
    }

    fn add_server(&mut self, server: ServerId, vif: Interface, mac: Mac, addresses: &[IpAddr]) {
        self.note_lost();
        let port = Port::new(vif.device);
        self.servers.insert(server, Server { port, mac, addresses: addresses.to_vec() });
    }

    fn has_server(&self, server: ServerId) -> bool {
        self.servers.get(&server).is_some_and(|server| server.port.device.is_some())
    }

    fn rename_server(&mut self, from: ServerId, to: ServerId) {
        self.neighbours.forget(from);
        if let Some(server) = self.servers.remove(&from) {
            self.servers.insert(to, server);
        }
    }

    fn remove_server(&mut self, server: ServerId) {
        self.note_lost();
        self.neighbours.forget(server);
        self.servers.remove(&server);
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let servers = self.servers.values().map(|server| &server.port);
        self.anchor.iter().chain(servers).filter_map(|port| port.device.as_ref().map(Device::fd)).collect()
    }

    fn set_ready(&mut self, ready: &[PollFlags]) {
        let anchor = self.anchor.iter().map(|port| (None, port));
        let servers = self.servers.iter().map(|(&id, server)| (Some(id), &server.port));
        let open = anchor.chain(servers).filter(|(_, port)| port.device.is_some());
        self.turns.clear();
        for ((from, _), ready) in open.zip(ready).filter(|(_, ready)| !ready.is_empty()) {
            let is_down = ready.contains(PollFlags::POLLERR);
            if from.is_none() || from == self.ovm {
                self.turns.push_front(Turn { from, left: TURN, is_down });
            } else {
                self.turns.push_back(Turn { from, left: RVM_TURN, is_down });
            }
        }
    }

    fn receive(&mut self, now: Instant) -> Option<Inbound<'_>> {
        let (origin, range) = loop {
            let &Turn { from, left, is_down } = self.turns.front()?;
            let Some(frame) = self.take(from) else {
                if is_down {
                    self.lose(from, "the interface is down, or gone".to_owned());
                }
                self.turns.pop_front();
                continue;
            };
            match left.checked_sub(self.received.len().max(LEAST_COST)) {
                Some(left) => self.turns[0].left = left,
                None => drop(self.turns.pop_front()),
            }
            let meaning = match from {
                None => self.network_frame(now, frame),
                Some(server) => self.server_frame(now, server, frame),
            };
            if let Meaning::Packet(origin, range) = meaning {
                break (origin, range);
            }
        };
        Some(Inbound { from: origin, packet: Bytes::Captured(&self.received[range]), passage: Passage::Kept })
    }

    fn ask(&mut self, server: ServerId) {
        let Some(known) = self.servers.get_mut(&server) else { return };
        let v4 = known.addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        // A probe teaches nobody anything, and the answer to it goes to the PSC's MAC, which is ours. One for an IPv6
        // address would be answered to all nodes: there it comes from the PSC's own link-local address.
        let frame = match (v4, known.addresses.first()) {
            (Some(v4), _) => frame::arp_request(self.psc.mac, Ipv4Addr::UNSPECIFIED, v4),
            (None, Some(IpAddr::V6(v6))) => {
                frame::solicitation(self.psc.mac, frame::link_local(self.psc.mac), *v6)
            }
            _ => return,
        };
        let sent = known.port.device.as_mut().map(|device| device.send(&frame, None));
        self.counters.signs_asked += 1;
        match sent {
            Some(sent) => self.count_send(sent),
            None => self.counters.no_interface += 1,
        }
    }

    fn take_sign(&mut self) -> Option<(ServerId, Sign)> {
        let ovm = self.ovm?;
        self.signs.pop_front().map(|sign| (ovm, sign))
    }

    fn transmit(&mut self, transmit: &Transmit) {
        let sent = match transmit.to {
            Destination::Client(link) => {
                let mac = if is_unicast(link.0) {
                    link.0
                } else {
                    let known = destination_address(&transmit.packet)
                        .and_then(|address| self.neighbours.get(address));
                    let Some(neighbour) = known else {
                        self.counters.no_link_address += 1;
                        return;
                    };
                    neighbour.mac
                };
                frame::wrap_ip(&mut self.sending, mac, self.psc.mac, &transmit.packet);
                let cut = frame::cut(&transmit.packet, transmit.segment);
                let device = self.anchor.as_mut().and_then(|port| port.device.as_mut());
                self.counters.sent_to_clients += 1;
                device.map(|device| device.send(&self.sending, cut))
            }
            Destination::Server(id) => {
                let server = self.servers.get_mut(&id);
                let found = server.and_then(|server| Some((server.mac, server.port.device.as_mut()?)));
                self.counters.sent_to_servers += 1;
                found.map(|(mac, device)| {
                    frame::wrap_ip(&mut self.sending, mac, self.psc.mac, &transmit.packet);
                    device.send(&self.sending, frame::cut(&transmit.packet, transmit.segment))
                })
            }
        };
        match sent {
            Some(sent) => self.count_send(sent),
            None => self.counters.no_interface += 1,
        }
    }

    fn set_ovm(&mut self, ovm: Option<ServerId>) {
        if self.ovm != ovm {
            self.signs.clear();
        }
        self.ovm = ovm;
    }

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        let due = self.announce_at?;
        if now >= due && self.is_anchored() {
            self.announce();
            self.announced += 1;
            let wait = match EARLY_ANNOUNCEMENTS.get(self.announced) {
                Some(&at) => at.saturating_sub(EARLY_ANNOUNCEMENTS[self.announced - 1]),
                None => ANNOUNCEMENT_INTERVAL,
            };
            self.announce_at = Some(now + wait);
        }
        if self.is_anchored() { self.announce_at } else { None }
    }

    fn take_own_connections(&mut self) -> Vec<(ServerId, SocketAddr)> {
        std::mem::take(&mut self.own_connections)
    }

    fn take_losses(&mut self) -> Vec<Loss> {
        std::mem::take(&mut self.losses)
    }

    fn counters(&mut self) -> BTreeMap<&'static str, u64> {
        self.note_lost();
        let Counters {
            client_frames,
            server_frames,
            sent_to_clients,
            sent_to_servers,
            send_queue_full,
            send_too_long,
            send_interface_down,
            send_failed,
            no_interface,
            no_link_address,
            other_vlan_refused,
            malformed,
            neighbour_answers,
            neighbour_questions,
            signs_asked,
            psc_conflicts,
            own_connection_attempts,
            capture_dropped,
            capture_truncated,
        } = self.counters;
        BTreeMap::from([
            ("client_frames", client_frames),
            ("server_frames", server_frames),
            ("sent_to_clients", sent_to_clients),
            ("sent_to_servers", sent_to_servers),
            ("send_queue_full", send_queue_full),
            ("send_too_long", send_too_long),
            ("send_interface_down", send_interface_down),
            ("send_failed", send_failed),
            ("no_interface", no_interface),
            ("no_link_address", no_link_address),
            ("other_vlan_refused", other_vlan_refused),
            ("malformed", malformed),
            ("neighbour_answers", neighbour_answers),
            ("neighbour_questions", neighbour_questions),
            ("signs_asked", signs_asked),
            ("psc_conflicts", psc_conflicts),
            ("own_connection_attempts", own_connection_attempts),
            ("capture_dropped", capture_dropped),
            ("capture_truncated", capture_truncated),
        ])
    }
}

pub(super) fn source_address(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?.into()),
        6 => Some(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?.into()),
        _ => None,
    }
}

/// Where to, if it is the first segment of a connection.
fn opens(packet: &[u8]) -> Option<SocketAddr> {
    let header = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&6) => usize::from(packet[0] & 0xf) * 4,
        6 if packet.get(6) == Some(&6) => 40,
        _ => return None,
    };
    let tcp = packet.get(header..header + 14)?;
    let is_syn = tcp[13] & 0x12 == 0x02;
    is_syn
        .then(|| Some(SocketAddr::new(destination_address(packet)?, u16::from_be_bytes([tcp[2], tcp[3]]))))?
}

fn destination_address(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?.into()),
        6 => Some(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_syn_opens_a_connection_and_nothing_else_does() {
        let v4 = |flags: u8| {
            let mut packet = [0; 40];
            (packet[0], packet[9], packet[33]) = (0x45, 6, flags);
            packet[16..20].copy_from_slice(&[10, 0, 0, 5]);
            packet[22..24].copy_from_slice(&5432_u16.to_be_bytes());
            packet
        };
        assert_eq!(opens(&v4(0x02)), Some("10.0.0.5:5432".parse().unwrap()));
        // With ECN on offer (RFC 3168 §6.1.1).
        assert_eq!(opens(&v4(0xc2)), Some("10.0.0.5:5432".parse().unwrap()));
        for flags in [0x12, 0x10, 0x18, 0x04, 0x14, 0x11] {
            assert_eq!(opens(&v4(flags)), None, "{flags:#x}");
        }
        let mut udp = v4(0x02);
        udp[9] = 17;
        assert_eq!(opens(&udp), None);
        let mut v6 = [0; 60];
        (v6[0], v6[6], v6[53], v6[39], v6[43]) = (0x60, 6, 0x02, 1, 80);
        assert_eq!(opens(&v6), Some("[::1]:80".parse().unwrap()));
        for length in 0..33 {
            assert_eq!(opens(&v4(0x02)[..length]), None);
        }
    }
}
