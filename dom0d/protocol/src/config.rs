//! The configuration of one service, with units and defaults.

use core::net::IpAddr;
use core::time::Duration;

use serde::{Deserialize, Serialize};

/// Everything the engine must know about a service before its first segment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceConfig {
    /// The operator's name of the service; appears in events and status.
    pub name: String,
    /// PSC addresses that clients know: at most one IPv4 and one IPv6 address.
    pub psc: Vec<IpAddr>,
    /// TCP ports of the PSC that are replicated. Other ports of the PSC are not forwarded.
    pub ports: Vec<u16>,
    /// Bounds on memory and queues.
    pub limits: Limits,
    /// How long the engine waits.
    pub timing: Timing,
    /// How the next OVM is chosen.
    pub candidate: CandidatePolicy,
    /// What happens when an RVM falls behind a limit.
    pub on_lag: LagPolicy,
    /// Byte ranges of answers that may differ between servers.
    pub masks: Vec<Mask>,
    /// Seed of the port and ISS of the daemon's own SYNs to the OVM, which clients must not be able to predict. The
    /// same seed and the same inputs give the same outputs.
    pub seed: u64,
}

impl ServiceConfig {
    /// A configuration with the given identity and every other field at its default.
    pub fn new(name: impl Into<String>, psc: Vec<IpAddr>, ports: Vec<u16>) -> Self {
        Self {
            name: name.into(),
            psc,
            ports,
            limits: Limits::default(),
            timing: Timing::default(),
            candidate: CandidatePolicy::default(),
            on_lag: LagPolicy::default(),
            masks: Vec::new(),
            seed: 0,
        }
    }
}

/// Bounds on memory and queues (rule 6). A counter of the bound's name in [`crate::ServiceStatus`] grows when the engine drops,
/// evicts or leaves unprotected for it. [`Self::promotions`] has `promotions_limited`; [`Self::inflight_bytes`] and
/// [`Self::resets_per_ms`], which only delay, have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Conversations in the table. Any further conversation flows unprotected, and makes RVMs stale.
    pub conversations: u32,
    /// Handshakes that clients have begun and not completed. The oldest makes room for the newest once it is a second
    /// old; until then the engine drops further SYNs, and clients retransmit them.
    pub embryonic: u32,
    /// Bytes of one direction of a conversation that the daemon keeps because a server or the client still lacks them.
    pub conversation_bytes: u32,
    /// Bytes of one direction of a passed conversation by which client or OVM may be ahead of an RVM: the windows that
    /// they are told end there.
    pub ahead_bytes: u32,
    /// Bytes that the daemon keeps for all conversations of the service. Beyond that it evicts an RVM; if that does not
    /// help, it drops segments, and their senders retransmit them.
    pub retained_bytes: u64,
    /// Bytes of clients and OVM beyond gaps that the daemon keeps for the whole service. It drops further ones, before
    /// it drops anything else, and their senders retransmit them.
    pub out_of_order_bytes: u64,
    /// Bytes, over the whole service, that one RVM may be behind before the engine evicts it, or slows the clients (see
    /// [`LagPolicy`]).
    pub lag_bytes: u64,
    /// Bytes in flight from the daemon to one RVM in one conversation.
    pub inflight_bytes: u32,
    /// Entries of the record that an RVM may still have to produce.
    pub order_entries: u32,
    /// Resets sent to clients in one millisecond after a promotion.
    pub resets_per_ms: u32,
    /// Unplanned promotions within [`Timing::promotion_window`].
    pub promotions: u32,
    /// Events kept until polled; further ones are dropped and counted.
    pub events: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            conversations: 65_536,
            embryonic: 65_536,
            conversation_bytes: 16 << 20,
            ahead_bytes: 8 << 20,
            retained_bytes: 512 << 20,
            out_of_order_bytes: 128 << 20,
            lag_bytes: 256 << 20,
            inflight_bytes: 256 << 10,
            order_entries: 1 << 20,
            resets_per_ms: 100,
            promotions: 3,
            events: 4_096,
        }
    }
}

/// How long the engine waits. In TOML each value is in milliseconds, and its name has the suffix `_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Evidence (c): how long a client segment may stay unacknowledged by the OVM though an RVM
    /// acknowledged it.
    pub unacked_limit: Duration,
    /// Evidence (d): how long the OVM may take to begin an answer on which the RVMs agree.
    pub progress_limit: Duration,
    /// How long a FIN or RST of the OVM is held for a covering RVM to do the same.
    pub close_hold: Duration,
    /// How long an RVM may keep client bytes waiting in the record before it counts as lagging, and leave bytes
    /// unacknowledged before it is evicted. For half of this, less what it has made up for, it may stop client or OVM
    /// before it is evicted.
    pub lag_limit: Duration,
    /// How long an OVM that was deposed for (c) or (d), and whose domain lives, may take to catch up as an RVM before
    /// it is fenced. Zero: it is fenced at once.
    pub recover_limit: Duration,
    /// Window in which [`Limits::promotions`] are counted.
    pub promotion_window: Duration,
    /// How long the engine remembers a closed conversation (late segments, TIME-WAIT). It remembers a conversation that
    /// a new OVM has not ended yet for [`Timing::idle_probe`].
    pub linger: Duration,
    /// After this long without a segment from the client the engine probes it, and resets the conversation if it does
    /// not answer.
    pub idle_probe: Duration,
    /// If a call to the engine is late by this much, the daemon was starved of CPU: evidence is measured anew.
    pub starvation: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            unacked_limit: Duration::from_millis(250),
            progress_limit: Duration::from_millis(250),
            close_hold: Duration::from_millis(20),
            lag_limit: Duration::from_secs(10),
            // As long as `lag_limit` lets any other RVM stand still.
            recover_limit: Duration::from_secs(10),
            promotion_window: Duration::from_secs(60),
            linger: Duration::from_secs(60),
            idle_probe: Duration::from_secs(7200),
            starvation: Duration::from_millis(50),
        }
    }
}

/// Which promotable RVM becomes the OVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CandidatePolicy {
    /// Fewest conversations that would be reset, then fewest bytes behind, then queue order.
    #[default]
    Progress,
    /// The first promotable RVM in the queue (the paper's rule, §IV.B).
    Queue,
}

/// What happens when an RVM exceeds [`Limits::lag_bytes`], or slows clients for long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LagPolicy {
    /// The RVM is evicted; clients never wait for it.
    #[default]
    Evict,
    /// Clients are slowed by a smaller window while an RVM is behind.
    Wait,
}

/// A difference between servers' answers that is harmless: `length` bytes after `prefix`.
///
/// Only bytes at equal stream positions are masked, so the range must have the same length on every server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mask {
    /// Bytes that come right before the range, 1 to 64 of them.
    pub prefix: Vec<u8>,
    /// Length of the range in bytes, 1 to 256.
    pub length: u16,
}

impl Mask {
    /// The value of HTTP's `Date` field (RFC 9110 §6.6.1: IMF-fixdate, always 29 bytes).
    pub fn http_date() -> Self {
        Self { prefix: b"\r\nDate: ".to_vec(), length: 29 }
    }

    /// Process id and key of PostgreSQL's BackendKeyData (protocol 3.0: `K`, length 12, 8 bytes).
    pub fn postgresql_backend_key() -> Self {
        Self { prefix: b"K\x00\x00\x00\x0c".to_vec(), length: 8 }
    }
}
