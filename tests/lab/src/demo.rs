//! `cargo lab demo`: a real Redis loses its machine in mid-conversation, and its clients notice nothing.

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::bench::path::Path;
use crate::bench::rtt::{self, Effort, Series};
use crate::client::redis::load::{Outcome, Plan};
use crate::client::redis::verify::Verdict;
use crate::host::{Fault, Lab, LabConfig, Service, instance_name};
use crate::report::{Client, Eviction, Failover, Report, Rtt};
use crate::stage::failover::Failover as Observed;
use crate::stage::pinning::{Pinning, release_host};
use crate::stage::repair::repair;
use crate::stage::{Stage, with_replicas};

/// How `cargo lab demo` is called.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Replicas of the OVM that fails
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=3))]
    replicas: u8,
    /// What happens to the OVM
    #[arg(long, value_enum, default_value_t = Fault::Freeze)]
    fault: Fault,
    /// Write the report to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Longer than the whole demo takes: a demo that needs longer hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(1_800);

/// Degradation of the round trip in the paper (section V.A) with 1, 2 and 3 replicas, in percent;
/// the absolute times of its Table II are not readable in the copies there are.
const PAPER: [(usize, &str); 3] = [(1, "+81.16 %"), (2, "+80.64 %"), (3, "+82.92 %")];

/// Plays the demo; the exit code tells whether everything was as promised.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let replicas = usize::from(options.replicas);
    let tell = Story::begin();

    tell.heading("A dom0, a client, an OVM and three replicas, each a network namespace");
    let plan = LabConfig { replicas: 3, services: vec![Service::Redis], ..LabConfig::new(instance_name()?) };
    let lab = Lab::up(plan, &|line| tell.line(line))?;

    tell.heading("Round trips of a transaction: plain bridge, then through the PSC");
    let pinning = Pinning::choose();
    tell.line(&pinning.describe());
    let effort = Effort { rounds: 2, samples: 500 };
    let paths: Vec<Path> = std::iter::once(Path::Plain).chain(Path::with_up_to(None, 3)).collect();
    let series = rtt::measure(&lab, pinning, &paths, effort, |round, series| {
        tell.line(&format!("round {}: {} measured", round + 1, series.path.name()));
    })?;
    for domain in lab.domains()? {
        release_host(&domain.host)?;
    }
    let rtt = table(&series)?;
    print_table(&rtt);

    tell.heading("What dom0d discovered");
    let config = with_replicas(&lab.default_config(), replicas);
    let mut stage = Stage::take_identical(lab, &config)?;
    for line in stage.operator.order(&["status"])?.lines() {
        tell.line(line);
    }

    tell.heading(&format!("40 connections, 20 of them writing; then guest-1: {}", name_of(options.fault)));
    let (outcome, observed) = fail_over(&stage, options.fault, &tell)?;
    let failover = describe(&outcome, &observed, &tell)?;

    tell.heading("Proof");
    let ovm = stage.ovm(Service::Redis)?;
    let verdict = stage.verify(&ovm, &outcome)?;
    let client = prove(&outcome, &verdict, &ovm.name, &tell);

    tell.heading("guest-1 is brought in line and attached again; then it is evicted under load");
    let eviction = evict(&stage, &config, options.fault, &ovm.name, &tell)?;
    tell.line(&format!(
        "evicted; the packet path was held up for {:.3} us (the paper: 3.526 us), {} client errors",
        eviction.packet_path_us, eviction.client_errors
    ));

    let report = Report {
        plane: stage.operator.service(Service::Redis.name())?.plane,
        replicas,
        client,
        failover,
        rtt,
        eviction,
        pinning: pinning.describe(),
    };
    if let Some(path) = &options.json {
        report.write(path)?;
    }

    tell.heading("Taking everything down");
    stage.stop_dom0d()?;
    let Stage { lab, .. } = stage;
    lab.down()?;
    conclude(&report, !verdict.wrong.is_empty(), &tell)
}

/// Shows the failover as it was measured, and what clients felt of it.
pub(crate) fn describe(outcome: &Outcome, observed: &Observed, tell: &Story) -> Result<Failover> {
    let first_byte_us =
        observed.first_byte_us(outcome).context("no client read anything after the cutover")?;
    print_timeline(observed, first_byte_us);
    let stalls = outcome.stalls_ns(observed.fault_us * 1_000, observed.cut_over_us * 1_000);
    let longest_stall_us = stalls.iter().max().copied().unwrap_or_default() / 1_000;
    tell.line(&format!(
        "{} connections were waiting for an answer then; the last of them read on after {longest_stall_us} us",
        stalls.len()
    ));
    Ok(Failover {
        fault: observed.fault,
        detected_by: observed.detected_by.clone(),
        fault_to_detection_us: observed.suspected_us.saturating_sub(observed.fault_us),
        detection_to_cutover_us: observed.cut_over_us.saturating_sub(observed.suspected_us),
        fault_to_first_byte_us: first_byte_us.saturating_sub(observed.fault_us),
        longest_stall_us,
        fault_to_fenced_us: observed.fenced_us.map(|at| at.saturating_sub(observed.fault_us)),
        fault_to_recuperated_us: observed.recuperated_us.saturating_sub(observed.fault_us),
        conversations: observed.conversations,
        recuperated: observed.recuperated,
        reset: observed.reset,
    })
}

/// Shows what the clients saw, and which of their acknowledged writes `ovm` holds.
pub(crate) fn prove(outcome: &Outcome, verdict: &Verdict, ovm: &str, tell: &Story) -> Client {
    let client = Client {
        connections: outcome.ledgers.len(),
        requests: outcome.requests,
        errors: outcome.closed + outcome.wrong_answers + outcome.unanswered,
        resets: outcome.resets,
        reconnects: outcome.reconnects,
        acknowledged_writes: outcome.acknowledged_writes,
        lost_writes: verdict.lost_writes,
    };
    tell.line(&format!(
        "{} connections stayed open: {} resets, {} reconnects, {} errors",
        client.connections, client.resets, client.reconnects, client.errors
    ));
    tell.line(&format!("{} requests, each answered byte for byte as one server would have", client.requests));
    tell.line(&format!(
        "{} acknowledged writes, {} of them missing in {ovm}",
        client.acknowledged_writes, client.lost_writes
    ));
    for error in outcome.errors.iter().chain(&verdict.wrong) {
        tell.line(error);
    }
    client
}

/// Writes over open connections, the fault in the middle, and everything until the last answer.
fn fail_over(stage: &Stage, fault: Fault, tell: &Story) -> Result<(Outcome, Observed)> {
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "demo");
    plan.connections = 40;
    plan.busy = 20;
    plan.pace = Some(Duration::from_millis(5));
    let load = plan.start(&stage.client())?;
    load.wait_answers(2_000, Duration::from_secs(20))?;
    tell.line(&format!("{} answers so far; now the fault", load.answers()));
    let at = stage.lab.fault(fault, "guest-1")?;
    let observed = Observed::observe(stage, Service::Redis, fault, at)?;
    load.wait_answers(2_000, Duration::from_secs(20))?;
    sleep(Duration::from_millis(500));
    tell.line(&format!("{} answers, and they go on", load.answers()));
    Ok((load.finish()?, observed))
}

/// Brings the deposed domain back as a replica, and freezes it while clients write.
fn evict(stage: &Stage, config: &str, fault: Fault, ovm: &str, tell: &Story) -> Result<Eviction> {
    repair(&stage.lab, fault, "guest-1")?;
    stage.lab.copy_state(ovm, "guest-1")?;
    stage.operator.seed_all(config)?;
    tell.line("guest-1 is a replica that can be promoted again");

    let mut plan = Plan::new(stage.psc(Service::Redis)?, "evict");
    plan.connections = 40;
    plan.busy = 20;
    plan.pace = Some(Duration::from_millis(5));
    let load = plan.start(&stage.client())?;
    load.wait_answers(1_000, Duration::from_secs(20))?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let from_us = at.monotonic_ns / 1_000;
    stage.events.wait("evicted", "redis", from_us, Duration::from_secs(10))?;
    load.wait_answers(1_000, Duration::from_secs(20))?;
    let outcome = load.finish()?;
    let verdict = stage.verify(&stage.ovm(Service::Redis)?, &outcome)?;
    for error in outcome.errors.iter().chain(&verdict.wrong) {
        tell.line(error);
    }
    let service = stage.operator.service("redis")?;
    let took_ns = service
        .plane_counters
        .get("eviction_last_ns")
        .context("dom0d does not tell how long the eviction took (plane counter eviction_last_ns)")?;
    Ok(Eviction {
        packet_path_us: *took_ns as f64 / 1_000.0,
        client_errors: outcome.troubles() + verdict.lost_writes,
    })
}

fn table(series: &[Series]) -> Result<Vec<Rtt>> {
    let us = |ns: u64| ns as f64 / 1_000.0;
    let plain = series.iter().find(|s| s.path == Path::Plain).context("the plain path was not measured")?;
    let plain_p50 = us(plain.transactions.value_at_quantile(0.5));
    Ok(series
        .iter()
        .filter(|s| s.path != Path::Plain)
        .map(|s| {
            let p50 = us(s.transactions.value_at_quantile(0.5));
            Rtt {
                replicas: s.path.replicas(),
                samples: s.transactions.len(),
                p50_us: p50,
                p99_us: us(s.transactions.value_at_quantile(0.99)),
                ratio_to_plain_p50: p50 / plain_p50,
                plain_p50_us: plain_p50,
            }
        })
        .collect())
}

pub(crate) fn print_table(rtt: &[Rtt]) {
    println!();
    println!("  replicas    p50        p99        against plain p50   against 0 replicas   paper (Table II)");
    let none = rtt.first().map_or(f64::NAN, |row| row.p50_us);
    if let Some(row) = rtt.first() {
        println!("  plain    {:>7.1} us", row.plain_p50_us);
    }
    for row in rtt {
        let paper = PAPER
            .iter()
            .find(|(replicas, _)| *replicas == row.replicas)
            .map_or("", |(_, degradation)| degradation);
        println!(
            "  {:<8} {:>7.1} us {:>7.1} us {:>13.2} times {:>+17.1} %  {:>16}",
            row.replicas,
            row.p50_us,
            row.p99_us,
            row.ratio_to_plain_p50,
            (row.p50_us / none - 1.0) * 100.0,
            paper
        );
    }
    println!();
}

fn print_timeline(observed: &Observed, first_byte_us: u64) {
    let mut moments = vec![
        (observed.fault_us, "fault".to_owned()),
        (observed.suspected_us, format!("suspected: {}", observed.detected_by)),
        (observed.cut_over_us, format!("cut over to {}, epoch {}", observed.to, observed.epoch)),
        (first_byte_us, "first byte to a client".to_owned()),
        (
            observed.recuperated_us,
            format!("recuperated: {} conversations, {} reset", observed.recuperated, observed.reset),
        ),
    ];
    if let Some(fenced_us) = observed.fenced_us {
        moments.push((fenced_us, "fenced".to_owned()));
    }
    // Stable: what happened in one microsecond stays in the order of cause and effect.
    moments.sort_by_key(|(at, _)| *at);
    println!();
    for (at, what) in moments {
        println!("  {:>10} us  {what}", at.saturating_sub(observed.fault_us));
    }
    println!("  (the paper, Table IV: about 5,000 us from detection to the new OVM)");
}

/// Says whether everything was as promised.
pub(crate) fn conclude(report: &Report, wrong: bool, tell: &Story) -> Result<ExitCode> {
    let client = &report.client;
    let failover = &report.failover;
    let broken = [
        (client.resets > 0, "connections were reset"),
        (client.reconnects > 0, "connections were opened again"),
        (client.errors > 0, "clients saw errors"),
        (client.lost_writes > 0, "acknowledged writes were lost"),
        (wrong, "the promoted server holds something else than was acknowledged"),
        (failover.reset > 0, "conversations were reset"),
        (failover.recuperated != failover.conversations, "not every conversation recuperated"),
        (
            failover.conversations < client.connections as u64,
            "not every connection was a protected conversation",
        ),
        (report.eviction.client_errors > 0, "clients noticed the eviction"),
    ];
    let broken: Vec<_> = broken.iter().filter(|(is, _)| *is).map(|(_, what)| *what).collect();
    tell.heading(&format!("Done in {:.0} s", tell.begun.elapsed().as_secs_f64()));
    if broken.is_empty() {
        tell.line("No connection broke, nothing acknowledged was lost, every answer was right.");
        return Ok(ExitCode::SUCCESS);
    }
    for what in broken {
        tell.line(&format!("BROKEN PROMISE: {what}"));
    }
    Ok(ExitCode::FAILURE)
}

fn name_of(fault: Fault) -> String {
    format!("{fault:?}").to_lowercase()
}

/// Prints with the time since the beginning.
pub(crate) struct Story {
    begun: Instant,
}

impl Story {
    pub(crate) fn begin() -> Self {
        Self { begun: Instant::now() }
    }

    pub(crate) fn heading(&self, text: &str) {
        println!("\n[{:5.1} s] {text}", self.begun.elapsed().as_secs_f64());
    }

    pub(crate) fn line(&self, text: &str) {
        println!("          {text}");
    }
}
