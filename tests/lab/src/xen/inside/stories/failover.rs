//! Every fault of the OVM, while Redis clients write, one downloads 20 MiB, or one transfers money.

use std::fs;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::client::http;
use crate::client::postgres::Session;
use crate::host::{Fault, Service};
use crate::scenarios::Scenario;
use crate::scenarios::database::{expect_balanced, transfers};
use crate::xen::Kind;
use crate::xen::inside::command::run;
use crate::xen::inside::guests::{LARGE, client, domid, large_sha256};
use crate::xen::inside::stage::{ANSWERS, Stage};

/// Where in the download the fault strikes.
const STRUCK_AT: u64 = 4 << 20;
/// The longest frame of one segment; a guest's own stack sends several as one frame (GSO).
const LONGEST_FRAME: u64 = 1514;
/// Until the download has come there: on two busy cores emulation gave 30 KiB/s.
const STRIKE_LIMIT: Duration = Duration::from_secs(240);

const FAULTS: [Fault; 7] =
    [Fault::Freeze, Fault::Hang, Fault::Spin, Fault::Kill, Fault::Crash, Fault::Destroy, Fault::Poweroff];

/// Every fault with one and with two replicas over Redis; over the download, which takes longest, with one,
/// and the two that differ most with two; one in the middle of a PostgreSQL transaction.
pub(super) fn of_pv_guests() -> Vec<Scenario> {
    let mut all = Vec::new();
    for fault in FAULTS {
        all.extend([1, 2].map(|replicas| under_redis(Kind::Pv, fault, replicas)));
    }
    all.extend(FAULTS.map(|fault| in_download(Kind::Pv, fault, 1)));
    all.extend([Fault::Freeze, Fault::Destroy].map(|fault| in_download(Kind::Pv, fault, 2)));
    all.push(in_transaction(Kind::Pv, Fault::Freeze));
    all.push(under_redis(Kind::Pv, Fault::Reboot, 1));
    all
}

/// Every fault, with one replica.
pub(super) fn of_pvh_guests() -> Vec<Scenario> {
    let mut all: Vec<_> = FAULTS.map(|fault| under_redis(Kind::Pvh, fault, 1)).into();
    all.push(in_download(Kind::Pvh, Fault::Freeze, 1));
    all
}

fn name(kind: Kind, fault: Fault, replicas: usize, work: &str) -> String {
    format!("failover/{}/{work}/{fault:?}/{replicas}", kind.name()).to_lowercase()
}

fn under_redis(kind: Kind, fault: Fault, replicas: usize) -> Scenario {
    Scenario::new(name(kind, fault, replicas, "redis"), move |_| redis(kind, fault, replicas))
        .within(Duration::from_secs(300))
}

fn in_download(kind: Kind, fault: Fault, replicas: usize) -> Scenario {
    Scenario::new(name(kind, fault, replicas, "download"), move |_| download(kind, fault, replicas))
        .within(Duration::from_secs(600))
}

fn in_transaction(kind: Kind, fault: Fault) -> Scenario {
    Scenario::new(name(kind, fault, 1, "postgresql"), move |_| transaction(kind, fault))
        .within(Duration::from_secs(600))
}

fn redis(kind: Kind, fault: Fault, replicas: usize) -> Result<()> {
    let stage = Stage::up(kind, replicas, &[Service::Redis])?;
    let load = stage.load("failover")?;
    let at = stage.fault(fault, "guest-1")?;
    let failover = stage.failover(Service::Redis, fault, at)?;
    load.wait_answers(40, ANSWERS)?;
    stage.expect_unharmed(&load.finish()?)?;
    if fault == Fault::Spin {
        // It takes no orders any more: the next story would wait for it in vain.
        run(&["xl", "destroy", "guest-1"])?;
    }
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

fn download(kind: Kind, fault: Fault, replicas: usize) -> Result<()> {
    let stage = Stage::up(kind, replicas, &[Service::Http])?;
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
    let before = sent_by("guest-1")?;
    let download = http::download(&stage.client(), target, LARGE)?;
    download.wait_progress(STRUCK_AT, STRIKE_LIMIT)?;
    let after = sent_by("guest-1")?;
    let (frames, bytes) = (after.frames - before.frames, after.bytes - before.bytes);
    ensure!(bytes > frames * LONGEST_FRAME, "{frames} frames for {bytes} bytes: the guest uses no GSO");
    let at = stage.fault(fault, "guest-1")?;
    let failover = stage.failover(Service::Http, fault, at)?;
    let transfer = download.finish()?;
    ensure!(transfer.sha256 == sha256, "SHA-256 of what came is {}, of the file {sha256}", transfer.sha256);
    println!(
        "  {} bytes in {:.1} s, longest gap {} ms, SHA-256 equal",
        transfer.bytes,
        transfer.took.as_secs_f64(),
        transfer.longest_gap.0.as_millis()
    );
    client().run(move || silent.into_iter().try_for_each(|mut stream| http::head(&mut stream, LARGE)))?;
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
