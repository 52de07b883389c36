//! Every fault of the OVM, while Redis clients write and one downloads 20 MB, or one transfers money.

use std::fs;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client::http;
use crate::client::postgres::Session;
use crate::host::{Fault, Service};
use crate::scenarios::Scenario;
use crate::scenarios::database::{expect_balanced, transfers};
use crate::stage::failover::Failover;
use crate::xen::Kind;
use crate::xen::inside::command::run;
use crate::xen::inside::guests::{LARGE, client, domid, large_sha256};
use crate::xen::inside::stage::{ANSWERS, REBOOTED, Stage};

/// Where in the download a fault strikes.
const STRIKES: [u64; 2] = [4 << 20, 12 << 20];
/// The longest frame of one segment; a guest's own stack sends several as one frame (GSO).
const LONGEST_FRAME: u64 = 1514;
/// Until the download has come there: on two busy cores emulation gave 30 KiB/s.
const STRIKE_LIMIT: Duration = Duration::from_secs(240);

const FAULTS: [Fault; 7] =
    [Fault::Freeze, Fault::Hang, Fault::Spin, Fault::Kill, Fault::Crash, Fault::Destroy, Fault::Poweroff];

/// Every fault, twice; in the middle of a PostgreSQL transaction; and a guest that comes back by itself.
pub(super) fn of_pv_guests() -> Vec<Scenario> {
    let mut all = twice_each(Kind::Pv);
    all.push(story(Kind::Pv, "postgresql", || transaction(Kind::Pv, Fault::Freeze)));
    all.push(story(Kind::Pv, "reboot", || reboot(Kind::Pv)));
    all
}

/// Every fault, twice.
pub(super) fn of_pvh_guests() -> Vec<Scenario> {
    twice_each(Kind::Pvh)
}

fn twice_each(kind: Kind) -> Vec<Scenario> {
    FAULTS.map(|fault| story(kind, &format!("{fault:?}").to_lowercase(), move || twice(kind, fault))).into()
}

fn story(kind: Kind, name: &str, play: impl Fn() -> Result<()> + Send + Sync + 'static) -> Scenario {
    Scenario::new(format!("failover/{}/{name}", kind.name()), move |_| play())
        .within(Duration::from_secs(600))
}

/// Strikes the OVM of two replicas while Redis clients write and one downloads, and then, in the same
/// conversations, the replica that was promoted, when one is left.
fn twice(kind: Kind, fault: Fault) -> Result<()> {
    let services = [Service::Redis, Service::Http];
    let stage = Stage::up(kind, 2, &services)?;
    let sha256 = large_sha256("guest-1")?;
    let target = stage.psc(Service::Http);
    // Some that asked once and are silent: that a service died inside shows on several conversations.
    let silent = client().run(move || {
        (0..3)
            .map(|_| {
                let mut stream = http::connect(target)?;
                http::head(&mut stream, LARGE)?;
                Ok(stream)
            })
            .collect::<Result<Vec<TcpStream>>>()
    })?;
    let load = stage.load("failover")?;
    let before = sent_by("guest-1")?;
    let download = http::download(&stage.client(), target, LARGE)?;
    let mut struck = Vec::new();
    for at in STRIKES {
        download.wait_progress(at, STRIKE_LIMIT)?;
        let ovm = stage.ovm(Service::Http)?;
        if struck.is_empty() {
            let after = sent_by(&ovm)?;
            let (frames, bytes) = (after.frames - before.frames, after.bytes - before.bytes);
            println!("  {bytes} bytes in {frames} frames");
            ensure!(
                bytes > frames * LONGEST_FRAME,
                "{frames} frames for {bytes} bytes: the guest uses no GSO"
            );
        }
        // Each service may have promoted another replica.
        let mut lost = Vec::new();
        for service in services {
            lost.extend((stage.ovm(service)? == ovm).then_some(service));
        }
        let at = stage.fault(fault, &ovm)?;
        let failovers: Vec<_> =
            lost.into_iter().map(|service| stage.failover(service, fault, at)).collect::<Result<_>>()?;
        load.wait_answers(40, ANSWERS)?;
        expect_plausible(&failovers)?;
        struck.push(ovm);
    }
    let transfer = download.finish()?;
    ensure!(transfer.sha256 == sha256, "SHA-256 of what came is {}, of the file {sha256}", transfer.sha256);
    println!(
        "  {} bytes in {:.1} s, longest gap {} ms, SHA-256 equal",
        transfer.bytes,
        transfer.took.as_secs_f64(),
        transfer.longest_gap.0.as_millis()
    );
    client().run(move || silent.into_iter().try_for_each(|mut stream| http::head(&mut stream, LARGE)))?;
    stage.expect_unharmed(&load.finish()?)?;
    if fault == Fault::Spin {
        // They take no orders any more: the next story would wait for them in vain.
        for ovm in struck {
            run(&["xl", "destroy", &ovm])?;
        }
    }
    Ok(())
}

/// The services that lost one OVM: one by what the fault itself shows, another perhaps by the fence that followed.
fn expect_plausible(failovers: &[Failover]) -> Result<()> {
    let is_fence = |failover: &Failover| failover.detected_by == "domain_paused";
    let all = failovers.iter().all(is_fence);
    failovers.iter().try_for_each(|failover| {
        if is_fence(failover) && !all { failover.expect_whole() } else { failover.expect_plausible() }
    })
}

/// A guest that reboots comes back as another domain, which is a replica at most.
fn reboot(kind: Kind) -> Result<()> {
    let stage = Stage::up(kind, 1, &[Service::Redis])?;
    let load = stage.load("failover")?;
    let before = domid("guest-1")?;
    let at = stage.fault(Fault::Reboot, "guest-1")?;
    let failover = stage.failover(Service::Redis, Fault::Reboot, at)?;
    load.wait_answers(40, ANSWERS)?;
    stage.operator.until("guest-1 is back as a replica", REBOOTED, |status| {
        status.services[0].servers.iter().any(|server| {
            let domain = server.domain.as_ref();
            domain.is_some_and(|domain| domain.name == "guest-1" && domain.domid != before)
        })
    })?;
    ensure!(stage.ovm(Service::Redis)? == "guest-2", "guest-1 serves again");
    ensure!(stage.operator.service(Service::Redis.name())?.promotable() == 0, "guest-1 is promotable");
    stage.expect_unharmed(&load.finish()?)?;
    failover.expect_plausible()
}

fn transaction(kind: Kind, fault: Fault) -> Result<()> {
    let stage = Stage::up(kind, 1, &[Service::Postgresql])?;
    let target = stage.psc(Service::Postgresql);
    let mut session = client().run(move || Session::connect(target))?;
    let at = transfers(&mut session, || stage.fault(fault, "guest-1"))?;
    let failover = stage.failover(Service::Postgresql, fault, at)?;
    expect_balanced(&mut session)?;
    failover.expect_plausible()
}

/// What a guest has sent.
struct Sent {
    frames: u64,
    bytes: u64,
}

/// As its vif's backend counts it.
fn sent_by(guest: &str) -> Result<Sent> {
    let statistics = format!("/sys/class/net/vif{}.0/statistics", domid(guest)?);
    let read = |counter: &str| -> Result<u64> {
        let path = format!("{statistics}/{counter}");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        text.trim().parse().with_context(|| format!("{path} holds {text:?}"))
    };
    Ok(Sent { frames: read("rx_packets")?, bytes: read("rx_bytes")? })
}
