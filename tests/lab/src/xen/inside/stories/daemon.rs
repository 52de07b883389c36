//! dom0d's own life under systemd: killed under load, and taken off the host.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::client::redis::load::Running;
use crate::host::{Fault, Service};
use crate::scenarios::Scenario;
use crate::xen::Kind;
use crate::xen::inside::command::{run, shell};
use crate::xen::inside::guests::Guests;
use crate::xen::inside::stage::{ANSWERS, Stage, config, forget};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("daemon/killed-under-load", killed).within(Duration::from_secs(300)),
        Scenario::new("daemon/leaves-nothing-behind", leaves_nothing).within(Duration::from_secs(240)),
    ]
}

/// Everything in dom0 that Understudy could leave behind. Who served last (/var/lib/understudy) is to stay.
fn traces() -> Result<String> {
    // A route that a router advertised gets older meanwhile.
    shell(
        "{ ip -br link; ip -br address; ip rule; ip route show table all; bridge -d link; nft list ruleset
           tc qdisc; xenstore-ls /tool; xenstore-ls /libxl; find /etc/xen /sys/fs/bpf 2>/dev/null || :
           find /run/understudy -name '*.journal.*' 2>/dev/null || :
         } | sed -E 's/ expires [0-9]+sec//'",
    )
}

/// SIGKILL under load: systemd starts it again, and clients notice nothing. On the plane that ends with it: it serves
/// the same queue, trusts no replica that may have missed something, and is as good as before once they are in step.
fn killed(_: &str) -> Result<()> {
    let stage = Stage::up(Kind::Pv, 1, &[Service::Redis])?;
    let load = stage.load("killed")?;
    let pid = stage.operator.status()?.pid;
    let outlives = stage.operator.service("redis")?.plane == "bpf";
    run(&["systemctl", "kill", "--signal=KILL", "dom0d"])?;
    let Stage { guests, config, .. } = stage;
    let stage = after_restart(guests, config, pid)?;
    stage.operator.until("the restarted dom0d serves", ANSWERS, |status| {
        status.services[0].serving && status.services[0].servers.len() == 2
    })?;
    if outlives {
        stage
            .operator
            .until("the replica follows", ANSWERS, |status| status.services[0].promotable() == 1)?;
        return survives_freeze(&stage, load);
    }
    // Connections that the first one knew and the second does not may flow or be reset; they may
    // not answer wrong.
    let outcome = load.finish()?;
    ensure!(outcome.wrong_answers == 0, "wrong answers: {:#?}", outcome.errors);
    println!(
        "  of {} connections that outlived dom0d, {} were reset or closed, {} got no answer",
        outcome.ledgers.len(),
        outcome.resets + outcome.closed,
        outcome.unanswered
    );
    ensure!(
        stage.operator.service("redis")?.promotable() == 0,
        "the replica counts as identical, though dom0d can't know what it missed"
    );
    forget()?;
    stage.guests.prepare(&|line| println!("  {line}"))?;
    let Stage { guests, config, .. } = stage;
    let stage = Stage::start(guests, config)?;
    stage.operator.wait_ready(&stage.config)?;
    let load = stage.load("after")?;
    survives_freeze(&stage, load)
}

fn survives_freeze(stage: &Stage, load: Running) -> Result<()> {
    load.wait_answers(40, ANSWERS)?;
    let at = stage.fault(Fault::Freeze, "guest-1")?;
    let failover = stage.failover(Service::Redis, Fault::Freeze, at)?;
    load.wait_answers(40, ANSWERS)?;
    stage.expect_unharmed(&load.finish()?)?;
    failover.expect_plausible()
}

fn after_restart(guests: Guests, config: String, former: u32) -> Result<Stage> {
    let deadline = std::time::Instant::now() + ANSWERS;
    loop {
        let pid = run(&["systemctl", "show", "--property=MainPID", "--value", "dom0d"])?;
        let active = run(&["systemctl", "is-active", "dom0d"]).is_ok();
        if active && pid.trim() != former.to_string() {
            return Stage::start(guests, config);
        }
        ensure!(std::time::Instant::now() < deadline, "systemd did not start dom0d again");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Installed with its hooks, used through a failover, and taken off again.
fn leaves_nothing(_: &str) -> Result<()> {
    forget()?;
    let guests = Guests { kind: Kind::Pv, replicas: 1, postgresql: false };
    guests.prepare(&|line| println!("  {line}"))?;
    let before = traces()?;
    run(&["/root/xl-hooks/install"])?;
    let stage = Stage::start(guests, config(1, &[Service::Redis, Service::Http]))?;
    stage.operator.wait_ready(&stage.config)?;
    ensure!(traces()? != before, "a running dom0d leaves no trace: this check sees nothing");
    let load = stage.load("uninstall")?;
    let at = stage.fault(Fault::Freeze, "guest-1")?;
    stage.failover(Service::Redis, Fault::Freeze, at)?;
    stage.expect_unharmed(&load.finish()?)?;
    run(&["systemctl", "stop", "dom0d"])?;
    run(&["/root/xl-hooks/uninstall"])?;
    let after = traces()?;
    ensure!(after == before, "before:\n{before}\nafter:\n{after}");
    Ok(())
}
