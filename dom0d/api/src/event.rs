//! One line of `GET /v1/events`: what happened, when, and to which domains.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::Domain;

/// An event. The field `event` names its kind; the kinds of the protocol engine and their fields are
/// those of [`understudy_protocol::EventKind`]; the daemon adds its own. Kinds may be added: a reader
/// ignores those that it does not know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Grows by one with each event, from the start of dom0d.
    pub seq: u64,
    /// When, as RFC 3339 in UTC with microseconds.
    pub time: String,
    /// When, in microseconds of CLOCK_MONOTONIC: comparable with other processes of the same host.
    pub monotonic_us: u64,
    /// The service concerned, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The domains behind the server ids in it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub domains: BTreeMap<String, Domain>,
    /// What happened: `event`, and the fields of this kind.
    #[serde(flatten)]
    pub what: Map<String, Value>,
}

/// The event in place of those that were dropped before this reader got them. Its field `count` says how many.
pub const EVENTS_LOST: &str = "events_lost";

impl Event {
    /// The kind's name.
    pub fn kind(&self) -> &str {
        self.text("event").unwrap_or("unknown")
    }

    /// A field that is a text.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.what.get(field)?.as_str()
    }

    /// A field that is a number.
    pub fn number(&self, field: &str) -> Option<u64> {
        self.what.get(field)?.as_u64()
    }

    /// The name of the domain behind a field that is a server id; `server 7` if it has none.
    pub fn domain(&self, field: &str) -> Option<String> {
        self.number(field).map(|id| self.domain_of(id))
    }

    /// The name of the domain behind a server id; `server 7` if it has none.
    pub fn domain_of(&self, server: u64) -> String {
        match self.domains.get(&server.to_string()) {
            Some(domain) => domain.name.clone(),
            None => format!("server {server}"),
        }
    }
}
