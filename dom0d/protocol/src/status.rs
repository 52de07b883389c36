//! Snapshots of a service for operators. Field names are part of the control API.

use core::net::SocketAddr;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::{NotPromotable, ServerId, StaleReason, Uncovered};

/// A server's state in the queue; the numbers are the paper's (§IV.B).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// 2: it serves now.
    Ovm,
    /// 3: it receives what clients send, and its answers are suppressed.
    Rvm,
    /// 4: it serves, and conversations are still in recuperation.
    TakingOver,
}

/// One service at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceStatus {
    /// Grows by one with each promotion; 0 before the first OVM.
    pub epoch: u64,
    /// The server queue, in order.
    pub servers: Vec<ServerStatus>,
    /// Open conversations.
    pub conversations: u64,
    /// Handshakes that clients have begun and not completed.
    pub embryonic: u64,
    /// Conversations in recuperation.
    pub recuperating: u64,
    /// Bytes held for any server or client.
    pub retained_bytes: u64,
    /// Monotonic counters by name, of what was dropped, refused or limited.
    pub counters: BTreeMap<&'static str, u64>,
}

/// One server at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServerStatus {
    /// The server.
    pub server: ServerId,
    /// Its state in the queue.
    pub role: Role,
    /// Why it can't be promoted unasked; `None` if it can.
    pub not_promotable: Option<NotPromotable>,
    /// Why its state may differ from the OVM's, if it may.
    pub stale: Option<StaleReason>,
    /// Open conversations it covers.
    pub covered: u64,
    /// Open conversations it does not cover.
    pub uncovered: u64,
    /// Open conversations in which it diverged.
    pub diverged: u64,
    /// Bytes, over all conversations and both directions, that it is behind.
    pub behind_bytes: u64,
}

/// One conversation at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConversationStatus {
    /// The client's address.
    pub client: SocketAddr,
    /// The PSC address and port.
    pub psc: SocketAddr,
    /// The state that the OVM's TCP is in, by its name in RFC 9293 §3.3.2, as the daemon sees it.
    pub state: &'static str,
    /// The conversation is in recuperation.
    pub recuperating: bool,
    /// Client bytes recorded.
    pub received_bytes: u64,
    /// Answer bytes sent to the client.
    pub sent_bytes: u64,
    /// Per server: covered, or why not.
    pub legs: Vec<LegStatus>,
}

/// One server's part in one conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LegStatus {
    /// Which server.
    pub server: ServerId,
    /// Client bytes it acknowledged.
    pub acknowledged_bytes: u64,
    /// Answer bytes it produced.
    pub produced_bytes: u64,
    /// Why it does not cover the conversation.
    pub uncovered: Option<Uncovered>,
    /// Offset of its first answer byte that differs, from the first byte (0), if one does.
    pub diverged_at: Option<u64>,
}
