//! What the control server asks of the data path: one [`Request`] per question or command, each with its own reply channel.
//!
//! The data-path thread answers between packets, in the order in which they arrive, so that an answer describes one moment
//! of a service. Nothing here blocks: a reply either comes soon or the channel closes because the daemon is stopping
//! ([`CommandError::Stopping`]).

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::oneshot;
use understudy_api::{
    Answer, Attach, Command, CopyEnd, DEFAULT_DRAIN_TIMEOUT_MS, HoldState, MAX_DRAIN_TIMEOUT_MS,
};
use understudy_protocol::{ConversationStatus, OperatorError, ServiceStatus};

use crate::domain::{DomainRef, KnownDomain};

/// Where the answer to a [`Request`] goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, CommandError>>;

/// A question or a command of an operator. `service` is a configured name; `domain` is a domain's name or UUID.
#[derive(Debug)]
pub(crate) enum Request {
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
    /// Has a service carry out a command.
    Command {
        /// Which service.
        service: String,
        /// What.
        command: Command,
        /// Gets what the command names as its answer.
        reply: Reply<Answer>,
    },
    /// Holds a service's clients while the OVM's state is copied to a domain, which is out of the queue and may use its
    /// network meanwhile. Ends by [`Statement::Copied`], by [`Request::Release`], or by itself.
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
    /// The state of a hold.
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
}

/// Most conversations that one [`Request::Conversations`] gives: the packet path waits meanwhile.
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

impl Statement {
    /// What an attach says, if it says anything; refused if it contradicts itself.
    pub(crate) fn of(attach: &Attach) -> Result<Option<Self>, CommandError> {
        let invalid = |why: &str| Err(CommandError::Invalid(why.to_owned()));
        let Attach { assume_identical, drain, drain_timeout_ms, copied, .. } = *attach;
        match (copied, assume_identical, drain, drain_timeout_ms) {
            (Some(hold), false, false, None) => Ok(Some(Self::Copied { hold })),
            (Some(_), ..) => invalid("`copied` says all that there is to say of the domain's state"),
            (None, true, true, _) => invalid(
                "`assume_identical` and `drain` exclude each other: the first says that the domain's state equals the OVM's now, the second that it will once open conversations have ended",
            ),
            (None, _, false, Some(_)) => invalid("`drain_timeout_ms` means nothing without `drain`"),
            (None, false, true, Some(timeout)) if timeout > MAX_DRAIN_TIMEOUT_MS => invalid(&format!(
                "`drain_timeout_ms` is {timeout}: new clients wait that long; at most {MAX_DRAIN_TIMEOUT_MS}"
            )),
            (None, false, true, timeout) => Ok(Some(Self::IdenticalAfterDrain {
                timeout: Duration::from_millis(timeout.unwrap_or(DEFAULT_DRAIN_TIMEOUT_MS)),
            })),
            (None, true, false, None) => Ok(Some(Self::Identical)),
            (None, false, false, None) => Ok(None),
        }
    }
}

/// Answer to [`Request::Hold`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hold {
    /// Its number, in this process.
    pub(crate) hold: u64,
    /// The OVM.
    pub(crate) from: CopyEnd,
    /// The domain whose state is to become equal.
    pub(crate) to: CopyEnd,
}

/// Answer to [`Request::Conversations`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conversations {
    /// The page.
    pub(crate) conversations: Vec<ConversationStatus>,
    /// Names of the servers in it.
    pub(crate) servers: BTreeMap<u32, DomainRef>,
    /// Open conversations in all.
    pub(crate) total: u64,
}

/// Answer to [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq)]
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
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Domains in the queue, by their server ids.
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
    /// The command contradicts itself.
    #[error("{0}")]
    Invalid(String),
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
            Self::Invalid(_) => "bad_request",
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
