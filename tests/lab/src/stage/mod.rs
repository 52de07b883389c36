//! A lab with dom0d running, on which demo, stories and benchmarks are played.

pub(crate) mod failover;
pub(crate) mod logs;
pub(crate) mod operator;
pub(crate) mod pinning;
pub(crate) mod repair;

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::client::place::Place;
use crate::client::redis::load::{Outcome, Plan, Running};
use crate::client::redis::verify::{Verdict, verify};
use crate::host::{Daemon, Domain, Fault, FaultInstant, Lab, LabConfig, Plane, Service};
use failover::Failover;
use logs::Logs;
use operator::{Events, Operator};

/// Until a load has had its answers, on a busy machine.
const ANSWERS: Duration = Duration::from_secs(20);

/// A lab, its dom0d, and the operator's view of it.
#[derive(Debug)]
pub(crate) struct Stage {
    // First, so that logs are kept before what wrote them is removed.
    _logs: Logs,
    pub(crate) operator: Operator,
    pub(crate) events: Events,
    /// `None` while a scenario has taken it away.
    pub(crate) dom0d: Option<Daemon>,
    pub(crate) lab: Lab,
}

impl Stage {
    /// A fresh lab with this many replicas and these services, dom0d with the default configuration,
    /// and every replica promotable.
    pub(crate) fn up(name: &str, replicas: usize, services: &[Service]) -> Result<Self> {
        Self::up_with(Self::plan(name, replicas, services), |config| config)
    }

    /// What [`Stage::up`] builds, to be changed before [`Stage::up_with`].
    pub(crate) fn plan(name: &str, replicas: usize, services: &[Service]) -> LabConfig {
        LabConfig { replicas, services: services.to_vec(), build: false, ..LabConfig::new(name.to_owned()) }
    }

    /// The same with a configuration of dom0d that `edit` makes from the default one.
    pub(crate) fn up_with(plan: LabConfig, edit: impl Fn(String) -> String) -> Result<Self> {
        let lab = Lab::up(plan, &|line| println!("  {line}"))?;
        let config = edit(lab.default_config());
        Self::take(lab, &config)
    }

    /// Starts dom0d in a lab that is up, and waits until every replica of its configuration is
    /// promotable.
    pub(crate) fn take(lab: Lab, config: &str) -> Result<Self> {
        let stage = Self::take_unready(lab, config)?;
        stage.wait_ready(config)?;
        Ok(stage)
    }

    /// Starts dom0d in a lab that is up, and waits for nothing but its control socket.
    pub(crate) fn take_unready(lab: Lab, config: &str) -> Result<Self> {
        let logs = Logs::of(&lab);
        let dom0d = lab.start_dom0d(config)?;
        let operator = Operator::new(dom0d.control_socket())?;
        let events = operator.follow()?;
        Ok(Self { _logs: logs, operator, events, dom0d: Some(dom0d), lab })
    }

    /// Starts dom0d in a lab that is up, in which every server holds the same, and seeds every
    /// replica of its configuration.
    pub(crate) fn take_identical(lab: Lab, config: &str) -> Result<Self> {
        let stage = Self::take_unready(lab, config)?;
        stage.operator.seed_all(config)?;
        Ok(stage)
    }

    /// Tells dom0d to become the installed dom0d, and waits for that.
    pub(crate) fn hang_up(&mut self) -> Result<()> {
        self.events.end();
        let dom0d = self.dom0d.as_ref().context("no dom0d")?;
        let before = self.operator.status()?.uptime_ms;
        dom0d.signal(Signal::SIGHUP)?;
        let deadline = Instant::now() + ANSWERS;
        // Meanwhile nobody answers.
        while self.operator.status().map_or(true, |status| status.uptime_ms > before) {
            ensure!(Instant::now() < deadline, "no other dom0d answers within {ANSWERS:?} of the hangup");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.events = self.operator.follow()?;
        Ok(())
    }

    /// Stops dom0d properly, if it is still here.
    pub(crate) fn stop_dom0d(&mut self) -> Result<()> {
        self.events.end();
        self.dom0d.take().map_or(Ok(()), Daemon::stop)
    }

    /// See [`Operator::wait_ready`].
    pub(crate) fn wait_ready(&self, config: &str) -> Result<()> {
        self.operator.wait_ready(config)
    }

    /// See [`Operator::until`].
    pub(crate) fn until(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&understudy_api::Status) -> bool,
    ) -> Result<()> {
        self.operator.until(what, limit, wanted)
    }

    /// The client's network namespace.
    pub(crate) fn client(&self) -> Place {
        Place::new(self.lab.client().netns)
    }

    /// Where clients find a service, over IPv4.
    pub(crate) fn psc(&self, service: Service) -> Result<SocketAddr> {
        self.psc_of_family(service, false)
    }

    /// Where clients find a service, over IPv4 or IPv6.
    pub(crate) fn psc_of_family(&self, service: Service, ipv6: bool) -> Result<SocketAddr> {
        let report = self.operator.service(service.name())?;
        let address = report
            .psc
            .iter()
            .find(|address| address.is_ipv6() == ipv6)
            .context("the service has no PSC of this family")?;
        Ok(SocketAddr::new(*address, service.port()))
    }

    /// The PSC's MAC, to which raw frames are sent.
    pub(crate) fn psc_mac(&self, service: Service) -> Result<[u8; 6]> {
        parse_mac(&self.operator.service(service.name())?.psc_mac)
    }

    /// The domain that serves now.
    pub(crate) fn ovm(&self, service: Service) -> Result<Domain> {
        let report = self.operator.service(service.name())?;
        let domain = report
            .ovm()
            .and_then(|server| server.domain.as_ref())
            .with_context(|| format!("{} has no OVM", service.name()))?;
        self.lab.domain(&domain.name)
    }

    /// Strikes whoever serves, once a replica could take over. That need not be guest-1: where a busy machine made the
    /// OVM stall for longer than the service's limits, dom0d has moved the service, and the OVM follows again.
    pub(crate) fn strike(&self, service: Service, fault: Fault) -> Result<FaultInstant> {
        self.until("a replica could take over", ANSWERS, |status| {
            status.services.iter().any(|known| known.name == service.name() && known.promotable() > 0)
        })?;
        self.lab.fault(fault, &self.ovm(service)?.name)
    }

    /// Redis clients that write all the time, some of which were answered already.
    pub(crate) fn load(&self, prefix: &str) -> Result<Running> {
        let load = Plan::new(self.psc(Service::Redis)?, prefix).start(&self.client())?;
        load.wait_answers(300, ANSWERS)?;
        Ok(load)
    }

    /// `guest-1`, which serves, freezes under a load, whose clients notice nothing.
    pub(crate) fn survives_freeze(&self, load: Running) -> Result<()> {
        let at = self.lab.fault(Fault::Freeze, "guest-1")?;
        let failover = Failover::observe(self, Service::Redis, Fault::Freeze, at)?;
        load.wait_answers(300, ANSWERS)?;
        self.expect_unharmed(&load.finish()?)?;
        failover.expect_plausible()
    }

    /// Compares what a domain's Redis holds with what a load was told.
    pub(crate) fn verify(&self, domain: &Domain, outcome: &Outcome) -> Result<Verdict> {
        let (place, address) = own_address(domain, Service::Redis)?;
        verify(&place, address, outcome)
    }

    /// No client noticed anything, and the domain that serves now holds every acknowledged write.
    pub(crate) fn expect_unharmed(&self, outcome: &Outcome) -> Result<()> {
        let ovm = self.ovm(Service::Redis)?;
        expect_unharmed(outcome, &ovm.name, || self.verify(&ovm, outcome))
    }
}

/// No client noticed anything, and the domain `ovm` holds every acknowledged write.
pub(crate) fn expect_unharmed(
    outcome: &Outcome,
    ovm: &str,
    verify: impl FnOnce() -> Result<Verdict>,
) -> Result<()> {
    ensure!(
        outcome.troubles() == 0,
        "clients noticed: {} resets, {} closed, {} wrong answers, {} unanswered, {} reconnects: {:#?}",
        outcome.resets,
        outcome.closed,
        outcome.wrong_answers,
        outcome.unanswered,
        outcome.reconnects,
        outcome.errors
    );
    let verdict = verify()?;
    ensure!(
        verdict.wrong.is_empty(),
        "{ovm} holds something else than was acknowledged, {} writes lost: {:#?}",
        verdict.lost_writes,
        verdict.wrong
    );
    println!(
        "  {} requests, {} acknowledged writes, none lost; latency p50 {} us, max {} us",
        outcome.requests,
        outcome.acknowledged_writes,
        outcome.latency.value_at_quantile(0.5) / 1_000,
        outcome.latency.max() / 1_000
    );
    Ok(())
}

/// A configuration in which every service has the first `replicas` of its replicas only.
pub(crate) fn with_replicas(config: &str, replicas: usize) -> String {
    let rvms: Vec<_> = (0..replicas).map(|n| format!("guest-{}", n + 2)).collect();
    config
        .lines()
        .map(|line| match line.starts_with("rvms = ") {
            true => format!("rvms = {rvms:?}\n"),
            false => format!("{line}\n"),
        })
        .collect()
}

/// A configuration in which every service has this data plane.
pub(crate) fn with_plane(config: &str, plane: Plane) -> String {
    config
        .lines()
        .filter(|line| !line.starts_with("plane = "))
        .map(|line| match line.starts_with("rvms = ") {
            true => format!("{line}\nplane = \"{}\"\n", plane.name()),
            false => format!("{line}\n"),
        })
        .collect()
}

/// A configuration for measuring the cost of replication without faults: on a busy machine, servers that share its CPUs may
/// seem to hang, or to fall behind.
pub(crate) fn unhurried(config: &str) -> String {
    let timing = "timing = { unacked_limit_ms = 60000, progress_limit_ms = 60000, lag_limit_ms = 60000 }";
    config
        .lines()
        .map(|line| match line.starts_with("rvms = ") {
            true => format!("{line}\n{timing}\n"),
            false => format!("{line}\n"),
        })
        .collect()
}

/// A domain's inside, and its own address of a service there.
pub(crate) fn own_address(domain: &Domain, service: Service) -> Result<(Place, SocketAddr)> {
    let address = domain
        .addresses
        .iter()
        .find(|address| address.is_ipv4())
        .copied()
        .unwrap_or(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));
    Ok((Place::new(domain.host.netns.clone()), SocketAddr::new(address, service.port())))
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16))
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| format!("not a MAC: {text}"))?;
    bytes.try_into().map_err(|_| anyhow::anyhow!("not a MAC: {text}"))
}
