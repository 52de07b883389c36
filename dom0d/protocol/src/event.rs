//! What the engine tells the outside world, and what the outside world tells it.

use core::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::encoding;
use crate::tcp::translate::{Bounds, Flow};
use crate::time::Instant;
use crate::wire::{self, Parsed};

/// A server of a service: one life of one domain in its queue. Never reused by the caller, so that
/// what arrives late for a former life is recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServerId(pub u32);

/// A client's link-layer next hop (Ethernet address), learned from its segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LinkAddress(pub [u8; 6]);

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
    /// If not 0, it is longer than the path's MTU: it must be cut into segments with so many bytes of payload, which
    /// the kernel does (GSO). Its TCP checksum is that of the pseudo-header alone.
    pub segment: u16,
}

impl Transmit {
    /// The packets that it is cut into, for who has no kernel to do that.
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

/// Why the OVM is believed to be at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// (a) The domain is gone, or shut down with a code that nobody planned.
    DomainGone,
    /// (b) The domain is paused and nobody announced it.
    DomainPaused,
    /// (c) A client segment stays unacknowledged by the OVM though an RVM acknowledged it.
    UnacknowledgedSegment,
    /// (d) The RVMs agree on an answer that the OVM does not begin.
    NoProgress,
    /// (e) FIN or RST on several conversations that covering RVMs do not share.
    UnsharedClose,
    /// An operator asked for it.
    Operator,
}

/// Why an RVM's state may differ from the OVM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StaleReason {
    /// Attached, and nobody has stated yet that its state equals the OVM's.
    NotSeeded,
    /// It missed bytes of a conversation that the OVM served.
    MissedBytes,
    /// A conversation that the OVM serves could not be replicated to it.
    UncoveredConversation,
    /// It was given a client's bytes that the OVM answered with a RST.
    TookMore,
    /// It was the OVM, lost its seat for a fault, and did not catch up within [`crate::Timing::recover_limit`].
    Deposed,
    /// It was evicted for falling behind.
    Lagged,
}

/// Why a conversation is uncovered by an RVM, or unprotected as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Uncovered {
    /// The daemon did not see its SYN.
    MidStream,
    /// The conversation table was full.
    TableFull,
    /// The RVM was attached after the conversation began.
    AttachedLater,
    /// The RVM's SYN-ACK lacks timestamps, window scale or MSS that the client relies on.
    OptionsDiffer,
    /// The RVM refused or reset the conversation.
    RvmReset,
    /// The RVM did not answer, or fell behind a limit.
    RvmLagged,
    /// TCP-MD5 or TCP-AO: segments can't be rewritten.
    Authenticated,
    /// The data plane passed what could not be recorded.
    Unrecorded,
}

/// What shows that a server's kernel lives, whatever its conversations look like: ARP (RFC 826) or neighbour
/// discovery (RFC 4861) of its own, seen at its vif.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sign {
    /// It told its own address.
    Answered,
    /// It asks for somebody's address: until it is answered it can't reach whom it knows there.
    Asked {
        /// Whose address.
        target: IpAddr,
        /// What the caller knows to be the answer.
        link: Option<LinkAddress>,
    },
}

/// What must be done outside the engine, in the order polled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// From this moment `to` is the OVM. In force inside the engine already; a data plane that
    /// forwards by itself must switch now, before the next [`Transmit`] is sent.
    Cutover {
        /// The service's new epoch.
        epoch: u64,
        /// The OVM until now; `None` if there was none.
        from: Option<ServerId>,
        /// The OVM from now on.
        to: ServerId,
    },
    /// Pause or destroy this deposed server, as the service's policy says.
    Fence(ServerId),
    /// Ask this server's kernel for its own link-layer address, from an address that it learns nothing of (RFC 5227
    /// §2.1.1): whoever lives answers, which [`crate::Service::handle_sign`] is to be told.
    Ask(ServerId),
    /// Where the data plane passes conversations by itself: it must stop, everything that it has passed must be
    /// handled, then [`crate::Service::handle_plane_stopped`] and [`crate::Service::handle_confirmed`] be called.
    StopPlane {
        /// Whom the evidence is against: another may be the OVM by then.
        accused: ServerId,
        /// What for.
        evidence: Evidence,
    },
    /// The data plane passes this conversation by itself no more.
    TakeBack {
        /// The client's socket.
        client: SocketAddr,
        /// The PSC's socket.
        psc: SocketAddr,
    },
    /// The data plane passes a conversation by itself, and may let it go on further than before. In force before
    /// the next [`Transmit`] is sent, which may tell so.
    Extend {
        /// As in [`Handover::place`].
        place: u32,
        /// Up to where.
        bounds: Bounds,
    },
    /// Tell whoever listens.
    Event(#[serde(with = "encoding::as_text")] Event),
}

/// Something an operator would want to know, with when it happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, on the engine's clock.
    pub at: Instant,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// Kinds of [`Event`]; names and fields are stable, they are the control API's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A server joined the queue.
    Attached {
        /// Which.
        server: ServerId,
        /// Promotable from the start.
        seeded: bool,
    },
    /// A server left the queue.
    Detached {
        /// Which.
        server: ServerId,
    },
    /// An RVM was taken out of the queue and its memory released.
    Evicted {
        /// Which.
        server: ServerId,
        /// Why.
        reason: StaleReason,
    },
    /// An RVM is not promotable until it is seeded again.
    Stale {
        /// Which.
        server: ServerId,
        /// Why.
        reason: StaleReason,
    },
    /// The operator stated that the RVM's state equals the OVM's.
    Seeded {
        /// Which.
        server: ServerId,
    },
    /// Conversations were still open at a drain's deadline; the RVM stays stale.
    DrainFailed {
        /// Which.
        server: ServerId,
        /// Conversations that were still open.
        open: u64,
    },
    /// No conversation is open and none can begin: the OVM's state can be copied.
    Held,
    /// Clients are let in again.
    Released {
        /// Why.
        reason: Release,
    },
    /// The OVM is believed to be at fault.
    Suspected {
        /// Which.
        server: ServerId,
        /// Why.
        evidence: Evidence,
    },
    /// A promotion took place. `evidence` is `None` for a planned switchover.
    CutOver {
        /// The service's new epoch.
        epoch: u64,
        /// The OVM until then.
        from: Option<ServerId>,
        /// The OVM from then on.
        to: ServerId,
        /// Why.
        evidence: Option<Evidence>,
        /// Open conversations at that moment.
        conversations: u64,
    },
    /// A deposed OVM whose domain lives goes on as an RVM: it is promotable again once it has caught up, and fenced if it
    /// does not within [`crate::Timing::recover_limit`].
    Recovering {
        /// Which.
        server: ServerId,
    },
    /// It has caught up.
    Recovered {
        /// Which.
        server: ServerId,
    },
    /// The first byte of the new epoch was sent to a client.
    FirstByte {
        /// The epoch.
        epoch: u64,
    },
    /// Every conversation of an epoch ended recuperation.
    Recuperated {
        /// The epoch.
        epoch: u64,
        /// Conversations that go on.
        recuperated: u64,
        /// Conversations that were reset.
        reset: u64,
    },
    /// A fault was found and nothing is promotable; the OVM stays.
    NoCandidate {
        /// The OVM at fault.
        server: Option<ServerId>,
        /// Why it is at fault.
        evidence: Evidence,
        /// Each other server and why it can't be promoted.
        because: Vec<(ServerId, NotPromotable)>,
    },
    /// An RVM answered differently from what the client was sent.
    Diverged {
        /// The RVM.
        server: ServerId,
        /// The conversation's client.
        client: SocketAddr,
        /// Position in the stream of answers, from the first byte (0).
        position: u64,
    },
    /// A conversation flows but could not survive a promotion.
    Unprotected {
        /// The conversation's client.
        client: SocketAddr,
        /// Why.
        reason: Uncovered,
    },
    /// A conversation was reset because it could not go on correctly.
    Reset {
        /// The conversation's client.
        client: SocketAddr,
    },
}

/// Why a server can't be promoted unasked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotPromotable {
    /// It is the OVM.
    IsOvm,
    /// Its state may differ from the OVM's.
    Stale(StaleReason),
    /// It was behind the service-wide order for too long, and has not caught up yet.
    Lagging,
    /// It was the OVM, lost its seat for a fault, and has not caught up yet.
    Recovering,
    /// Too many unplanned promotions took place in the window.
    PromotionLimit,
    /// Its domain is not running.
    NotRunning,
    /// It opened connections of its own, which went nowhere: it may have answered, or done, something else for that.
    OwnConnections,
}

/// A server as the caller introduces it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerSpec {
    /// Its identity, never used before in this service.
    pub id: ServerId,
    /// The guest's own addresses: at most one per family; a PSC address without a counterpart here
    /// is not served by it.
    pub addresses: Vec<IpAddr>,
    /// MTU of its vif in bytes.
    pub mtu: u16,
}

/// What the operator states about an RVM's state when attaching it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seeding {
    /// Nothing: it is fed new conversations, and is stale.
    Unseeded,
    /// Its state equals the OVM's now. Refused while conversations are open.
    AssumeIdentical,
    /// Its state will equal the OVM's once open conversations ended: new SYNs are held, and what is
    /// still open at the deadline makes the drain fail (SYNs flow again, the RVM stays stale).
    Drain {
        /// When to give up.
        deadline: Instant,
    },
    /// Its state was made equal to the OVM's while clients were held ([`crate::Service::hold`]), who are let in again.
    Copied,
}

/// Why clients are held no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Release {
    /// A server was made equal, and is seeded.
    Seeded,
    /// Whoever had asked for it wants it no more, or is gone.
    GivenUp,
    /// Conversations did not end in time.
    ConversationsOpen,
    /// It took too long.
    Limit,
    /// Another OVM serves: what was copied is not its state.
    OvmChanged,
    /// Clients reached the OVM without the engine, whose process did not run for too long.
    Unattended,
}

/// Why an operator's request is refused; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperatorError {
    /// The id is not in the queue.
    #[error("the server is not in this service's queue")]
    UnknownServer,
    /// The id is in the queue already.
    #[error("the server is in this service's queue already")]
    AlreadyAttached,
    /// No slot is free.
    #[error("the queue is full: a service has at most {0} servers")]
    QueueFull(usize),
    /// Seeding as identical needs a moment without open conversations.
    #[error(
        "{0} conversations are open; a server can be taken as identical only when none is (wait, or drain)"
    )]
    ConversationsOpen(u64),
    /// A drain is under way.
    #[error("a drain or a copy is under way already")]
    DrainUnderWay,
    /// Clients are not held any more, or not yet: the OVM's state may have changed while it was copied.
    #[error("clients are not held: what was copied may lack what they wrote meanwhile")]
    NotHeld,
    /// The service has an OVM.
    #[error("the service has an OVM already")]
    OvmInstalled,
    /// It is the OVM.
    #[error("the server is the OVM")]
    IsOvm,
    /// No server would remain that could serve.
    #[error("nothing would be left to serve the clients")]
    NothingLeft,
    /// The server can't be promoted unasked, and force was not given.
    #[error("the server is not promotable")]
    NotPromotable,
}

/// What the data plane did with a packet that it hands to the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Passage {
    /// Nothing: it waits for the engine's word.
    #[default]
    Kept,
    /// Passed it on, translated by the conversation's [`Flow`].
    Passed {
        /// Right edge of the window that the receiver was told.
        edge: u32,
        /// The receiver takes it without a look at its TCP checksum, which a device has verified or is still to fill in.
        /// Otherwise it drops one that is not right, a partial one too.
        trusted: bool,
    },
    /// Nothing, and it passes nothing more of this conversation by itself.
    HandedOver,
    /// Passed it on because the daemon was away for too long, as it does with all of this conversation from now on.
    Unattended,
}

/// A conversation that the data plane may pass by itself from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handover {
    /// The client's socket.
    pub client: SocketAddr,
    /// The PSC's socket.
    pub psc: SocketAddr,
    /// The client's next hop.
    pub link: LinkAddress,
    /// Its place among the conversations, below [`crate::Limits::conversations`]: no other has it as long as
    /// this one is passed.
    pub place: u32,
    /// How to translate, as of now.
    pub flow: Flow,
}
