//! Guests with dom0d running, on which stories are played inside dom0.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::command::{run, shell};
use super::guests::{Guests, client, destroy, exists, fault};
use crate::client::place::Place;
use crate::client::redis::load::{Outcome, Plan, Running};
use crate::client::redis::verify::verify;
use crate::host::{Fault, FaultInstant, LabConfig, Service, default_config, domain_name, psc_addresses};
use crate::stage::expect_unharmed;
use crate::stage::failover::Failover;
use crate::stage::operator::{Events, Operator};
use crate::xen::Kind;

/// Where an operator writes dom0d's configuration.
const CONFIG: &str = "/etc/understudy/dom0d.toml";
/// Until dom0d has found every guest.
const READY: Duration = Duration::from_secs(60);
/// Until what clients closed is closed.
const CLOSED: Duration = Duration::from_secs(5);
/// Until some answers came: on a busy machine an answer may take a second.
pub(super) const ANSWERS: Duration = Duration::from_secs(60);
/// Until a domain that reboots is created anew and its kernel has connected its vif.
pub(super) const REBOOTED: Duration = Duration::from_secs(120);

/// Guests, dom0d run by its unit, and the operator's view of it.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) operator: Operator,
    pub(super) events: Events,
    pub(super) guests: Guests,
    pub(super) config: String,
}

impl Stage {
    /// Sound guests, and a dom0d that knows nothing of an earlier one, with every replica promotable.
    pub(super) fn up(kind: Kind, replicas: usize, services: &[Service]) -> Result<Self> {
        let postgresql = services.contains(&Service::Postgresql);
        Self::up_with(Guests { kind, replicas, postgresql }, services, |config| config)
    }

    /// The same with a configuration that `edit` makes from the default one.
    pub(super) fn up_with(
        guests: Guests,
        services: &[Service],
        edit: impl FnOnce(String) -> String,
    ) -> Result<Self> {
        let begun = Instant::now();
        let progress = |line: &str| println!("  [{:5.1} s] {line}", begun.elapsed().as_secs_f64());
        forget()?;
        guests.prepare(&progress)?;
        let config = edit(config(guests.replicas, services));
        let stage = Self::start(guests, config)?;
        stage.operator.wait_ready(&stage.config)?;
        progress("every replica is promotable");
        Ok(stage)
    }

    /// Starts dom0d by its unit, and waits for nothing but that.
    pub(super) fn start(guests: Guests, config: String) -> Result<Self> {
        fs::create_dir_all("/etc/understudy").context("making /etc/understudy")?;
        fs::write(CONFIG, &config).with_context(|| format!("writing {CONFIG}"))?;
        run(&["systemctl", "start", "dom0d"])?;
        let operator = operator();
        let events = operator.follow()?;
        Ok(Self { operator, events, guests, config })
    }

    pub(super) fn client(&self) -> Place {
        client()
    }

    /// Where clients find a service.
    pub(super) fn psc(&self, service: Service) -> SocketAddr {
        SocketAddr::new(psc_addresses(service, false)[0], service.port())
    }

    /// The domain that serves now.
    pub(super) fn ovm(&self, service: Service) -> Result<String> {
        let report = self.operator.service(service.name())?;
        let domain = report.ovm().and_then(|server| server.domain.as_ref());
        Ok(domain.with_context(|| format!("{} has no OVM", service.name()))?.name.clone())
    }

    /// Some connections that write all the time and some that are silent, as many as an emulated
    /// host serves with ease.
    pub(super) fn load(&self, prefix: &str) -> Result<Running> {
        let mut plan = Plan::new(self.psc(Service::Redis), prefix);
        plan.connections = 6;
        plan.busy = 4;
        plan.pace = Some(Duration::from_millis(50));
        let load = plan.start(&self.client())?;
        load.wait_answers(40, ANSWERS)?;
        Ok(load)
    }

    /// See [`fault`].
    pub(super) fn fault(&self, of: Fault, domain: &str) -> Result<FaultInstant> {
        fault(of, domain)
    }

    /// The failover that followed a fault, complete.
    pub(super) fn failover(&self, service: Service, of: Fault, at: FaultInstant) -> Result<Failover> {
        Failover::collect(&self.operator, &self.events, service, of, at)
    }

    /// No client noticed anything, and what the PSC answers now holds every acknowledged write.
    pub(super) fn expect_unharmed(&self, outcome: &Outcome) -> Result<()> {
        let ovm = self.ovm(Service::Redis)?;
        let psc = self.psc(Service::Redis);
        expect_unharmed(outcome, &ovm, || verify(&self.client(), psc, outcome))
    }
}

/// The operator of this host.
pub(super) fn operator() -> Operator {
    Operator::installed("/usr/sbin/understudy", "/run/understudy/control.sock", READY)
}

/// What an emulated host needs: a thousand hypercalls a second would take half of dom0, 256 MiB of captures
/// ten seconds to allocate; a guest's vCPU may wait for a second until it is run, which is not its fault; and
/// dom0 is hardly ever run for as long as a starved host is told by otherwise (50 ms). With room for a whole
/// transfer no replica has to show progress within half a second.
const FOR_EMULATION: &str = "liveness_poll_ms = 10\ncapture_buffer_mib = 4\n\n";
const SERVICE_FOR_EMULATION: &str = "[[service]]\ntiming = { unacked_limit_ms = 5000, \
    progress_limit_ms = 5000, close_hold_ms = 2000, lag_limit_ms = 60000, starvation_ms = 1000 }\n\
    limits = { conversation_bytes = 67108864, ahead_bytes = 67108864 }\n";

/// `guest-1` as OVM, the next ones as replicas.
pub(super) fn config(replicas: usize, services: &[Service]) -> String {
    let plan = LabConfig { replicas, services: services.to_vec(), ..LabConfig::new(String::new()) };
    FOR_EMULATION.to_owned() + &default_config(&plan).replace("[[service]]\n", SERVICE_FOR_EMULATION)
}

/// Ends dom0d, and what it remembers of domains; first, if it runs, the conversations that clients have
/// closed: a FIN that is repeated when the next dom0d runs belongs to a conversation which that one could
/// not replicate, and makes its replicas stale. If some stay open, as after a story that failed, the guests are
/// destroyed: what they repeat to a client that is gone makes it send an RST, and no replica is taken as identical
/// once a client was heard.
pub(super) fn forget() -> Result<()> {
    if run(&["systemctl", "is-active", "dom0d"]).is_ok() {
        let closed = operator().until("no conversation", CLOSED, |status| {
            status.services.iter().all(|service| service.conversations == 0)
        });
        if closed.is_err() {
            (1..).map(domain_name).take_while(|name| exists(name)).try_for_each(|name| destroy(&name))?;
        }
    }
    shell(
        "systemctl stop dom0d; systemctl reset-failed dom0d 2>/dev/null || :; rm -rf /var/lib/understudy/*
         ip netns exec client ss --kill --tcp >/dev/null || :",
    )
    .map(drop)
}
