//! What happened, when, and to which domain: the stream behind `understudy events`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::broadcast;
use understudy_protocol::{EventKind, ServerId};

use crate::domain::DomainRef;

/// An event with its time and the names that its server ids stand for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct TimedEvent {
    /// Microseconds since the Unix epoch.
    pub(crate) unix_us: u64,
    /// Microseconds on CLOCK_MONOTONIC, comparable with other processes of this host.
    pub(crate) monotonic_us: u64,
    /// The service that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) service: Option<String>,
    /// Domains behind the server ids that the event names.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) domains: BTreeMap<u32, DomainRef>,
    /// What.
    #[serde(flatten)]
    pub(crate) kind: Happening,
}

/// What happened: in the engine, or around it. Both serialize with a field `event`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Happening {
    /// In the protocol engine.
    Protocol(EventKind),
    /// In the daemon.
    Daemon(DaemonEvent),
}

/// Events of the daemon itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum DaemonEvent {
    /// The PSC is in place on its bridge: clients find it from now on.
    PscReady {
        /// The bridge.
        bridge: String,
        /// The PSC's MAC.
        mac: String,
    },
    /// A domain that matches the service appeared.
    DomainAppeared {
        /// Which.
        domain: DomainRef,
    },
    /// A domain of the service is gone.
    DomainGone {
        /// Which.
        domain: DomainRef,
    },
    /// A domain of the service lives on under another domid: it was migrated within this host.
    DomainMoved {
        /// Which.
        server: ServerId,
        /// Its number before.
        from_domid: u16,
    },
    /// A domain that matches the service is not put into its queue.
    NotAttached {
        /// Which.
        domain: DomainRef,
        /// Why, and what to do.
        reason: String,
    },
    /// A deposed server is fenced for good, verified.
    Fenced {
        /// Which.
        server: ServerId,
        /// `pause`, `destroy` or `isolate`.
        by: &'static str,
    },
    /// A deposed server could not be fenced for good yet. The data path drops its frames, and dom0d tries again.
    FenceFailed {
        /// Which.
        server: ServerId,
        /// Why.
        error: String,
    },
    /// A domain's maintenance was announced: its pause causes no failover for that long.
    MaintenanceBegan {
        /// Which.
        server: ServerId,
        /// The limit in milliseconds.
        limit_ms: u64,
    },
    /// A domain's announced maintenance is over.
    MaintenanceEnded {
        /// Which.
        server: ServerId,
    },
    /// The toolstack asks a domain to shut down.
    ShutdownRequested {
        /// Which.
        server: ServerId,
        /// The request as written by the toolstack: `poweroff`, `reboot`, ...
        request: String,
    },
    /// A replica tried to open a TCP connection of its own, which was dropped; told once for each destination.
    OwnConnection {
        /// Which.
        server: ServerId,
        /// Where to.
        to: SocketAddr,
    },
    /// Somebody removed rules or programs that contain the service's guests or pass its packets. dom0d put them back.
    Restored {
        /// What.
        what: String,
    },
    /// This dom0d resumed where a killed one had left the service.
    TakenOver {
        /// Open conversations, as the killed dom0d knew them.
        conversations: u64,
    },
    /// The daemon or a service has a problem; the status has the same text until it is over.
    Problem {
        /// What, and what to do.
        message: String,
    },
    /// A problem is over.
    Solved {
        /// The text of the problem.
        message: String,
    },
}

/// Where events go; a receiver that is too slow loses the oldest and is told so.
pub(crate) type Events = broadcast::Sender<Arc<TimedEvent>>;

/// How many events a slow receiver may be behind.
pub(crate) const EVENTS_KEPT: usize = 4_096;
