//! The replication protocol of Understudy as a state machine: one [`Service`] owns a PSC's conversations and its queue of
//! servers. It has no sockets, no clock, no async and no randomness of its own (sans-IO).
//!
//! Hand it each [`Input`] with the time, then carry out its [`Output`]s in their order until there is none, then call again
//! by [`Service::next_timeout`] at the latest. Packets go in and come out as whole IP packets; link layers, devices and
//! domains are the caller's. The same inputs give the same outputs.
//!
//! ```
//! use understudy_protocol::{Command, Input, Instant, Output, ServerId, ServerSpec, Service, ServiceConfig};
//!
//! let mut service = Service::new(ServiceConfig::new("redis", vec!["10.0.0.100".parse()?], vec![6379]));
//! let ovm = ServerSpec { id: ServerId(1), addresses: vec!["10.0.0.11".parse()?], mtu: 1500 };
//! let now = Instant::from_micros(0);
//! service.handle(now, Input::Command(Command::InstallOvm(ovm)))?;
//! let outputs: Vec<Output> = std::iter::from_fn(|| service.poll(now)).collect();
//! assert!(matches!(outputs[0], Output::Cutover { epoch: 1, from: None, to: ServerId(1) }));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `examples/failover.rs` puts the engine between three TCP stacks: a client asks, its server vanishes, and a replica
//! answers over the same connection. `ARCHITECTURE.md` lists the rules that the engine keeps and what each folder
//! holds. TCP's terms are RFC 9293's, and roles are named as in the paper.

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
mod rules;
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
