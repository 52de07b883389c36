//! Translates the daemon's reports into the API's types: server ids get their domains, reasons get words.

use std::collections::BTreeMap;

use axum::body::Bytes;
use serde_json::{Map, Value};
use understudy_api::{
    Conversation, Conversations, Event, HoldState, Holding, Leg, Server, Service, Status, queue_state, time,
    words,
};
use understudy_protocol::{ConversationStatus, LegStatus, NotPromotable, Role, ServerId, ServerStatus};

use crate::command::{self, DaemonStatus, ServiceReport};
use crate::domain::DomainRef;
use crate::report::TimedEvent;

/// One line of a hold.
pub(super) fn holding(hold: &command::Hold, state: &HoldState) -> Bytes {
    let command::Hold { hold, from, to } = hold.clone();
    // Nothing of it refuses to be written.
    let mut line = serde_json::to_vec(&Holding { hold, from, to, state: state.clone() }).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

pub(super) fn status(report: DaemonStatus) -> Status {
    let ready = report.problems.is_empty() && report.services.iter().all(|s| s.serving);
    Status {
        version: report.version.to_owned(),
        pid: report.pid,
        uptime_ms: report.uptime_ms,
        hypervisor: report.hypervisor.to_owned(),
        ready,
        problems: report.problems,
        counters: counters(report.counters),
        services: report.services.into_iter().map(service).collect(),
    }
}

fn service(report: ServiceReport) -> Service {
    let servers = report.status.servers.iter();
    Service {
        servers: servers.map(|status| server(status, &report.servers)).collect(),
        known: report.known,
        contained: report.contained,
        name: report.name,
        psc: report.psc,
        psc_mac: report.psc_mac,
        ports: report.ports,
        plane: report.plane.to_owned(),
        bridge: report.bridge,
        serving: report.serving,
        problems: report.problems,
        epoch: report.status.epoch,
        conversations: report.status.conversations,
        embryonic: report.status.embryonic,
        recuperating: report.status.recuperating,
        retained_bytes: report.status.retained_bytes,
        counters: counters(report.status.counters),
        plane_counters: counters(report.plane_counters),
    }
}

fn server(status: &ServerStatus, domains: &BTreeMap<u32, DomainRef>) -> Server {
    let serves = matches!(status.role, Role::Ovm | Role::TakingOver);
    Server {
        server: status.server,
        domain: domains.get(&status.server.0).cloned(),
        role: status.role,
        queue_state: queue_state(status.role),
        promotable: status.not_promotable.is_none() && !serves,
        not_promotable: status.not_promotable,
        why: status.not_promotable.filter(|_| !serves).map(words::not_promotable),
        stale: status.stale,
        lagging: status.not_promotable == Some(NotPromotable::Lagging),
        covered: status.covered,
        uncovered: status.uncovered,
        diverged: status.diverged,
        behind_bytes: status.behind_bytes,
    }
}

pub(super) fn conversations(service: String, skip: usize, page: command::Conversations) -> Conversations {
    let rows = page.conversations.into_iter();
    Conversations {
        service,
        total: page.total,
        skip,
        conversations: rows.map(|row| conversation(row, &page.servers)).collect(),
    }
}

fn conversation(row: ConversationStatus, domains: &BTreeMap<u32, DomainRef>) -> Conversation {
    let leg = |leg: LegStatus| Leg {
        server: leg.server,
        domain: domains.get(&leg.server.0).map(|d| d.name.clone()),
        covered: leg.uncovered.is_none() && leg.diverged_at.is_none(),
        acknowledged_bytes: leg.acknowledged_bytes,
        produced_bytes: leg.produced_bytes,
        uncovered: leg.uncovered,
        diverged_at: leg.diverged_at,
    };
    Conversation {
        client: row.client,
        psc: row.psc,
        state: row.state.to_owned(),
        recuperating: row.recuperating,
        received_bytes: row.received_bytes,
        sent_bytes: row.sent_bytes,
        legs: row.legs.into_iter().map(leg).collect(),
    }
}

pub(super) fn event(seq: u64, event: &TimedEvent) -> Event {
    let what = match serde_json::to_value(&event.kind) {
        Ok(Value::Object(fields)) => fields,
        // Every kind is an object (`kinds_of_events_are_objects` checks it).
        other => Map::from_iter([("event".to_owned(), Value::from(format!("{other:?}")))]),
    };
    Event {
        seq,
        time: time::rfc3339(event.unix_us),
        monotonic_us: event.monotonic_us,
        service: event.service.clone(),
        domains: event.domains.iter().map(|(id, domain)| (id.to_string(), domain.clone())).collect(),
        what,
    }
}

fn counters(of: BTreeMap<&'static str, u64>) -> BTreeMap<String, u64> {
    of.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// The id of a server as metrics label it when its domain is not known.
pub(super) fn label(server: ServerId) -> String {
    format!("server {}", server.0)
}
