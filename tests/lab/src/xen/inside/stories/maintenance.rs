//! Pauses that are no faults: what an operator announced, and what the toolstack does by itself.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::host::{Fault, Service};
use crate::scenarios::Scenario;
use crate::xen::Kind;
use crate::xen::inside::command::run;
use crate::xen::inside::guests::{Guests, domid};
use crate::xen::inside::stage::{ANSWERS, Stage};

pub(super) fn of_pv_guests() -> Vec<Scenario> {
    vec![
        Scenario::new("maintenance/announced-pause", |_| {
            excused(Kind::Pv, |stage| {
                stage.operator.order(&["pause", Service::Redis.name(), "guest-1"])?;
                sleep(Duration::from_secs(5));
                stage.operator.order(&["resume", Service::Redis.name(), "guest-1"]).map(drop)
            })
        })
        .within(Duration::from_secs(240)),
        Scenario::new("maintenance/save-and-dump-core", |_| {
            excused(Kind::Pv, |_| {
                for order in [&["save", "-c"][..], &["dump-core"]] {
                    let (begun, file) = (Instant::now(), "/var/tmp/guest-1.image");
                    run(&[&["xl"], order, &["guest-1", file]].concat())?;
                    println!("  xl {} took {:.1} s", order[0], begun.elapsed().as_secs_f64());
                    fs::remove_file(file)?;
                }
                Ok(())
            })
        })
        .within(Duration::from_secs(300)),
        Scenario::new("maintenance/shutdown-request", shutdown_request).within(Duration::from_secs(240)),
    ]
}

pub(super) fn of_pvh_guests() -> Vec<Scenario> {
    vec![
        Scenario::new("maintenance/migration-of-the-ovm", |_| excused(Kind::Pvh, |_| migrate("guest-1")))
            .within(Duration::from_secs(300)),
        Scenario::new("maintenance/migration-of-the-replica", migration_of_the_replica)
            .within(Duration::from_secs(300)),
    ]
}

/// What `work` does to the OVM stops it for some seconds: clients wait, and go on with the same OVM.
fn excused(kind: Kind, work: impl FnOnce(&Stage) -> Result<()>) -> Result<()> {
    let stage = Stage::up(kind, 1, &[Service::Redis])?;
    let load = stage.load("excused")?;
    let epoch = stage.operator.service(Service::Redis.name())?.epoch;
    work(&stage)?;
    load.wait_answers(40, ANSWERS)?;
    let service = stage.operator.service(Service::Redis.name())?;
    ensure!(service.epoch == epoch, "it caused a promotion");
    ensure!(stage.ovm(Service::Redis)? == "guest-1", "guest-1 was deposed");
    ensure!(service.promotable() == 1, "the replica is not promotable any more");
    stage.expect_unharmed(&load.finish()?)
}

/// Migrates a guest within this host. Only a PVH guest: Debian's hypervisor is built without shadow paging, so
/// that of a PV guest it can't tell which pages it wrote meanwhile.
fn migrate(name: &str) -> Result<()> {
    let (begun, before) = (Instant::now(), domid(name)?);
    // Without a command to reach another host, xl runs the receiver's as it is given.
    run(&["xl", "migrate", "-s", "", name, "xl migrate-receive"])?;
    let after = domid(name)?;
    ensure!(before != after, "{name} has domid {after} as before");
    println!("  xl migrate took {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// A replica that was migrated has missed nothing, and can take over.
fn migration_of_the_replica(_: &str) -> Result<()> {
    let stage = Stage::up(Kind::Pvh, 1, &[Service::Redis])?;
    let load = stage.load("migrated")?;
    migrate("guest-2")?;
    load.wait_answers(40, ANSWERS)?;
    stage.operator.until("guest-2 is promotable", ANSWERS, |status| status.services[0].promotable() == 1)?;
    let at = stage.fault(Fault::Destroy, "guest-1")?;
    let failover = stage.failover(Service::Redis, Fault::Destroy, at)?;
    load.wait_answers(40, ANSWERS)?;
    stage.expect_unharmed(&load.finish()?)?;
    failover.expect_plausible()
}

/// `xl shutdown` of the OVM moves the service first, where its policy says so.
fn shutdown_request(_: &str) -> Result<()> {
    let guests = Guests { kind: Kind::Pv, replicas: 1, postgresql: false };
    let stage = Stage::up_with(guests, &[Service::Redis], |config| {
        config.replace("[[service]]\n", "[[service]]\non_shutdown_request = \"switchover\"\n")
    })?;
    let load = stage.load("shutdown")?;
    run(&["xl", "shutdown", "guest-1"])?;
    stage.operator.until("guest-2 serves", ANSWERS, |status| {
        status.services[0]
            .ovm()
            .and_then(|server| server.domain.as_ref())
            .is_some_and(|domain| domain.name == "guest-2")
    })?;
    load.wait_answers(40, ANSWERS)?;
    let suspected = stage.events.since("suspected", Service::Redis.name(), 0);
    ensure!(suspected.is_empty(), "it was moved only once guest-1 was gone: {suspected:?}");
    stage.expect_unharmed(&load.finish()?)
}
