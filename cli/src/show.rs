//! Puts dom0d's answers into text for people.

use std::time::Duration;

use understudy_api::protocol::Role;
use understudy_api::{
    Conversation, Conversations, Event, Leg, Server, Service, Services, Status, time, words,
};

use crate::sentence::sentence;
use crate::table::Table;

pub(crate) fn status(status: &Status) -> String {
    let ready = match status.ready {
        true => "ready",
        false => "NOT ready",
    };
    let mut text = format!(
        "dom0d {}, pid {}, up {}, {}: {ready}\n",
        status.version,
        status.pid,
        time::brief(Duration::from_millis(status.uptime_ms)),
        status.hypervisor,
    );
    for problem in &status.problems {
        text += &format!("  problem: {problem}\n");
    }
    for service in &status.services {
        text += "\n";
        text += &one_service(service);
    }
    text
}

fn one_service(service: &Service) -> String {
    let bridge = match &service.bridge {
        Some(bridge) => format!(" on {bridge}"),
        None => String::new(),
    };
    let mut text = format!(
        "{}: {} port {}, plane {}{bridge}, epoch {}: {}\n",
        service.name,
        listed(&service.psc),
        listed(&service.ports),
        service.plane,
        service.epoch,
        serving(service),
    );
    text += &format!(
        "  {} conversations ({} in recuperation), {} handshakes, {} retained\n",
        service.conversations,
        service.recuperating,
        service.embryonic,
        bytes(service.retained_bytes),
    );
    for problem in &service.problems {
        text += &format!("  problem: {problem}\n");
    }
    if !service.servers.is_empty() {
        let mut table = Table::new(
            2,
            &["DOMAIN", ">DOMID", "ROLE", "PROMOTABLE", ">COVERED", ">UNCOVERED", ">DIVERGED", ">BEHIND"],
        );
        for server in &service.servers {
            table.row(server_row(server));
        }
        text += &table.to_string();
    }
    for server in &service.servers {
        if let Some(why) = &server.why {
            text += &format!("  {} is not promotable: {why}\n", name(server));
        }
    }
    for known in &service.known {
        text += &format!(
            "  {} (domid {}) is not in the queue: {}\n",
            known.domain.name, known.domain.domid, known.reason
        );
    }
    if !service.contained.is_empty() {
        text +=
            &format!("  contained, so that only what `allow` names passes: {}\n", listed(&service.contained));
    }
    text
}

fn server_row(server: &Server) -> Vec<String> {
    let serves = server.role != Role::Rvm;
    let of_rvm = |number: String| match serves {
        true => "-".to_owned(),
        false => number,
    };
    vec![
        name(server),
        match &server.domain {
            Some(domain) => domain.domid.to_string(),
            None => "-".to_owned(),
        },
        role(server),
        match (serves, server.promotable) {
            (true, _) => "-".to_owned(),
            (false, true) => "yes".to_owned(),
            (false, false) => "no".to_owned(),
        },
        of_rvm(server.covered.to_string()),
        of_rvm(server.uncovered.to_string()),
        of_rvm(server.diverged.to_string()),
        of_rvm(bytes(server.behind_bytes)),
    ]
}

/// The role with the paper's number.
fn role(server: &Server) -> String {
    let role = match server.role {
        Role::Ovm => "OVM",
        Role::Rvm => "RVM",
        Role::TakingOver => "taking over",
    };
    format!("{role} ({})", server.queue_state)
}

fn name(server: &Server) -> String {
    match &server.domain {
        Some(domain) => domain.name.clone(),
        None => format!("server {}", server.server.0),
    }
}

pub(crate) fn services(services: &Services) -> String {
    let mut table = Table::new(
        0,
        &["SERVICE", "PSC", "PORTS", "PLANE", "OVM", ">PROMOTABLE", ">CONVERSATIONS", ">EPOCH", "STATE"],
    );
    for service in &services.services {
        table.row(vec![
            service.name.clone(),
            listed(&service.psc),
            listed(&service.ports),
            service.plane.clone(),
            service.ovm().map_or_else(|| "-".to_owned(), name),
            service.promotable().to_string(),
            service.conversations.to_string(),
            service.epoch.to_string(),
            serving(service).to_owned(),
        ]);
    }
    table.to_string()
}

fn serving(service: &Service) -> &'static str {
    match service.serving {
        true => "serving",
        false => "NOT serving",
    }
}

pub(crate) fn conversations(page: &Conversations) -> String {
    let shown = page.conversations.len() as u64;
    if shown == 0 {
        return match page.total {
            0 => format!("{}: no open conversations\n", page.service),
            total => format!("{}: {total} open conversations, none shown\n", page.service),
        };
    }
    let mut table = Table::new(0, &["CLIENT", "PSC", "STATE", ">RECEIVED", ">SENT", "SERVERS"]);
    for conversation in &page.conversations {
        table.row(conversation_row(conversation));
    }
    let mut text = table.to_string();
    if shown < page.total {
        text += &format!("{shown} of {} open conversations; see more with --limit and --skip\n", page.total);
    }
    text
}

fn conversation_row(conversation: &Conversation) -> Vec<String> {
    let state = match conversation.recuperating {
        true => format!("{}, recuperating", conversation.state),
        false => conversation.state.clone(),
    };
    let legs: Vec<String> = conversation.legs.iter().map(leg).collect();
    vec![
        conversation.client.to_string(),
        conversation.psc.to_string(),
        state,
        bytes(conversation.received_bytes),
        bytes(conversation.sent_bytes),
        legs.join("; "),
    ]
}

fn leg(leg: &Leg) -> String {
    let name = match &leg.domain {
        Some(name) => name.clone(),
        None => format!("server {}", leg.server.0),
    };
    match (leg.uncovered, leg.diverged_at) {
        (_, Some(position)) => format!("{name} diverged at byte {position}"),
        (Some(reason), None) => format!("{name} uncovered ({})", words::uncovered(reason)),
        (None, None) => format!("{name} covered"),
    }
}

/// One line, without its end.
pub(crate) fn event(event: &Event) -> String {
    match &event.service {
        Some(service) => format!("{}  {service}: {}", event.time, sentence(event)),
        None => format!("{}  {}", event.time, sentence(event)),
    }
}

fn listed<T: ToString>(of: &[T]) -> String {
    let texts: Vec<String> = of.iter().map(T::to_string).collect();
    texts.join(",")
}

/// A count of bytes in at most four digits and a unit; exact in the JSON.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1_024 {
        return format!("{count} B");
    }
    let mut scaled = count as f64 / 1_024.0;
    let mut unit = 0;
    // 1023.95 would be written as 1024.0.
    while scaled >= 1_023.95 && unit + 1 < UNITS.len() {
        scaled /= 1_024.0;
        unit += 1;
    }
    format!("{scaled:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    const UUID: &str = "00000000-0000-0000-0000-000000000001";

    fn redis() -> Service {
        let server = |id: u32, role: &str, state: u8, promotable: bool, why: Option<&str>| {
            json!({
                "server": id,
                "domain": {"name": format!("redis-{id}"), "uuid": UUID, "domid": 10 + id},
                "role": role, "queue_state": state, "promotable": promotable,
                "not_promotable": null, "why": why, "stale": null, "lagging": false,
                "covered": 6, "uncovered": 0, "diverged": 0, "behind_bytes": 1536,
            })
        };
        serde_json::from_value(json!({
            "name": "redis", "psc": ["10.77.0.100", "fd77::100"], "psc_mac": "02:00:00:00:00:01",
            "ports": [6379], "plane": "pcap", "bridge": "xenbr0", "serving": true,
            "problems": ["the bridge drops frames"], "epoch": 1,
            "servers": [
                server(1, "ovm", 2, false, None),
                server(2, "rvm", 3, true, None),
                server(3, "rvm", 3, false, Some("stale: it missed bytes")),
            ],
            "known": [{"domain": {"name": "redis-4", "uuid": UUID, "domid": 14}, "reason": "detached"}],
            "conversations": 6, "embryonic": 1, "recuperating": 0, "retained_bytes": 4096,
            "counters": {}, "plane_counters": {},
        }))
        .unwrap()
    }

    #[test]
    fn the_status_tells_who_serves_and_why_a_replica_can_t_take_over() {
        let status = Status {
            version: "0.1.0".into(),
            pid: 7,
            uptime_ms: 61_000,
            hypervisor: "xen".into(),
            ready: true,
            problems: vec!["xenstored is gone; restart it".into()],
            counters: Default::default(),
            services: vec![redis()],
        };
        let expected = "\
dom0d 0.1.0, pid 7, up 1m 1s, xen: ready
  problem: xenstored is gone; restart it

redis: 10.77.0.100,fd77::100 port 6379, plane pcap on xenbr0, epoch 1: serving
  6 conversations (0 in recuperation), 1 handshakes, 4.0 KiB retained
  problem: the bridge drops frames
  DOMAIN   DOMID  ROLE     PROMOTABLE  COVERED  UNCOVERED  DIVERGED   BEHIND
  redis-1     11  OVM (2)  -                 -          -         -        -
  redis-2     12  RVM (3)  yes               6          0         0  1.5 KiB
  redis-3     13  RVM (3)  no                6          0         0  1.5 KiB
  redis-3 is not promotable: stale: it missed bytes
  redis-4 (domid 14) is not in the queue: detached
";
        assert_eq!(super::status(&status), expected);
    }

    #[test]
    fn services_are_a_line_each() {
        let mut stopped = redis();
        stopped.servers.clear();
        stopped.serving = false;
        let services = Services { services: vec![redis(), stopped] };
        let expected = "\
SERVICE  PSC                    PORTS  PLANE  OVM      PROMOTABLE  CONVERSATIONS  EPOCH  STATE
redis    10.77.0.100,fd77::100  6379   pcap   redis-1           1              6      1  serving
redis    10.77.0.100,fd77::100  6379   pcap   -                 0              6      1  NOT serving
";
        assert_eq!(super::services(&services), expected);
    }

    #[test]
    fn conversations_tell_who_covers_them() {
        let leg = |id: u32, uncovered: Option<&str>, diverged_at: Option<u64>| {
            json!({
                "server": id, "domain": format!("redis-{id}"), "covered": false,
                "acknowledged_bytes": 1, "produced_bytes": 1,
                "uncovered": uncovered, "diverged_at": diverged_at,
            })
        };
        let row = |port: u16, legs: serde_json::Value| {
            json!({
                "client": format!("10.77.0.1:{port}"), "psc": "10.77.0.100:6379",
                "state": "established", "recuperating": port == 2, "received_bytes": 0,
                "sent_bytes": 1048576, "legs": legs,
            })
        };
        let mixed = json!([leg(2, None, None), leg(3, Some("attached_later"), None), leg(4, None, Some(9))]);
        let mut page: Conversations = serde_json::from_value(json!({
            "service": "redis", "total": 9, "skip": 0,
            "conversations": [row(1, mixed), row(2, json!([leg(2, None, None)]))],
        }))
        .unwrap();
        let expected = "\
CLIENT       PSC               STATE                      RECEIVED     SENT  SERVERS
10.77.0.1:1  10.77.0.100:6379  established                     0 B  1.0 MiB  redis-2 covered; redis-3 uncovered (the RVM was attached after it began); redis-4 diverged at byte 9
10.77.0.1:2  10.77.0.100:6379  established, recuperating       0 B  1.0 MiB  redis-2 covered
2 of 9 open conversations; see more with --limit and --skip
";
        assert_eq!(super::conversations(&page), expected);

        page.conversations.clear();
        page.total = 0;
        assert_eq!(super::conversations(&page), "redis: no open conversations\n");
    }

    #[test]
    fn bytes_are_short() {
        let written = [0, 1_023, 1_024, 1_048_575, 1_048_576, u64::MAX].map(bytes);
        let expected = ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.0 MiB", "16.0 EiB"];
        assert_eq!(written, expected);
    }
}
