//! A data plane that passes conversations by itself, as the one in the kernel does: by the protocol's `Flow`, at
//! once, while the engine hears copies later, in order.

use core::net::SocketAddr;
use std::collections::{BTreeMap, VecDeque};

use understudy_protocol::{Aside, Bounds, Evidence, Flow, LinkAddress, Passage, ServerId};

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
    /// By client and PSC: the epoch that it is for, and its place.
    flows: BTreeMap<(SocketAddr, SocketAddr), (u64, u32, Flow)>,
    ring: VecDeque<(From, Vec<u8>, Passage)>,
    /// When the daemon looks next.
    look: Option<u64>,
    suspicion: Option<(ServerId, Evidence)>,
}

impl Plane {
    pub(super) fn activate(&mut self, ovm: Option<ServerId>) {
        self.ovm = ovm;
        self.epoch += 1;
    }

    pub(super) fn take_back(&mut self, client: SocketAddr, psc: SocketAddr) {
        self.flows.remove(&(client, psc));
    }

    pub(super) fn extend(&mut self, place: u32, bounds: Bounds) {
        for (_, at, flow) in self.flows.values_mut() {
            if *at == place {
                flow.bounds = bounds;
            }
        }
    }

    pub(super) fn suspect(&mut self, accused: ServerId, evidence: Evidence) {
        self.suspicion = Some((accused, evidence));
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
        self.hear_ring();
        self.follow_suspicion();
        while let Some(handover) = self.service.poll_handover() {
            if let Some(plane) = &mut self.plane {
                plane
                    .flows
                    .insert((handover.client, handover.psc), (plane.epoch, handover.place, handover.flow));
                self.coverage.hit("plane.handed over");
            }
        }
    }

    fn hear_ring(&mut self) {
        while let Some((from, packet, passage)) = self.plane.as_mut().and_then(|plane| plane.ring.pop_front())
        {
            if let From::Server(id) = from {
                self.check_repetition(id, &packet);
            }
            let now = self.instant();
            match from {
                From::Client(link) => self.service.handle_tapped_client(now, link, &packet, passage),
                From::Server(id) => self.service.handle_tapped_server(now, id, &packet, passage),
            }
            self.after_packet();
        }
    }

    /// Acts on the engine's own evidence, once the plane has stopped.
    pub(super) fn follow_suspicion(&mut self) {
        if let Some((accused, evidence)) = self.plane.as_mut().and_then(|plane| plane.suspicion.take()) {
            let now = self.instant();
            self.cut_over(|service| service.handle_confirmed(now, accused, evidence));
        }
    }

    /// Does what may depose the OVM, as the daemon does it.
    pub(super) fn cut_over<T>(&mut self, act: impl FnOnce(&mut understudy_protocol::Service) -> T) -> T {
        if let Some(plane) = &mut self.plane {
            plane.activate(None);
            self.hear_ring();
            self.service.handle_plane_stopped();
        }
        let result = act(&mut self.service);
        self.drain();
        let ovm = self.service.ovm();
        if let Some(plane) = self.plane.as_mut().filter(|plane| plane.ovm.is_none()) {
            plane.activate(ovm);
        }
        result
    }
}
