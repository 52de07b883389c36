//! How long clients wait after each kind of fault, over many failovers.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::rtt::{clear, hang_up};
use super::summary::quantile;
use crate::client::redis::load::Plan;
use crate::host::{Fault, Lab, Service};
use crate::stage::failover::Failover;
use crate::stage::repair::repair;
use crate::stage::{Stage, with_replicas};

const FAULTS: [Fault; 6] =
    [Fault::Freeze, Fault::Crash, Fault::Destroy, Fault::Hang, Fault::Kill, Fault::Spin];

/// One fault with one number of replicas; times in microseconds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) fault: Fault,
    pub(crate) replicas: usize,
    pub(crate) detected_by: Vec<String>,
    pub(crate) fault_to_detection_us: Spread,
    pub(crate) detection_to_cutover_us: Spread,
    /// To the first new in-order byte that a client with a request outstanding read.
    pub(crate) fault_to_first_byte_us: Spread,
    pub(crate) fault_to_recuperated_us: Spread,
    /// Anything a client noticed besides the wait, over all samples.
    pub(crate) client_errors: u64,
}

/// A distribution of few samples.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Spread {
    pub(crate) samples: usize,
    pub(crate) p50: u64,
    pub(crate) p90: u64,
    pub(crate) p99: u64,
    pub(crate) max: u64,
}

impl Spread {
    pub(crate) fn of(samples: &[u64]) -> Self {
        Self {
            samples: samples.len(),
            p50: quantile(samples, 0.5),
            p90: quantile(samples, 0.9),
            p99: quantile(samples, 0.99),
            max: quantile(samples, 1.0),
        }
    }
}

pub(crate) fn measure(lab: &Lab, samples: usize) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for replicas in 1..=3 {
        hang_up(&lab.domains()?)?;
        clear(lab)?;
        let config = format!(
            "{}\n[service.limits]\npromotions = 1000000\n",
            with_replicas(&redis_only(&lab.default_config()), replicas)
        );
        let mut stage = Stage::take_identical(Lab::find(&lab.config().name)?, &config)?;
        for fault in FAULTS {
            let row = row(&stage, &config, fault, replicas, samples)
                .with_context(|| format!("{fault:?} with {replicas} replicas"))?;
            println!(
                "  {replicas} replicas, {fault:?}: first byte after p50 {} us, max {} us",
                row.fault_to_first_byte_us.p50, row.fault_to_first_byte_us.max
            );
            rows.push(row);
        }
        stage.stop_dom0d()?;
    }
    Ok(rows)
}

/// The first service of a configuration, which is Redis'.
pub(crate) fn redis_only(config: &str) -> String {
    let mut services = config.split("[[service]]");
    // Nothing stands before the first one.
    let _ = services.next();
    format!("[[service]]{}", services.next().unwrap_or_default())
}

fn row(stage: &Stage, config: &str, fault: Fault, replicas: usize, samples: usize) -> Result<Row> {
    let mut detection = Vec::new();
    let mut cutover = Vec::new();
    let mut first_byte = Vec::new();
    let mut recuperated = Vec::new();
    let mut detected_by = Vec::new();
    let mut client_errors = 0;
    for _ in 0..samples {
        let ovm = stage.ovm(Service::Redis)?.name;
        let (observed, first_byte_us, errors) = once(stage, fault, &ovm)?;
        detection.push(observed.suspected_us.saturating_sub(observed.fault_us));
        cutover.push(observed.cut_over_us.saturating_sub(observed.suspected_us));
        first_byte.push(first_byte_us.saturating_sub(observed.fault_us));
        recuperated.push(observed.recuperated_us.saturating_sub(observed.fault_us));
        detected_by.push(observed.detected_by);
        client_errors += errors;
        repair(&stage.lab, fault, &ovm)?;
        hang_up(&[stage.lab.domain(&ovm)?])?;
        clear(&stage.lab)?;
        stage.operator.seed_all(config)?;
    }
    detected_by.sort();
    detected_by.dedup();
    Ok(Row {
        fault,
        replicas,
        detected_by,
        fault_to_detection_us: Spread::of(&detection),
        detection_to_cutover_us: Spread::of(&cutover),
        fault_to_first_byte_us: Spread::of(&first_byte),
        fault_to_recuperated_us: Spread::of(&recuperated),
        client_errors,
    })
}

/// One failover of eight connections that ask a thousand times a second each.
fn once(stage: &Stage, fault: Fault, ovm: &str) -> Result<(Failover, u64, u64)> {
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "bench");
    plan.pace = Some(Duration::from_millis(1));
    let load = plan.start(&stage.client())?;
    load.wait_answers(300, Duration::from_secs(20))?;
    let at = stage.lab.fault(fault, ovm)?;
    let observed = Failover::observe(stage, Service::Redis, fault, at)?;
    load.wait_answers(100, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    let verdict = stage.verify(&stage.ovm(Service::Redis)?, &outcome)?;
    let first_byte_us =
        observed.first_byte_us(&outcome).context("no client read anything after the cutover")?;
    let errors = outcome.troubles() + verdict.lost_writes + observed.reset;
    for error in outcome.errors.iter().chain(&verdict.wrong) {
        println!("  {fault:?} of {ovm}: {error}");
    }
    Ok((observed, first_byte_us, errors))
}

pub(crate) fn print(rows: &[Row]) {
    println!("  all in microseconds, p50 / p99 / max");
    println!(
        "  fault    replicas  samples  detection              cutover             first byte             errors  detected by"
    );
    let spread = |s: &Spread| format!("{}/{}/{}", s.p50, s.p99, s.max);
    for row in rows {
        println!(
            "  {:<8} {:>8} {:>8}  {:<22} {:<19} {:<22} {:>6}  {}",
            format!("{:?}", row.fault).to_lowercase(),
            row.replicas,
            row.fault_to_first_byte_us.samples,
            spread(&row.fault_to_detection_us),
            spread(&row.detection_to_cutover_us),
            spread(&row.fault_to_first_byte_us),
            row.client_errors,
            row.detected_by.join(", ")
        );
    }
}
