//! `cargo lab bench`: what Understudy costs and how quickly it acts, against a plain bridge and HAProxy in the
//! same run.

mod crowd;
mod eviction;
mod failover;
mod machine;
pub(crate) mod path;
mod proxy;
pub(crate) mod rtt;
mod summary;
mod throughput;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::host::{Lab, LabConfig, Plane, Service, instance_name};
use crate::stage::pinning::{Pinning, release_host};
use path::Path;

/// How `cargo lab bench` is called.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Write the report to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Far fewer samples: to see that everything works, not for numbers
    #[arg(long)]
    quick: bool,
    /// Measure only these parts
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
}

/// What can be measured by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    Rtt,
    Throughput,
    Failover,
    Proxy,
    Eviction,
    Crowd,
}

/// More than a whole run takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(3_600);

/// Everything measured; a part that was not asked for is empty.
#[derive(Debug, Default, Serialize)]
struct Report {
    machine: machine::Machine,
    pinning: String,
    quick: bool,
    rtt: Vec<summary::Rtt>,
    throughput: Vec<throughput::Row>,
    throughput_over_1_gbit_per_s: Vec<throughput::Row>,
    failover: Vec<failover::Row>,
    proxy: Vec<proxy::Row>,
    keepalived_ipvs: String,
    eviction: Vec<eviction::Row>,
    memory: Vec<crowd::Memory>,
    conversations: Vec<crowd::Cost>,
    took_s: f64,
}

/// Measures what was asked for, prints tables and writes the report.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let begun = Instant::now();
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let pinning = Pinning::choose();
    let mut report = Report {
        machine: machine::Machine::read(),
        pinning: pinning.describe(),
        quick: options.quick,
        ..Report::default()
    };
    println!("{}", report.machine);
    println!("pinned while something is measured: {}", report.pinning);

    let plan = LabConfig {
        replicas: 3,
        services: vec![Service::Redis, Service::Http],
        ..LabConfig::new(instance_name()?)
    };
    let lab = Lab::up(plan, &|line| println!("  {line}"))?;
    // Thousands of connections a minute, each one's port in TIME-WAIT for as long.
    lab.client().run(&["sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535"])?;

    proxy::install()?;
    let planes = Plane::chosen().map_or(vec![Plane::Pcap, Plane::Bpf], |plane| vec![plane]);
    let mut paths = vec![Path::Plain, Path::PlainTwice, Path::Proxy];
    paths.extend(planes.iter().flat_map(|&plane| Path::with_up_to(Some(plane), 3)));
    if wanted(Part::Rtt) {
        println!(
            "\nRound trips in us, 64-byte PING and transaction, against the plain bridge (the paper: 1.81 to 1.88 times with\n\
             1 to 3 replicas; to reach: p50 1.05 times or 1 us more, p99 1.20 times)"
        );
        let effort = rtt::Effort {
            rounds: if options.quick { 1 } else { 6 },
            samples: if options.quick { 200 } else { 2_000 },
        };
        let series = rtt::measure(&lab, pinning, &paths, effort, |_, _| {})?;
        report.rtt = summary::rtt(&series)?;
        summary::print_rtt(&report.rtt);
    }
    if wanted(Part::Throughput) {
        let rounds = if options.quick { 1 } else { 3 };
        println!(
            "\nThroughput of one 300 MB transfer, against the plain bridge and, with 1 replica, the fair limit (plain,\n\
             with a second transfer meanwhile; to reach: 80 % of it)"
        );
        report.throughput = throughput::measure(&lab, pinning, &paths, rounds)?;
        throughput::print(&report.throughput);
        println!("\nThe same over a link of 1 Gbit/s (to reach: 99 % of plain)");
        let one = planes.iter().map(|&plane| Path::Replicated { plane: Some(plane), replicas: 1 });
        let over_link: Vec<_> = std::iter::once(Path::Plain).chain(one).collect();
        report.throughput_over_1_gbit_per_s =
            wire::limited(&lab, || throughput::measure(&lab, pinning, &over_link, rounds))?;
        throughput::print(&report.throughput_over_1_gbit_per_s);
    }
    for domain in lab.domains()? {
        release_host(&domain.host)?;
    }
    if wanted(Part::Eviction) {
        println!("\nEviction of an RVM, time on the packet path (the paper: 3.526 us)");
        report.eviction = eviction::measure(&lab, if options.quick { 5 } else { 30 })?;
        eviction::print(&report.eviction);
    }
    // Before the crowds: a dom0d with fewer replicas may not know whom those leave as OVM.
    if wanted(Part::Failover) {
        println!(
            "\nFailover from the fault itself (the paper's Table IV: about 5 ms, detection excluded; to reach: first byte p50 2 ms,\n\
             p99 10 ms, or for kill, spin and hang their limit of 20 or 250 ms + 2 ms; detection to cutover 0.5 ms)"
        );
        report.failover = failover::measure(&lab, if options.quick { 3 } else { 30 })?;
        failover::print(&report.failover);
    }
    if wanted(Part::Proxy) {
        println!("\nWhat happens to open connections behind HAProxy instead");
        report.proxy = proxy::measure(&lab, if options.quick { 1 } else { 10 })?;
        proxy::print(&report.proxy);
        report.keepalived_ipvs = proxy::ipvs().to_owned();
        println!("  KEEPALIVED/IPVS: {}", report.keepalived_ipvs);
    }
    if wanted(Part::Crowd) {
        println!(
            "\nCost against the number of conversations, 3 replicas (to reach: 1,024 bytes each, detection to cutover 500 us)"
        );
        let (memory, cost) = crowd::measure(&lab, pinning, options.quick)?;
        (report.memory, report.conversations) = (memory, cost);
        crowd::print(&report.memory, &report.conversations);
    }
    lab.down()?;
    report.took_s = begun.elapsed().as_secs_f64();
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("\nmeasured in {:.0} s", report.took_s);
    Ok(ExitCode::SUCCESS)
}
