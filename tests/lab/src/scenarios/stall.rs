//! An OVM that stalls for a moment loses its seat, not its life: clients wait for a failover's time, and nobody is lost.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Scenario;
use crate::client::redis::load::Plan;
use crate::host::{Fault, Plane, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, with_plane};

/// As long as a fork, an fsync or a stolen vCPU may take.
const STALL: Duration = Duration::from_millis(700);

/// How long a stalled server may take to catch up, on a busy machine.
const RECOVERY: Duration = Duration::from_secs(8);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("stall/service/bpf", |lab| stalls(lab, Plane::Bpf, Fault::Hang)),
        Scenario::new("stall/service/pcap", |lab| stalls(lab, Plane::Pcap, Fault::Hang)),
        Scenario::new("stall/domain/bpf", |lab| stalls(lab, Plane::Bpf, Fault::Spin)),
        Scenario::new("stall/domain/pcap", |lab| stalls(lab, Plane::Pcap, Fault::Spin)),
        Scenario::new("stall/for-good", for_good),
    ]
}

/// One OVM after the other stalls, three of three, under the same connections.
fn stalls(lab: &str, plane: Plane, fault: Fault) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis]), |config| with_plane(&config, plane))?;
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "stall");
    plan.depth = 4;
    plan.pace = Some(Duration::from_millis(5));
    let load = plan.start(&stage.client())?;
    for _ in 0..3 {
        load.wait_answers(1_000, Duration::from_secs(30))?;
        let ovm = stage.ovm(Service::Redis)?.name;
        let at = stage.lab.fault(fault, &ovm)?;
        let thaw_at = Instant::now() + STALL;
        let failover = Failover::observe(&stage, Service::Redis, fault, at)?;
        sleep(thaw_at.saturating_duration_since(Instant::now()));
        stage.lab.thaw(&ovm)?;
        let thawed_us = crate::client::clock::now_ns() / 1_000;
        let recovered = stage.events.wait("recovered", "redis", thawed_us, RECOVERY)?;
        ensure!(recovered.domain("server").as_deref() == Some(&*ovm), "another one than {ovm} recovered");
        println!("  {ovm} caught up {} ms after its stall", (recovered.monotonic_us - thawed_us) / 1_000);
        failover.expect_plausible()?;
    }
    load.wait_answers(1_000, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    for kind in ["fenced", "evicted", "stale"] {
        ensure!(stage.events.since(kind, "redis", 0).is_empty(), "a server was {kind}");
    }
    stage.until("both others promotable", Duration::from_secs(10), |status| {
        status.services[0].promotable() == 2
    })?;
    // What they are behind they apply within a moment; then all hold the same.
    sleep(Duration::from_millis(500));
    for domain in stage.lab.domains()? {
        let verdict = stage.verify(&domain, &outcome)?;
        ensure!(verdict.wrong.is_empty(), "{} differs: {:#?}", domain.name, verdict.wrong);
    }
    Ok(())
}

/// An OVM that never continues is fenced, and clients notice nothing.
fn for_good(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis]), |config| {
        config.replace("rvms = ", "timing = { recover_limit_ms = 1500 }\nrvms = ")
    })?;
    let load = stage.load("good")?;
    let at = stage.lab.fault(Fault::Hang, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Hang, at)?;
    let why = stage.operator.order(&["status"])?;
    ensure!(why.contains("recovering"), "the status does not say that guest-1 has yet to recover: {why}");
    let fenced = stage.events.wait("fenced", "redis", failover.cut_over_us, RECOVERY)?;
    let after_ms = (fenced.monotonic_us - failover.cut_over_us) / 1_000;
    ensure!((1_400..4_000).contains(&after_ms), "fenced {after_ms} ms after it lost its seat");
    let state = stage.lab.domain("guest-1")?.state;
    ensure!(state.contains("paused"), "guest-1 is {state}");
    load.wait_answers(300, Duration::from_secs(20))?;
    ensure!(stage.operator.service("redis")?.promotable() == 1, "guest-3 is not promotable any more");
    stage.expect_unharmed(&load.finish()?)?;
    failover.expect_plausible()
}
