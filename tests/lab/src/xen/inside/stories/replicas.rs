//! Replicas and deposed OVMs: nothing that happens to them changes anything for clients.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use understudy_api::Server;

use crate::host::{Fault, Service};
use crate::scenarios::Scenario;
use crate::xen::Kind;
use crate::xen::inside::command::run;
use crate::xen::inside::guests::restart_services;
use crate::xen::inside::stage::{ANSWERS, Stage};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("replica/thawed-ovm-stays-silent", thawed).within(Duration::from_secs(240)),
        Scenario::new("replica/destroyed-under-load", destroyed).within(Duration::from_secs(240)),
        Scenario::new("replica/switchover-and-back", switchover).within(Duration::from_secs(240)),
    ]
}

/// A deposed OVM that somebody unpauses tries to go on with its connections: nobody hears it, and it
/// is no candidate.
fn thawed(_: &str) -> Result<()> {
    let stage = Stage::up(Kind::Pv, 1, &[Service::Redis])?;
    let load = stage.load("thawed")?;
    let at = stage.fault(Fault::Freeze, "guest-1")?;
    let failover = stage.failover(Service::Redis, Fault::Freeze, at)?;
    run(&["xl", "unpause", "guest-1"])?;
    load.wait_answers(100, ANSWERS)?;
    // Its kernel repeats what was not acknowledged, with growing intervals.
    sleep(Duration::from_secs(5));
    load.wait_answers(40, ANSWERS)?;
    let service = stage.operator.service(Service::Redis.name())?;
    ensure!(service.promotable() == 0, "the deposed guest-1 counts as promotable");
    ensure!(stage.ovm(Service::Redis)? == "guest-2", "guest-2 does not serve");
    stage.expect_unharmed(&load.finish()?)?;
    // It still sends to its former clients; the next dom0d would take its replicas as stale for that.
    restart_services("guest-1")?;
    failover.expect_plausible()
}

/// A replica is destroyed under load; the other replica takes over when it must.
fn destroyed(_: &str) -> Result<()> {
    let stage = Stage::up(Kind::Pv, 2, &[Service::Redis])?;
    let load = stage.load("evicted")?;
    let at = stage.fault(Fault::Destroy, "guest-3")?;
    stage.events.wait("evicted", Service::Redis.name(), at.monotonic_ns / 1_000, ANSWERS)?;
    load.wait_answers(40, ANSWERS)?;
    let at = stage.fault(Fault::Freeze, "guest-1")?;
    let failover = stage.failover(Service::Redis, Fault::Freeze, at)?;
    ensure!(failover.to == "guest-2", "{} took over", failover.to);
    load.wait_answers(40, ANSWERS)?;
    stage.expect_unharmed(&load.finish()?)?;
    failover.expect_plausible()
}

/// Planned, there and back: the former OVM is a replica like any other.
fn switchover(_: &str) -> Result<()> {
    let stage = Stage::up(Kind::Pv, 1, &[Service::Redis])?;
    let load = stage.load("switchover")?;
    for to in ["guest-2", "guest-1"] {
        stage.operator.order(&["switchover", Service::Redis.name(), "--to", to])?;
        ensure!(stage.ovm(Service::Redis)? == to, "{to} does not serve");
        load.wait_answers(40, ANSWERS)?;
        stage.operator.until("the other one promotable again", ANSWERS, |status| {
            status.services[0].promotable() == 1 && status.services[0].recuperating == 0
        })?;
    }
    stage.expect_unharmed(&load.finish()?)?;
    let service = stage.operator.service(Service::Redis.name())?;
    let rvm: &Server =
        service.servers.iter().find(|server| server.queue_state == 3).context("there is no RVM")?;
    ensure!(rvm.diverged == 0 && rvm.uncovered == 0, "the former OVM does not follow: {rvm:?}");
    Ok(())
}
