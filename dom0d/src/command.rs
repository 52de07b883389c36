//! What the control server can ask of the daemon: one [`Command`] per question or order, each with its own reply channel.
//!
//! Commands are carried out by the data-path thread between packets, in the order they arrive, so that
//! an answer describes one moment of a service. Nothing here blocks: a reply either comes soon or the
//! channel closes because the daemon is stopping ([`CommandError::Stopping`]).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::oneshot;
use understudy_protocol::{ConversationStatus, OperatorError, ServerId, ServiceStatus};

use crate::domain::{DomainRef, KnownDomain};

/// Where the answer to a [`Command`] goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, CommandError>>;

/// A question or an order of an operator. `service` is a configured name; `domain` is a domain's name or UUID.
#[derive(Debug)]
pub(crate) enum Command {
    /// Everything an operator may want to see at a glance. Always legal.
    Status {
        /// Gets the snapshot.
        reply: Reply<DaemonStatus>,
    },
    /// Conversations of one service, in table order.
    Conversations {
        /// Which service.
        service: String,
        /// How many to leave out at the front.
        skip: usize,
        /// How many to give at most; capped at [`CONVERSATIONS_LIMIT`].
        limit: usize,
        /// Gets the page.
        reply: Reply<Conversations>,
    },
    /// Puts a domain into a service's queue, or seeds one that is in it. Needs a statement on the domain's state.
    Attach {
        /// Which service.
        service: String,
        /// Which domain.
        domain: String,
        /// What the operator states.
        statement: Option<Statement>,
        /// Gets the domain's place.
        reply: Reply<Attached>,
    },
    /// Holds a service's clients while the OVM's state is copied to a domain, which is out of the queue and may use its
    /// network meanwhile. Ends by [`Statement::Copied`], by [`Command::Release`], or by itself.
    Hold {
        /// Which service.
        service: String,
        /// Which domain.
        domain: String,
        /// How long open conversations get to end.
        drain: Duration,
        /// How long clients are held then.
        limit: Duration,
        /// Gets the hold.
        reply: Reply<Hold>,
    },
    /// How a hold is.
    Holding {
        /// Which service.
        service: String,
        /// Which hold.
        hold: u64,
        /// Gets that.
        reply: Reply<HoldState>,
    },
    /// Lets clients in again; nothing if another hold, or none, is in force.
    Release {
        /// Which service.
        service: String,
        /// Which hold.
        hold: u64,
    },
    /// Takes an RVM out of the queue and leaves it out until it is attached again.
    Detach {
        /// Which service.
        service: String,
        /// Which domain.
        domain: String,
        /// Gets what was detached.
        reply: Reply<DomainRef>,
    },
    /// A planned promotion; the old OVM stays as an RVM.
    Switchover {
        /// Which service.
        service: String,
        /// The next OVM; the best candidate if none is named.
        to: Option<String>,
        /// Gets the new OVM.
        reply: Reply<Promoted>,
    },
    /// An unplanned promotion by an operator; the old OVM is fenced.
    Failover {
        /// Which service.
        service: String,
        /// The next OVM; the best candidate if none is named.
        to: Option<String>,
        /// Promote `to` although it is not promotable.
        force: bool,
        /// Gets the new OVM.
        reply: Reply<Promoted>,
    },
    /// Announces maintenance of a domain and pauses it; causes no failover within the service's limit.
    Pause {
        /// Which service.
        service: String,
        /// Which domain.
        domain: String,
        /// Gets the domain once the hypervisor says that it is paused.
        reply: Reply<DomainRef>,
    },
    /// Lets a paused domain run again and ends its announced maintenance.
    Resume {
        /// Which service.
        service: String,
        /// Which domain.
        domain: String,
        /// Gets the domain once the hypervisor says that it runs.
        reply: Reply<DomainRef>,
    },
}

/// Most conversations that one [`Command::Conversations`] gives: the packet path waits meanwhile.
pub(crate) const CONVERSATIONS_LIMIT: usize = 1_000;

/// What an operator states about the state of a domain that is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Statement {
    /// It equals the OVM's now; refused while conversations are open.
    Identical,
    /// It equals the OVM's once the open conversations have ended, for which they have this long.
    IdenticalAfterDrain {
        /// When the drain gives up.
        timeout: Duration,
    },
    /// It was made equal under this hold.
    Copied {
        /// Which.
        hold: u64,
    },
}

/// Answer to [`Command::Hold`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hold {
    /// Its number, in this process.
    pub(crate) hold: u64,
    /// The OVM, and its addresses.
    pub(crate) from: (DomainRef, Vec<IpAddr>),
    /// Whose state is to become equal, and its addresses.
    pub(crate) to: (DomainRef, Vec<IpAddr>),
}

/// How a hold is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HoldState {
    /// So many conversations are open, or it is not in force yet.
    Draining(u64),
    /// Nothing of clients reaches the OVM.
    Held,
    /// It is over, for this reason.
    Over(String),
}

/// Answer to [`Command::Attach`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Attached {
    /// The domain.
    pub(crate) domain: DomainRef,
    /// Its id in events and status from now on.
    pub(crate) server: ServerId,
    /// `true`: the drain is under way; its end is reported by an event (`seeded`, or `stale`).
    pub(crate) draining: bool,
}

/// Answer to [`Command::Switchover`] and [`Command::Failover`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Promoted {
    /// The new OVM.
    pub(crate) domain: DomainRef,
    /// Its id in events and status.
    pub(crate) server: ServerId,
    /// The service's new epoch.
    pub(crate) epoch: u64,
}

/// Answer to [`Command::Conversations`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Conversations {
    /// The page.
    pub(crate) conversations: Vec<ConversationStatus>,
    /// Names of the servers in it.
    pub(crate) servers: BTreeMap<u32, DomainRef>,
    /// Open conversations in all.
    pub(crate) total: u64,
}

/// Answer to [`Command::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct DaemonStatus {
    /// The daemon's version.
    pub(crate) version: &'static str,
    /// Its process.
    pub(crate) pid: u32,
    /// How long it has been up, in milliseconds.
    pub(crate) uptime_ms: u64,
    /// What runs the domains: `xen` or `lab`.
    pub(crate) hypervisor: &'static str,
    /// What hinders the daemon as a whole: xenstore unreachable, domain list unreadable. Empty when all is well.
    pub(crate) problems: Vec<String>,
    /// Monotonic counters of the daemon as a whole.
    pub(crate) counters: BTreeMap<&'static str, u64>,
    /// The services, in the configuration's order.
    pub(crate) services: Vec<ServiceReport>,
}

/// One service at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct ServiceReport {
    /// The operator's name of it.
    pub(crate) name: String,
    /// The PSC's addresses.
    pub(crate) psc: Vec<std::net::IpAddr>,
    /// The PSC's MAC, as in `02:00:00:00:00:01`.
    pub(crate) psc_mac: String,
    /// The replicated ports.
    pub(crate) ports: Vec<u16>,
    /// The data plane in use: `pcap` or `bpf`.
    pub(crate) plane: &'static str,
    /// The bridge of the PSC, once known.
    pub(crate) bridge: Option<String>,
    /// Clients are served: the PSC is in place and there is an OVM whose domain runs.
    pub(crate) serving: bool,
    /// What hinders it, and what to do. Empty when all is well.
    pub(crate) problems: Vec<String>,
    /// The engine's view; its servers are named in [`ServiceReport::servers`].
    pub(crate) status: ServiceStatus,
    /// Domains in the queue, by [`ServerId`].
    pub(crate) servers: BTreeMap<u32, DomainRef>,
    /// Domains that match the service's configuration and are not in the queue, each with the reason.
    pub(crate) known: Vec<KnownDomain>,
    /// Interfaces from which nothing passes but what the operator allows.
    pub(crate) contained: Vec<String>,
    /// Monotonic counters of the data plane of this service.
    pub(crate) plane_counters: BTreeMap<&'static str, u64>,
}

/// Why a command was not carried out; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// No service has that name.
    #[error("no service is named {service:?}; the configuration has: {}", .known.join(", "))]
    UnknownService {
        /// What was asked for.
        service: String,
        /// What there is.
        known: Vec<String>,
    },
    /// No running domain of the service has that name or UUID.
    #[error("service {service}: no running domain {domain:?} matches its `ovm` or `rvms`; it has: {}. Start the domain (xl create), or add it to `rvms`", if .known.is_empty() { "none".to_owned() } else { .known.join(", ") })]
    UnknownDomain {
        /// The service.
        service: String,
        /// What was asked for.
        domain: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The domain is known but can't serve as it is.
    #[error("service {service}: {domain} can't be used: {reason}")]
    Unusable {
        /// The service.
        service: String,
        /// The domain.
        domain: String,
        /// Why, and what to do.
        reason: String,
    },
    /// An attach without a word on the domain's state.
    #[error(
        "service {service}: attaching {domain} needs a statement on its state: --assume-identical if it equals the OVM's now, --drain to let open conversations end first, --copy COMMAND to make it equal while clients wait"
    )]
    NoStatement {
        /// The service.
        service: String,
        /// The domain.
        domain: String,
    },
    /// The engine refuses.
    #[error("service {service}: {}{error}", .domain.as_ref().map(|d| format!("{d}: ")).unwrap_or_default())]
    Refused {
        /// The service.
        service: String,
        /// The domain, if one was named.
        domain: Option<String>,
        /// Why.
        error: OperatorError,
    },
    /// The hypervisor refuses or can't be reached.
    #[error("service {service}: {domain}: {error}")]
    Hypervisor {
        /// The service.
        service: String,
        /// The domain.
        domain: String,
        /// What it said, and what to do.
        error: String,
    },
    /// The daemon is stopping.
    #[error("dom0d is stopping; ask again once it runs")]
    Stopping,
}

impl CommandError {
    /// A stable name for programs.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::UnknownService { .. } => "unknown_service",
            Self::UnknownDomain { .. } => "unknown_domain",
            Self::Unusable { .. } => "domain_unusable",
            Self::NoStatement { .. } => "no_statement",
            Self::Refused { error, .. } => match error {
                OperatorError::UnknownServer => "not_in_queue",
                OperatorError::AlreadyAttached => "already_attached",
                OperatorError::QueueFull(_) => "queue_full",
                OperatorError::ConversationsOpen(_) => "conversations_open",
                OperatorError::DrainUnderWay => "drain_under_way",
                OperatorError::NotHeld => "not_held",
                OperatorError::IsOvm => "is_ovm",
                OperatorError::NothingLeft => "nothing_left",
                OperatorError::NotPromotable => "not_promotable",
                OperatorError::OvmInstalled => "ovm_installed",
            },
            Self::Hypervisor { .. } => "hypervisor",
            Self::Stopping => "stopping",
        }
    }
}
