//! The messages between threads: all send a [`Message`] to the data path, which sends [`LostInterface`] to placement.

use std::collections::BTreeMap;
use std::sync::mpsc;

use tokio::sync::oneshot;

use crate::command::{CommandError, Reply, Request};
use crate::containment::RulesNews;
use crate::domain::{DomainId, DomainRef, KnownDomain};
use crate::host::fencing::Outcome;
use crate::link::device::Device;
use crate::link::vif::{Arrival, GuestVif, Interface};
use crate::wake::Waker;

/// What other threads tell the data path.
pub(crate) enum Message {
    /// A question or a command of an operator.
    Request(Request),
    /// A service's PSC has its place on a bridge.
    Anchored {
        /// Index of the service.
        service: usize,
        /// The bridge.
        bridge: String,
        /// The far end of the anchor.
        device: Device,
    },
    /// A domain can be used by a service, or its lost interface is open again.
    Arrived {
        /// Index of the service.
        service: usize,
        /// The domain.
        arrival: Arrival,
        /// Its vif.
        vif: Interface,
    },
    /// A domain of a service was migrated within this host: it has another domid.
    Moved {
        /// Index of the service.
        service: usize,
        /// Its life before.
        from: DomainId,
        /// Its life now.
        to: DomainRef,
        /// Its interface in dom0 now, not connected yet.
        vif: String,
    },
    /// All vifs that domains of a service have, by name.
    Vifs {
        /// Index of the service.
        service: usize,
        /// The vifs.
        vifs: BTreeMap<String, GuestVif>,
    },
    /// Somebody took away a part of a service's plane, and it is there again.
    Restored {
        /// Index of the service.
        service: usize,
        /// What.
        what: String,
    },
    /// A domain can't be used by a service any more.
    Departed {
        /// Index of the service.
        service: usize,
        /// Which life of which domain.
        domain: DomainId,
    },
    /// A domain has another name.
    Renamed {
        /// Index of the service.
        service: usize,
        /// Which life of which domain.
        domain: DomainId,
        /// The name.
        name: String,
    },
    /// A domain matches a service, and can't be used.
    Unusable {
        /// Index of the service.
        service: usize,
        /// Which, and why.
        known: KnownDomain,
    },
    /// The toolstack asks a domain to shut down.
    ShutdownRequested {
        /// Index of the service.
        service: usize,
        /// Which life of which domain.
        domain: DomainId,
        /// What it asks for.
        request: String,
    },
    /// The problems that one part of the daemon has; they replace those that it had before.
    Problems {
        /// Which part.
        source: Source,
        /// What, and what to do.
        problems: Vec<String>,
    },
    /// News of the kernel's rules.
    Rules(RulesNews),
    /// The result of a job.
    Outcome(Outcome),
    /// End the thread.
    Stop,
}

/// The part of the daemon that has a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Source {
    /// Discovery.
    Xenstore,
    /// Liveness.
    Hypervisor,
    /// The kernel's rules.
    Rules,
    /// What outlives a reboot.
    Memory,
    /// Placement of a service, by its index.
    Placement(usize),
}

/// An interface that a service lost; placement opens it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LostInterface {
    /// Index of the service.
    pub(crate) service: usize,
    /// Whose vif; `None` for the PSC's anchor.
    pub(crate) domain: Option<DomainId>,
}

/// Where requests of operators go, for as many callers as there are.
#[derive(Clone)]
pub(crate) struct Requests {
    sender: mpsc::Sender<Message>,
    waker: Waker,
}

impl Requests {
    /// Requests that reach the thread which reads `sender`'s other end and sleeps on `waker`.
    pub(crate) fn new(sender: mpsc::Sender<Message>, waker: Waker) -> Self {
        Self { sender, waker }
    }

    /// Sends a request that has no answer.
    pub(crate) fn tell(&self, request: Request) {
        // Without a data path there is nothing to be done.
        let _ = self.sender.send(Message::Request(request));
        self.waker.wake();
    }

    /// Asks and waits for the answer: `requests.ask(|reply| Request::Status { reply }).await`.
    pub(crate) async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, CommandError> {
        let (reply, answer) = oneshot::channel();
        self.sender.send(Message::Request(request(reply))).map_err(|_| CommandError::Stopping)?;
        self.waker.wake();
        answer.await.map_err(|_| CommandError::Stopping)?
    }
}
