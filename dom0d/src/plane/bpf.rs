//! The fast data plane: clients and OVM talk through tc programs (see [`understudy_bpf`]), and the engine hears
//! copies, in order. What the programs leave aside the engine forwards, as on the portable plane, whose
//! captures and injection this one uses for it, and for neighbours' questions.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use nix::poll::PollFlags;
use understudy_api::config::{self, OnDaemonLoss};
use understudy_bpf::layout::{self, Conversation, Key, SLOTS, Server};
use understudy_bpf::{Copied, RingEnd, Settings, Source, Tap};
use understudy_protocol::{Bounds, Handover, Instant, LinkAddress, Passage, ServerId, Sign, Transmit};

use super::pcap::{PcapPlane, source_address};
use super::{Bytes, Inbound, Loss, Origin, Plane};
use crate::link::device::Device;
use crate::link::frame::{Mac, is_unicast};
use crate::link::vif::Interface;

/// How often the ring is looked at while something comes in: what the kernel passed wakes nobody.
const LOOK: Duration = Duration::from_micros(250);

/// For how long after the last record.
const BUSY: Duration = Duration::from_millis(3);

/// Bytes taken from the ring of clients and OVM, and from that of each replica, before others have their turn. As much
/// for each: what a client says makes every replica say about as much, and what a full ring loses is an
/// acknowledgment, whose bytes are then sent again after a timeout.
const TURN: usize = 1 << 18;

/// What the smallest packet counts for: its cost is not in its bytes.
const LEAST_COST: usize = 1_024;

/// See the module.
pub(super) struct BpfPlane {
    tap: Tap,
    /// For all that the kernel leaves to the daemon.
    portable: PcapPlane,
    /// Who is in which of the kernel's slots.
    slots: [Option<ServerId>; SLOTS],
    ovm: Option<ServerId>,
    stopped: bool,
    /// Where the ring ended when it last stopped.
    end: RingEnd,
    /// What may still be taken in this round: of the ring, and of each replica's.
    left: usize,
    rvms_left: [usize; SLOTS],
    /// The ring was found empty when last looked at.
    idle: bool,
    busy_until: Instant,
    untold: u64,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    handed_over: u64,
    hand_over_failed: u64,
    no_slot: u64,
}

/// A packet that lies in a ring.
struct Taken {
    source: Source,
    /// In bytes.
    length: usize,
    from: Origin,
    passage: Passage,
}

/// What the programs must know of a service.
pub(super) fn settings(service: &config::Service, pins: Option<&Path>) -> Settings {
    Settings {
        psc: service.engine.psc.clone(),
        psc_mac: service.psc_mac,
        vlan: service.vlan,
        ports: service.engine.ports.clone(),
        conversations: service.engine.limits.conversations,
        daemon_grace: service.daemon_grace,
        serve: service.on_daemon_loss == OnDaemonLoss::Serve,
        pins: pins.map(Path::to_owned),
    }
}

fn shared(bounds: Bounds) -> layout::Bounds {
    layout::Bounds { up: bounds.up, down: bounds.down }
}

impl BpfPlane {
    pub(super) fn new(tap: Tap, portable: PcapPlane) -> Self {
        Self {
            tap,
            portable,
            slots: [None; SLOTS],
            ovm: None,
            stopped: false,
            end: RingEnd::default(),
            left: 0,
            rvms_left: [0; SLOTS],
            idle: false,
            busy_until: Instant::default(),
            untold: 0,
            counters: Counters::default(),
        }
    }

    fn slot_of(&self, server: ServerId) -> Option<usize> {
        self.slots.iter().position(|known| *known == Some(server))
    }

    /// Where the next packet of clients and OVM came from.
    fn take(&mut self) -> Option<Taken> {
        loop {
            let copied = self.tap.next(Source::Service)?;
            if let Some(taken) = self.origin(Source::Service, &copied) {
                return Some(taken);
            }
        }
    }

    /// Where a packet came from; `None` if from nobody who is known, or from a MAC that can't be.
    fn origin(&mut self, source: Source, copied: &Copied) -> Option<Taken> {
        let passage = match copied {
            Copied { unattended: true, .. } => Passage::Unattended,
            &Copied { forwarded: true, edge, trusted, .. } => Passage::Passed { edge, trusted },
            Copied { handed_over: true, .. } => Passage::HandedOver,
            _ => Passage::Kept,
        };
        let from = match copied.slot {
            Some(slot) => Origin::Server((*self.slots.get(slot)?)?),
            None if is_unicast(copied.source_mac) => {
                if let Some(address) = source_address(&self.tap.packet(source)) {
                    self.portable.learn(address, copied.source_mac, None);
                }
                Origin::Client(LinkAddress(copied.source_mac))
            }
            None => return None,
        };
        Some(Taken { source, length: copied.length, from, passage })
    }

    fn inbound(&mut self, Taken { source, from, passage, .. }: Taken) -> Inbound<'_> {
        Inbound { from, packet: Bytes::Tapped(self.tap.packet(source)), passage }
    }

    /// The next packet of the programs in this round.
    fn receive_tapped(&mut self) -> Option<Taken> {
        if self.left > 0 {
            let taken = self.take();
            self.idle = taken.is_none();
            if let Some(taken) = taken {
                self.left = self.left.saturating_sub(taken.length.max(LEAST_COST));
                return Some(taken);
            }
        }
        for slot in 0..SLOTS {
            while self.rvms_left[slot] > 0 {
                let source = Source::Rvm(slot);
                let Some(copied) = self.tap.next(source) else { break };
                let cost = copied.length.max(LEAST_COST);
                self.rvms_left[slot] = self.rvms_left[slot].saturating_sub(cost);
                if let Some(taken) = self.origin(source, &copied) {
                    return Some(taken);
                }
            }
        }
        None
    }
}

impl Plane for BpfPlane {
    fn name(&self) -> &'static str {
        "bpf"
    }

    fn set_anchor(&mut self, now: Instant, far_end: Device) {
        self.portable.set_anchor(now, far_end);
    }

    fn is_anchored(&self) -> bool {
        self.portable.is_anchored()
    }

    fn add_server(&mut self, server: ServerId, vif: Interface, mac: Mac, addresses: &[IpAddr]) {
        let Some(slot) = self.slot_of(server).or_else(|| self.slots.iter().position(Option::is_none)) else {
            // Without a slot it is not in the plane, so `has_server` keeps it from serving.
            self.counters.no_slot += 1;
            return;
        };
        let mut entry = Server { ifindex: vif.index, mac, ..Server::default() };
        for address in addresses {
            match address {
                IpAddr::V4(v4) => (entry.has_v4, entry.v4) = (1, v4.octets()),
                IpAddr::V6(v6) => (entry.has_v6, entry.v6) = (1, v6.octets()),
            }
        }
        self.slots[slot] = Some(server);
        self.tap.set_server(slot, entry);
        self.portable.add_server(server, vif, mac, addresses);
    }

    fn has_server(&self, server: ServerId) -> bool {
        self.slot_of(server).is_some() && self.portable.has_server(server)
    }

    fn rename_server(&mut self, from: ServerId, to: ServerId) {
        if let Some(slot) = self.slot_of(from) {
            self.slots[slot] = Some(to);
        }
        self.portable.rename_server(from, to);
    }

    fn remove_server(&mut self, server: ServerId) {
        if let Some(slot) = self.slot_of(server) {
            self.slots[slot] = None;
            self.tap.set_server(slot, Server::default());
        }
        self.portable.remove_server(server);
    }

    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let rvms = self.slots.iter().zip(0..).filter(|(server, _)| server.is_some());
        let sources = rvms.map(|(_, slot)| Source::Rvm(slot)).chain([Source::Service]);
        sources.filter_map(|source| self.tap.fd(source)).chain(self.portable.fds()).collect()
    }

    fn set_ready(&mut self, ready: &[PollFlags]) {
        // The rings are looked at in any case: that costs less than a poll, and most records wake nobody.
        let rings = 1 + self.slots.iter().flatten().count();
        let captures = ready.get(rings..).unwrap_or_default();
        self.left = TURN;
        self.rvms_left = [TURN; SLOTS];
        self.portable.set_ready(captures);
    }

    fn receive(&mut self, now: Instant) -> Option<Inbound<'_>> {
        if let Some(taken) = self.receive_tapped() {
            self.busy_until = now + BUSY;
            return Some(self.inbound(taken));
        }
        self.portable.receive(now)
    }

    fn ask(&mut self, server: ServerId) {
        self.portable.ask(server);
    }

    fn take_sign(&mut self) -> Option<(ServerId, Sign)> {
        self.portable.take_sign()
    }

    fn transmit(&mut self, packet: &Transmit) {
        self.portable.transmit(packet);
    }

    fn set_ovm(&mut self, ovm: Option<ServerId>) {
        if self.ovm == ovm && !self.stopped {
            return;
        }
        self.ovm = ovm;
        self.stopped = false;
        let slot = ovm.and_then(|ovm| self.slot_of(ovm));
        self.tap.activate(slot);
        self.portable.set_ovm(ovm);
    }

    fn passes(&self) -> bool {
        true
    }

    fn stop(&mut self) -> bool {
        if self.stopped {
            return false;
        }
        self.tap.activate(None);
        // Once, or whoever goes on to fill the ring decides how long a cutover takes.
        self.end = self.tap.end();
        self.stopped = true;
        true
    }

    fn is_stopped(&self) -> bool {
        self.stopped
    }

    fn rest(&mut self) -> Option<Inbound<'_>> {
        loop {
            let copied = self.tap.next_before(self.end)?;
            if let Some(taken) = self.origin(Source::Service, &copied) {
                return Some(self.inbound(taken));
            }
        }
    }

    fn is_idle(&self) -> bool {
        self.idle && !self.stopped
    }

    fn hand_over(&mut self, handover: &Handover) {
        let key = Key::new(handover.client, handover.psc.port());
        let conversation = Conversation::new(&handover.flow, handover.link.0, handover.place);
        match self.tap.install(&key, conversation, shared(handover.flow.bounds)) {
            Ok(()) => self.counters.handed_over += 1,
            // Its segments go on through the daemon.
            Err(_) => self.counters.hand_over_failed += 1,
        }
    }

    fn extend(&mut self, place: u32, bounds: Bounds) {
        self.tap.extend(place, shared(bounds));
    }

    fn take_back(&mut self, client: SocketAddr, psc: SocketAddr) {
        self.tap.remove(&Key::new(client, psc.port()));
    }

    fn take_untold(&mut self) -> bool {
        let untold = self.tap.unrecorded();
        std::mem::replace(&mut self.untold, untold) != untold
    }

    fn succeed(&mut self, slots: &BTreeMap<ServerId, u8>, ovm: Option<ServerId>, untold: u64) {
        for (&server, &slot) in slots {
            if let Some(place) = self.slots.get_mut(usize::from(slot)) {
                *place = Some(server);
            }
        }
        self.ovm = ovm;
        self.portable.set_ovm(ovm);
        self.untold = untold;
    }

    fn lets_speak(&self, ovm: Option<ServerId>) -> bool {
        !self.stopped && self.tap.active() == ovm.and_then(|ovm| self.slot_of(ovm))
    }

    fn slots(&self) -> BTreeMap<ServerId, u8> {
        let slots = self.slots.iter().zip(0..);
        slots.filter_map(|(server, slot)| Some(((*server)?, slot))).collect()
    }

    fn untold(&self) -> u64 {
        self.untold
    }

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        self.tap.beat(now.as_micros().saturating_mul(1_000));
        let look = (now < self.busy_until).then(|| now + LOOK);
        look.into_iter().chain(self.portable.tick(now)).min()
    }

    fn take_losses(&mut self) -> Vec<Loss> {
        self.portable.take_losses()
    }

    fn take_own_connections(&mut self) -> Vec<(ServerId, SocketAddr)> {
        self.portable.take_own_connections()
    }

    fn counters(&mut self) -> BTreeMap<&'static str, u64> {
        let mut counters = self.portable.counters();
        counters.extend(self.tap.counters());
        let Counters { handed_over, hand_over_failed, no_slot } = self.counters;
        counters.extend([
            ("conversations_to_kernel", handed_over),
            ("conversations_to_kernel_failed", hand_over_failed),
            ("servers_without_slot", no_slot),
        ]);
        counters
    }
}
