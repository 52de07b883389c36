//! The kernel's part of the plane `bpf`: tc programs (see [`understudy_bpf`]) pass segments between clients and OVM,
//! and the engine gets copies, in order. Frames that the programs leave aside come and go through the captured
//! interfaces, as on the plane `pcap`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_api::config::{self, OnDaemonLoss};
use understudy_bpf::layout::{self, Conversation, Key, SLOTS, Server};
use understudy_bpf::{Copied, Packet, RingEnd, Settings, Source, Tap};
use understudy_protocol::{Bounds, Instant, LinkAddress, Passage, Rule, ServerId};

use super::Origin;
use crate::link::frame::is_unicast;
use crate::link::vif::Vif;

/// How often the data-path thread looks at the ring while packets arrive: a passed packet does not wake it.
const LOOK: Duration = Duration::from_micros(250);

/// For how long after the last packet it does so.
const BUSY: Duration = Duration::from_millis(3);

/// Bytes taken from the ring of clients and OVM, and from the ring of each replica, before other work gets its turn.
/// Each ring gets as much, because each client segment makes every replica send about as much; and a full ring loses
/// acknowledgments, which cost a retransmission timeout.
const TURN: usize = 1 << 18;

/// The number of bytes for which the smallest packet counts, because its cost does not depend on its bytes.
const LEAST_COST: usize = 1_024;

/// See the module.
pub(crate) struct FastPath {
    tap: Tap,
    /// The server in each of the kernel's slots.
    slots: [Option<ServerId>; SLOTS],
    ovm: Option<ServerId>,
    stopped: bool,
    /// The end of the ring when the fast path last stopped.
    end: RingEnd,
    /// Bytes that may still be taken in this round: from the ring of clients and OVM, and from each replica's.
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

/// What a successor must know to continue with the maps of a fast path (rule 8).
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Left {
    /// Servers by their slots in the maps.
    slots: BTreeMap<ServerId, u8>,
    /// How many packets the kernel had passed and could not report, as far as the engine knows.
    untold: u64,
}

/// A packet that lies in a ring.
pub(super) struct Taken {
    /// Which ring.
    pub(super) source: Source,
    /// Who sent it.
    pub(super) from: Origin,
    /// What the kernel did with it.
    pub(super) passage: Passage,
    /// In bytes.
    length: usize,
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

impl FastPath {
    /// Continues where a predecessor stopped, with that OVM. Without an OVM it passes nothing yet.
    pub(super) fn new(tap: Tap, left: &Left, ovm: Option<ServerId>) -> Self {
        let mut slots = [None; SLOTS];
        for (&server, &slot) in &left.slots {
            if let Some(known) = slots.get_mut(usize::from(slot)) {
                *known = Some(server);
            }
        }
        Self {
            tap,
            slots,
            ovm,
            stopped: false,
            end: RingEnd::default(),
            left: 0,
            rvms_left: [0; SLOTS],
            idle: false,
            busy_until: Instant::default(),
            untold: left.untold,
            counters: Counters::default(),
        }
    }

    fn slot_of(&self, server: ServerId) -> Option<usize> {
        self.slots.iter().position(|known| *known == Some(server))
    }

    /// Tells the programs of a server, or of its new interface. `false` if all slots are taken.
    pub(super) fn add_server(&mut self, server: ServerId, index: u32, vif: &Vif) -> bool {
        let Some(slot) = self.slot_of(server).or_else(|| self.slots.iter().position(Option::is_none)) else {
            self.counters.no_slot += 1;
            return false;
        };
        let mut entry = Server { ifindex: index, mac: vif.mac, ..Server::default() };
        for address in &vif.addresses {
            match address {
                IpAddr::V4(v4) => (entry.has_v4, entry.v4) = (1, v4.octets()),
                IpAddr::V6(v6) => (entry.has_v6, entry.v6) = (1, v6.octets()),
            }
        }
        self.slots[slot] = Some(server);
        self.tap.set_server(slot, entry);
        true
    }

    pub(super) fn rename_server(&mut self, from: ServerId, to: ServerId) {
        if let Some(slot) = self.slot_of(from) {
            self.slots[slot] = Some(to);
        }
    }

    /// Tells the programs that a server is gone.
    pub(super) fn remove_server(&mut self, server: ServerId) {
        if let Some(slot) = self.slot_of(server) {
            self.slots[slot] = None;
            self.tap.set_server(slot, Server::default());
        }
    }

    /// What to poll for reading.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let rvms = self.slots.iter().zip(0..).filter(|(server, _)| server.is_some());
        let sources = rvms.map(|(_, slot)| Source::Rvm(slot)).chain([Source::Service]);
        sources.filter_map(|source| self.tap.fd(source))
    }

    /// Begins a round, in which a bounded number of bytes is taken. The round looks at the rings whatever the poll
    /// reported: that costs less than a poll, and most packets do not wake the thread.
    pub(super) fn begin_round(&mut self) {
        self.left = TURN;
        self.rvms_left = [TURN; SLOTS];
    }

    /// The next packet of this round.
    pub(super) fn receive(&mut self, now: Instant) -> Option<Taken> {
        let taken = self.receive_service().or_else(|| self.receive_rvm())?;
        self.busy_until = now + BUSY;
        Some(taken)
    }

    fn receive_service(&mut self) -> Option<Taken> {
        if self.left == 0 {
            return None;
        }
        let taken = loop {
            let Some(copied) = self.tap.next(Source::Service) else { break None };
            if let Some(taken) = self.taken(Source::Service, &copied) {
                break Some(taken);
            }
        };
        self.idle = taken.is_none();
        let taken = taken?;
        self.left = self.left.saturating_sub(taken.length.max(LEAST_COST));
        Some(taken)
    }

    fn receive_rvm(&mut self) -> Option<Taken> {
        for slot in 0..SLOTS {
            while self.rvms_left[slot] > 0 {
                let source = Source::Rvm(slot);
                let Some(copied) = self.tap.next(source) else { break };
                self.rvms_left[slot] = self.rvms_left[slot].saturating_sub(copied.length.max(LEAST_COST));
                if let Some(taken) = self.taken(source, &copied) {
                    return Some(taken);
                }
            }
        }
        None
    }

    /// The origin of a packet; `None` if its server is unknown, or its source MAC is impossible.
    fn taken(&self, source: Source, copied: &Copied) -> Option<Taken> {
        let passage = match copied {
            Copied { unattended: true, .. } => Passage::Unattended,
            &Copied { forwarded: true, edge, trusted, .. } => Passage::Passed { edge, trusted },
            Copied { handed_over: true, .. } => Passage::HandedOver,
            _ => Passage::Kept,
        };
        let from = match copied.slot {
            Some(slot) => Origin::Server((*self.slots.get(slot)?)?),
            None if is_unicast(copied.source_mac) => Origin::Client(LinkAddress(copied.source_mac)),
            None => return None,
        };
        Some(Taken { source, length: copied.length, from, passage })
    }

    /// A packet in its ring, not copied.
    pub(super) fn packet(&mut self, source: Source) -> Packet<'_> {
        self.tap.packet(source)
    }

    /// Lets this OVM's segments through to clients, and no other server's (rule 1). Also ends [`FastPath::stop`].
    pub(super) fn set_ovm(&mut self, ovm: Option<ServerId>) {
        if self.ovm == ovm && !self.stopped {
            return;
        }
        self.ovm = ovm;
        self.stopped = false;
        let slot = ovm.and_then(|ovm| self.slot_of(ovm));
        self.tap.activate(slot);
    }

    /// Passes nothing from now on. `false` if it had stopped already.
    pub(crate) fn stop(&mut self) -> bool {
        if self.stopped {
            return false;
        }
        self.tap.activate(None);
        // Read the end once: otherwise clients that continue to fill the ring would decide how long a cutover takes.
        self.end = self.tap.end();
        self.stopped = true;
        true
    }

    /// Whether it was stopped and has not been given an OVM since.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// The next packet, passed or not, that arrived before [`FastPath::stop`]; `None` when none is left.
    /// [`FastPath::receive`] returns packets that arrived later.
    pub(super) fn rest(&mut self) -> Option<Taken> {
        loop {
            let copied = self.tap.next_before(self.end)?;
            if let Some(taken) = self.taken(Source::Service, &copied) {
                return Some(taken);
            }
        }
    }

    /// Whether everything of clients and OVM has been received.
    pub(crate) fn is_idle(&self) -> bool {
        self.idle && !self.stopped
    }

    /// Begins to pass a conversation, moves its bounds, or stops passing it.
    pub(crate) fn apply(&mut self, rule: &Rule) {
        match rule {
            Rule::HandOver(handover) => {
                let key = Key::new(handover.client, handover.psc.port());
                let conversation = Conversation::new(&handover.flow, handover.link.0, handover.entry);
                match self.tap.install(&key, conversation, shared(handover.flow.bounds)) {
                    Ok(()) => self.counters.handed_over += 1,
                    // The conversation's segments continue to go through the daemon.
                    Err(_) => self.counters.hand_over_failed += 1,
                }
            }
            &Rule::Extend { entry, bounds } => self.tap.extend(entry, shared(bounds)),
            &Rule::TakeBack { client, psc } => self.tap.remove(&Key::new(client, psc.port())),
        }
    }

    /// Whether since the last call the kernel has passed a packet that it could not report.
    pub(crate) fn take_untold(&mut self) -> bool {
        let untold = self.tap.unrecorded();
        std::mem::replace(&mut self.untold, untold) != untold
    }

    /// Tells the programs that the daemon lives, and returns when to look at the ring again.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Instant> {
        self.tap.beat(now.as_micros().saturating_mul(1_000));
        (now < self.busy_until).then(|| now + LOOK)
    }

    /// What a successor must know.
    pub(crate) fn left(&self) -> Left {
        let slots = self.slots.iter().zip(0..);
        Left {
            slots: slots.filter_map(|(server, slot)| Some(((*server)?, slot))).collect(),
            untold: self.untold,
        }
    }

    /// Whether the programs let this OVM's segments through to clients, and no other server's.
    pub(crate) fn lets_speak(&self, ovm: Option<ServerId>) -> bool {
        !self.stopped && self.tap.active() == ovm.and_then(|ovm| self.slot_of(ovm))
    }

    /// Monotonic counters.
    pub(super) fn counters(&self) -> BTreeMap<&'static str, u64> {
        let mut counters = self.tap.counters();
        let Counters { handed_over, hand_over_failed, no_slot } = self.counters;
        counters.extend([
            ("conversations_to_kernel", handed_over),
            ("conversations_to_kernel_failed", hand_over_failed),
            ("servers_without_slot", no_slot),
        ]);
        counters
    }
}
