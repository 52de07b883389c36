//! Options of the configuration take effect: a pause is excused for a while, a number of promotions is not exceeded, clients
//! wait for a slow replica.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Scenario;
use super::transfer::{Direction, Large};
use crate::client::clock::now_ns;
use crate::host::{Fault, LabConfig, Link, Service};
use crate::stage::Stage;
use crate::stage::failover::Failover;

/// How long a pause is excused, in milliseconds.
const GRACE_MS: u64 = 2_000;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("options/pause-grace", pause_grace),
        Scenario::new("options/promotion-limit", promotion_limit),
        Scenario::new("options/on-lag-wait", on_lag_wait).within(Duration::from_secs(120)),
    ]
}

/// An unannounced pause is a fault only once it has lasted longer than the grace.
fn pause_grace(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 1, &[Service::Redis]), |config| {
        config.replace("attach =", &format!("pause_grace_ms = {GRACE_MS}\nattach ="))
    })?;
    let load = stage.load("grace")?;
    let begun_us = now_ns() / 1_000;
    stage.lab.fault(Fault::Freeze, "guest-1")?;
    std::thread::sleep(Duration::from_millis(GRACE_MS / 4));
    stage.lab.thaw("guest-1")?;
    load.wait_answers(300, Duration::from_secs(20))?;
    let suspected = stage.events.since("suspected", "redis", begun_us);
    ensure!(suspected.is_empty(), "a pause within its grace was a fault: {suspected:?}");
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    let waited_us = failover.suspected_us - failover.fault_us;
    ensure!(waited_us >= GRACE_MS * 1_000, "it was excused for {waited_us} us");
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)?;
    failover.expect_plausible()
}

/// One unplanned promotion is allowed, so the second OVM's fault promotes nobody; an operator's command does.
fn promotion_limit(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis]), |config| {
        config.replace("attach =", "limits = { promotions = 1 }\nattach =")
    })?;
    let load = stage.load("limit")?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let first = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    first.expect_plausible()?;
    load.wait_answers(300, Duration::from_secs(20))?;
    let at = stage.lab.fault(Fault::Freeze, &first.to)?;
    let refusal =
        stage.events.wait("no_candidate", "redis", at.monotonic_ns / 1_000, Duration::from_secs(5))?;
    let because = refusal.what.get("because").context("no reason")?.to_string();
    ensure!(because.contains("promotion_limit"), "nobody was promoted since {because}");
    stage.operator.order(&["failover", "redis"])?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// The operator would rather have clients wait than lose a replica behind a slow link.
fn on_lag_wait(lab: &str) -> Result<()> {
    let plan = LabConfig { large_file_bytes: 40_000_000, ..Stage::plan(lab, 1, &[Service::Http]) };
    let stage = Stage::up_with(plan, |config| config.replace("attach =", "on_lag = \"wait\"\nattach ="))?;
    stage.lab.link("guest-2", Link { rate_bits: Some(40_000_000), ..Link::default() })?;
    Large::begin(&stage, Direction::Download, false)?.expect_whole(&stage)?;
    stage.until("guest-2 follows", Duration::from_secs(30), |status| status.services[0].promotable() == 1)?;
    let service = stage.operator.service("http")?;
    ensure!(service.counters.get("evictions") == Some(&0), "it was evicted: {:?}", service.counters);
    let large = Large::begin(&stage, Direction::Download, false)?;
    large.wait_part(0.3)?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    Failover::observe(&stage, Service::Http, Fault::Freeze, at)?.expect_plausible()?;
    large.expect_whole(&stage).map(drop)
}
