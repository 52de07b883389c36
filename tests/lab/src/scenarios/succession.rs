//! dom0d is killed at any moment, or replaced by an upgrade, on the plane bpf (rule 8): clients notice nothing, and its
//! successor's replicas lack nothing.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use super::daemon::traces;
use super::transfer::{Direction, Large};
use crate::host::{Fault, Lab, LabConfig, Plane, Service, Vlan};
use crate::stage::failover::Failover;
use crate::stage::{Stage, with_plane};

/// Where the stories' daemons are killed: these many milliseconds after something happened.
const MOMENTS: [u64; 6] = [0, 37, 3, 211, 1, 90];

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("succession/under-load", under_load),
        Scenario::new("succession/download", |lab| transfer(lab, Direction::Download)),
        Scenario::new("succession/upload", |lab| transfer(lab, Direction::Upload)),
        Scenario::new("succession/at-the-cutover", at_the_cutover),
        Scenario::new("succession/after-a-failover", |lab| after_a_failover(lab, None)),
        Scenario::new("succession/after-a-failover/vlan", |lab| {
            after_a_failover(lab, Some(Vlan { id: 5, filtered: false }))
        }),
        Scenario::new("succession/hangup", hangup),
        Scenario::new("succession/domain-gone-meanwhile", gone_meanwhile),
        Scenario::new("succession/damaged-journal", |lab| damaged(lab, |_| vec![0x5a; 1 << 16])),
        Scenario::new("succession/flipped-bits", |lab| damaged(lab, flipped)),
        Scenario::new("succession/protect", protect),
    ]
}

fn begin(lab: &str, replicas: usize, services: &[Service]) -> Result<(Stage, String)> {
    begin_with(Stage::plan(lab, replicas, services))
}

fn begin_with(plan: LabConfig) -> Result<(Stage, String)> {
    let lab = Lab::up(plan, &|line| println!("  {line}"))?;
    let config = with_plane(&lab.default_config(), Plane::Bpf);
    Ok((Stage::take(lab, &config)?, config))
}

/// Kills dom0d, does this while there is none, and starts another.
fn kill(mut stage: Stage, config: &str, meanwhile: impl FnOnce(&Lab) -> Result<()>) -> Result<Stage> {
    stage.dom0d.take().context("no dom0d")?.kill9()?;
    let Stage { lab, .. } = stage;
    meanwhile(&lab)?;
    let stage = Stage::take_unready(lab, config)?;
    stage.until("the successor serves", Duration::from_secs(10), |status| {
        status.services.iter().all(|service| service.serving)
    })?;
    Ok(stage)
}

/// Every replica could take over at once.
fn expect_promotable(stage: &Stage, service: &str, replicas: usize) -> Result<()> {
    stage.until("replicas follow", Duration::from_secs(10), |status| {
        let service = status.services.iter().find(|status| status.name == service);
        service.is_some_and(|service| service.promotable() == replicas)
    })
}

/// dom0d is killed again and again under load of two services; then the OVM freezes. In the end nothing of any dom0d is left.
fn under_load(lab: &str) -> Result<()> {
    let services = [Service::Redis, Service::Http];
    let lab = Lab::up(Stage::plan(lab, 2, &services), &|line| println!("  {line}"))?;
    let before = traces(&lab)?;
    let config = with_plane(&lab.default_config(), Plane::Bpf);
    let mut stage = Stage::take(lab, &config)?;
    let load = stage.load("succession")?;
    let large = Large::begin(&stage, Direction::Download, false)?;
    for moment in MOMENTS {
        load.wait_answers(300, Duration::from_secs(20))?;
        std::thread::sleep(Duration::from_millis(moment));
        stage = kill(stage, &config, |_| Ok(()))?;
        for service in services {
            expect_promotable(&stage, service.name(), 2)?;
        }
    }
    stage.survives_freeze(load)?;
    large.expect_whole(&stage)?;
    stage.stop_dom0d()?;
    let after = traces(&stage.lab)?;
    ensure!(after == before, "before:\n{before}\nafter the last one's clean end:\n{after}");
    Ok(())
}

/// In the middle of a large transfer, which the replica then finishes.
fn transfer(lab: &str, direction: Direction) -> Result<()> {
    let (mut stage, config) = begin(lab, 1, &[Service::Http])?;
    let large = Large::begin(&stage, direction, false)?;
    for part in [0.1, 0.25, 0.4, 0.55] {
        large.wait_part(part)?;
        stage = kill(stage, &config, |_| Ok(()))?;
        expect_promotable(&stage, "http", 1)?;
    }
    large.wait_part(0.7)?;
    let at = stage.strike(Service::Http, Fault::Freeze)?;
    Failover::observe(&stage, Service::Http, Fault::Freeze, at)?;
    large.expect_whole(&stage)?;
    Ok(())
}

/// While it deposes an OVM: the successor ends what it began.
fn at_the_cutover(lab: &str) -> Result<()> {
    let (mut stage, config) = begin(lab, 3, &[Service::Redis])?;
    let load = stage.load("cutover")?;
    for moment_us in [700, 1_500, 0] {
        load.wait_answers(300, Duration::from_secs(20))?;
        let ovm = stage.ovm(Service::Redis)?.name;
        stage.lab.fault(Fault::Freeze, &ovm)?;
        std::thread::sleep(Duration::from_micros(moment_us));
        stage = kill(stage, &config, |_| Ok(()))?;
        load.wait_answers(300, Duration::from_secs(20))?;
        ensure!(stage.ovm(Service::Redis)?.name != ovm, "{ovm} is frozen and serves");
    }
    stage.expect_unharmed(&load.finish()?)
}

/// After a promotion, when clients are told other numbers than their server uses; then that server freezes too.
fn after_a_failover(lab: &str, vlan: Option<Vlan>) -> Result<()> {
    let plan = LabConfig { vlan, ..Stage::plan(lab, 2, &[Service::Redis]) };
    let (mut stage, config) = begin_with(plan)?;
    let load = stage.load("after")?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage = kill(stage, &config, |_| Ok(()))?;
    expect_promotable(&stage, "redis", 1)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    let at = stage.lab.fault(Fault::Freeze, &stage.ovm(Service::Redis)?.name)?;
    Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// An upgrade: the same process becomes another program.
fn hangup(lab: &str) -> Result<()> {
    let (mut stage, _) = begin(lab, 1, &[Service::Redis])?;
    let load = stage.load("hangup")?;
    for _ in 0..3 {
        load.wait_answers(300, Duration::from_secs(20))?;
        let log = std::fs::read_to_string(stage.dom0d.as_ref().context("no dom0d")?.log())?;
        stage.hang_up()?;
        let said = "goes on where a dom0d was";
        let now = std::fs::read_to_string(stage.dom0d.as_ref().context("no dom0d")?.log())?;
        ensure!(now.matches(said).count() > log.matches(said).count(), "no other program took over");
        expect_promotable(&stage, "redis", 1)?;
    }
    stage.survives_freeze(load)
}

/// The OVM ends while there is no dom0d: the successor finds it gone, and a replica takes over.
fn gone_meanwhile(lab: &str) -> Result<()> {
    let (mut stage, config) = begin(lab, 2, &[Service::Redis])?;
    let load = stage.load("gone")?;
    stage = kill(stage, &config, |lab| lab.fault(Fault::Destroy, "guest-1").map(drop))?;
    load.wait_answers(300, Duration::from_secs(20))?;
    ensure!(stage.ovm(Service::Redis)?.name != "guest-1", "a domain that is gone serves");
    stage.expect_unharmed(&load.finish()?)
}

/// Longer than its grace, where the operator would rather wait than go on without replicas: what the kernel passes by
/// itself goes on and is kept for the successor, nobody new comes in, and replicas lack nothing.
fn protect(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 1, &[Service::Redis]), &|line| println!("  {line}"))?;
    let config = with_plane(&lab.default_config(), Plane::Bpf)
        .replace("rvms = ", "daemon_grace_ms = 200\non_daemon_loss = \"protect\"\nrvms = ");
    let mut stage = Stage::take(lab, &config)?;
    let load = stage.load("protect")?;
    let (client, target) = (stage.client(), stage.psc(Service::Redis)?);
    stage = kill(stage, &config, |_| {
        std::thread::sleep(Duration::from_millis(400));
        load.wait_answers(300, Duration::from_secs(20))?;
        let newcomer = client.run(move || {
            Ok(TcpStream::connect_timeout(&target, Duration::from_millis(500)).map_err(|error| error.kind()))
        })?;
        ensure!(newcomer.is_err_and(|kind| kind == ErrorKind::TimedOut), "a client came in unprotected");
        Ok(())
    })?;
    expect_promotable(&stage, "redis", 1)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.survives_freeze(load)
}

/// 30 bytes of what the log ends with.
fn flipped(mut journal: Vec<u8>) -> Vec<u8> {
    let end = journal.iter().rposition(|&byte| byte != 0).unwrap_or(0);
    journal[end.saturating_sub(30)..end].iter_mut().for_each(|byte| *byte ^= 0x11);
    journal
}

/// What cannot be read is said, and clients notice nothing: only their replicas do not count any more.
fn damaged(lab: &str, damage: impl Fn(Vec<u8>) -> Vec<u8>) -> Result<()> {
    let (mut stage, config) = begin(lab, 1, &[Service::Redis])?;
    let load = stage.load("damaged")?;
    let log = stage.dom0d.as_ref().context("no dom0d")?.log().to_owned();
    load.hold(Duration::from_secs(5))?;
    stage = kill(stage, &config, |lab| {
        let mut damaged = 0;
        for entry in std::fs::read_dir(lab.directory().join("run"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "0" || extension == "1") {
                std::fs::write(&path, damage(std::fs::read(&path)?))?;
                damaged += 1;
            }
        }
        ensure!(damaged > 0, "there is no journal to damage");
        Ok(())
    })?;
    load.go_on();
    load.wait_answers(300, Duration::from_secs(20))?;
    let said = std::fs::read_to_string(log)?;
    ensure!(said.contains("seed the replicas anew"), "dom0d did not say what is lost");
    let promotable = stage.operator.service("redis")?.promotable();
    ensure!(promotable == 0, "the replica counts as identical, though nobody knows what it missed");
    stage.expect_unharmed(&load.finish()?)
}
