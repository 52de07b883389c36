//! What `/metrics` shows: the status as numbers, in the OpenMetrics text format.
//!
//! Everything is derived from one status at the moment of the scrape, so there is nothing to keep in
//! step. Counters keep their names: those of the engine are `understudy_engine_…_total`, those of the
//! data plane `understudy_plane_…_total`, those of the daemon `understudy_daemon_…_total`.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use understudy_api::{Server, Service, Status};

use super::view;

/// The content type of what [`encode`] writes.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The metrics of a moment.
pub(super) fn encode(status: &Status) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("understudy");
    registry.register_collector(Box::new(Scrape(families(status))));
    let mut page = String::new();
    text::encode(&mut page, &registry)?;
    Ok(page)
}

type Labels = Vec<(&'static str, String)>;

/// One metric with its value for each set of labels.
#[derive(Debug)]
struct Family {
    name: String,
    help: &'static str,
    kind: MetricType,
    values: Vec<(Labels, u64)>,
}

#[derive(Debug)]
struct Scrape(Vec<Family>);

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        for family in &self.0 {
            let mut values = encoder.encode_descriptor(&family.name, family.help, None, family.kind)?;
            for (labels, value) in &family.values {
                match labels.as_slice() {
                    [] => encode_value(&mut values, family.kind, *value)?,
                    labels => encode_value(&mut values.encode_family(&labels)?, family.kind, *value)?,
                }
            }
        }
        Ok(())
    }
}

fn encode_value(encoder: &mut MetricEncoder<'_>, kind: MetricType, value: u64) -> fmt::Result {
    match kind {
        MetricType::Counter => encoder.encode_counter::<NoLabelSet, u64, u64>(&value, None),
        _ => encoder.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX)),
    }
}

fn families(status: &Status) -> Vec<Family> {
    let mut families = vec![
        gauge("build", "The running dom0d, always 1", vec![(vec![("version", status.version.clone())], 1)]),
        gauge("uptime_seconds", "Since dom0d started", vec![(Vec::new(), status.uptime_ms / 1_000)]),
        gauge(
            "ready",
            "1 if every service serves and nothing hinders the daemon",
            vec![(Vec::new(), u64::from(status.ready))],
        ),
        gauge(
            "problems",
            "What hinders the daemon as a whole, counted",
            vec![(Vec::new(), status.problems.len() as u64)],
        ),
    ];

    type OfService = (&'static str, &'static str, fn(&Service) -> u64);
    const SERVICE: [OfService; 8] = [
        ("service_serving", "1 if clients of the service are served", |s| u64::from(s.serving)),
        ("service_problems", "What hinders the service, counted", |s| s.problems.len() as u64),
        ("service_epoch", "Grows by one with each promotion", |s| s.epoch),
        ("service_promotable_rvms", "RVMs that could take over unasked", |s| s.promotable() as u64),
        ("service_open_conversations", "Open conversations", |s| s.conversations),
        ("service_embryonic_conversations", "Handshakes that clients began and did not complete", |s| {
            s.embryonic
        }),
        ("service_recuperating_conversations", "Conversations in recuperation", |s| s.recuperating),
        ("service_retained_bytes", "Bytes held for any server or client", |s| s.retained_bytes),
    ];
    for (name, help, value) in SERVICE {
        let values = status.services.iter();
        let values = values.map(|s| (vec![("service", s.name.clone())], value(s)));
        families.push(gauge(name, help, values.collect()));
    }

    type OfServer = (&'static str, &'static str, fn(&Server) -> u64);
    const SERVER: [OfServer; 7] = [
        ("server_queue_state", "Place in the server queue: 2 OVM, 3 RVM, 4 taking over", |s| {
            u64::from(s.queue_state)
        }),
        ("server_promotable", "1 if it could take over unasked", |s| u64::from(s.promotable)),
        ("server_lagging", "1 if it is behind for too long", |s| u64::from(s.lagging)),
        ("server_covered_conversations", "Open conversations that would go on there", |s| s.covered),
        (
            "server_uncovered_conversations",
            "Open conversations that it did not receive from their SYN on",
            |s| s.uncovered,
        ),
        ("server_diverged_conversations", "Open conversations in which it answered differently", |s| {
            s.diverged
        }),
        ("server_behind_bytes", "Bytes that it is behind, over all conversations and both directions", |s| {
            s.behind_bytes
        }),
    ];
    for (name, help, value) in SERVER {
        let services = status.services.iter();
        let values = services
            .flat_map(|service| {
                let servers = service.servers.iter();
                servers.map(move |server| (server_labels(service, server), value(server)))
            })
            .collect();
        families.push(gauge(name, help, values));
    }

    let mut counters = BTreeMap::new();
    for (name, value) in &status.counters {
        count(&mut counters, "daemon", name, Vec::new(), *value);
    }
    for service in &status.services {
        let labels = vec![("service", service.name.clone())];
        for (name, value) in &service.counters {
            count(&mut counters, "engine", name, labels.clone(), *value);
        }
        for (name, value) in &service.plane_counters {
            count(&mut counters, "plane", name, labels.clone(), *value);
        }
    }
    families.extend(counters.into_iter().map(|(name, values)| Family {
        name,
        help: "Of the counters in `understudy status --json`",
        kind: MetricType::Counter,
        values,
    }));
    families
}

fn gauge(name: &str, help: &'static str, values: Vec<(Labels, u64)>) -> Family {
    Family { name: name.to_owned(), help, kind: MetricType::Gauge, values }
}

/// The server id tells two lives of one domain apart, which are in the queue at one time after a
/// domain was replaced.
fn server_labels(service: &Service, server: &Server) -> Labels {
    let domain = match &server.domain {
        Some(domain) => domain.name.clone(),
        None => view::label(server.server),
    };
    vec![("service", service.name.clone()), ("domain", domain), ("server", server.server.0.to_string())]
}

fn count(
    counters: &mut BTreeMap<String, Vec<(Labels, u64)>>,
    of: &str,
    name: &str,
    labels: Labels,
    value: u64,
) {
    let name = name.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    // The encoder adds `_total` itself.
    let name = name.strip_suffix("_total").unwrap_or(&name);
    let values = counters.entry(format!("{of}_{name}")).or_default();
    values.push((labels, value));
}
