//! The PSC's presence on its bridge: announced, defended and answered for, since no machine has its addresses. An RVM's
//! questions for neighbours, which never reach the network, are answered here too.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use understudy_protocol::{Instant, ServerId};

use super::neighbours::{Neighbour, Neighbours, Question, Response};
use super::ports::Ports;
use crate::link::device::mac_text;
use crate::link::frame::{self, Advertisement, Arp, Frame, Mac, Solicitation};
use crate::link::psc::Psc;

/// When the PSC is announced after it came up, for those that missed the first time.
const EARLY_ANNOUNCEMENTS: [Duration; 3] =
    [Duration::from_millis(0), Duration::from_millis(1_000), Duration::from_millis(2_000)];

/// How often the PSC is announced after that: before bridges forget its MAC (300 s by default).
const ANNOUNCEMENT_INTERVAL: Duration = Duration::from_secs(60);

/// Least time between two defences of the PSC's addresses (RFC 5227 §2.4).
const DEFEND_INTERVAL: Duration = Duration::from_secs(10);

/// See the module.
pub(crate) struct Presence {
    psc: Psc,
    neighbours: Neighbours,
    announced: usize,
    announce_at: Option<Instant>,
    defended: Option<Instant>,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    neighbour_answers: u64,
    neighbour_questions: u64,
    signs_asked: u64,
    psc_conflicts: u64,
}

impl Presence {
    /// A PSC that is not on a bridge yet.
    pub(super) fn new(psc: Psc) -> Self {
        Self {
            psc,
            neighbours: Neighbours::default(),
            announced: 0,
            announce_at: None,
            defended: None,
            counters: Counters::default(),
        }
    }

    pub(super) fn psc(&self) -> &Psc {
        &self.psc
    }

    /// The neighbour with that address, if it is known.
    pub(super) fn neighbour(&self, address: IpAddr) -> Option<Neighbour> {
        self.neighbours.get(address)
    }

    /// Announces the PSC if that is due, and says when to call again.
    pub(super) fn tick(&mut self, now: Instant, ports: &mut Ports) -> Option<Instant> {
        if ports.take_is_new() {
            (self.announced, self.announce_at) = (0, Some(now));
        }
        let due = self.announce_at.filter(|_| ports.is_anchored())?;
        if now >= due {
            self.announce(ports);
            self.announced += 1;
            let wait = match EARLY_ANNOUNCEMENTS.get(self.announced) {
                Some(&at) => at.saturating_sub(EARLY_ANNOUNCEMENTS[self.announced - 1]),
                None => ANNOUNCEMENT_INTERVAL,
            };
            self.announce_at = Some(now + wait);
        }
        self.announce_at
    }

    fn announce(&self, ports: &mut Ports) {
        if let Some(v4) = self.psc.v4 {
            ports.send_to_network(&frame::arp_announcement(self.psc.mac, v4));
        }
        if let Some(v6) = self.psc.v6 {
            ports.send_to_network(&frame::advertisement(self.psc.mac, v6, false, None));
        }
    }

    /// An ARP message from the network.
    pub(super) fn network_arp(&mut self, now: Instant, arp: Arp, ports: &mut Ports) {
        if !arp.sender.is_unspecified() && self.psc.v4 == Some(arp.sender) {
            return self.defend(now, arp.sender_mac, ports);
        }
        self.learn(arp.sender.into(), arp.sender_mac, None, ports);
        if arp.request && self.psc.v4 == Some(arp.target) {
            self.counters.neighbour_answers += 1;
            let reply = frame::arp_reply(self.psc.mac, arp.target, arp.sender_mac, arp.sender);
            ports.send_to_network(&reply);
        }
    }

    /// A neighbour solicitation from the network, in a frame of this station.
    pub(super) fn network_solicitation(&mut self, asks: Solicitation, asker_mac: Mac, ports: &mut Ports) {
        if let Some(link) = asks.link {
            self.learn(asks.source.into(), link, None, ports);
        }
        if self.psc.v6 == Some(asks.target) {
            self.counters.neighbour_answers += 1;
            // A probe for a free address is answered to all nodes (RFC 4861 §7.2.4).
            let to = (!asks.source.is_unspecified()).then_some((asks.link.unwrap_or(asker_mac), asks.source));
            ports.send_to_network(&frame::advertisement(self.psc.mac, asks.target, false, to));
        }
    }

    /// A neighbour advertisement from the network, in a frame of this station.
    pub(super) fn network_advertisement(
        &mut self,
        now: Instant,
        tells: Advertisement,
        source: Mac,
        ports: &mut Ports,
    ) {
        if self.psc.v6 == Some(tells.target) {
            self.defend(now, tells.link.unwrap_or(source), ports);
        } else if let Some(link) = tells.link {
            self.learn(tells.target.into(), link, Some(tells.router), ports);
        }
    }

    /// Somebody else says that it has the PSC's address.
    fn defend(&mut self, now: Instant, claimant: Mac, ports: &mut Ports) {
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
        self.announce(ports);
    }

    /// What an RVM asks in an ARP request.
    pub(super) fn server_arp(&mut self, now: Instant, server: ServerId, asks: Arp, ports: &mut Ports) {
        let is_probe = asks.sender.is_unspecified() || asks.sender == asks.target;
        if !is_probe {
            let (asker, asker_mac) = (asks.sender.into(), asks.sender_mac);
            self.question(now, Question { server, asker, asker_mac, target: asks.target.into() }, ports);
        }
    }

    /// What an RVM asks in a neighbour solicitation, in a frame of this station.
    pub(super) fn server_solicitation(
        &mut self,
        now: Instant,
        server: ServerId,
        asks: Solicitation,
        source: Mac,
        ports: &mut Ports,
    ) {
        if !asks.source.is_unspecified() {
            let (asker, asker_mac) = (asks.source.into(), asks.link.unwrap_or(source));
            self.question(now, Question { server, asker, asker_mac, target: asks.target.into() }, ports);
        }
    }

    fn question(&mut self, now: Instant, question: Question, ports: &mut Ports) {
        let psc = Neighbour { mac: self.psc.mac, router: false };
        if self.psc.has(question.target) {
            return self.answer(question, psc, ports);
        }
        match self.neighbours.ask(now, question) {
            Response::Answer(neighbour) => self.answer(question, neighbour, ports),
            Response::AnswerWithPsc => self.answer(question, psc, ports),
            Response::Wait => {}
            Response::Ask => {
                self.counters.neighbour_questions += 1;
                let ask = match (question.target, self.psc.v4, self.psc.v6) {
                    (IpAddr::V4(target), Some(psc), _) => frame::arp_request(self.psc.mac, psc, target),
                    (IpAddr::V6(target), _, Some(psc)) => frame::solicitation(self.psc.mac, psc, target),
                    // The PSC has no address to ask from; a family that it does not serve.
                    _ => return,
                };
                ports.send_to_network(&ask);
            }
        }
    }

    /// Learns that `address` is reached through `mac`, and answers those who asked for it.
    pub(super) fn learn(&mut self, address: IpAddr, mac: Mac, router: Option<bool>, ports: &mut Ports) {
        for question in self.neighbours.learn(address, mac, router) {
            if let Some(neighbour) = self.neighbours.get(address) {
                self.answer(question, neighbour, ports);
            }
        }
    }

    fn answer(&mut self, question: Question, neighbour: Neighbour, ports: &mut Ports) {
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
        ports.send_to_server(question.server, &frame);
    }

    /// Asks a server for its own link-layer address; the answer is a sign that it lives.
    pub(crate) fn ask(&mut self, server: ServerId, ports: &mut Ports) {
        let addresses = ports.addresses(server);
        let v4 = addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        // A probe teaches nobody anything, and the answer to it goes to the PSC's MAC, which is ours. One for an IPv6
        // address would be answered to all nodes: there it comes from the PSC's own link-local address.
        let frame = match (v4, addresses.first()) {
            (Some(v4), _) => frame::arp_request(self.psc.mac, Ipv4Addr::UNSPECIFIED, v4),
            (None, Some(IpAddr::V6(v6))) => {
                frame::solicitation(self.psc.mac, frame::link_local(self.psc.mac), *v6)
            }
            _ => return,
        };
        self.counters.signs_asked += 1;
        ports.send_to_server(server, &frame);
    }

    /// Forgets a server's questions.
    pub(super) fn forget(&mut self, server: ServerId) {
        self.neighbours.forget(server);
    }

    /// Whether a frame is in another VLAN than the PSC, or in several.
    pub(super) fn is_elsewhere(&self, frame: &Frame) -> bool {
        frame.vlan != self.psc.vlan || frame.content == frame::Content::ManyTags
    }

    /// Whether a frame would be answered if it were in the PSC's VLAN: a bridge floods its frames to all.
    pub(super) fn is_addressed(&self, frame: &Frame) -> bool {
        frame.destination == self.psc.mac
            || match &frame.content {
                frame::Content::Arp(arp) => self.psc.v4 == Some(arp.target),
                frame::Content::Solicitation(asks) => self.psc.v6 == Some(asks.target),
                _ => false,
            }
    }

    /// Monotonic counters.
    pub(super) fn counters(&self) -> [(&'static str, u64); 4] {
        let counters = &self.counters;
        [
            ("neighbour_answers", counters.neighbour_answers),
            ("neighbour_questions", counters.neighbour_questions),
            ("signs_asked", counters.signs_asked),
            ("psc_conflicts", counters.psc_conflicts),
        ]
    }
}
