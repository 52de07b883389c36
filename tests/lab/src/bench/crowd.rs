//! What the number of open conversations costs: memory, round trips, and the cutover.

use std::fs;
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::failover::{Spread, redis_only};
use super::rtt::hang_up;
use crate::client::pingpong::{PingPong, histogram};
use crate::client::redis::load::{Outcome, Plan};
use crate::host::{Fault, Lab, Service};
use crate::stage::failover::Failover;
use crate::stage::pinning::{Pinning, pin_host, pin_process, release_host};
use crate::stage::repair::repair;
use crate::stage::{Stage, unhurried};

const CROWDS: [usize; 4] = [1, 1_000, 10_000, 50_000];

/// How long idle conversations need to fall asleep, and how many do in a second.
const CALM: Duration = Duration::from_secs(3);
const CALMED_PER_SECOND: usize = 5_000;

/// A process may not open more files than some 20,000 on many machines, so 50,000 connections are spread over as many
/// Redis servers as they need in each domU, and over as many threads with files of their own.
const PORTS: [u16; 4] = [6379, 6380, 6381, 6382];
const CONNECTIONS_PER_PORT: usize = 15_000;

/// How long the last answers may take. Thousands of connections that ask at once are more than two cores can serve: some
/// lose a dozen segments in a row, and wait for 12 s before they retransmit.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the end of all conversations may take.
const QUIET: Duration = Duration::from_secs(60);

/// The daemon's memory for idle conversations.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Memory {
    pub(crate) conversations: u64,
    pub(crate) replicas: usize,
    /// The daemon's own memory and the kernel's maps, before and with them; not the journal.
    pub(crate) without_bytes: u64,
    pub(crate) with_bytes: u64,
    pub(crate) bytes_per_conversation: f64,
    /// Of that, recorded bytes that some server still lacks.
    pub(crate) retained_bytes: u64,
}

/// Times while this number of conversations is open, in microseconds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cost {
    pub(crate) conversations: usize,
    pub(crate) replicas: usize,
    pub(crate) ping_samples: u64,
    pub(crate) ping_p50_us: f64,
    pub(crate) ping_p99_us: f64,
    pub(crate) detection_to_cutover_us: Spread,
    pub(crate) fault_to_first_byte_us: Spread,
    pub(crate) fault_to_recuperated_us: Spread,
    pub(crate) client_errors: u64,
}

pub(crate) fn measure(lab: &Lab, pinning: Pinning, quick: bool) -> Result<(Vec<Memory>, Vec<Cost>)> {
    let _more = more_servers(lab)?;
    let mut memory = Vec::new();
    let mut costs = Vec::new();
    for crowd in CROWDS {
        let samples = match (quick, crowd) {
            (true, _) => 1,
            (false, 50_000..) => 2,
            (false, 10_000..) => 5,
            (false, _) => 10,
        };
        costs.push(
            cost(lab, pinning, crowd, samples, quick, &mut memory)
                .with_context(|| format!("with {crowd} conversations"))?,
        );
    }
    Ok((memory, costs))
}

fn cost(
    lab: &Lab,
    pinning: Pinning,
    crowd: usize,
    samples: usize,
    quick: bool,
    memory: &mut Vec<Memory>,
) -> Result<Cost> {
    let mut pings = histogram()?;
    let (mut cutover, mut first_byte, mut recuperated) = (Vec::new(), Vec::new(), Vec::new());
    let mut client_errors = 0;
    hang_up(&lab.domains()?)?;
    empty(lab)?;
    let ports = &PORTS[..crowd.div_ceil(CONNECTIONS_PER_PORT)];
    let config = format!(
        "{}\n[service.limits]\npromotions = 1000000\n",
        unhurried(&redis_only(&lab.default_config()))
            .replace("ports = [6379]", &format!("ports = {ports:?}"))
    );
    let mut stage = Stage::take_identical(Lab::find(&lab.config().name)?, &config)?;
    let pid = stage.dom0d.as_ref().map(|dom0d| dom0d.pid()).unwrap_or_default();
    for sample in 0..samples {
        let target = stage.psc(Service::Redis)?;
        let without = footprint(pid)?;
        let mut idle = Vec::new();
        for &port in ports.iter().skip(1) {
            let mut plan = Plan::new(SocketAddr::new(target.ip(), port), &format!("crowd-{port}"));
            plan.connections = crowd / ports.len();
            plan.busy = 0;
            plan.patience = PATIENCE;
            idle.push(plan.start(&stage.client())?);
        }
        let mut plan = Plan::new(target, "crowd");
        plan.connections = crowd - idle.len() * (crowd / ports.len());
        plan.busy = crowd.min(8);
        plan.patience = PATIENCE;
        let load = plan.start(&stage.client())?;
        load.hold(Duration::from_secs(20))?;
        caught_up(&stage)?;
        if sample == 0 && crowd > 1 {
            sleep(CALM + Duration::from_secs((crowd / CALMED_PER_SECOND) as u64));
        }
        if sample == 0 && crowd > 1 {
            let service = stage.operator.service(Service::Redis.name())?;
            let with = footprint(pid)?;
            memory.push(Memory {
                conversations: service.conversations,
                replicas: service.servers.len().saturating_sub(1),
                without_bytes: without,
                with_bytes: with,
                bytes_per_conversation: with.saturating_sub(without) as f64 / crowd as f64,
                retained_bytes: service.retained_bytes,
            });
        }
        if sample == 0 {
            for domain in stage.lab.domains()? {
                let cpu = if domain.name == stage.ovm(Service::Redis)?.name {
                    pinning.client_and_ovm
                } else {
                    pinning.dom0d_and_rvms
                };
                pin_host(&domain.host, cpu)?;
            }
            pin_process(pid, pinning.dom0d_and_rvms)?;
            let rounds = if quick { 200 } else { 2_000 };
            let place = stage.client().pinned(Some(pinning.client_and_ovm));
            let times = place.run(move || {
                let (mut warm, mut times) = (histogram()?, histogram()?);
                let mut connection = PingPong::connect(target, "ping")?;
                connection.pings(rounds / 10, &mut warm)?;
                connection.pings(rounds, &mut times)?;
                Ok(times)
            })?;
            pings.add(&times)?;
            for domain in stage.lab.domains()? {
                release_host(&domain.host)?;
            }
        }
        load.go_on();
        load.wait_answers(200, Duration::from_secs(20))?;
        let ovm = stage.ovm(Service::Redis)?;
        let at = stage.lab.fault(Fault::Freeze, &ovm.name)?;
        let observed = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
        load.wait_answers(200, Duration::from_secs(20))?;
        let outcome = load.finish()?;
        let first = observed.first_byte_us(&outcome).context("no client read anything after the cutover")?;
        cutover.push(observed.cut_over_us.saturating_sub(observed.suspected_us));
        first_byte.push(first.saturating_sub(observed.fault_us));
        recuperated.push(observed.recuperated_us.saturating_sub(observed.fault_us));
        let mut troubles = observed.reset + complain(&outcome);
        for load in idle {
            troubles += complain(&load.finish()?);
        }
        client_errors += troubles;
        repair(lab, Fault::Freeze, &ovm.name)?;
        hang_up(&[ovm])?;
        quiet(&stage)?;
        empty(lab)?;
        stage.operator.seed_all(&config)?;
    }
    // However busy it was.
    let unattended = stage.operator.service(Service::Redis.name())?.plane_counters.get("unattended").copied();
    ensure!(unattended.unwrap_or(0) == 0, "{unattended:?} segments passed because dom0d seemed to be away");
    stage.stop_dom0d()?;
    Ok(Cost {
        conversations: crowd,
        replicas: lab.config().replicas,
        ping_samples: pings.len(),
        ping_p50_us: pings.value_at_quantile(0.5) as f64 / 1_000.0,
        ping_p99_us: pings.value_at_quantile(0.99) as f64 / 1_000.0,
        detection_to_cutover_us: Spread::of(&cutover),
        fault_to_first_byte_us: Spread::of(&first_byte),
        fault_to_recuperated_us: Spread::of(&recuperated),
        client_errors,
    })
}

/// More Redis servers in each domU, at the other ports.
fn more_servers(lab: &Lab) -> Result<Vec<Children>> {
    lab.domains()?
        .iter()
        .map(|domain| {
            let mut children = Children::default();
            for port in &PORTS[1..] {
                let mut server = domain.command("redis-server");
                server.args(["--port", &port.to_string(), "--bind", "*", "-::*", "--protected-mode", "no"]);
                server.args(["--save", "", "--maxclients", "60000", "--tcp-backlog", "4096", "--dir"]);
                server.arg(&domain.data).stdout(Stdio::null());
                children.0.push(domain.spawn(&mut server)?);
            }
            Ok(children)
        })
        .collect()
}

/// How many clients were hurt, after saying how.
fn complain(outcome: &Outcome) -> u64 {
    for error in &outcome.errors {
        eprintln!("  a client's error: {error}");
    }
    outcome.troubles()
}

/// Makes every server's state the same again.
fn empty(lab: &Lab) -> Result<()> {
    for domain in lab.domains()? {
        for port in PORTS {
            domain.run(&["redis-cli", "-p", &port.to_string(), "FLUSHALL"])?;
        }
    }
    Ok(())
}

/// Processes that end with this value.
#[derive(Default)]
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // They may have ended already, with their domU.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until every connection is closed and every replica has carried out its requests: a request that is carried out after
/// the servers were emptied would make its state differ from the OVM's.
fn quiet(stage: &Stage) -> Result<()> {
    stage.operator.until("all conversations are closed", QUIET, |status| {
        status.services.iter().all(|service| service.conversations == 0)
    })?;
    caught_up(stage)
}

/// Waits until every replica has followed: the time for opening thousands of connections on four servers at once is not
/// measured.
fn caught_up(stage: &Stage) -> Result<()> {
    let have_followed = |status: &understudy_api::Status| {
        let servers = status.services.iter().flat_map(|service| &service.servers);
        servers.map(|server| server.behind_bytes).sum::<u64>() == 0
    };
    stage.operator.until("every replica has caught up", QUIET, have_followed)
}

/// A process's anonymous memory, and that of its BPF maps, in bytes.
fn footprint(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib: u64 = line.context("no RssAnon")?.trim().trim_end_matches(" kB").parse()?;
    let mut bytes = kib * 1_024;
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor that was closed meanwhile does not count.
        let about = fs::read_to_string(entry?.path()).unwrap_or_default();
        if about.contains("map_type:") {
            let line = about.lines().find_map(|line| line.strip_prefix("memlock:"));
            bytes += line.context("a BPF map that does not tell its memory")?.trim().parse::<u64>()?;
        }
    }
    Ok(bytes)
}

pub(crate) fn print(memory: &[Memory], costs: &[Cost]) {
    println!("  conversations  replicas  bytes each");
    for row in memory {
        println!("  {:>13} {:>9} {:>11.0}", row.conversations, row.replicas, row.bytes_per_conversation);
    }
    println!(
        "  conversations  ping p50 us  p99 us   cutover p50/max us  first byte p50/max us  recuperated p50/max us  errors"
    );
    for row in costs {
        println!(
            "  {:>13} {:>12.1} {:>7.1} {:>20} {:>22} {:>23} {:>7}",
            row.conversations,
            row.ping_p50_us,
            row.ping_p99_us,
            format!("{}/{}", row.detection_to_cutover_us.p50, row.detection_to_cutover_us.max),
            format!("{}/{}", row.fault_to_first_byte_us.p50, row.fault_to_first_byte_us.max),
            format!("{}/{}", row.fault_to_recuperated_us.p50, row.fault_to_recuperated_us.max),
            row.client_errors
        );
    }
}
