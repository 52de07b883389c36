//! Replicas that must not be promoted unasked, though nothing else is left: they say why, and the
//! clients' connections wait for the OVM.

use std::time::Duration;

use anyhow::{Result, ensure};
use understudy_api::Server;

use super::Scenario;
use crate::client::redis::load::Plan;
use crate::client::redis::session::Session;
use crate::host::{Fault, Service};
use crate::stage::Stage;
use crate::stage::failover::Failover;
use crate::stage::repair::repair;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("stale/never-seeded", never_seeded),
        Scenario::new("stale/rebooted", rebooted),
        Scenario::new("stale/forced", forced),
        Scenario::new("stale/seeded-again", seeded_again),
        Scenario::new("stale/drain", drain),
    ]
}

fn rvm<'a>(servers: &'a [Server], name: &str) -> Option<&'a Server> {
    servers.iter().find(|server| server.domain.as_ref().is_some_and(|d| d.name == name))
}

/// Nobody stated that the replica's state equals the OVM's. The OVM freezes, and is thawed later:
/// the same connections go on with it.
fn never_seeded(lab: &str) -> Result<()> {
    let plan = Stage::plan(lab, 1, &[Service::Redis]);
    let lab = crate::host::Lab::up(plan, &|line| println!("  {line}"))?;
    let config = lab.default_config().replace("attach = \"assume-identical\"", "attach = \"known\"");
    let stage = Stage::take_unready(lab, &config)?;
    stage.until("the replica attached", Duration::from_secs(10), |status| {
        status.services[0].servers.len() == 2
    })?;
    refuses_then_goes_on(&stage, "stated")
}

/// The replica rebooted: it is the same domain, and holds nothing any more.
fn rebooted(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    stage.lab.fault(Fault::Reboot, "guest-2")?;
    stage.until("the rebooted replica is back", Duration::from_secs(20), |status| {
        let servers = &status.services[0].servers;
        rvm(servers, "guest-2").is_some_and(|server| !server.promotable)
            || status.services[0].known.iter().any(|k| k.domain.name == "guest-2")
    })?;
    refuses_then_goes_on(&stage, "")
}

fn refuses_then_goes_on(stage: &Stage, why: &str) -> Result<()> {
    let load = Plan::new(stage.psc(Service::Redis)?, "stale").start(&stage.client())?;
    load.wait_answers(500, Duration::from_secs(20))?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let refusal =
        stage.events.wait("no_candidate", "redis", at.monotonic_ns / 1_000, Duration::from_secs(5))?;
    let because = refusal.what.get("because").cloned().unwrap_or_default();
    println!("  no candidate because {because}");
    let service = stage.operator.service("redis")?;
    ensure!(
        stage.events.since("cut_over", "redis", at.monotonic_ns / 1_000).is_empty(),
        "a replica that is not promotable was promoted"
    );
    if let Some(server) = rvm(&service.servers, "guest-2") {
        let said = server.why.clone().unwrap_or_default();
        ensure!(
            !server.promotable && !said.is_empty() && said.contains(why),
            "the status does not say why guest-2 can't be promoted: {said:?}"
        );
        println!("  status: {said}");
    }
    stage.lab.thaw("guest-1")?;
    load.wait_answers(500, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    let ovm = stage.ovm(Service::Redis)?;
    ensure!(ovm.name == "guest-1", "{} serves", ovm.name);
    stage.expect_unharmed(&outcome)
}

/// An operator may promote it all the same, and is told first that it is not promotable.
fn forced(lab: &str) -> Result<()> {
    let plan = Stage::plan(lab, 1, &[Service::Redis]);
    let lab = crate::host::Lab::up(plan, &|line| println!("  {line}"))?;
    let config = lab.default_config().replace("attach = \"assume-identical\"", "attach = \"known\"");
    let stage = Stage::take_unready(lab, &config)?;
    stage.until("the replica attached", Duration::from_secs(10), |status| {
        status.services[0].servers.len() == 2
    })?;
    stage.operator.refused(&["failover", "redis", "--to", "guest-2"], &["promot"])?;
    stage.operator.order(&["failover", "redis", "--to", "guest-2", "--force"])?;
    let ovm = stage.ovm(Service::Redis)?;
    ensure!(ovm.name == "guest-2", "{} serves", ovm.name);
    let target = stage.psc(Service::Redis)?;
    stage.client().run(move || Session::connect(target)?.ask(&["PING"]))?;
    Ok(())
}

/// A deposed OVM is brought in line again (its state is copied), attached with the operator's word,
/// and takes over when its successor fails.
fn seeded_again(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = Plan::new(stage.psc(Service::Redis)?, "first").start(&stage.client())?;
    load.wait_answers(500, Duration::from_secs(20))?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?.expect_plausible()?;
    let first = load.finish()?;
    stage.expect_unharmed(&first)?;

    repair(&stage.lab, Fault::Freeze, "guest-1")?;
    stage.lab.copy_state("guest-2", "guest-1")?;
    stage.operator.order(&["attach", "redis", "guest-1", "--assume-identical"])?;
    stage.until("guest-1 promotable", Duration::from_secs(10), |status| {
        status.services[0].promotable() == 1
    })?;
    let load = Plan::new(stage.psc(Service::Redis)?, "second").start(&stage.client())?;
    load.wait_answers(500, Duration::from_secs(20))?;
    let at = stage.lab.fault(Fault::Crash, "guest-2")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Crash, at)?;
    load.wait_answers(500, Duration::from_secs(20))?;
    let second = load.finish()?;
    stage.expect_unharmed(&second)?;
    failover.expect_plausible()?;
    let verdict = stage.verify(&stage.ovm(Service::Redis)?, &first)?;
    ensure!(
        verdict.wrong.is_empty(),
        "what was acknowledged before the first failover is missing after the second: {:#?}",
        verdict.wrong
    );
    Ok(())
}

/// A domain is attached while connections are open: with a drain they end first, then it is seeded.
fn drain(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    stage.operator.order(&["detach", "redis", "guest-2"])?;
    let target = stage.psc(Service::Redis)?;
    let mut open = stage.client().run(move || Session::connect(target))?;
    open.ask(&["SET", "before", "drain"])?;
    // The replica missed that write: its state is brought in line by hand, as an operator would.
    let guest = stage.lab.domain("guest-2")?;
    guest.run(&["redis-cli", "SET", "before", "drain"])?;
    stage.operator.refused(&["attach", "redis", "guest-2", "--assume-identical"], &["open"])?;
    // The order waits for the drain's end, which waits for this connection's end.
    std::thread::scope(|scope| {
        let order = scope.spawn(|| stage.operator.order(&["attach", "redis", "guest-2", "--drain"]));
        std::thread::sleep(Duration::from_millis(300));
        let answer = open.ask(&["PING"]);
        drop(open);
        let ordered = order.join().map_err(|_| anyhow::anyhow!("the order could not be given"))?;
        answer.and(ordered)
    })?;
    stage.until("guest-2 promotable", Duration::from_secs(20), |status| {
        status.services[0].promotable() == 1
    })?;
    let load = Plan::new(target, "drained").start(&stage.client())?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.survives_freeze(load)
}
