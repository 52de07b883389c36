//! The replication protocol of Understudy: one [`Service`] owns a PSC's conversations and its server
//! queue. Sans-IO: no sockets, no clock, no async, no randomness of its own.
//!
//! Packets go in and come out as whole IP packets; link layers, devices and domains are the
//! caller's. The terms are RFC 9293's for TCP, the paper's for roles.

mod config;
mod event;
mod service;
mod status;
mod time;

pub use config::{CandidatePolicy, LagPolicy, Limits, Mask, ServiceConfig, Timing};
pub use event::{
    Destination, Effect, Event, EventKind, Evidence, LinkAddress, NotPromotable, ServerId,
    StaleReason, Transmit, Uncovered,
};
pub use service::{OperatorError, Seeding, ServerSpec, Service};
pub use status::{ConversationStatus, LegStatus, Role, ServerStatus, ServiceStatus};
pub use time::Instant;
