//! What an operator decides about one service, with units and defaults.

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
    /// Waits and their limits.
    pub timing: Timing,
    /// How the next OVM is chosen.
    pub candidate: CandidatePolicy,
    /// What happens when an RVM falls behind a limit.
    pub on_lag: LagPolicy,
    /// Byte ranges of answers that may differ between servers.
    pub masks: Vec<Mask>,
    /// Seed for what must be unpredictable to peers (ISS towards nobody; hash keys). Same seed and
    /// same inputs give the same outputs.
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

/// Bounds. Each has a counter of the same name in the counters of [`crate::ServiceStatus`] that grows when it bites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Conversations in the table. A further one flows unprotected, and makes RVMs stale.
    pub conversations: u32,
    /// Handshakes that clients have begun and not completed. The oldest makes room for the newest
    /// once it is a second old; until then a further SYN is dropped, and sent again.
    pub embryonic: u32,
    /// Bytes, per conversation, of one direction that are kept because a server still lacks them.
    pub conversation_bytes: u32,
    /// Bytes, per direction of a conversation that the data plane passes by itself, that client or OVM may be
    /// ahead of an RVM: their windows end there.
    pub ahead_bytes: u32,
    /// Bytes that the daemon keeps for the whole service, of all conversations. Beyond it an RVM is
    /// evicted; where that doesn't help, segments find no room and are sent again by their sender.
    pub retained_bytes: u64,
    /// Bytes that the daemon keeps beyond gaps, of clients and OVM, for the whole service: further ones find no room before
    /// anything else does, and are sent again by their sender.
    pub out_of_order_bytes: u64,
    /// Bytes, over the whole service, that one RVM may be behind before it is evicted (or the
    /// clients are slowed, see [`LagPolicy`]).
    pub lag_bytes: u64,
    /// Bytes in flight from the daemon to one RVM in one conversation.
    pub inflight_bytes: u32,
    /// Entries of the service-wide record that an RVM may have unfulfilled.
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

/// Waits and limits of waits. In TOML each is written in milliseconds with the suffix `_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Evidence (c): how long a client segment may stay unacknowledged by the OVM though an RVM
    /// acknowledged it.
    pub unacked_limit: Duration,
    /// Evidence (d): how long the OVM may not begin an answer that the RVMs agree on.
    pub progress_limit: Duration,
    /// How long a FIN or RST of the OVM is held for a covering RVM to do the same.
    pub close_hold: Duration,
    /// How long an RVM may keep a client byte waiting for the service-wide record before it is
    /// lagging, and unacknowledged before it is evicted. Half of it, less what it made up for, may client or OVM be kept
    /// from going on for it.
    pub lag_limit: Duration,
    /// How long an OVM that lost its seat for (c) or (d), and whose domain lives, may take to catch up as an RVM before
    /// it is fenced. Zero: it is fenced at once.
    pub recover_limit: Duration,
    /// Window in which [`Limits::promotions`] are counted.
    pub promotion_window: Duration,
    /// A closed conversation is remembered this long (late segments, TIME-WAIT); one that a new OVM has yet
    /// to end, for [`Timing::idle_probe`].
    pub linger: Duration,
    /// A conversation silent for this long is probed, and dropped when nobody answers.
    pub idle_probe: Duration,
    /// The daemon was starved if it was not called for this long; evidence is measured anew.
    pub starvation: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            unacked_limit: Duration::from_millis(250),
            progress_limit: Duration::from_millis(250),
            close_hold: Duration::from_millis(20),
            lag_limit: Duration::from_secs(10),
            // As long as any other RVM may stand still.
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
    /// The first in the queue (the paper's rule, §IV.B).
    Queue,
}

/// What happens when an RVM is behind [`Limits::lag_bytes`] or [`Timing::lag_limit`].
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
/// Only bytes at equal stream positions are masked, so both servers' ranges must have one length.
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
