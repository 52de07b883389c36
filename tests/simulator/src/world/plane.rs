//! A data plane that passes conversations by itself, as the one in the kernel does: by the protocol's `Flow`, at
//! once, while the engine hears copies later, in order.

use core::net::SocketAddr;
use std::collections::{BTreeMap, VecDeque};

use understudy_driver::{Driven, Suspicion};
use understudy_protocol::{
    Aside, Flow, Input, Instant, LinkAddress, Output, Passage, Rule, ServerId, Service,
};

use super::{Event, World, link_address};
use crate::segment::Segment;

/// How late the daemon hears of what was passed, at most.
const LOOK_US: u64 = 300;

/// Whom a packet is from.
#[derive(Clone, Copy, Debug)]
enum From {
    Client(LinkAddress),
    Server(ServerId),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Plane {
    ovm: Option<ServerId>,
    epoch: u64,
    /// By client and PSC: the epoch that it is for, and its entry.
    flows: BTreeMap<(SocketAddr, SocketAddr), (u64, u32, Flow)>,
    ring: VecDeque<(From, Vec<u8>, Passage)>,
    /// When the daemon looks next.
    look: Option<u64>,
}

impl Plane {
    pub(super) fn activate(&mut self, ovm: Option<ServerId>) {
        self.ovm = ovm;
        self.epoch += 1;
    }

    pub(super) fn apply(&mut self, rule: &Rule) {
        match rule {
            Rule::HandOver(handover) => {
                let key = (handover.client, handover.psc);
                self.flows.insert(key, (self.epoch, handover.entry, handover.flow));
            }
            Rule::Extend { entry, bounds } => {
                for (_, at, flow) in self.flows.values_mut() {
                    if at == entry {
                        flow.bounds = *bounds;
                    }
                }
            }
            Rule::TakeBack { client, psc } => drop(self.flows.remove(&(*client, *psc))),
        }
    }

    /// Passes a segment if it is what comes next.
    fn pass(
        &mut self,
        key: (SocketAddr, SocketAddr),
        translate: impl FnOnce(&mut Flow) -> Result<u32, Aside>,
    ) -> Passage {
        let Some((epoch, _, flow)) = self.flows.get_mut(&key) else { return Passage::Kept };
        if *epoch != self.epoch || self.ovm.is_none() {
            return Passage::Kept;
        }
        match translate(flow) {
            // Who receives it gets it as it was before it was made partial.
            Ok(edge) => Passage::Passed { edge, trusted: true },
            Err(Aside::DaemonFromNow) => {
                // Of no epoch.
                *epoch = u64::MAX;
                Passage::HandedOver
            }
            Err(_) => Passage::Kept,
        }
    }
}

impl World {
    /// A client's frame at the anchor; false if the plane leaves it to the daemon's sockets.
    pub(super) fn plane_takes_from_client(&mut self, client: usize, whole: &[u8], packet: &[u8]) -> bool {
        let Ok(segment) = Segment::taken(whole) else { return false };
        let Some(plane) = self.plane.as_mut().filter(|_| self.observer.psc.contains(&segment.dst)) else {
            return false;
        };
        let ovm = plane.ovm.and_then(|ovm| self.guests.iter().position(|guest| guest.id == ovm));
        let mut passed = whole.to_vec();
        let mut passage = Passage::Kept;
        if let Some(ovm) = ovm {
            let like = segment.dst.is_ipv4();
            let to = self.guests[ovm].addresses.iter().copied().find(|address| address.is_ipv4() == like);
            if let Some(to) = to {
                passage =
                    plane.pass((segment.src, segment.dst), |flow| flow.client_to_server(&mut passed, to));
            }
        }
        plane.ring.push_back((From::Client(link_address(client)), packet.to_vec(), passage));
        if let (Some(ovm), Passage::Passed { .. }) = (ovm, passage) {
            self.coverage.hit("plane.passed up");
            self.transmit_to_server(self.guests[ovm].id, passed);
        }
        self.look_soon(passage);
        true
    }

    /// A server's frame at its vif; false if the plane leaves it to the daemon's sockets.
    pub(super) fn plane_takes_from_server(&mut self, id: ServerId, whole: &[u8], packet: &[u8]) -> bool {
        let Ok(segment) = Segment::taken(whole) else { return false };
        let Some(plane) = self.plane.as_mut().filter(|plane| plane.ovm == Some(id)) else { return false };
        let like = segment.src.is_ipv4();
        let psc =
            self.observer.psc.iter().find(|psc| psc.is_ipv4() == like && psc.port() == segment.src.port());
        let client = self.clients.iter().position(|c| c.addresses.contains(&segment.dst.ip()));
        let (Some(psc), Some(client)) = (psc.copied(), client) else { return false };
        let mut passed = whole.to_vec();
        let passage = plane.pass((segment.dst, psc), |flow| flow.server_to_client(&mut passed, psc.ip()));
        plane.ring.push_back((From::Server(id), packet.to_vec(), passage));
        if matches!(passage, Passage::Passed { .. }) {
            self.coverage.hit("plane.passed down");
            self.transmit_to_client(link_address(client), passed);
        }
        self.look_soon(passage);
        true
    }

    fn look_soon(&mut self, passage: Passage) {
        // What was not passed wakes the daemon.
        let passed = matches!(passage, Passage::Passed { .. });
        let wait = if passed { self.rng.between(0, LOOK_US) } else { self.rng.between(0, 20) };
        let at = self.now + wait;
        if let Some(plane) = &mut self.plane
            && plane.look.is_none_or(|look| at < look)
        {
            plane.look = Some(at);
            self.push(at, Event::Look);
        }
    }

    /// The daemon reads the ring, then lets the plane pass what it may.
    pub(super) fn look_at_ring(&mut self) {
        if let Some(plane) = &mut self.plane {
            plane.look = None;
        }
        while self.hear_ring() {
            self.after_packet();
        }
        self.settle();
    }

    /// The engine hears the oldest of what the plane has for it, if there is anything.
    fn hear_ring(&mut self) -> bool {
        let Some((from, packet, passage)) = self.plane.as_mut().and_then(|plane| plane.ring.pop_front())
        else {
            return false;
        };
        match from {
            From::Client(link) => self.tell(Input::Client { link, passage, packet: &packet }),
            From::Server(server) => {
                self.check_repetition(server, &packet);
                self.tell(Input::Server { server, passage, packet: &packet });
            }
        }
        true
    }
}

impl Driven for World {
    type Engine = Service;

    fn engine(&mut self) -> &mut Service {
        &mut self.service
    }

    fn suspicion(&mut self) -> &mut Option<Suspicion> {
        &mut self.suspicion
    }

    fn carry_out(&mut self, output: Output) {
        self.carry_out_or_fail(output);
    }

    fn stop(&mut self) -> bool {
        let Some(plane) = &mut self.plane else { return false };
        let stops = plane.ovm.is_some();
        plane.activate(None);
        stops
    }

    fn hear_rest(&mut self, _: Instant) -> bool {
        self.hear_ring()
    }

    fn resume(&mut self, ovm: Option<ServerId>) {
        if let Some(plane) = self.plane.as_mut().filter(|plane| plane.ovm.is_none()) {
            plane.activate(ovm);
        }
    }

    fn is_idle(&self) -> bool {
        self.plane.as_ref().is_some_and(|plane| plane.ring.is_empty())
    }
}
