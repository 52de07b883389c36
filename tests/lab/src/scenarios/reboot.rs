//! Memory outlives reboots (rule 14): after a reboot of dom0 the domain that served last serves again, and in doubt nobody does.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::host::{Fault, Lab, Service};
use crate::stage::Stage;
use crate::stage::failover::Failover;

/// How long to wait for something that must not happen.
const QUIET: Duration = Duration::from_secs(2);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("reboot/after-a-failover", after_a_failover),
        Scenario::new("reboot/promoted-domain-comes-last", comes_last),
        Scenario::new("reboot/without-a-failover", without_a_failover),
        Scenario::new("reboot/damaged-memory", |lab| {
            in_doubt(lab, "damaged", |memory| memory[..memory.len() / 2].to_owned())
        }),
        Scenario::new("reboot/memory-of-another-version", |lab| {
            in_doubt(lab, "version 9", |memory| memory.replace("\"version\": 1", "\"version\": 9"))
        }),
        Scenario::new("reboot/memory-can-t-be-written", full),
    ]
}

fn redis(lab: &Lab, domain: &str, words: &[&str]) -> Result<String> {
    let output = lab.host(domain)?.run(&[&["redis-cli"], words].concat())?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn through_the_psc(lab: &Lab, words: &[&str]) -> Result<String> {
    redis(lab, "client", &[&["-h", "10.77.0.100"], words].concat())
}

/// A service whose `n` is 1 on guest-1, and 6 on guest-2 too if that was promoted meanwhile; then dom0 reboots.
/// No domain runs yet, nor dom0d.
fn rebooted(lab: &str, failover: bool) -> Result<(Lab, String)> {
    let mut stage = Stage::up(lab, 1, &[Service::Redis])?;
    let config = stage.lab.default_config();
    ensure!(config.contains("assume-identical"), "the configuration states nothing: this check sees nothing");
    through_the_psc(&stage.lab, &["SET", "n", "1"])?;
    if failover {
        let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
        Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
        through_the_psc(&stage.lab, &["SET", "n", "6"])?;
    }
    stage.stop_dom0d()?;
    let Stage { lab, .. } = stage;
    for domain in ["guest-1", "guest-2"] {
        lab.fault(Fault::Destroy, domain)?;
    }
    fs::remove_dir_all(lab.directory().join("run")).context("emptying dom0d's run directory")?;
    fs::write(lab.directory().join("boot_id"), "another boot")?;
    Ok((lab, config))
}

/// Creates a domain with this on its disk.
fn boot(lab: &Lab, domain: &str, n: &str) -> Result<()> {
    lab.create(domain)?;
    redis(lab, domain, &["SET", "n", n]).map(drop)
}

fn serves(stage: &Stage, domain: &str, n: &str) -> Result<()> {
    stage.until("somebody serves", Duration::from_secs(15), |status| status.services[0].serving)?;
    // The other one's time to join.
    stage.until("both are in the queue", Duration::from_secs(15), |status| {
        status.services[0].servers.len() == 2
    })?;
    let ovm = stage.ovm(Service::Redis)?.name;
    ensure!(ovm == domain, "{ovm} serves");
    let read = through_the_psc(&stage.lab, &["GET", "n"])?;
    ensure!(read == n, "a client reads n={read} instead of {n}");
    ensure!(
        stage.operator.service("redis")?.promotable() == 0,
        "a domain with other data counts as identical"
    );
    Ok(())
}

fn waits_for(stage: &Stage, saying: &[&str]) -> Result<()> {
    stage.until("dom0d says what it waits for", Duration::from_secs(15), |status| {
        let said = status.services[0].problems.join("; ");
        saying.iter().all(|word| said.contains(word))
    })?;
    std::thread::sleep(QUIET);
    ensure!(
        !stage.operator.service("redis")?.serving,
        "somebody serves, though nobody knows whose data is right"
    );
    stage.events.wait("problem", "redis", 0, QUIET).map(drop)
}

/// Domains have new UUIDs, as xl makes them up at each creation.
fn after_a_failover(lab: &str) -> Result<()> {
    let (lab, config) = rebooted(lab, true)?;
    boot(&lab, "guest-1", "1")?;
    boot(&lab, "guest-2", "6")?;
    serves(&Stage::take_unready(lab, &config)?, "guest-2", "6")
}

fn comes_last(lab: &str) -> Result<()> {
    let (lab, config) = rebooted(lab, true)?;
    boot(&lab, "guest-1", "1")?;
    let stage = Stage::take_unready(lab, &config)?;
    waits_for(&stage, &["guest-2", "served last", "failover redis --to"])?;
    boot(&stage.lab, "guest-2", "6")?;
    serves(&stage, "guest-2", "6")
}

/// The OVM serves again without an operator, and the replica is not seeded: `assume-identical` is for the first start.
fn without_a_failover(lab: &str) -> Result<()> {
    let (lab, config) = rebooted(lab, false)?;
    boot(&lab, "guest-2", "0")?;
    boot(&lab, "guest-1", "1")?;
    serves(&Stage::take_unready(lab, &config)?, "guest-1", "1")
}

/// dom0d's memory is unusable: it says so, and an operator's command is enough.
fn in_doubt(lab: &str, saying: &str, damage: impl Fn(&str) -> String) -> Result<()> {
    let (lab, config) = rebooted(lab, true)?;
    let memory = lab.directory().join("state/memory.json");
    let text = fs::read_to_string(&memory).context("dom0d wrote nothing down")?;
    fs::write(&memory, damage(&text))?;
    boot(&lab, "guest-1", "1")?;
    boot(&lab, "guest-2", "6")?;
    let mut stage = Stage::take_unready(lab, &config)?;
    waits_for(&stage, &["nobody knows who served last", saying, "failover redis --to DOMAIN --force"])?;
    // Nor does it when it is started again.
    stage.stop_dom0d()?;
    let stage = Stage::take_unready(stage.lab, &config)?;
    waits_for(&stage, &["nobody knows who served last"])?;
    stage.operator.order(&["failover", "redis", "--to", "guest-2", "--force"])?;
    serves(&stage, "guest-2", "6")
}

/// A memory that can't be written is reported, and serving continues.
fn full(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 1, &[Service::Redis]), &|line| println!("  {line}"))?;
    // No file can be made where there is a directory.
    let obstacle = lab.directory().join("state/memory.new");
    fs::create_dir_all(&obstacle)?;
    let config = lab.default_config();
    let stage = Stage::take_unready(lab, &config)?;
    stage.until("dom0d says so", Duration::from_secs(15), |status| {
        status.problems.iter().any(|problem| problem.contains("can't be written down"))
            && status.services[0].serving
    })?;
    through_the_psc(&stage.lab, &["SET", "n", "1"])?;
    fs::remove_dir(&obstacle)?;
    stage.operator.order(&["switchover", "redis", "--to", "guest-2"])?;
    stage.until("that is over", Duration::from_secs(15), |status| status.problems.is_empty())
}
