//! How do a service's packets get from the wire to the engine and back? One trait for all data planes.
//!
//! A plane belongs to one service and to the data-path thread. It tells client from server by where a
//! packet came from; whose voice counts is the engine's business.

pub(crate) mod anchor;
pub(crate) mod device;
mod frame;
mod neighbours;
pub(crate) mod pcap;
pub(crate) mod rules;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use understudy_protocol::{Instant, LinkAddress, ServerId, Transmit};

pub(crate) use device::mac_text;
pub(crate) use frame::Mac;

/// A packet for the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Inbound<'a> {
    /// Where it came from.
    pub(crate) from: Origin,
    /// The IP packet.
    pub(crate) packet: &'a [u8],
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
    /// What to poll for reading. The order is that of the flags given to [`Plane::set_ready`].
    fn fds(&self) -> Vec<BorrowedFd<'_>>;

    /// Which of [`Plane::fds`] have something; the others are left alone until the next poll.
    fn set_ready(&mut self, ready: &[bool]);

    /// The next packet of this round, fairly from all that are ready. Gives a bounded number of packets
    /// after each [`Plane::set_ready`]. Answers neighbours' questions on the way.
    fn receive(&mut self, now: Instant) -> Option<Inbound<'_>>;

    /// Sends a packet of the engine. Failures are counted: to a TCP they are losses.
    fn transmit(&mut self, packet: &Transmit);

    /// Who is the OVM from now on.
    fn set_ovm(&mut self, ovm: Option<ServerId>);

    /// Does what is due (announcing the PSC), and says when to call again.
    fn tick(&mut self, now: Instant) -> Option<Instant>;

    /// Interfaces lost since the last call.
    fn take_losses(&mut self) -> Vec<Loss>;

    /// Monotonic counters.
    fn counters(&mut self) -> BTreeMap<&'static str, u64>;
}
