//! How long the eviction of a replica holds up the packet path, and whether clients notice.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use super::failover::redis_only;
use super::rtt::{clear, hang_up};
use super::summary::quantile;
use crate::client::redis::load::Plan;
use crate::host::{Fault, Lab, Service};
use crate::stage::Stage;
use crate::stage::repair::repair;

/// Evictions of one of three replicas that held this many conversations.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) conversations: usize,
    pub(crate) samples: usize,
    pub(crate) packet_path_p50_us: f64,
    pub(crate) packet_path_max_us: f64,
    pub(crate) client_errors: u64,
}

pub(crate) fn measure(lab: &Lab, samples: usize) -> Result<Vec<Row>> {
    clear(lab)?;
    let config = redis_only(&lab.default_config());
    let mut stage = Stage::take_identical(Lab::find(&lab.config().name)?, &config)?;
    let mut rows = Vec::new();
    for conversations in [10, 1_000] {
        let mut times_ns = Vec::new();
        let mut client_errors = 0;
        for _ in 0..samples {
            let (took_ns, errors) = once(&stage, conversations)?;
            times_ns.push(took_ns);
            client_errors += errors;
            repair(lab, Fault::Freeze, "guest-4")?;
            hang_up(&[lab.domain("guest-4")?])?;
            clear(lab)?;
            stage.operator.seed_all(&config)?;
        }
        rows.push(Row {
            conversations,
            samples,
            packet_path_p50_us: quantile(&times_ns, 0.5) as f64 / 1_000.0,
            packet_path_max_us: quantile(&times_ns, 1.0) as f64 / 1_000.0,
            client_errors,
        });
    }
    stage.stop_dom0d()?;
    Ok(rows)
}

fn once(stage: &Stage, conversations: usize) -> Result<(u64, u64)> {
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "evict");
    plan.connections = conversations;
    plan.busy = 10;
    let load = plan.start(&stage.client())?;
    load.wait_answers(200, Duration::from_secs(20))?;
    let at = stage.lab.fault(Fault::Freeze, "guest-4")?;
    let from_us = at.monotonic_ns / 1_000;
    stage.events.wait("evicted", "redis", from_us, Duration::from_secs(10))?;
    load.wait_answers(200, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    let service = stage.operator.service("redis")?;
    let took_ns = *service
        .plane_counters
        .get("eviction_last_ns")
        .context("dom0d does not tell how long the eviction took (plane counter eviction_last_ns)")?;
    Ok((took_ns, outcome.troubles()))
}

pub(crate) fn print(rows: &[Row]) {
    println!("  conversations  samples   p50 us    max us  client errors");
    for row in rows {
        println!(
            "  {:>13} {:>8} {:>8.2} {:>9.2} {:>14}",
            row.conversations, row.samples, row.packet_path_p50_us, row.packet_path_max_us, row.client_errors
        );
    }
}
