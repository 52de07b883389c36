//! Domains that come, go, change their names and reboot, as xl and the guests themselves do it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use understudy_api::Status;

use crate::client::clock::now_ns;
use crate::host::{Fault, Service};
use crate::scenarios::Scenario;
use crate::xen::Kind;
use crate::xen::inside::command::{run, shell};
use crate::xen::inside::guests::domid;
use crate::xen::inside::stage::{ANSWERS, REBOOTED, Stage};

/// What dom0d may take to see something, in emulation; on a real host it is a second.
const SEEN: Duration = Duration::from_secs(10);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("discovery/renamed", renamed).within(Duration::from_secs(300)),
        Scenario::new("discovery/rebooted-destroyed-created", comes_and_goes)
            .within(Duration::from_secs(300)),
        Scenario::new("discovery/garbage-in-xenstore", garbage).within(Duration::from_secs(300)),
    ]
}

/// The number of the domain of this name, if it is in the queue or known.
fn seen(status: &Status, name: &str) -> Option<u16> {
    let service = &status.services[0];
    let queue = service.servers.iter().filter_map(|server| server.domain.as_ref());
    let known = service.known.iter().map(|known| &known.domain);
    queue.chain(known).find(|domain| domain.name == name).map(|domain| domain.domid)
}

fn until(stage: &Stage, what: &str, limit: Duration, wanted: impl Fn(&Status) -> bool) -> Result<()> {
    let begun = Instant::now();
    stage.operator.until(what, limit, wanted)?;
    println!("  {what} after {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// A renamed domain is not the configured domain any more, until it has its old name again.
fn renamed(_: &str) -> Result<()> {
    let stage = Stage::up(Kind::Pv, 1, &[Service::Redis])?;
    run(&["xl", "rename", "guest-2", "other"])?;
    until(&stage, "guest-2 gone by its name", SEEN, |status| seen(status, "guest-2").is_none())?;
    run(&["xl", "rename", "other", "guest-2"])?;
    until(&stage, "guest-2 seen again", SEEN, |status| seen(status, "guest-2").is_some())
}

/// A reboot from inside keeps the UUID and changes the domid; a destroyed domain is gone; a created domain
/// is found. None of them is seeded without the operator.
fn comes_and_goes(_: &str) -> Result<()> {
    let stage = Stage::up(Kind::Pv, 1, &[Service::Redis])?;
    let load = stage.load("discovery")?;
    let former = domid("guest-2")?;
    stage.fault(Fault::Reboot, "guest-2")?;
    until(&stage, "guest-2 rebooted", REBOOTED, |status| {
        seen(status, "guest-2").is_some_and(|domid| domid != former)
    })?;
    ensure!(stage.operator.service("redis")?.promotable() == 0, "a rebooted replica is promotable");

    run(&["xl", "destroy", "guest-2"])?;
    until(&stage, "guest-2 gone", SEEN, |status| seen(status, "guest-2").is_none())?;

    let from_us = now_ns() / 1_000;
    stage.guests.create(2)?;
    let created_us = now_ns() / 1_000;
    // Known as it is created, with what it lacks; in the queue once its frontend is connected.
    let noticed = stage.events.wait("not_attached", "redis", from_us, SEEN)?;
    println!(
        "  dom0d noticed guest-2 {} ms {} xl create was done",
        created_us.abs_diff(noticed.monotonic_us) / 1_000,
        if noticed.monotonic_us < created_us { "before" } else { "after" }
    );
    stage.events.wait("domain_appeared", "redis", from_us, REBOOTED)?;
    ensure!(stage.operator.service("redis")?.promotable() == 0, "a new replica is promotable");
    load.wait_answers(40, ANSWERS)?;
    stage.expect_unharmed(&load.finish()?)
}

/// Nodes that no toolstack writes, and two thousand changes at once.
fn garbage(_: &str) -> Result<()> {
    let stage = Stage::up(Kind::Pv, 1, &[Service::Redis])?;
    let load = stage.load("garbage")?;
    let domid = domid("guest-2")?;
    shell(&format!(
        "xenstore-write /local/domain/0/backend/vif/{domid}/7/frontend \"$(printf '\\377\\376')\"
         xenstore-write /local/domain/0/backend/vif/{domid}/7/mac 'no MAC at all'
         xenstore-write /local/domain/0/backend/vif/nobody/0/mac 00:16:3e:00:00:00
         words=; n=0
         while [ $n -lt 1000 ]; do words=\"$words /local/domain/0/backend/vif/{domid}/7/n$n x\"; n=$((n + 1)); done
         xenstore-write $words
         xenstore-rm /local/domain/0/backend/vif/{domid}/7 /local/domain/0/backend/vif/nobody"
    ))?;
    load.wait_answers(40, ANSWERS)?;
    run(&["xl", "rename", "guest-2", "other"])?;
    until(&stage, "guest-2 gone by its name", SEEN, |status| seen(status, "guest-2").is_none())?;
    run(&["xl", "rename", "other", "guest-2"])?;
    until(&stage, "guest-2 seen again", SEEN, |status| seen(status, "guest-2").is_some())?;
    stage.expect_unharmed(&load.finish()?)
}
