//! The replication protocol of Understudy: one [`Service`] owns a PSC's conversations and its server
//! queue. Sans-IO: no sockets, no clock, no async, no randomness of its own.
//!
//! Packets go in and come out as whole IP packets; link layers, devices and domains are the
//! caller's. The terms are RFC 9293's for TCP, the paper's for roles.

mod accounts;
mod config;
mod context;
mod conversation;
mod counters;
mod encoding;
mod epoch;
mod event;
mod follower;
mod input;
mod key;
mod outbox;
mod output;
mod persist;
mod plane;
mod promotion;
mod record;
mod service;
mod status;
mod suspicion;
mod tcp;
mod time;
mod wire;

pub use config::{CandidatePolicy, LagPolicy, Limits, Mask, ServiceConfig, Timing};
pub use event::{
    Event, EventKind, Evidence, LinkAddress, NotPromotable, Release, ServerId, StaleReason, Uncovered,
};
pub use input::{Command, Input, OperatorError, Passage, Seeding, ServerSpec, Sign};
pub use key::MAX_SERVERS;
pub use output::{Destination, Handover, Output, Rule, Transmit};
pub use persist::saved::RestoreError;
pub use service::Service;
pub use service::repetition::Repetition;
pub use status::{ConversationStatus, LegStatus, Role, ServerStatus, ServiceStatus};
pub use tcp::translate::{Aside, Bounds, Flow};
pub use time::Instant;

#[cfg(test)]
mod stories;
