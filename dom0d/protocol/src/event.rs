//! Events for operators, and the reasons that they give (rule 7).

use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::time::Instant;

/// A server of a service: one life of one domain in its queue. The caller never reuses an id, so the engine recognises
/// what arrives late from a former life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServerId(pub u32);

/// A client's link-layer next hop (Ethernet address), learned from its segments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LinkAddress(pub [u8; 6]);

/// Why the OVM is believed to be at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// (a) The domain is gone, or shut down with a code that no planned shutdown has.
    DomainGone,
    /// (b) The domain is paused, and no operator announced that.
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
    /// It was attached, and the operator has not stated yet that its state equals the OVM's.
    NotSeeded,
    /// It missed bytes of a conversation that the OVM served.
    MissedBytes,
    /// A conversation that the OVM serves could not be replicated to it.
    UncoveredConversation,
    /// It was given client bytes that the OVM refused with a RST.
    TookMore,
    /// It was the OVM, was deposed for a fault, and did not catch up within [`crate::Timing::recover_limit`].
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
    /// The data plane passed bytes that could not be recorded.
    Unrecorded,
}

/// Something that an operator would want to know, and when it happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When it happened, on the engine's clock.
    pub at: Instant,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// Kinds of [`Event`]. Names and fields are part of the control API, and stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A server joined the queue.
    Attached {
        /// The server.
        server: ServerId,
        /// Promotable from the start.
        seeded: bool,
    },
    /// A server left the queue.
    Detached {
        /// The server.
        server: ServerId,
    },
    /// An RVM was taken out of the queue and its memory released.
    Evicted {
        /// The server.
        server: ServerId,
        /// Why.
        reason: StaleReason,
    },
    /// An RVM is not promotable until it is seeded again.
    Stale {
        /// The server.
        server: ServerId,
        /// Why.
        reason: StaleReason,
    },
    /// The operator stated that the RVM's state equals the OVM's.
    Seeded {
        /// The server.
        server: ServerId,
    },
    /// Conversations were still open at a drain's deadline, or another server became the OVM; the RVM stays stale.
    DrainFailed {
        /// The server.
        server: ServerId,
        /// Conversations that were still open.
        open: u64,
        /// Why: [`Release::ConversationsOpen`] or [`Release::OvmChanged`].
        reason: Release,
    },
    /// No conversation is open and none can begin: the OVM's state can be copied.
    Held,
    /// Clients are no longer held.
    Released {
        /// Why.
        reason: Release,
    },
    /// The OVM is believed to be at fault.
    Suspected {
        /// The server.
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
    /// A deposed OVM whose domain lives continues as an RVM. It is promotable again once it has caught up, and fenced
    /// if it does not within [`crate::Timing::recover_limit`].
    Recovering {
        /// The server.
        server: ServerId,
    },
    /// A deposed OVM has caught up as an RVM.
    Recovered {
        /// The server.
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
        /// Conversations that continue.
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
    /// A conversation was reset because it could not continue correctly.
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
    /// It was behind the record for too long, and has not caught up yet.
    Lagging,
    /// It was the OVM, was deposed for a fault, and has not caught up yet.
    Recovering,
    /// Too many unplanned promotions took place in the window.
    PromotionLimit,
    /// Its domain is not running.
    NotRunning,
    /// It tried to open connections of its own, which nobody answers, so its state may differ from the OVM's.
    OwnConnections,
}

/// Why clients are no longer held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Release {
    /// A server was made equal to the OVM, and is seeded.
    Seeded,
    /// The operator who asked for the hold gave it up, or has disconnected.
    GivenUp,
    /// Open conversations did not end by the deadline.
    ConversationsOpen,
    /// The hold reached its time limit.
    Limit,
    /// Another OVM serves now, whose state is not the one that was copied.
    OvmChanged,
    /// The data plane let clients through to the OVM, because the daemon did not run for too long.
    Unattended,
}
