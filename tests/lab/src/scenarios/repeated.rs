//! One connection that outlives more than one promotion, planned ones too, and a deposed OVM that
//! comes back and tries to go on speaking.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Scenario;
use super::transfer::{Direction, Large};
use crate::client::place::join;
use crate::client::redis::load::Plan;
use crate::client::sniff::Wire;
use crate::host::{Fault, Service};
use crate::stage::Stage;
use crate::stage::failover::Failover;

pub(super) fn scenarios() -> Vec<Scenario> {
    let long = Duration::from_secs(180);
    vec![
        Scenario::new("repeated/two-failovers/pipeline", two_failovers),
        Scenario::new("repeated/two-failovers/download", |lab| {
            two_failovers_in_transfer(lab, Direction::Download)
        })
        .within(long),
        Scenario::new("repeated/two-failovers/upload", |lab| {
            two_failovers_in_transfer(lab, Direction::Upload)
        })
        .within(long),
        Scenario::new("repeated/switchover/pipeline", switchover),
        Scenario::new("repeated/switchover/download", switchover_in_download).within(long),
        Scenario::new("repeated/thawed-ovm/pipeline", thawed_ovm),
        Scenario::new("repeated/thawed-ovm/download", thawed_ovm_in_download).within(long),
        Scenario::new("repeated/service-killed", service_killed),
    ]
}

/// The OVM freezes, then its successor crashes, under the same connections.
fn two_failovers(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 3, &[Service::Redis])?;
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "twice");
    plan.depth = 8;
    plan.pace = Some(Duration::from_millis(10));
    let load = plan.start(&stage.client())?;
    for fault in [Fault::Freeze, Fault::Crash] {
        load.wait_answers(2_000, Duration::from_secs(30))?;
        let ovm = stage.ovm(Service::Redis)?;
        let at = stage.lab.fault(fault, &ovm.name)?;
        Failover::observe(&stage, Service::Redis, fault, at)?.expect_plausible()?;
    }
    load.wait_answers(2_000, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)
}

fn two_failovers_in_transfer(lab: &str, direction: Direction) -> Result<()> {
    let stage = Stage::up(lab, 3, &[Service::Http])?;
    let large = Large::begin(&stage, direction, false)?;
    for (part, fault) in [(0.25, Fault::Freeze), (0.6, Fault::Destroy)] {
        large.wait_part(part)?;
        let ovm = stage.ovm(Service::Http)?;
        let at = stage.lab.fault(fault, &ovm.name)?;
        Failover::observe(&stage, Service::Http, fault, at)?.expect_plausible()?;
    }
    large.expect_whole(&stage)?;
    Ok(())
}

/// Planned, there and back again: the old OVM stays as a replica that can be promoted.
fn switchover(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "planned");
    plan.connections = 50;
    plan.busy = 20;
    plan.depth = 4;
    plan.pace = Some(Duration::from_millis(10));
    let load = plan.start(&stage.client())?;
    for to in ["guest-2", "guest-3", "guest-1"] {
        load.wait_answers(1_500, Duration::from_secs(30))?;
        stage.operator.order(&["switchover", "redis", "--to", to])?;
        let ovm = stage.ovm(Service::Redis)?;
        ensure!(ovm.name == to, "the OVM is {}, not {to}", ovm.name);
    }
    load.wait_answers(1_500, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    let service = stage.operator.service("redis")?;
    ensure!(
        service.promotable() == 2,
        "after planned promotions every other server is promotable still: {:#?}",
        service.servers
    );
    // Replicas apply what they are behind within a moment; then they hold the same.
    sleep(Duration::from_millis(500));
    for domain in stage.lab.domains()? {
        let verdict = stage.verify(&domain, &outcome)?;
        ensure!(verdict.wrong.is_empty(), "{} differs: {:#?}", domain.name, verdict.wrong);
    }
    Ok(())
}

fn switchover_in_download(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Http])?;
    let large = Large::begin(&stage, Direction::Download, false)?;
    for (part, to) in [(0.3, "guest-2"), (0.6, "guest-1")] {
        large.wait_part(part)?;
        stage.operator.order(&["switchover", "http", "--to", to])?;
    }
    large.expect_whole(&stage)?;
    Ok(())
}

/// The deposed OVM runs on with unacknowledged answers in its send queues: it retransmits them at
/// once, and none of that may reach a client.
fn thawed_ovm(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "thaw");
    plan.depth = 16;
    plan.pace = Some(Duration::from_millis(10));
    let load = plan.start(&stage.client())?;
    load.wait_answers(3_000, Duration::from_secs(30))?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    let listener = listen_for_guests(&stage, Duration::from_secs(4))?;
    for _ in 0..3 {
        stage.lab.thaw("guest-1")?;
        load.wait_answers(1_000, Duration::from_secs(30))?;
        sleep(Duration::from_millis(300));
    }
    let outcome = load.finish()?;
    let heard = join(listener)?;
    ensure!(heard == 0, "{heard} segments with a guest's own address reached the client's link");
    stage.expect_unharmed(&outcome)?;
    failover.expect_plausible()
}

fn thawed_ovm_in_download(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Http])?;
    let large = Large::begin(&stage, Direction::Download, false)?;
    large.wait_part(0.3)?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Http, Fault::Freeze, at)?;
    stage.lab.thaw("guest-1")?;
    large.wait_part(0.6)?;
    stage.lab.thaw("guest-1")?;
    large.expect_whole(&stage)?;
    failover.expect_plausible()
}

/// Counts segments on the client's link whose source is a guest's own address, for some time.
fn listen_for_guests(stage: &Stage, limit: Duration) -> Result<std::thread::JoinHandle<Result<u64>>> {
    let guests: Vec<_> = stage.lab.domains()?.iter().flat_map(|domain| domain.addresses.clone()).collect();
    stage.client().spawn("listener", move || {
        let wire = Wire::open_only()?;
        let until = std::time::Instant::now() + limit;
        let mut heard = 0;
        loop {
            let left = until.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(heard);
            }
            let wanted = |seen: &crate::client::frames::Seen| guests.contains(&seen.from.ip());
            if wire.next(left, wanted)?.is_some() {
                heard += 1;
            }
        }
    })
}

/// The Redis process of the OVM dies while its kernel lives: its FINs are withheld, and a replica
/// goes on. Afterwards the process comes back on the deposed machine, and changes nothing.
fn service_killed(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "killed");
    plan.connections = 40;
    plan.busy = 10;
    let load = plan.start(&stage.client())?;
    load.wait_answers(2_000, Duration::from_secs(30))?;
    let at = stage.lab.fault(Fault::Kill, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Kill, at)?;
    load.wait_answers(1_000, Duration::from_secs(30))?;
    stage.lab.thaw("guest-1")?;
    stage.lab.restart_service("guest-1", Service::Redis)?;
    load.wait_answers(1_000, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    failover.expect_plausible()?;
    let ovm = stage.ovm(Service::Redis)?;
    ensure!(ovm.name != "guest-1", "the deposed guest-1 serves again by itself");
    Ok(())
}
