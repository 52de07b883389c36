//! The engine's inputs, in one order, as the caller hands them over ([`crate::Service::handle`]).
//!
//! The engine is a function of its configuration and its inputs: if a process records its inputs, as dom0d does in the
//! journal, another process can replay them.

use core::net::IpAddr;
use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::{Evidence, LinkAddress, ServerId};
use crate::time::Instant;

/// One input of the engine. Packets are borrowed, also in an input that was read back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input<'a> {
    /// An IP packet from a client to the PSC.
    Client {
        /// The frame's source address.
        link: LinkAddress,
        /// What the data plane did with the packet.
        passage: Passage,
        /// The IPv4 or IPv6 packet. The engine drops and counts a packet that is malformed or not the service's.
        #[serde(borrow, with = "serde_bytes")]
        packet: &'a [u8],
    },
    /// An IP packet that came out of a server's vif. An unknown id belongs to a deposed or former server: the engine
    /// drops and counts its packet (rule 1).
    Server {
        /// The server whose vif it is.
        server: ServerId,
        /// What the data plane did with the packet.
        passage: Passage,
        /// The IPv4 or IPv6 packet. The engine drops and counts a packet that is malformed or not the service's.
        #[serde(borrow, with = "serde_bytes")]
        packet: &'a [u8],
    },
    /// The time that [`crate::Service::next_timeout`] named has come. Calling early or late is fine.
    Timeout,
    /// A server's kernel gave a sign of life. Only the OVM's count (rule 11).
    Sign {
        /// The server.
        server: ServerId,
        /// Which.
        sign: Sign,
    },
    /// A server's domain began or ceased to run. The engine never promotes a server that does not run, and does not
    /// accuse an OVM that does not run by (c) or (d).
    Running {
        /// The server.
        server: ServerId,
        /// Whether it runs.
        running: bool,
    },
    /// An RVM tried to open a connection of its own, which nobody answers, and the operator has not stated that this is
    /// harmless. From now on the engine does not promote it unasked.
    OwnConnection {
        /// The server.
        server: ServerId,
    },
    /// Liveness found evidence (a) or (b) against a server. The engine deposes an OVM (or reports by
    /// [`crate::EventKind::NoCandidate`] why it can't), and evicts an RVM. If the server is the OVM, stop the plane
    /// first.
    Evidence {
        /// The server that the evidence is against.
        server: ServerId,
        /// The evidence.
        evidence: Evidence,
    },
    /// The data plane can pass conversations by itself.
    PlanePasses,
    /// The caller has handed over everything that the data plane had for the engine, and polled all outputs. Until the
    /// next input the engine may give the plane conversations to pass ([`crate::Rule::HandOver`]).
    PlaneIdle,
    /// The data plane passes nothing any more, and the caller has handed over everything that it had passed.
    PlaneStopped,
    /// The data plane passed something that it could not report to the engine: no RVM can follow (rule 10).
    Untold,
    /// The answer to [`crate::Output::StopPlane`], after [`Input::PlaneStopped`]: the engine acts on the evidence if
    /// the accused is still the OVM.
    Confirmed {
        /// As in the output.
        accused: ServerId,
        /// As in the output.
        evidence: Evidence,
    },
    /// An operator's command, the only input that the engine can refuse.
    Command(Command),
}

/// An operator's command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Gives the service an OVM, if it has none, or if its OVM no longer runs and could not be replaced (that OVM's
    /// conversations are reset). The new OVM's state is the reference by definition.
    InstallOvm(ServerSpec),
    /// Adds an RVM at the end of the queue.
    Attach {
        /// The server.
        spec: ServerSpec,
        /// What the operator states about its state.
        seeding: Seeding,
    },
    /// Seeds an attached RVM.
    Seed {
        /// The server.
        server: ServerId,
        /// What the operator states about its state.
        seeding: Seeding,
    },
    /// Takes an RVM out of the queue.
    Detach {
        /// The server.
        server: ServerId,
    },
    /// A planned promotion: `to`, or the best candidate, becomes the OVM; the old OVM stays as a promotable RVM. Stop
    /// the plane first.
    Switchover {
        /// The server to promote; `None` for the best candidate.
        to: Option<ServerId>,
    },
    /// An unplanned promotion: the OVM is deposed and fenced. Stop the plane first.
    Failover {
        /// The server to promote, or `None` for the best candidate.
        to: Option<ServerId>,
        /// Promote `to` even if it is not promotable: its uncovered and diverged conversations are reset.
        force: bool,
    },
    /// Lets no conversation begin, and gives open conversations until the deadline to end. Then nothing of clients
    /// reaches the OVM for `limit` at most, while the operator copies the OVM's state to a server and attaches that
    /// ([`Seeding::Copied`]). [`crate::EventKind::Held`] reports that the copy may begin,
    /// [`crate::EventKind::Released`] that the hold is over.
    Hold {
        /// When the engine gives up waiting for open conversations.
        deadline: Instant,
        /// How long clients are held after that, at most.
        limit: Duration,
    },
    /// Ends a [`Command::Hold`]; does nothing if there is none.
    Release,
}

/// What the data plane did with a packet that it hands to the engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Passage {
    /// Nothing: the engine decides what becomes of the packet.
    #[default]
    Kept,
    /// The plane passed the packet on, translated by the conversation's [`crate::Flow`].
    Passed {
        /// Right edge of the window that the receiver was told, in the sequence numbers that the client knows.
        edge: u32,
        /// The receiver does not check the TCP checksum, because a device has verified it or is still to fill it in.
        /// Otherwise the receiver drops a packet whose checksum is wrong or partial.
        trusted: bool,
    },
    /// Nothing, and from now on the plane passes nothing of this conversation by itself.
    HandedOver,
    /// The plane passed the packet on because the daemon did not run for too long, and passes all of this conversation
    /// from now on.
    Unattended,
}

/// A sign that a server's kernel lives, independent of its conversations: its own ARP (RFC 826) or Neighbor Discovery
/// (RFC 4861) packet, seen at its vif.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Sign {
    /// The kernel announced its own address.
    Answered,
    /// The kernel asks for a link address: until it gets the answer it can't reach the hosts behind that address.
    Asked {
        /// The IP address whose link address it asks for.
        target: IpAddr,
        /// The right answer, if the caller knows it.
        link: Option<LinkAddress>,
    },
}

/// A server, as the caller describes it to the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerSpec {
    /// Its identity, never used before in this service.
    pub id: ServerId,
    /// The guest's own addresses, at most one per family. The server does not serve a PSC address of a family that is
    /// missing here.
    pub addresses: Vec<IpAddr>,
    /// MTU of its vif in bytes.
    pub mtu: u16,
}

/// What the operator states about an RVM's state (rule 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seeding {
    /// Nothing: the engine feeds it new conversations, and it is stale.
    Unseeded,
    /// Its state equals the OVM's now. The engine refuses this while conversations are open.
    AssumeIdentical,
    /// Its state will equal the OVM's once the open conversations have ended. Until then the engine holds new SYNs. If
    /// a conversation is still open at the deadline, or another server becomes the OVM, the drain fails: SYNs flow
    /// again, and the RVM stays stale.
    Drain {
        /// When the drain fails.
        deadline: Instant,
    },
    /// Its state was made equal to the OVM's while clients were held ([`Command::Hold`]). This ends the hold.
    Copied,
}

/// Why the engine refused a command. It has changed nothing.
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
    /// Clients are not held, or no longer: the OVM's state may have changed while it was copied.
    #[error("clients are not held: the copy may lack what they wrote meanwhile")]
    NotHeld,
    /// The service has an OVM.
    #[error("the service has an OVM already")]
    OvmInstalled,
    /// It is the OVM.
    #[error("the server is the OVM")]
    IsOvm,
    /// No server would remain that could serve.
    #[error("no server would be left to serve the clients")]
    NothingLeft,
    /// The server can't be promoted unasked, and force was not given.
    #[error("the server is not promotable")]
    NotPromotable,
}
