//! dom0d's own life: it leaves nothing behind, its successor adopts or removes what a killed dom0d
//! left, a second dom0d is refused, and xenstored may restart.

use std::iter;
use std::net::{Ipv4Addr, UdpSocket};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Scenario;
use super::refusals::refused;
use super::transfer::{Direction, Large};
use crate::bench::rtt::clear;
use crate::client::place::join;
use crate::client::redis::load::Plan;
use crate::host::{Fault, Lab, Link, Plane, Service};
use crate::stage::failover::Failover;
use crate::stage::operator::explains;
use crate::stage::{Stage, expect_unharmed, own_address, with_plane};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("daemon/clean-shutdown", clean_shutdown),
        Scenario::new("daemon/uninstalled/stopped", |lab| uninstalled(lab, End::Stopped)),
        Scenario::new("daemon/uninstalled/killed", |lab| uninstalled(lab, End::Killed)),
        Scenario::new("daemon/uninstalled/killed-and-reconfigured", |lab| {
            uninstalled(lab, End::Reconfigured)
        }),
        Scenario::new("daemon/killed-and-restarted", killed),
        Scenario::new("daemon/suspended/download", |lab| suspended(lab, Direction::Download)),
        Scenario::new("daemon/suspended/upload", |lab| suspended(lab, Direction::Upload)),
        Scenario::new("daemon/away", away),
        Scenario::new("daemon/second", second),
        Scenario::new("daemon/xenstored-restarts", xenstored),
        Scenario::new("daemon/announced-pause", announced_pause),
        Scenario::new("daemon/shutdown-request", shutdown_request),
        Scenario::new("daemon/domain-comes-later", comes_later),
        Scenario::new("daemon/rules-without-a-gap", rules_without_a_gap),
    ]
}

/// Everything in dom0 that a daemon could leave behind.
pub(super) fn traces(lab: &Lab) -> Result<String> {
    let dom0 = lab.dom0();
    let mut all = String::new();
    for words in [
        &["ip", "-br", "link"][..],
        &["ip", "-br", "address"],
        &["ip", "rule"],
        &["ip", "route", "show", "table", "all"],
        &["bridge", "-d", "link"],
        &["nft", "--stateless", "list", "ruleset"],
        &["tc", "qdisc"],
        &["find", "/sys/fs/bpf"],
        &["find", &lab.directory().display().to_string(), "-name", "*.journal.*"],
    ] {
        let output = dom0.run(words)?;
        all.push_str(&String::from_utf8_lossy(&output.stdout));
    }
    Ok(all)
}

/// After SIGTERM the rules, addresses and interfaces are those from before the start.
fn clean_shutdown(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 2, &[Service::Redis, Service::Http]), &|line| println!("  {line}"))?;
    let before = traces(&lab)?;
    let config = lab.default_config();
    let mut stage = Stage::take(lab, &config)?;
    ensure!(traces(&stage.lab)? != before, "a running dom0d leaves no trace: this check sees nothing");
    let load = stage.load("clean")?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    load.finish()?;
    stage.stop_dom0d()?;
    let after = traces(&stage.lab)?;
    ensure!(after == before, "before:\n{before}\nafter the shutdown:\n{after}");
    Ok(())
}

/// How the last dom0d of a host ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// As `systemctl disable --now` ends it.
    Stopped,
    /// It was killed; to uninstall it, the operator starts it once more and stops it at once.
    Killed,
    /// The same, with a configuration that lacks one service and has the other on the other plane.
    Reconfigured,
}

/// dom0d is uninstalled under load: everything that it made goes, and what others put on the same interfaces stays.
fn uninstalled(lab: &str, end: End) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 2, &[Service::Redis, Service::Http]), &|line| println!("  {line}"))?;
    let vif = lab.domain("guest-3")?.vif;
    let filter = format!("tc filter add dev {vif} ingress pref 7 protocol arp u32 match u32 0 0 flowid 1:1");
    lab.dom0().run(&["sh", "-c", &format!("tc qdisc add dev {vif} clsact && {filter}")])?;
    let before = everything(&lab)?;
    ensure!(before.contains("pref 7"), "this check does not see filters: {before}");
    let config = lab.default_config();
    let mut stage = Stage::take(lab, &config)?;
    let load = stage.load("uninstalled")?;
    ensure!(everything(&stage.lab)? != before, "a running dom0d leaves no trace: this check sees nothing");
    load.hold(Duration::from_secs(5))?;
    match end {
        End::Stopped => stage.stop_dom0d()?,
        End::Killed | End::Reconfigured => {
            stage.dom0d.take().context("no dom0d")?.kill9()?;
            let only_redis: String = config.split_inclusive("[[service]]").take(2).collect();
            let changed = with_plane(only_redis.trim_end_matches("[[service]]"), Plane::Pcap);
            let config = if end == End::Killed { &config } else { &changed };
            stage.lab.start_dom0d(config)?.stop()?;
        }
    }
    let after = everything(&stage.lab)?;
    ensure!(after == before, "before:\n{before}\nafter the end:\n{after}");
    Ok(())
}

/// The state of dom0, with filters of interfaces, xenstore and the files of dom0d's directory. Two files may stay: the lock
/// until dom0 ends, and the memory of promotions, so that a new installation does not return to a deposed OVM.
fn everything(lab: &Lab) -> Result<String> {
    let mut all = traces(lab)?;
    let directory = lab.directory().display();
    let script = format!(
        "for link in $(ls /sys/class/net); do for side in ingress egress; do
             echo $link $side; tc filter show dev $link $side 2>/dev/null || true; done; done
         XENSTORED_PATH={directory}/xenstored.sock xenstore-ls -f | sort
         cd {directory}; ls | grep -v -e '^dom0d[.]' -e '^log$' -e '^domains.json' -e '^run$' -e '^state$'; test ! -d run || find run -mindepth 1 ! -name dom0d.lock"
    );
    let output = lab.dom0().run(&["sh", "-c", &script])?;
    all.push_str(&String::from_utf8_lossy(&output.stdout));
    Ok(all)
}

/// kill -9 under load on the plane pcap, and a restart: there is one set of rules and interfaces, and the service can fail
/// over as before. The successor's clean shutdown removes the leftovers.
fn killed(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 1, &[Service::Redis]), &|line| {
        println!("  {line}");
    })?;
    let before = traces(&lab)?;
    let config = with_plane(&lab.default_config(), Plane::Pcap);
    let mut stage = Stage::take(lab, &config)?;
    // Rules are written in steps, between which there are two tables.
    let deadline = Instant::now() + Duration::from_secs(5);
    let running = loop {
        let running = traces(&stage.lab)?;
        if !running.contains("understudy_meanwhile") {
            break running;
        }
        ensure!(Instant::now() < deadline, "the rules are not written to the end:\n{running}");
        sleep(Duration::from_millis(50));
    };
    let target = stage.psc(Service::Redis)?;
    let load = Plan::new(target, "killed").start(&stage.client())?;
    load.wait_answers(300, Duration::from_secs(20))?;
    load.hold(Duration::from_secs(5))?;
    stage.dom0d.take().context("no dom0d")?.kill9()?;
    let Stage { lab, .. } = stage;
    let mut stage = Stage::take_unready(lab, &config)?;
    stage.until("the restarted dom0d serves", Duration::from_secs(10), |status| {
        status.services[0].serving && status.services[0].servers.len() == 2
    })?;
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let again = traces(&stage.lab)?;
        if again.lines().count() == running.lines().count() {
            break;
        }
        ensure!(Instant::now() < deadline, "before the kill:\n{running}\nafter the restart:\n{again}");
        sleep(Duration::from_millis(50));
    }
    // Connections that the first daemon knew and the second does not are its affair to let flow or
    // to reset; they may not answer wrong.
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
    clear(&stage.lab)?;
    stage.operator.seed_all(&config)?;
    let load = Plan::new(target, "after").start(&stage.client())?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.survives_freeze(load)?;
    stage.stop_dom0d()?;
    let after = traces(&stage.lab)?;
    ensure!(after == before, "before:\n{before}\nafter the successor's shutdown:\n{after}");
    Ok(())
}

/// dom0d is stopped for two seconds during a large transfer: the transfer may stall, continues, and the replica lacks
/// nothing, for it finishes the transfer.
fn suspended(lab: &str, direction: Direction) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Http])?;
    let large = Large::begin(&stage, direction, false)?;
    large.wait_part(0.2)?;
    stage.dom0d.as_ref().context("no dom0d")?.suspend_for(Duration::from_secs(2))?;
    large.wait_part(0.6)?;
    let service = stage.operator.service("http")?;
    ensure!(service.promotable() == 1, "the replica missed something: {:#?}", service.servers);
    for name in ["ring_full", "unrecorded"] {
        let times = service.plane_counters.get(name).copied().unwrap_or_default();
        ensure!(times == 0, "windows were to stop the transfer, and {name} is {times}");
    }
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    Failover::observe(&stage, Service::Http, Fault::Freeze, at)?.expect_plausible()?;
    let whole = large.expect_whole(&stage)?;
    ensure!(whole.longest_gap.0 > Duration::from_secs(1), "dom0d's absence did not show: was it suspended?");
    Ok(())
}

/// dom0d is killed on the plane bpf and not started again. After its grace, open connections continue over a lossy link,
/// though their OVM is not the one that they began with; others begin and end. The next dom0d serves, and says that the
/// replica missed something.
fn away(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 1, &[Service::Redis]), &|line| println!("  {line}"))?;
    let grace = "daemon_grace_ms = 300\nrvms = ";
    let config = with_plane(&lab.default_config(), Plane::Bpf).replace("rvms = ", grace);
    let mut stage = Stage::take(lab, &config)?;
    let target = stage.psc(Service::Redis)?;
    let load = Plan::new(target, "away").start(&stage.client())?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.operator.order(&["switchover", "redis", "--to", "guest-2"])?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.dom0d.take().context("no dom0d")?.kill9()?;
    stage.lab.link("client", Link { loss: 0.02, ..Link::default() })?;
    load.wait_answers(1_000, Duration::from_secs(40))?;
    let later = Plan::new(target, "later").start(&stage.client())?;
    later.wait_answers(300, Duration::from_secs(20))?;
    let ovm = stage.lab.domain("guest-2")?;
    for outcome in [later.finish()?, load.finish()?] {
        expect_unharmed(&outcome, &ovm.name, || stage.verify(&ovm, &outcome))?;
    }
    stage.lab.link("client", Link::default())?;
    let Stage { lab, .. } = stage;
    let stage = Stage::take_unready(lab, &config)?;
    stage.until("the restarted dom0d serves", Duration::from_secs(10), |status| {
        status.services[0].serving && status.services[0].servers.len() == 2
    })?;
    ensure!(stage.ovm(Service::Redis)?.name == "guest-2", "the restarted dom0d forgot whom it had promoted");
    ensure!(
        stage.operator.service("redis")?.promotable() == 0,
        "the replica counts as identical, though it missed what came meanwhile"
    );
    stage.load("again")?.finish()?;
    Ok(())
}

/// A second dom0d beside the first refuses to start, says why, and disturbs nothing.
fn second(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("twin")?;
    let before = traces(&stage.lab)?;
    for socket in ["control.sock", "other.sock"] {
        let config = stage.lab.directory().join("second.toml");
        let socket = stage.lab.directory().join(socket);
        let text = format!("control_socket = {socket:?}\n{}", stage.lab.default_config());
        std::fs::write(&config, text)?;
        let said = refused(&stage.lab, &config, |_| {}, &[])?;
        explains("the second dom0d", &said, &["already"])?;
    }
    let after = traces(&stage.lab)?;
    ensure!(after == before, "before:\n{before}\nafter the second dom0d:\n{after}");
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.survives_freeze(load)
}

/// xenstored goes away for a second under load; clients notice nothing, a fault meanwhile is found
/// (domain info does not come from there), and domains that appear later are seen.
fn xenstored(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let load = stage.load("store")?;
    stage.lab.restart_xenstored(Duration::from_secs(1))?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.survives_freeze(load)?;
    stage.lab.fault(Fault::Destroy, "guest-1")?;
    stage.lab.create("guest-1")?;
    stage.until("guest-1 seen again", Duration::from_secs(15), |status| {
        let service = &status.services[0];
        service.servers.iter().any(|s| s.domain.as_ref().is_some_and(|d| d.name == "guest-1"))
            || service.known.iter().any(|k| k.domain.name == "guest-1")
    })?;
    ensure!(
        stage.operator.status()?.problems.is_empty(),
        "dom0d still reports problems: {:?}",
        stage.operator.status()?.problems
    );
    Ok(())
}

/// An announced pause of the OVM is no fault: connections wait, and continue after the resume.
fn announced_pause(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("pause")?;
    let epoch = stage.operator.service("redis")?.epoch;
    stage.operator.order(&["pause", "redis", "guest-1"])?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(stage.operator.service("redis")?.epoch == epoch, "an announced pause caused a failover");
    stage.operator.order(&["resume", "redis", "guest-1"])?;
    load.wait_answers(300, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    ensure!(stage.ovm(Service::Redis)?.name == "guest-1", "guest-1 was deposed");
    stage.expect_unharmed(&outcome)
}

/// A toolstack's shutdown request to the OVM moves the service first, though the guest clears the node at once.
fn shutdown_request(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 1, &[Service::Redis]), |config| {
        config.replace("[[service]]\n", "[[service]]\non_shutdown_request = \"switchover\"\n")
    })?;
    let load = stage.load("shutdown")?;
    let node = format!("/local/domain/{}/control/shutdown", stage.lab.domain("guest-1")?.domid);
    let socket = stage.lab.directory().join("xenstored.sock");
    let line = format!(
        "export XENSTORED_PATH={}; xenstore-write {node} poweroff; sleep 0.002; xenstore-write {node} ''",
        socket.display()
    );
    stage.lab.dom0().run(&["sh", "-c", &line])?;
    stage.until("guest-2 serves", Duration::from_secs(10), |status| {
        let ovm = status.services[0].ovm().and_then(|server| server.domain.as_ref());
        ovm.is_some_and(|domain| domain.name == "guest-2")
    })?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// A replica that is created while dom0d runs is found, and is no candidate before it is seeded.
fn comes_later(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    stage.lab.fault(Fault::Destroy, "guest-2")?;
    stage.until("guest-2 gone", Duration::from_secs(10), |status| status.services[0].servers.len() == 1)?;
    let load = stage.load("later")?;
    let first = load.finish()?;
    stage.lab.create("guest-2")?;
    stage.until("guest-2 seen", Duration::from_secs(10), |status| {
        let service = &status.services[0];
        service.servers.len() == 2
    })?;
    ensure!(
        stage.operator.service("redis")?.promotable() == 0,
        "an empty domain counts as a replica of a service that has data"
    );
    stage.lab.copy_state("guest-1", "guest-2")?;
    stage.operator.order(&["attach", "redis", "guest-2", "--assume-identical"])?;
    let load = stage.load("again")?;
    stage.survives_freeze(load)?;
    let verdict = stage.verify(&stage.ovm(Service::Redis)?, &first)?;
    ensure!(verdict.wrong.is_empty(), "{:#?}", verdict.wrong);
    Ok(())
}

/// While dom0d replaces its rules again and again, no frame of a replica passes: one that reached its client would make the
/// client reset the connection.
fn rules_without_a_gap(lab: &str) -> Result<()> {
    const PORT: u16 = 9_999;
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let guest = stage.lab.domain("guest-2")?;
    let client = Ipv4Addr::new(10, 77, 0, 1);
    // Its questions for the client's link address are not answered.
    guest.run(&[
        "ip",
        "neigh",
        "replace",
        &client.to_string(),
        "lladdr",
        "ff:ff:ff:ff:ff:ff",
        "dev",
        "eth0",
    ])?;
    let socket = stage.client().run(move || Ok(UdpSocket::bind((client, PORT))?))?;
    socket.set_nonblocking(true)?;
    let (place, _) = own_address(&guest, Service::Redis)?;
    let flood = place.spawn("flood", move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        let until = Instant::now() + Duration::from_secs(3);
        let mut sent = 0_u64;
        while Instant::now() < until {
            sent += u64::from(socket.send_to(b"x", (client, PORT)).is_ok());
        }
        Ok(sent)
    })?;
    let mut replaced = 0;
    while !flood.is_finished() {
        stage.operator.order(&["detach", "redis", "guest-3"])?;
        stage.operator.order(&["attach", "redis", "guest-3", "--assume-identical"])?;
        replaced += 2;
    }
    let sent = join(flood)?;
    let passed = iter::from_fn(|| socket.recv(&mut [0; 16]).ok()).count();
    println!("  {sent} frames sent, {replaced} orders that change the rules");
    ensure!(sent > 10_000 && replaced > 10, "too few for a gap to show");
    ensure!(passed == 0, "{passed} of the replica's {sent} frames passed while rules were replaced");
    Ok(())
}
