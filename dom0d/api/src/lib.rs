//! What dom0d and `understudy` share: the types of the control API, and the configuration.
//!
//! The API is HTTP/1.1 with JSON on a Unix socket; its paths below `/v1/` are stable. Reasons, roles and server ids are the
//! protocol engine's own types, see [`protocol`]; [`words`] puts the reasons into words. [`config`] reads
//! `/etc/understudy/dom0d.toml`.

mod command;
pub mod config;
mod event;
mod status;
pub mod time;
pub mod words;

pub use command::*;
pub use event::{EVENTS_LOST, Event};
pub use status::{
    Conversation, Conversations, Domain, KnownDomain, Leg, Server, Service, Services, Status, queue_state,
};
pub use understudy_protocol as protocol;
