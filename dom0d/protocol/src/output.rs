//! What the engine wants done, in one order: what the caller polls ([`crate::Service::poll`]).

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::encoding;
use crate::event::{Event, Evidence, LinkAddress, ServerId};
use crate::tcp::translate::{Bounds, Flow};
use crate::wire::{self, Parsed};

/// What the caller must do, in the order polled.
///
/// The order is part of the meaning: whatever comes before a [`Transmit`] is in force when that is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Output {
    /// Send a packet.
    Transmit(Transmit),
    /// Change what the data plane passes by itself.
    Rule(Rule),
    /// From this moment `to` is the OVM: the data plane drops what `from` says and takes what `to` says. In force inside
    /// the engine already.
    Cutover {
        /// The service's new epoch.
        epoch: u64,
        /// The OVM until now; `None` if there was none.
        from: Option<ServerId>,
        /// The OVM from now on.
        to: ServerId,
    },
    /// Stop the data plane, which passes conversations by itself; hand the engine everything that the plane has passed,
    /// then [`crate::Input::PlaneStopped`], then [`crate::Input::Confirmed`] with the same accused and evidence.
    StopPlane {
        /// Whom the evidence is against: another server may be the OVM by then.
        accused: ServerId,
        /// What for.
        evidence: Evidence,
    },
    /// Pause or destroy this deposed server, as the service's policy says.
    Fence(ServerId),
    /// Ask this server's kernel for its own link-layer address, from an address that it learns nothing of (RFC 5227
    /// §2.1.1). A kernel that lives answers; tell the engine by [`crate::Input::Sign`].
    Ask(ServerId),
    /// Tell whoever listens.
    Event(#[serde(with = "encoding::as_text")] Event),
}

/// What a data plane passes between client and OVM by itself: one change of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// Pass this conversation from now on.
    HandOver(Box<Handover>),
    /// Let a conversation that is passed go on further than before.
    Extend {
        /// As in [`Handover::entry`].
        entry: u32,
        /// Up to where.
        bounds: Bounds,
    },
    /// Pass this conversation no more.
    TakeBack {
        /// The client's socket.
        client: SocketAddr,
        /// The PSC's socket.
        psc: SocketAddr,
    },
}

/// A conversation that the data plane may pass by itself from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The client's socket.
    pub client: SocketAddr,
    /// The PSC's socket.
    pub psc: SocketAddr,
    /// The client's next hop.
    pub link: LinkAddress,
    /// Where the plane keeps it, below [`crate::Limits::conversations`]: no other conversation has this entry while this one
    /// is passed.
    pub entry: u32,
    /// How to translate, as of now.
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
    /// If not 0, the packet is longer than the path's MTU: it must be cut into segments with this many bytes of payload,
    /// which the kernel does (GSO). Its TCP checksum is that of the pseudo-header alone.
    pub segment: u16,
}

impl Transmit {
    /// The packets that it is cut into, for a caller that has no kernel to do that.
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
