//! Types of dom0d's control API, shared by the daemon and the CLI.
//!
//! HTTP/1.1 with JSON on a Unix socket; `/v1/` paths are stable. Reasons, roles and server ids are the
//! protocol engine's own types, see [`protocol`].

pub mod config;
mod event;
mod order;
mod status;
pub mod time;
pub mod words;

pub use event::{EVENTS_LOST, Event};
pub use order::{
    Attach, Attached, CopyEnd, DEFAULT_COPY_LIMIT_MS, DEFAULT_DRAIN_TIMEOUT_MS, Done, Failover, Failure,
    Hold, HoldState, Holding, MAX_COPY_LIMIT_MS, MAX_DRAIN_TIMEOUT_MS, Notice, NoticeEvent, Noticed,
    OnDomain, Promoted, Refusal, Switchover,
};
pub use status::{
    Conversation, Conversations, Domain, KnownDomain, Leg, Server, Service, Services, Status, queue_state,
};
pub use understudy_protocol as protocol;
