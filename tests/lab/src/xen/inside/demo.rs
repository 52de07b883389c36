//! `cargo lab xen demo`, in dom0: a Redis loses its domU in mid-conversation, and clients outside the domUs
//! notice nothing. The same report as the namespace demo's.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use super::guests::{Guests, client};
use super::stage::{self, ANSWERS, Stage};
use crate::client::pingpong::{PingPong, histogram};
use crate::client::redis::load::{Plan, Running};
use crate::client::redis::verify::verify;
use crate::demo::{Story, conclude, describe, print_table, prove};
use crate::host::{Fault, Service, domain_name, guest_addresses};
use crate::report::{Eviction, Report, Rtt};
use crate::xen::Kind;

/// What happens to whom.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Replicas of the OVM that fails
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=3))]
    pub(in crate::xen) replicas: u8,
    /// How the domUs are virtualised
    #[arg(long, value_enum, default_value = "pv")]
    pub(in crate::xen) guests: Kind,
    /// What happens to the OVM
    #[arg(long, value_enum, default_value_t = Fault::Freeze)]
    pub(in crate::xen) fault: Fault,
    /// Write the report to this file
    #[arg(long)]
    pub(in crate::xen) json: Option<PathBuf>,
}

/// Round trips measured per path; one takes some 10 ms here.
const SAMPLES: usize = 200;
const REDIS: [Service; 1] = [Service::Redis];

/// Plays it; the exit code tells whether everything was as promised.
pub(super) fn run(options: &Options) -> Result<ExitCode> {
    let replicas = usize::from(options.replicas);
    let guests = Guests { kind: options.guests, replicas, postgresql: false };
    let ovm = domain_name(1);
    let tell = Story::begin();

    tell.heading(&format!("{} domUs on Xen: {ovm} is the OVM, the others its replicas", replicas + 1));
    stage::forget()?;
    guests.prepare(&|line| tell.line(line))?;

    tell.heading("Round trips of a transaction: plain bridge, then through the PSC");
    let rtt = measure(guests, &tell)?;
    print_table(&rtt);

    tell.heading("What dom0d, started by its unit, discovered");
    let stage = fresh(guests, replicas)?;
    for line in stage.operator.order(&["status"])?.lines() {
        tell.line(line);
    }

    tell.heading(&format!("12 connections, 8 of them writing; then {ovm}: {:?}", options.fault));
    let load = load(&stage, "demo")?;
    tell.line(&format!("{} answers so far; now the fault", load.answers()));
    let at = stage.fault(options.fault, &ovm)?;
    let observed = stage.failover(Service::Redis, options.fault, at)?;
    load.wait_answers(100, ANSWERS)?;
    tell.line(&format!("{} answers, and they go on", load.answers()));
    let outcome = load.finish()?;
    let failover = describe(&outcome, &observed, &tell)?;

    tell.heading("Proof");
    let verdict = verify(&client(), stage.psc(Service::Redis), &outcome)?;
    let seen = prove(&outcome, &verdict, &stage.ovm(Service::Redis)?, &tell);
    let plane = stage.operator.service(Service::Redis.name())?.plane;
    drop(stage);

    let last = domain_name(replicas + 1);
    tell.heading(&format!("All anew; then {last}, a replica, is evicted under load"));
    stage::forget()?;
    guests.prepare(&|line| tell.line(line))?;
    let eviction = evict(&fresh(guests, replicas)?, &last)?;
    tell.line(&format!(
        "evicted; the packet path was held up for {:.3} us, {} client errors",
        eviction.packet_path_us, eviction.client_errors
    ));

    let report = Report {
        plane,
        replicas,
        client: seen,
        failover,
        rtt,
        eviction,
        pinning: "not pinned: an emulated machine, on which only ratios mean anything".to_owned(),
    };
    if let Some(path) = &options.json {
        report.write(path)?;
    }
    conclude(&report, !verdict.wrong.is_empty(), &tell)
}

/// dom0d on guests that are all alike, with that many replicas, each promotable.
fn fresh(guests: Guests, replicas: usize) -> Result<Stage> {
    let stage = Stage::start(guests, stage::config(replicas, &REDIS))?;
    stage.operator.wait_ready(&stage.config)?;
    Ok(stage)
}

fn load(stage: &Stage, prefix: &str) -> Result<Running> {
    let mut plan = Plan::new(stage.psc(Service::Redis), prefix);
    plan.connections = 12;
    plan.busy = 8;
    plan.pace = Some(Duration::from_millis(50));
    let load = plan.start(&client())?;
    load.wait_answers(100, ANSWERS)?;
    Ok(load)
}

/// Without dom0d, without a replica, and with all of them. Leaves no dom0d, and guests that are alike.
fn measure(guests: Guests, tell: &Story) -> Result<Vec<Rtt>> {
    let direct = SocketAddr::new(guest_addresses(1, false)[0], Service::Redis.port());
    let (plain, _) = sample(direct)?;
    tell.line("plain bridge measured");
    let mut rows = Vec::new();
    for replicas in [0, guests.replicas] {
        guests.prepare(&|_| ())?;
        let stage = fresh(guests, replicas)?;
        let (p50_us, p99_us) = sample(stage.psc(Service::Redis))?;
        tell.line(&format!("{replicas} replicas measured"));
        rows.push(Rtt {
            replicas,
            samples: SAMPLES as u64,
            p50_us,
            p99_us,
            ratio_to_plain_p50: p50_us / plain,
            plain_p50_us: plain,
        });
        drop(stage);
        stage::forget()?;
    }
    guests.prepare(&|_| ())?;
    Ok(rows)
}

/// Median and 99th percentile of a transaction's round trip, in microseconds.
fn sample(target: SocketAddr) -> Result<(f64, f64)> {
    client().run(move || {
        let (mut warm, mut times) = (histogram()?, histogram()?);
        let mut connection = PingPong::connect(target, "rtt")?;
        connection.transactions(SAMPLES / 10, &mut warm)?;
        connection.transactions(SAMPLES, &mut times)?;
        let us = |quantile| times.value_at_quantile(quantile) as f64 / 1_000.0;
        Ok((us(0.5), us(0.99)))
    })
}

/// A replica freezes while clients write.
fn evict(stage: &Stage, replica: &str) -> Result<Eviction> {
    let load = load(stage, "evict")?;
    let at = stage.fault(Fault::Freeze, replica)?;
    stage.events.wait("evicted", Service::Redis.name(), at.monotonic_ns / 1_000, ANSWERS)?;
    load.wait_answers(100, ANSWERS)?;
    let outcome = load.finish()?;
    let verdict = verify(&client(), stage.psc(Service::Redis), &outcome)?;
    let service = stage.operator.service(Service::Redis.name())?;
    let took_ns = service
        .plane_counters
        .get("eviction_last_ns")
        .context("dom0d does not tell how long the eviction took (plane counter eviction_last_ns)")?;
    Ok(Eviction {
        packet_path_us: *took_ns as f64 / 1_000.0,
        client_errors: outcome.troubles() + verdict.lost_writes,
    })
}
