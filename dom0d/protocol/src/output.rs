//! The engine's outputs, in one order, as the caller polls them ([`crate::Service::poll`]).

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::encoding;
use crate::event::{Event, Evidence, LinkAddress, ServerId};
use crate::tcp::translate::{Bounds, Flow};
use crate::wire::{self, Parsed};

/// One thing that the caller must do. The caller does them in the order in which it polls them.
///
/// The order is part of the meaning: every output before a [`Transmit`] must be in force when its packet is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// Send a packet.
    Transmit(Transmit),
    /// Change what the data plane passes by itself.
    Rule(Rule),
    /// From now on `to` is the OVM: the data plane drops the frames of `from` and takes those of `to` (rule 1). Inside
    /// the engine this is in force already.
    Cutover {
        /// The service's new epoch.
        epoch: u64,
        /// The OVM until now; `None` if there was none.
        from: Option<ServerId>,
        /// The OVM from now on.
        to: ServerId,
    },
    /// Stop the data plane from passing conversations by itself; hand the engine everything that it has passed, then
    /// [`crate::Input::PlaneStopped`], then [`crate::Input::Confirmed`] with the same accused and evidence.
    StopPlane {
        /// The server that the evidence is against. By the time of the answer another server may be the OVM.
        accused: ServerId,
        /// The evidence.
        evidence: Evidence,
    },
    /// Pause or destroy this deposed server, as the service's policy says.
    Fence(ServerId),
    /// Ask this server's kernel for its own link-layer address, by a probe from which the kernel learns no address (RFC
    /// 5227 §2.1.1). A living kernel answers; report its answer by [`crate::Input::Sign`] (rule 11).
    Ask(ServerId),
    /// Report this event to operators.
    Event(#[serde(with = "encoding::as_text")] Event),
}

/// One change to what the data plane passes between client and OVM by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// Pass this conversation from now on.
    HandOver(Box<Handover>),
    /// Move the bounds of a passed conversation onwards.
    Extend {
        /// As in [`Handover::entry`].
        entry: u32,
        /// The new bounds.
        bounds: Bounds,
    },
    /// Stop passing this conversation.
    TakeBack {
        /// The client's socket.
        client: SocketAddr,
        /// The PSC's socket.
        psc: SocketAddr,
    },
}

/// A conversation that the data plane may pass by itself from now on, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The client's socket.
    pub client: SocketAddr,
    /// The PSC's socket.
    pub psc: SocketAddr,
    /// The client's next hop.
    pub link: LinkAddress,
    /// Index of the conversation's entry in the plane's map, below [`crate::Limits::conversations`]. No other
    /// conversation has this entry while this one is passed.
    pub entry: u32,
    /// The translation, as of now.
    pub flow: Flow,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    /// To the client whose link-layer next hop this is.
    Client(LinkAddress),
    /// To a server's vif.
    Server(ServerId),
}

/// One IP packet to send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transmit {
    /// Where it goes.
    pub to: Destination,
    /// The IPv4 or IPv6 packet.
    #[serde(with = "serde_bytes")]
    pub packet: Vec<u8>,
    /// If not 0, the packet exceeds the path's MTU, and must be cut into segments with this many bytes of payload each;
    /// the kernel does so (GSO). Its TCP checksum field holds the sum of the pseudo-header alone.
    pub segment: u16,
}

impl Transmit {
    /// The packets into which a kernel would cut it, for a caller without one.
    pub fn packets(&self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        match wire::parse(&self.packet) {
            Ok(Parsed::Tcp(large)) if self.segment > 0 => {
                large.emit_split(usize::from(self.segment), |packet| packets.push(packet));
            }
            _ => packets.push(self.packet.clone()),
        }
        packets
    }
}
