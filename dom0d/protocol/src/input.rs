//! What the engine is told, in one order: what the caller hands it ([`crate::Service::handle`]).
//!
//! The engine is a function of its configuration and its inputs: whoever writes the inputs down, as dom0d does, can have
//! another process repeat them.

use core::net::IpAddr;
use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::{Evidence, LinkAddress, ServerId};
use crate::time::Instant;

/// One thing that the engine is told. Packets are borrowed, also when an input is read back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input<'a> {
    /// An IP packet from a client to the PSC.
    Client {
        /// The frame's source address.
        link: LinkAddress,
        /// What the data plane did with it.
        passage: Passage,
        /// The IPv4 or IPv6 packet; what is malformed or not the service's is counted.
        #[serde(borrow, with = "serde_bytes")]
        packet: &'a [u8],
    },
    /// An IP packet that came out of a server's vif. An unknown id is a deposed or former server: dropped and counted.
    Server {
        /// Whose vif.
        server: ServerId,
        /// What the data plane did with it.
        passage: Passage,
        /// The IPv4 or IPv6 packet; what is malformed or not the service's is counted.
        #[serde(borrow, with = "serde_bytes")]
        packet: &'a [u8],
    },
    /// The time that [`crate::Service::next_timeout`] named has come (early or late is fine).
    Timeout,
    /// A server's kernel gave a sign of life. Only the OVM's count.
    Sign {
        /// Whose.
        server: ServerId,
        /// Which.
        sign: Sign,
    },
    /// A server's domain runs, or does not: a server that does not run is never promoted, and an OVM that does not run is
    /// not accused by (c) or (d).
    Running {
        /// Which.
        server: ServerId,
        /// Whether it runs.
        running: bool,
    },
    /// An RVM tried to open a connection of its own, which nobody answers, and the operator has not stated that this does no
    /// harm: it is not promoted unasked any more.
    OwnConnection {
        /// Which.
        server: ServerId,
    },
    /// Liveness found evidence (a) or (b) against a server. An OVM loses its seat for it (or
    /// [`crate::EventKind::NoCandidate`] tells why not), an RVM is evicted. Before an OVM is accused, stop the plane.
    Evidence {
        /// Against whom.
        server: ServerId,
        /// What.
        evidence: Evidence,
    },
    /// The data plane can pass conversations by itself.
    PlanePasses,
    /// Everything that the data plane had for the engine was handed over, and all outputs were polled: until the next input
    /// the engine may give it conversations to pass ([`crate::Rule::HandOver`]).
    PlaneIdle,
    /// The data plane passes nothing any more, and the engine was told everything that it had passed.
    PlaneStopped,
    /// The data plane passed something that it could not tell the engine: no RVM can follow.
    Untold,
    /// The answer to [`crate::Output::StopPlane`], after [`Input::PlaneStopped`]: the engine acts upon the evidence if the
    /// accused still is the OVM.
    Confirmed {
        /// As in the output.
        accused: ServerId,
        /// As in the output.
        evidence: Evidence,
    },
    /// An operator asks for something. The only input that the engine can refuse.
    Command(Command),
}

/// What an operator may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Gives a service its OVM that has none, or whose OVM is not running any more and could not be replaced
    /// (conversations of that OVM are reset). The new OVM's state is the truth by definition.
    InstallOvm(ServerSpec),
    /// Adds an RVM at the end of the queue.
    Attach {
        /// The server.
        spec: ServerSpec,
        /// What is stated about its state.
        seeding: Seeding,
    },
    /// Seeds an RVM that is attached already.
    Seed {
        /// Which.
        server: ServerId,
        /// What is stated about its state.
        seeding: Seeding,
    },
    /// Takes an RVM out of the queue.
    Detach {
        /// Which.
        server: ServerId,
    },
    /// Planned: `to`, or the best candidate, becomes the OVM; the old OVM stays as a promotable RVM. Stop the plane before.
    Switchover {
        /// Whom to promote.
        to: Option<ServerId>,
    },
    /// Unplanned: the OVM is deposed and fenced. Stop the plane before.
    Failover {
        /// Whom to promote; `None` for the best candidate.
        to: Option<ServerId>,
        /// Promote `to` even if it is not promotable: its uncovered and diverged conversations are reset.
        force: bool,
    },
    /// Lets no conversation begin, and those that are open until the deadline to end; then nothing of clients reaches the OVM
    /// for `limit` at most, while its state is copied to a server that is then attached ([`Seeding::Copied`]).
    /// [`crate::EventKind::Held`] tells when that may begin, [`crate::EventKind::Released`] that it is over.
    Hold {
        /// When to give up waiting for open conversations.
        deadline: Instant,
        /// How long clients are held then.
        limit: Duration,
    },
    /// Lets clients in again whom [`Command::Hold`] keeps out; nothing if it does not.
    Release,
}

/// What the data plane did with a packet that it hands to the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Passage {
    /// Nothing: it waits for the engine's word.
    #[default]
    Kept,
    /// Passed it on, translated by the conversation's [`crate::Flow`].
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
    /// Its state was made equal to the OVM's while clients were held ([`Command::Hold`]), who are let in again.
    Copied,
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
