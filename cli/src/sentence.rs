//! Puts an event into a sentence. An unknown kind is shown by its name and fields.

use serde::de::DeserializeOwned;
use understudy_api::protocol::{Evidence, NotPromotable, ServerId, StaleReason, Uncovered};
use understudy_api::{EVENTS_LOST, Event, words};

/// The event as a sentence, without its time and service.
pub(crate) fn sentence(event: &Event) -> String {
    known(event).unwrap_or_else(|| unknown(event))
}

fn known(event: &Event) -> Option<String> {
    let server = || event.domain("server");
    let number = |field| event.number(field);
    let text = |field| event.text(field);
    Some(match event.kind() {
        "attached" => {
            let seeded = match event.what.get("seeded")?.as_bool()? {
                true => "seeded",
                false => "not seeded",
            };
            format!("{} joined the queue, {seeded}", server()?)
        }
        "detached" => format!("{} left the queue", server()?),
        "evicted" => format!("{} was evicted: {}", server()?, stale(event)?),
        "stale" => format!("{} is stale: {}", server()?, stale(event)?),
        "seeded" => format!("{} is seeded: its state equals the OVM's", server()?),
        "drain_failed" => match text("reason")? {
            "ovm_changed" => {
                format!(
                    "the drain for {} failed: another OVM serves now, whose state it may not equal",
                    server()?
                )
            }
            _ => format!(
                "the drain for {} failed: {} conversations were still open at its deadline",
                server()?,
                number("open")?
            ),
        },
        "held" => "clients wait: the OVM's state can be copied now".to_owned(),
        "released" => match text("reason")? {
            "seeded" => "clients are let in again: the copy is in the queue".to_owned(),
            "given_up" => "clients are let in again: the copy was given up".to_owned(),
            "conversations_open" => {
                "clients are let in again: open conversations did not end in time".to_owned()
            }
            "limit" => "clients are let in again: the copy took too long".to_owned(),
            "unattended" => {
                "clients are let in again: some reached the OVM while dom0d did not run".to_owned()
            }
            "ovm_changed" => "clients are let in again: the OVM that was copied no longer serves".to_owned(),
            _ => return None,
        },
        "suspected" => format!("{} is at fault: {}", server()?, evidence(event)?),
        "cut_over" => {
            let why = match evidence(event) {
                Some(evidence) => format!("failover, {evidence}"),
                None => "planned".to_owned(),
            };
            let from = match event.domain("from") {
                Some(from) => format!("{from} to "),
                None => String::new(),
            };
            format!(
                "cut over: {from}{} (epoch {}, {} conversations; {why})",
                event.domain("to")?,
                number("epoch")?,
                number("conversations")?
            )
        }
        "recovering" => format!(
            "{} lost its seat and continues as a replica; it is promotable again once it has caught up",
            server()?
        ),
        "recovered" => format!("{} has caught up and is promotable again", server()?),
        "first_byte" => format!("first byte to a client in epoch {}", number("epoch")?),
        "recuperated" => format!(
            "epoch {}: {} conversations continue, {} were reset",
            number("epoch")?,
            number("recuperated")?,
            number("reset")?
        ),
        "no_candidate" => no_candidate(event)?,
        "diverged" => format!(
            "{} answers client {} differently, beginning at byte {}",
            server()?,
            text("client")?,
            number("position")?
        ),
        "unprotected" => {
            let reason: Uncovered = field(event, "reason")?;
            format!(
                "the conversation of client {} could not survive a promotion: {}",
                text("client")?,
                words::uncovered(reason)
            )
        }
        "reset" => {
            format!(
                "the conversation of client {} was reset: it could not continue correctly",
                text("client")?
            )
        }
        "psc_ready" => format!("the PSC is in place on {} ({})", text("bridge")?, text("mac")?),
        "domain_appeared" => format!("{} appeared", of_domain(event)?),
        "domain_gone" => format!("{} is gone", of_domain(event)?),
        "domain_moved" => {
            format!("{} migrated within this host; it was domid {}", server()?, number("from_domid")?)
        }
        "not_attached" => format!("{} does not join the queue: {}", of_domain(event)?, text("reason")?),
        "fenced" => format!("{} is fenced for good ({})", server()?, text("by")?),
        "fence_failed" => format!(
            "{} is not fenced for good yet, but its frames are dropped: {}",
            server()?,
            text("error")?
        ),
        "maintenance_began" => format!(
            "maintenance of {} began: its pause causes no failover for {} s",
            server()?,
            number("limit_ms")? as f64 / 1_000.0
        ),
        "maintenance_ended" => format!("maintenance of {} is over", server()?),
        "shutdown_requested" => {
            format!("the toolstack asks {} to shut down ({})", server()?, text("request")?)
        }
        "own_connection" => format!(
            "{} tried to open a connection of its own to {}, which is dropped while it is a replica",
            server()?,
            text("to")?
        ),
        "taken_over" => {
            format!(
                "dom0d continues where its predecessor stopped, with {} open conversations",
                number("conversations")?
            )
        }
        "problem" => format!("problem: {}", text("message")?),
        "restored" => format!(
            "somebody changed or removed {}; dom0d restored it, but guests' frames may have passed meanwhile",
            text("what")?
        ),
        "solved" => format!("solved: {}", text("message")?),
        EVENTS_LOST => format!("{} events were dropped before you read them", number("count")?),
        _ => return None,
    })
}

fn no_candidate(event: &Event) -> Option<String> {
    let because: Vec<(ServerId, NotPromotable)> = field(event, "because")?;
    let others: Vec<String> = because
        .into_iter()
        .map(|(id, why)| format!("{} ({})", event.domain_of(u64::from(id.0)), words::not_promotable(why)))
        .collect();
    let others = match others.as_slice() {
        [] => "there is no other server".to_owned(),
        others => others.join("; "),
    };
    let ovm = event.domain("server").unwrap_or_else(|| "the OVM".into());
    let evidence = evidence(event)?;
    Some(format!("{ovm} is at fault ({evidence}) and nobody can take over: {others}"))
}

fn unknown(event: &Event) -> String {
    let mut text = event.kind().to_owned();
    for (field, value) in event.what.iter().filter(|(field, _)| *field != "event") {
        text += &format!(" {field}={value}");
    }
    text
}

fn stale(event: &Event) -> Option<&'static str> {
    field::<StaleReason>(event, "reason").map(words::stale)
}

fn evidence(event: &Event) -> Option<&'static str> {
    field::<Evidence>(event, "evidence").map(words::evidence)
}

fn of_domain(event: &Event) -> Option<&str> {
    event.what.get("domain")?.get("name")?.as_str()
}

fn field<T: DeserializeOwned>(event: &Event, field: &str) -> Option<T> {
    serde_json::from_value(event.what.get(field)?.clone()).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde::Serialize;
    use serde_json::{Value, json};
    use understudy_api::protocol::{EventKind, Release};

    fn said(mut what: Value) -> String {
        what["seq"] = json!(1);
        what["time"] = json!("1970-01-01T00:00:01.000000Z");
        what["monotonic_us"] = json!(1);
        let uuid = "00000000-0000-0000-0000-000000000001";
        what["domains"] = json!({
            "1": {"name": "redis-1", "uuid": uuid, "domid": 1},
            "2": {"name": "redis-2", "uuid": uuid, "domid": 2},
        });
        sentence(&serde_json::from_value(what).unwrap())
    }

    fn of_engine(kind: EventKind) -> String {
        said(json(&kind))
    }

    fn json(value: &impl Serialize) -> Value {
        serde_json::to_value(value).unwrap()
    }

    #[test]
    fn every_kind_of_the_engine_has_a_sentence() {
        let server = ServerId(2);
        let client = "10.77.0.1:4000".parse().unwrap();
        let evidence = Evidence::DomainPaused;
        let kinds = [
            EventKind::Attached { server, seeded: false },
            EventKind::Detached { server },
            EventKind::Evicted { server, reason: StaleReason::Lagged },
            EventKind::Stale { server, reason: StaleReason::MissedBytes },
            EventKind::Seeded { server },
            EventKind::DrainFailed { server, open: 3, reason: Release::OvmChanged },
            EventKind::Suspected { server, evidence },
            EventKind::CutOver { epoch: 2, from: None, to: server, evidence: None, conversations: 0 },
            EventKind::Recovering { server },
            EventKind::Recovered { server },
            EventKind::FirstByte { epoch: 2 },
            EventKind::Recuperated { epoch: 2, recuperated: 5, reset: 1 },
            EventKind::NoCandidate { server: None, evidence, because: Vec::new() },
            EventKind::Diverged { server, client, position: 7 },
            EventKind::Unprotected { client, reason: Uncovered::MidStream },
            EventKind::Reset { client },
        ];
        for kind in kinds {
            let name = json(&kind)["event"].as_str().unwrap().to_owned();
            let said = of_engine(kind);
            assert!(!said.contains('=') && said.contains(' '), "{name}: {said}");
        }
    }

    #[test]
    fn kinds_of_the_daemon_have_sentences() {
        assert_eq!(
            said(json!({"event": "taken_over", "conversations": 6})),
            "dom0d continues where its predecessor stopped, with 6 open conversations"
        );
        assert_eq!(
            said(json!({"event": "fenced", "server": 1, "by": "pause"})),
            "redis-1 is fenced for good (pause)"
        );
    }

    #[test]
    fn a_failover_reads_as_a_story() {
        let cut_over = EventKind::CutOver {
            epoch: 2,
            from: Some(ServerId(1)),
            to: ServerId(2),
            evidence: Some(Evidence::DomainPaused),
            conversations: 6,
        };
        assert_eq!(
            of_engine(cut_over),
            "cut over: redis-1 to redis-2 (epoch 2, 6 conversations; failover, its domain is paused and nobody announced it)"
        );
        let nobody = EventKind::NoCandidate {
            server: Some(ServerId(1)),
            evidence: Evidence::DomainGone,
            because: vec![(ServerId(2), NotPromotable::NotRunning), (ServerId(9), NotPromotable::Lagging)],
        };
        let said = of_engine(nobody);
        assert!(said.starts_with(
            "redis-1 is at fault (its domain is gone or shut down) and nobody can take over: redis-2 (its domain does not run"
        ), "{said}");
        assert!(said.contains("server 9 (lagging"), "{said}");
    }

    #[test]
    fn an_unknown_kind_is_shown_by_its_fields() {
        assert_eq!(said(json!({"event": "cloned", "ms": 7, "of": "redis-1"})), "cloned ms=7 of=\"redis-1\"");
        // A known kind with a reason of a later version.
        assert_eq!(
            said(json!({"event": "stale", "server": 2, "reason": "moonlight"})),
            "stale reason=\"moonlight\" server=2"
        );
        assert_eq!(said(json!({})), "unknown");
    }
}
