//! A domain serves two services: its fault reaches both at once and by one piece of evidence, and an operator's announcement
//! to one is known to both.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::Scenario;
use crate::client::clock::now_ns;
use crate::host::{Fault, Service};
use crate::stage::Stage;
use crate::stage::failover::Failover;

const BOTH: [Service; 2] = [Service::Redis, Service::Http];

pub(super) fn scenarios() -> Vec<Scenario> {
    let faults = [
        (Fault::Freeze, "freeze"),
        (Fault::Crash, "crash"),
        (Fault::Destroy, "destroy"),
        (Fault::Kill, "kill-of-one"),
    ];
    let mut all: Vec<_> = faults
        .into_iter()
        .map(|(fault, name)| Scenario::new(format!("shared/{name}"), move |lab| lost(lab, fault)))
        .collect();
    all.push(Scenario::new("shared/announced-pause", announced));
    all
}

/// Both services name the same evidence, also where only one of them could have found it.
pub(super) fn expect_one_reason(
    stage: &Stage,
    fault: Fault,
    at: crate::host::FaultInstant,
) -> Result<String> {
    let mut evidence = Vec::new();
    for service in BOTH {
        let failover = Failover::observe(stage, service, fault, at)?;
        failover.expect_whole()?;
        evidence.push(failover.detected_by);
    }
    let [one, other] = evidence.as_slice() else { unreachable!("two services") };
    ensure!(one == other, "one domain was lost, to one service by {one}, to the other by {other}");
    Ok(one.clone())
}

/// guest-1 serves both and is lost. If only one service died, the other loses guest-1 by the fence.
fn lost(lab: &str, fault: Fault) -> Result<()> {
    let stage = Stage::up(lab, 2, &BOTH)?;
    let load = stage.load("shared")?;
    let one = (fault == Fault::Kill).then_some(Service::Redis);
    let at = stage.lab.fault_of_service(fault, "guest-1", one)?;
    expect_one_reason(&stage, fault, at)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// An operator pauses guest-1 for one service: the other service learns of the pause and of its end.
fn announced(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &BOTH)?;
    let load = stage.load("announced")?;
    let before_us = now_ns() / 1_000;
    stage.operator.order(&["pause", "http", "guest-1"])?;
    std::thread::sleep(Duration::from_secs(1));
    for service in BOTH {
        let suspected = stage.events.since("suspected", service.name(), before_us);
        ensure!(suspected.is_empty(), "{}: an announced pause was a fault: {suspected:?}", service.name());
    }
    stage.operator.order(&["resume", "http", "guest-1"])?;
    load.wait_answers(300, Duration::from_secs(20))?;
    for service in BOTH {
        stage.events.wait("maintenance_ended", service.name(), before_us, Duration::from_secs(5))?;
    }
    stage.survives_freeze(load)
}
