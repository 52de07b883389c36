//! The answers to `GET /v1/status`, `/v1/services` and `/v1/services/{s}/conversations`.
//!
//! All counts and bytes of one answer are of the moment at which the data path answered. Fields are only
//! ever added: readers ignore those that they don't know.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use understudy_protocol::{NotPromotable, Role, ServerId, StaleReason, Uncovered};
use uuid::Uuid;

/// A domain as operators and toolstacks know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// The toolstack's handle.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// The number of its present life. Xen uses it again after that life.
    pub domid: u16,
}

/// The daemon and all of its services.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// dom0d's version.
    pub version: String,
    /// dom0d's process id.
    pub pid: u32,
    /// How long dom0d has been up, in milliseconds.
    pub uptime_ms: u64,
    /// The hypervisor: `xen` or `lab`.
    pub hypervisor: String,
    /// Every service serves and nothing hinders the daemon, as in `/readyz`.
    pub ready: bool,
    /// What hinders the daemon as a whole, and what to do.
    pub problems: Vec<String>,
    /// Monotonic counters of the daemon as a whole.
    pub counters: BTreeMap<String, u64>,
    /// The services, in the configuration's order.
    pub services: Vec<Service>,
}

/// The answer to `GET /v1/services`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Services {
    /// The services, in the configuration's order.
    pub services: Vec<Service>,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its name in the configuration.
    pub name: String,
    /// The PSC's addresses.
    pub psc: Vec<IpAddr>,
    /// The PSC's MAC, as in `02:00:00:00:00:01`.
    pub psc_mac: String,
    /// The replicated TCP ports.
    pub ports: Vec<u16>,
    /// The data plane, such as `pcap`.
    pub plane: String,
    /// The PSC's bridge, once known.
    pub bridge: Option<String>,
    /// Clients are served: the PSC is in place and there is an OVM whose domain runs.
    pub serving: bool,
    /// What hinders it, and what to do.
    pub problems: Vec<String>,
    /// Grows by one with each promotion.
    pub epoch: u64,
    /// The server queue, in order.
    pub servers: Vec<Server>,
    /// Domains that match the configuration and are not in the queue.
    pub known: Vec<KnownDomain>,
    /// Interfaces in dom0 of the service's domains, from which only what `allow` names passes. Also those of domains that
    /// are starting or can't be used.
    #[serde(default)]
    pub contained: Vec<String>,
    /// Open conversations.
    pub conversations: u64,
    /// Handshakes that clients began and did not complete.
    pub embryonic: u64,
    /// Conversations in recuperation.
    pub recuperating: u64,
    /// Bytes held for any server or client.
    pub retained_bytes: u64,
    /// Monotonic counters of the protocol engine.
    pub counters: BTreeMap<String, u64>,
    /// Monotonic counters of the data plane.
    pub plane_counters: BTreeMap<String, u64>,
}

impl Service {
    /// The server that serves now, or takes over.
    pub fn ovm(&self) -> Option<&Server> {
        self.servers.iter().find(|server| matches!(server.role, Role::Ovm | Role::TakingOver))
    }

    /// How many servers dom0d would promote unasked.
    pub fn promotable(&self) -> usize {
        self.servers.iter().filter(|s| s.promotable).count()
    }
}

/// One server of a queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// Its id in events.
    pub server: ServerId,
    /// The domain; `null` if the daemon has just lost it.
    pub domain: Option<Domain>,
    /// Its role.
    pub role: Role,
    /// The role as the paper numbers it (§IV.B), see [`queue_state`].
    pub queue_state: u8,
    /// It can be promoted unasked.
    pub promotable: bool,
    /// Why it can't be promoted, for programs.
    pub not_promotable: Option<NotPromotable>,
    /// Why it can't be promoted, in words, and what to do; `null` if it can, and for the OVM.
    pub why: Option<String>,
    /// Why its state may differ from the OVM's, if it may.
    pub stale: Option<StaleReason>,
    /// It is behind the record for too long.
    pub lagging: bool,
    /// Open conversations it covers.
    pub covered: u64,
    /// Open conversations it does not cover.
    pub uncovered: u64,
    /// Open conversations in which it diverged.
    pub diverged: u64,
    /// How many bytes it is behind, over all conversations and both directions.
    pub behind_bytes: u64,
}

/// The paper's number of a server's role: 2 OVM, 3 RVM, 4 taking over. (The paper's 0 and 1 stand for the
/// PSC and the client, which are no servers here.)
pub fn queue_state(role: Role) -> u8 {
    match role {
        Role::Ovm => 2,
        Role::Rvm => 3,
        Role::TakingOver => 4,
    }
}

/// A domain that could serve but is not in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownDomain {
    /// Which.
    pub domain: Domain,
    /// Why it is not in the queue, and what to do.
    pub reason: String,
}

/// A page of a service's conversations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversations {
    /// The service's name.
    pub service: String,
    /// Open conversations in all.
    pub total: u64,
    /// How many were skipped at the front.
    pub skip: usize,
    /// The page, in table order.
    pub conversations: Vec<Conversation>,
}

/// One conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversation {
    /// The client's address and port.
    pub client: SocketAddr,
    /// The PSC's address and port.
    pub psc: SocketAddr,
    /// Its state as the daemon sees it.
    pub state: String,
    /// It is in recuperation.
    pub recuperating: bool,
    /// Client bytes recorded.
    pub received_bytes: u64,
    /// Answer bytes sent to the client.
    pub sent_bytes: u64,
    /// Each server's part in it.
    pub legs: Vec<Leg>,
}

/// One server's counterpart of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leg {
    /// Which server.
    pub server: ServerId,
    /// The name of its domain.
    pub domain: Option<String>,
    /// The conversation would continue there after a promotion.
    pub covered: bool,
    /// Client bytes it acknowledged.
    pub acknowledged_bytes: u64,
    /// Answer bytes it produced.
    pub produced_bytes: u64,
    /// Why it does not cover the conversation.
    pub uncovered: Option<Uncovered>,
    /// Position of its first answer byte that differs from what the client was sent, if any differs.
    pub diverged_at: Option<u64>,
}
