//! How do a service's packets get from the wire to the engine and back? One trait for all data planes.
//!
//! A plane belongs to one service and to the data-path thread. It tells client from server by where a
//! packet came from; whose voice counts is the engine's business.

mod bpf;
mod neighbours;
mod pcap;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::poll::PollFlags;
use understudy_api::config;
use understudy_bpf::{Packet, Programs};
use understudy_protocol::{Bounds, Handover, Instant, LinkAddress, Passage, ServerId, Sign, Transmit};

use self::bpf::BpfPlane;
use self::pcap::PcapPlane;
use crate::link::device::Device;
use crate::link::frame::Mac;
use crate::link::psc::Psc;
use crate::link::vif::Interface;

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

/// An interface that a plane lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Loss {
    /// The server whose vif it was; `None` for the PSC's own.
    pub(crate) server: Option<ServerId>,
    /// What happened.
    pub(crate) error: String,
}

/// The data plane of one service.
pub(crate) trait Plane: Send {
    /// Its name in the configuration.
    fn name(&self) -> &'static str;

    /// The PSC's place on its bridge: the far end of the anchor. The PSC is announced with the next
    /// [`Plane::tick`].
    fn set_anchor(&mut self, now: Instant, far_end: Device);

    /// Whether the PSC has its place on a bridge.
    fn is_anchored(&self) -> bool;

    /// A server's vif, the guest's MAC and its addresses. Replaces the interface of a server that is there already.
    fn add_server(&mut self, server: ServerId, vif: Interface, mac: Mac, addresses: &[IpAddr]);

    /// Whether a server's vif is open.
    fn has_server(&self, server: ServerId) -> bool;

    /// A server goes on under another id: it was attached anew.
    fn rename_server(&mut self, from: ServerId, to: ServerId);

    /// Closes a server's interface.
    fn remove_server(&mut self, server: ServerId);

    /// What to poll for reading. The order is that of the flags given to [`Plane::set_ready`].
    fn fds(&self) -> Vec<BorrowedFd<'_>>;

    /// Which of [`Plane::fds`] have something, in their order; the others, and those that are not told of, are left alone
    /// until the next poll.
    fn set_ready(&mut self, ready: &[PollFlags]);

    /// The next packet of this round, fairly from all that are ready. Gives a bounded number of packets
    /// after each [`Plane::set_ready`]. Answers neighbours' questions on the way.
    fn receive(&mut self, now: Instant) -> Option<Inbound<'_>>;

    /// Asks a server for its own link-layer address; the answer is a sign that it lives.
    fn ask(&mut self, server: ServerId);

    /// The next sign of the OVM's life: of each kind the latest, as far as there is room for them.
    fn take_sign(&mut self) -> Option<(ServerId, Sign)>;

    /// Sends a packet of the engine. Failures are counted: to a TCP they are losses.
    fn transmit(&mut self, packet: &Transmit);

    /// Who is the OVM from now on; also after [`Plane::stop`].
    fn set_ovm(&mut self, ovm: Option<ServerId>);

    /// Passes conversations by itself.
    fn passes(&self) -> bool {
        false
    }

    /// Passes nothing by itself from now on. `false` if it never does, or had stopped already.
    fn stop(&mut self) -> bool {
        false
    }

    /// Whether it stopped and was not told of an OVM since.
    fn is_stopped(&self) -> bool {
        false
    }

    /// The next packet of those that came before [`Plane::stop`], passed or not; `None` when there is none left, whatever
    /// clients have said since: that is received as ever.
    fn rest(&mut self) -> Option<Inbound<'_>> {
        None
    }

    /// Everything of clients and OVM has been received.
    fn is_idle(&self) -> bool {
        false
    }

    /// Passes a conversation by itself from now on.
    fn hand_over(&mut self, _handover: &Handover) {}

    /// Lets a conversation that it passes go on further than before.
    fn extend(&mut self, _place: u32, _bounds: Bounds) {}

    /// Passes a conversation by itself no more.
    fn take_back(&mut self, _client: SocketAddr, _psc: SocketAddr) {}

    /// Whether something was passed since the last call that could not be told.
    fn take_untold(&mut self) -> bool {
        false
    }

    /// Does what is due (announcing the PSC), and says when to call again.
    fn tick(&mut self, now: Instant) -> Option<Instant>;

    /// Goes on where a predecessor's plane was, with servers in these slots.
    fn succeed(&mut self, _slots: &BTreeMap<ServerId, u8>, _ovm: Option<ServerId>, _untold: u64) {}

    /// Whether this OVM's segments, and nobody else's, are let through to clients.
    fn lets_speak(&self, _ovm: Option<ServerId>) -> bool {
        true
    }

    /// Servers by their places in what outlives the process.
    fn slots(&self) -> BTreeMap<ServerId, u8> {
        BTreeMap::new()
    }

    /// What [`Plane::take_untold`] told of so far.
    fn untold(&self) -> u64 {
        0
    }

    /// Interfaces lost since the last call.
    fn take_losses(&mut self) -> Vec<Loss>;

    /// Connections that RVMs tried to open by themselves since the last call, and where to: the first ones, if many.
    fn take_own_connections(&mut self) -> Vec<(ServerId, SocketAddr)>;

    /// Monotonic counters.
    fn counters(&mut self) -> BTreeMap<&'static str, u64>;
}

/// The plane that a service's configuration asks for, if this host has it; else the portable one and why.
pub(crate) struct Choice {
    /// The plane.
    pub(crate) plane: Box<dyn Plane>,
    /// What goes on the service's interfaces.
    pub(crate) programs: Option<Programs>,
    /// Why it is not the one that was asked for.
    pub(crate) reason: Option<String>,
}

/// Chooses a service's plane, whose maps, if it has any, are pinned there. May take a moment: the kernel verifies
/// programs.
pub(crate) fn choose(service: &config::Service, pins: Option<&Path>) -> Choice {
    let portable = PcapPlane::new(Psc::of(service));
    match service.plane {
        config::Plane::Pcap => Choice { plane: Box::new(portable), programs: None, reason: None },
        config::Plane::Bpf => match understudy_bpf::load(&bpf::settings(service, pins)) {
            Ok((programs, tap)) => {
                let plane = Box::new(BpfPlane::new(tap, portable));
                Choice { plane, programs: Some(programs), reason: None }
            }
            Err(error) => {
                let reason = format!("the plane bpf can't be used here, so pcap is: {error}");
                Choice { plane: Box::new(portable), programs: None, reason: Some(reason) }
            }
        },
    }
}
