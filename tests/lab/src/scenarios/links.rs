//! Loss, reordering and duplication, on the clients' side and on a replica's, with a failover in it.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::Scenario;
use super::transfer::{Direction, Large};
use crate::client::clock::now_ns;
use crate::client::redis::load::Plan;
use crate::host::{Fault, LabConfig, Link, Plane, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, with_plane};

const IMPAIRMENTS: [&str; 4] = ["loss", "reordering", "duplication", "all"];
const SIDES: [&str; 2] = ["client", "guest-2"];

/// Large enough for many thousand segments; the rate over a lossy link depends on the client's kernel.
const BYTES: u64 = 60_000_000;

pub(super) fn scenarios() -> Vec<Scenario> {
    let long = Duration::from_secs(180);
    let mut all = Vec::new();
    for side in SIDES {
        for kind in IMPAIRMENTS {
            all.push(
                Scenario::new(format!("links/{side}/{kind}/pipeline"), move |lab| {
                    pipeline(lab, side, impairment(kind))
                })
                .within(long),
            );
            for (direction, name) in [(Direction::Download, "download"), (Direction::Upload, "upload")] {
                all.push(
                    Scenario::new(format!("links/{side}/{kind}/{name}"), move |lab| {
                        transfer(lab, side, impairment(kind), direction)
                    })
                    .within(long),
                );
            }
        }
    }
    for (plane, name) in [(Plane::Bpf, "bpf"), (Plane::Pcap, "pcap")] {
        for (direction, direction_name) in [(Direction::Download, "download"), (Direction::Upload, "upload")]
        {
            let scenario =
                Scenario::new(format!("links/guest-3/narrow/{direction_name}/{name}"), move |lab| {
                    narrow(lab, plane, direction)
                });
            all.push(scenario.within(long));
        }
    }
    all
}

/// One of two replicas is behind a link of 40 Mbit/s: it is evicted when it has kept the client waiting, and the other
/// replica stays.
fn narrow(lab: &str, plane: Plane, direction: Direction) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Http]), |config| {
        with_plane(&config, plane).replace("rvms = ", "timing = { lag_limit_ms = 4000 }\nrvms = ")
    })?;
    stage.lab.link("guest-3", Link { rate_bits: Some(40_000_000), ..Link::default() })?;
    let begun_us = now_ns() / 1_000;
    let large = Large::begin(&stage, direction, false)?;
    let evicted = stage.events.wait("evicted", "http", begun_us, Duration::from_secs(20))?;
    ensure!(evicted.domain("server").as_deref() == Some("guest-3"), "another one was evicted: {evicted:?}");
    println!("  evicted after {} ms", (evicted.monotonic_us - begun_us) / 1_000);
    large.expect_whole(&stage)?;
    let service = stage.operator.service("http")?;
    ensure!(service.promotable() == 1, "the quick one is not promotable: {:#?}", service.servers);
    ensure!(service.servers.len() == 2, "the narrow one is in the queue yet: {:#?}", service.servers);
    Ok(())
}

fn impairment(kind: &str) -> Link {
    let part = |this: &str| {
        if kind == this || kind == "all" { 0.01 } else { 0.0 }
    };
    Link {
        loss: part("loss"),
        reorder: part("reordering"),
        duplicate: part("duplication"),
        ..Link::default()
    }
}

fn pipeline(lab: &str, side: &str, link: Link) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    stage.lab.link(side, link)?;
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "lossy");
    plan.connections = 30;
    plan.busy = 20;
    plan.depth = 8;
    plan.pace = Some(Duration::from_millis(20));
    let load = plan.start(&stage.client())?;
    load.wait_answers(5_000, Duration::from_secs(60))?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    load.wait_answers(5_000, Duration::from_secs(60))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    failover.expect_plausible()
}

fn transfer(lab: &str, side: &str, link: Link, direction: Direction) -> Result<()> {
    let plan = LabConfig { large_file_bytes: BYTES, ..Stage::plan(lab, 1, &[Service::Http]) };
    let stage = Stage::up_with(plan, |config| config)?;
    stage.lab.link(side, link)?;
    let large = Large::begin(&stage, direction, false)?;
    large.wait_part(0.4)?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Http, Fault::Freeze, at)?;
    large.expect_whole(&stage)?;
    failover.expect_plausible()
}
