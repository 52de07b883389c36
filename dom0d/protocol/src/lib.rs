//! The replication protocol of Understudy: one [`Service`] owns a PSC's conversations and its server
//! queue. Sans-IO: no sockets, no clock, no async, no randomness of its own.
//!
//! Packets go in and come out as whole IP packets; link layers, devices and domains are the
//! caller's. The terms are RFC 9293's for TCP, the paper's for roles.

mod answer;
mod catching_up;
mod config;
mod context;
mod conversation;
mod counters;
mod drain;
mod ending;
mod event;
mod feed;
mod handshake;
mod key;
mod leg;
mod mask;
mod operator;
mod order;
mod passing;
mod promotion;
mod queue;
mod reception;
mod recuperation;
mod repetition;
mod request;
mod saved;
mod sender;
mod seq;
mod service;
mod settle;
mod status;
mod stream;
mod suspicion;
mod table;
mod time;
mod translate;
mod upkeep;
mod verdict;
mod wire;

pub use config::{CandidatePolicy, LagPolicy, Limits, Mask, ServiceConfig, Timing};
pub use event::{
    Destination, Effect, Event, EventKind, Evidence, Handover, LinkAddress, NotPromotable, OperatorError,
    Passage, Release, Seeding, ServerId, ServerSpec, Sign, StaleReason, Transmit, Uncovered,
};
pub use queue::MAX_SERVERS;
pub use repetition::Repetition;
pub use saved::RestoreError;
pub use service::Service;
pub use status::{ConversationStatus, LegStatus, Role, ServerStatus, ServiceStatus};
pub use time::Instant;
pub use translate::{Aside, Bounds, Flow};

#[cfg(test)]
mod stories;
