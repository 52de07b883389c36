//! How do a service's packets get from the wire to the engine and back?
//!
//! A plane belongs to one service and to the data-path thread. It tells client from server by where a packet came from;
//! whose voice counts is the engine's business.
//!
//! Every plane captures the service's interfaces with libpcap and injects what the engine rewrote (the paper's own
//! construction, and all of the plane `pcap`): what a guest sends is taken at its vif and kept from the bridge (see
//! [`crate::containment`]), and what clients send to the PSC's MAC ends at the anchor. The plane `bpf` has a fast path in
//! the kernel beside that.

mod fast;
mod neighbours;
mod notes;
mod packet;
mod ports;
mod presence;

use std::collections::BTreeMap;
use std::ops::{Deref, Range};
use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::poll::PollFlags;
use understudy_api::config;
use understudy_bpf::{Packet, Programs};
use understudy_protocol::{Destination, Instant, LinkAddress, Passage, ServerId, Transmit};

use self::fast::Taken;
use self::notes::Notes;
use self::packet::{destination_address, opens, source_address};
use self::ports::Ports;
use self::presence::Presence;
use crate::link::device::mac_text;
use crate::link::frame::{self, Content, Frame, is_unicast};
use crate::link::psc::Psc;
use crate::link::vif::{Interface, Vif};

pub(crate) use self::fast::{FastPath, Left};

/// A packet for the engine.
#[derive(Debug)]
pub(crate) struct Inbound<'a> {
    /// Where it came from.
    pub(crate) from: Origin,
    /// The IP packet.
    pub(crate) packet: Bytes<'a>,
    /// What the plane did with it.
    pub(crate) passage: Passage,
}

/// An IP packet, where the plane has it.
#[derive(Debug)]
pub(crate) enum Bytes<'a> {
    /// In the kernel's ring.
    Tapped(Packet<'a>),
    /// As it was captured.
    Captured(&'a [u8]),
}

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Tapped(packet) => packet,
            Self::Captured(packet) => packet,
        }
    }
}

/// Where a packet came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The network, by this next hop.
    Client(LinkAddress),
    /// A server's vif.
    Server(ServerId),
}

/// The data plane of one service.
pub(crate) struct Plane {
    /// The service's open interfaces.
    pub(crate) ports: Ports,
    /// What servers told beside the service's segments.
    pub(crate) notes: Notes,
    /// What passes conversations by itself, on the plane `bpf`.
    pub(crate) fast: Option<FastPath>,
    /// The PSC on its bridge.
    pub(crate) presence: Presence,
    ovm: Option<ServerId>,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    client_frames: u64,
    server_frames: u64,
    no_link_address: u64,
    other_vlan_refused: u64,
    malformed: u64,
}

/// A change to a plane's servers.
pub(crate) enum Change<'a> {
    /// A server's vif is open: a new server's, or one that replaces its former vif. If the fast path has no slot for
    /// the server, it does not join the plane ([`Ports::has_server`]).
    Opened {
        /// The server.
        server: ServerId,
        /// The open interface.
        interface: Interface,
        /// The vif.
        vif: &'a Vif,
    },
    /// A server was attached anew, and has another id.
    Renamed {
        /// Its id before.
        from: ServerId,
        /// Its id now.
        to: ServerId,
    },
    /// A server is gone: its interface is closed.
    Gone(ServerId),
    /// The OVM from now on; also ends [`FastPath::stop`].
    Ovm(Option<ServerId>),
}

/// What a captured frame means.
enum Meaning {
    /// A packet for the engine, in this part of the frame at hand.
    Packet(Origin, Range<usize>),
    /// The plane has dealt with the frame, or has nothing to do.
    Done,
}

/// The plane that a service's configuration asks for, if this host can run it; otherwise the plane `pcap`, and why.
pub(crate) struct Choice {
    /// The plane.
    pub(crate) plane: Plane,
    /// The programs to attach to the service's interfaces.
    pub(crate) programs: Option<Programs>,
    /// Why it is not the configured plane.
    pub(crate) reason: Option<String>,
}

/// Chooses a service's plane. If it has maps, they are pinned at `pins`. The plane continues where a predecessor
/// stopped (`left`), with that OVM. May take a moment, because the kernel verifies programs.
pub(crate) fn choose(
    service: &config::Service,
    pins: Option<&Path>,
    (left, ovm): (&Left, Option<ServerId>),
) -> Choice {
    let plane = |fast: Option<FastPath>| Plane {
        ports: Ports::default(),
        notes: Notes::default(),
        presence: Presence::new(Psc::of(service)),
        ovm: ovm.filter(|_| fast.is_some()),
        fast,
        counters: Counters::default(),
    };
    match service.plane {
        config::Plane::Pcap => Choice { plane: plane(None), programs: None, reason: None },
        config::Plane::Bpf => match understudy_bpf::load(&fast::settings(service, pins)) {
            Ok((programs, tap)) => Choice {
                plane: plane(Some(FastPath::new(tap, left, ovm))),
                programs: Some(programs),
                reason: None,
            },
            Err(error) => {
                let reason = format!("the plane bpf can't be used here, so pcap is: {error}");
                Choice { plane: plane(None), programs: None, reason: Some(reason) }
            }
        },
    }
}

impl Plane {
    /// Applies a change to the plane's servers.
    pub(crate) fn change(&mut self, change: Change<'_>) {
        match change {
            Change::Opened { server, interface: Interface { index, device }, vif } => {
                let fast = self.fast.as_mut();
                if fast.is_none_or(|fast| fast.add_server(server, index, vif)) {
                    self.ports.add_server(server, device, vif);
                }
            }
            Change::Renamed { from, to } => {
                self.presence.forget(from);
                self.fast.iter_mut().for_each(|fast| fast.rename_server(from, to));
                self.ports.rename_server(from, to);
            }
            Change::Gone(server) => {
                self.presence.forget(server);
                self.fast.iter_mut().for_each(|fast| fast.remove_server(server));
                self.ports.remove_server(server);
            }
            Change::Ovm(ovm) => {
                self.fast.iter_mut().for_each(|fast| fast.set_ovm(ovm));
                if self.ovm != ovm {
                    self.notes.forget_signs();
                }
                self.ovm = ovm;
            }
        }
    }

    /// What to poll for reading. The order is that of the flags given to [`Plane::set_ready`].
    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.fast.iter().flat_map(FastPath::fds).chain(self.ports.fds()).collect()
    }

    /// Notes which of [`Plane::fds`] are readable, in their order. The plane does not read any others until the next
    /// poll.
    pub(crate) fn set_ready(&mut self, ready: &[PollFlags]) {
        let rings = self.fast.as_ref().map_or(0, |fast| fast.fds().count());
        if let Some(fast) = &mut self.fast {
            fast.begin_round();
        }
        self.ports.set_ready(ready.get(rings..).unwrap_or_default(), self.ovm);
    }

    /// The next packet of this round, taken fairly from all readable interfaces; a bounded number after each
    /// [`Plane::set_ready`]. Answers ARP and ND for the PSC on the way.
    pub(crate) fn receive(&mut self, now: Instant) -> Option<Inbound<'_>> {
        if let Some(taken) = self.fast.as_mut().and_then(|fast| fast.receive(now)) {
            return self.inbound(taken);
        }
        let (from, range) = loop {
            let port = self.ports.receive()?;
            let Some(frame) = frame::parse(self.ports.frame()) else {
                self.counters.malformed += 1;
                continue;
            };
            let meaning = match port {
                None => self.network_frame(now, frame),
                Some(server) => self.server_frame(now, server, frame),
            };
            if let Meaning::Packet(from, range) = meaning {
                break (from, range);
            }
        };
        let packet = Bytes::Captured(&self.ports.frame()[range]);
        Some(Inbound { from, packet, passage: Passage::Kept })
    }

    /// Does what is due, and returns when to call again.
    pub(crate) fn tick(&mut self, now: Instant) -> Option<Instant> {
        let look = self.fast.as_mut().and_then(|fast| fast.tick(now));
        look.into_iter().chain(self.presence.tick(now, &mut self.ports)).min()
    }

    /// Monotonic counters.
    pub(crate) fn counters(&mut self) -> BTreeMap<&'static str, u64> {
        let own = &self.counters;
        let mut counters = BTreeMap::from([
            ("client_frames", own.client_frames),
            ("server_frames", own.server_frames),
            ("no_link_address", own.no_link_address),
            ("other_vlan_refused", own.other_vlan_refused),
            ("malformed", own.malformed),
            ("own_connection_attempts", self.notes.own_connection_attempts()),
        ]);
        counters.extend(self.ports.counters());
        counters.extend(self.presence.counters());
        counters.extend(self.fast.iter().flat_map(FastPath::counters));
        counters
    }

    /// Sends a packet of the engine. Failures are counted: to a TCP they are losses.
    pub(crate) fn transmit(&mut self, transmit: &Transmit) {
        let (packet, psc_mac) = (&transmit.packet, self.presence.psc().mac);
        match transmit.to {
            Destination::Server(id) => {
                self.ports.send_packet_to_server(id, psc_mac, packet, transmit.segment);
            }
            Destination::Client(link) => {
                let known = if is_unicast(link.0) {
                    Some(link.0)
                } else {
                    let address = destination_address(packet);
                    address.and_then(|address| self.presence.neighbour(address)).map(|known| known.mac)
                };
                match known {
                    Some(mac) => self.ports.send_packet_to_network(mac, psc_mac, packet, transmit.segment),
                    None => self.counters.no_link_address += 1,
                }
            }
        }
    }

    /// The next packet of those that came before [`FastPath::stop`], passed or not; `None` when there is none left, whatever
    /// clients have said since: that is received as ever.
    pub(crate) fn rest(&mut self) -> Option<Inbound<'_>> {
        let taken = self.fast.as_mut()?.rest()?;
        self.inbound(taken)
    }
}

impl Plane {
    /// A packet of the fast path, for the engine.
    fn inbound(&mut self, Taken { source, from, passage, .. }: Taken) -> Option<Inbound<'_>> {
        let fast = self.fast.as_mut()?;
        if let Origin::Client(LinkAddress(mac)) = from
            && let Some(address) = source_address(&fast.packet(source))
        {
            self.presence.learn(address, mac, None, &mut self.ports);
        }
        Some(Inbound { from, packet: Bytes::Tapped(fast.packet(source)), passage })
    }

    fn network_frame(&mut self, now: Instant, frame: Frame) -> Meaning {
        if self.presence.is_elsewhere(&frame) {
            if self.presence.is_addressed(&frame) {
                self.refuse_vlan(&frame);
            }
            return Meaning::Done;
        }
        let (presence, ports) = (&mut self.presence, &mut self.ports);
        match frame.content {
            Content::Ip(range) => {
                if frame.destination != presence.psc().mac {
                    return Meaning::Done;
                }
                if !is_unicast(frame.source) {
                    self.counters.malformed += 1;
                    return Meaning::Done;
                }
                self.counters.client_frames += 1;
                if let Some(address) = source_address(&ports.frame()[range.clone()]) {
                    presence.learn(address, frame.source, None, ports);
                }
                return Meaning::Packet(Origin::Client(LinkAddress(frame.source)), range);
            }
            Content::Arp(arp) => presence.network_arp(now, arp, ports),
            Content::Solicitation(asks) => presence.network_solicitation(asks, frame.source, ports),
            Content::Advertisement(tells) => presence.network_advertisement(now, tells, frame.source, ports),
            Content::Malformed => self.counters.malformed += 1,
            Content::ManyTags | Content::Other => {}
        }
        Meaning::Done
    }

    fn server_frame(&mut self, now: Instant, server: ServerId, frame: Frame) -> Meaning {
        if self.presence.is_elsewhere(&frame) {
            self.refuse_vlan(&frame);
            return Meaning::Done;
        }
        let is_rvm = self.ovm != Some(server);
        if !is_rvm {
            self.notes.note_sign(server, &frame.content, &self.presence);
        }
        let (presence, ports) = (&mut self.presence, &mut self.ports);
        match frame.content {
            Content::Ip(range) => {
                if let Some(to) = opens(&ports.frame()[range.clone()]) {
                    // The OVM's go on to the bridge.
                    if is_rvm {
                        self.notes.note_own_connection(server, to);
                    }
                    return Meaning::Done;
                }
                self.counters.server_frames += 1;
                return Meaning::Packet(Origin::Server(server), range);
            }
            // The OVM's questions are answered by the network; an RVM's never reach it.
            Content::Arp(arp) if is_rvm && arp.request => presence.server_arp(now, server, arp, ports),
            Content::Solicitation(asks) if is_rvm => {
                presence.server_solicitation(now, server, asks, frame.source, ports);
            }
            Content::Malformed => self.counters.malformed += 1,
            _ => {}
        }
        Meaning::Done
    }

    /// Counted always, told once: a service in another VLAN than its clients would otherwise just not answer.
    fn refuse_vlan(&mut self, frame: &Frame) {
        self.counters.other_vlan_refused += 1;
        if self.counters.other_vlan_refused == 1 {
            let psc = self.presence.psc();
            tracing::warn!(
                sender = mac_text(frame.source),
                vlan = ?frame.vlan,
                service_vlan = ?psc.vlan,
                psc_v4 = ?psc.v4,
                psc_v6 = ?psc.v6,
                "frames of another VLAN than the service's are refused; where its clients or guests should be in that one, correct the service's `vlan`"
            );
        }
    }
}
