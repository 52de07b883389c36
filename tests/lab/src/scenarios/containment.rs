//! Contained before it breathes (rule 13): no frame of a replica or of a deposed server reaches anybody, no guest speaks in the
//! PSC's name, and none is reached beside the PSC, whatever state its vif is in and whoever removes the fences. Clients notice
//! nothing.

mod claims;
mod direct;
mod taken;
mod vifs;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Scenario;
use super::bridge::Psc;
use crate::client::clock::now_ns;
use crate::client::frames::{BROADCAST, Mac, RST, Segment, arp_announcement, discovery};
use crate::client::place::{Place, join};
use crate::client::redis::load::Running;
use crate::client::redis::session::Session;
use crate::client::sniff::Wire;
use crate::host::{BRIDGE, Domain, Fault, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, own_address};

/// How long dom0d may take to restore rules or programs on a busy machine. On an idle one it takes a tenth of a second.
const NOTICED: Duration = Duration::from_secs(2);

/// A MAC that nobody has.
const NOBODY: Mac = [0x02, 0, 0, 0, 0x0d, 0x13];

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = vec![
        Scenario::new("containment/claims/ovm", |lab| claims::claims(lab, "guest-1")),
        Scenario::new("containment/claims/replica", |lab| claims::claims(lab, "guest-2")),
        Scenario::new("containment/direct/reset", direct::direct_reset),
        Scenario::new("containment/direct/conversation", direct::direct_conversation),
        Scenario::new("containment/direct/allowed", direct::direct_allowed),
        Scenario::new("containment/netfront-toggles/replica", vifs::toggling_replica),
        Scenario::new("containment/netfront-toggles/isolated", vifs::toggling_isolated),
        Scenario::new("containment/second-vif/same-bridge", |lab| vifs::second_vif(lab, BRIDGE)),
        Scenario::new("containment/second-vif/other-bridge", |lab| vifs::second_vif(lab, "xenbr1")),
        Scenario::new("containment/second-vif/routed", vifs::second_vif_routed),
        Scenario::new("containment/second-vif/refused", vifs::second_vif_refused),
        Scenario::new("containment/allow", allow),
        Scenario::new("containment/fence/destroy", fence_destroy),
        Scenario::new("containment/fence/isolate", fence_isolate),
    ];
    for (name, script) in [
        ("flushed", "nft flush ruleset"),
        ("deleted", "nft delete table bridge understudy"),
        ("chain-flushed", "nft flush chain bridge understudy servers"),
        ("dormant", "nft add table bridge understudy '{ flags dormant; }'"),
    ] {
        let story = move |lab: &str| taken::rules_taken(lab, script);
        all.push(Scenario::new(format!("containment/rules/{name}"), story));
    }
    for (name, of_anchor, what) in [
        ("vif-qdisc", false, "tc qdisc del dev DEV clsact"),
        ("vif-filter", false, "tc filter del dev DEV ingress"),
        ("anchor-qdisc", true, "tc qdisc del dev DEV clsact"),
    ] {
        let story = move |lab: &str| taken::program_taken(lab, of_anchor, what);
        all.push(Scenario::new(format!("containment/programs/{name}"), story));
    }
    all
}

/// A guest's own addresses.
#[derive(Clone, Copy, Debug)]
struct Own {
    mac: Mac,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl Own {
    fn of(domain: &Domain) -> Result<Self> {
        let mac =
            domain.mac.split(':').map(|part| u8::from_str_radix(part, 16)).collect::<Result<Vec<_>, _>>()?;
        let mac = mac.try_into().map_err(|_| anyhow::anyhow!("not a MAC: {}", domain.mac))?;
        match domain.addresses.as_slice() {
            [IpAddr::V4(v4), IpAddr::V6(v6)] => Ok(Self { mac, v4: *v4, v6: *v6 }),
            other => bail!("not one address per family: {other:?}"),
        }
    }
}

fn counter(stage: &Stage, name: &str) -> Result<u64> {
    Ok(stage.operator.service("redis")?.plane_counters.get(name).copied().unwrap_or_default())
}

/// Waits until a counter has grown; counters are updated once a second.
fn wait_counted(stage: &Stage, name: &str, least: u64) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let counted = counter(stage, name)?;
        if counted >= least {
            println!("  {name}: {counted}");
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{name} is {counted}, it should be {least} at least");
        sleep(Duration::from_millis(50));
    }
}

/// Listens in a namespace to frames that must not be there.
struct Ear {
    heard: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Ear {
    fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    fn end(self) -> Result<u64> {
        self.done.store(true, Ordering::Relaxed);
        join(self.thread)?;
        Ok(self.heard.load(Ordering::Relaxed))
    }
}

fn listen(
    place: &Place,
    interface: &'static str,
    is_wrong: impl Fn(&[u8]) -> bool + Send + 'static,
) -> Result<Ear> {
    let (heard, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (counted, until) = (heard.clone(), done.clone());
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = place.spawn("ear", move || {
        let wire = Wire::open(interface)?;
        let _ = ready.send(());
        while !until.load(Ordering::Relaxed) {
            let wrong = wire.next_frame(Duration::from_millis(20), |frame| is_wrong(frame).then_some(()))?;
            counted.fetch_add(u64::from(wrong.is_some()), Ordering::Relaxed);
        }
        Ok(())
    })?;
    is_ready.recv_timeout(Duration::from_secs(5)).context("nobody listens")?;
    Ok(Ear { heard, done, thread })
}

/// A guest that sends all the time: its own segments of the service, claims to the PSC's address, frames of no protocol.
struct Babble {
    sent: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Babble {
    fn begin(guest: &Domain, interface: &'static str, psc: Psc) -> Result<Self> {
        let own = Own::of(guest)?;
        let (sent, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, until) = (sent.clone(), done.clone());
        let inside = Place::new(guest.host.netns.clone());
        let thread = inside.spawn("babble", move || {
            let wire = Wire::open(interface)?;
            let client = SocketAddr::from(([10, 77, 0, 1], 40_000));
            let reset = Segment::new(SocketAddr::new(own.v4.into(), Service::Redis.port()), client, RST);
            let frames = [
                reset.frame(wire.mac, BROADCAST),
                arp_announcement(wire.mac, psc.v4),
                discovery(136, wire.mac, own.v6, psc.v6),
                crate::client::frames::bare(wire.mac, BROADCAST),
            ];
            while !until.load(Ordering::Relaxed) {
                for frame in &frames {
                    counted.fetch_add(u64::from(wire.send(frame)?), Ordering::Relaxed);
                }
                sleep(Duration::from_millis(1));
            }
            Ok(())
        })?;
        Ok(Self { sent, done, thread })
    }

    /// Waits until it has sent enough to be heard, however busy the machine is.
    fn end(self) -> Result<()> {
        let sent = || self.sent.load(Ordering::Relaxed);
        let deadline = Instant::now() + Duration::from_secs(20);
        while sent() < 500 && !self.thread.is_finished() {
            ensure!(Instant::now() < deadline, "only {} frames were sent", sent());
            sleep(Duration::from_millis(5));
        }
        self.done.store(true, Ordering::Relaxed);
        println!("  {} frames were sent", sent());
        join(self.thread)
    }
}

/// Hears what comes from a guest's MAC.
fn ear_for(stage: &Stage, guest: &Domain) -> Result<Ear> {
    let own = Own::of(guest)?;
    listen(&stage.client(), "eth0", move |frame| frame.get(6..12) == Some(&own.mac))
}

fn expect_as_before(stage: &Stage, promotable: usize) -> Result<()> {
    let service = stage.operator.service("redis")?;
    ensure!(service.epoch == 1, "the OVM was deposed: {:#?}", service.servers);
    ensure!(service.promotable() == promotable, "a replica was hurt: {:#?}", service.servers);
    Ok(())
}

fn isolating(config: String) -> String {
    config.replace("attach =", "fence = \"isolate\"\nattach =")
}

/// The operator deposes guest-1; returns once it is fenced in this way.
fn depose(stage: &Stage, by: &str) -> Result<()> {
    let now_us = now_ns() / 1_000;
    stage.operator.order(&["failover", "redis"])?;
    let fenced = stage.events.wait("fenced", "redis", now_us, Duration::from_secs(5))?;
    ensure!(fenced.what["by"] == by, "it was fenced otherwise: {fenced:?}");
    ensure!(stage.ovm(Service::Redis)?.name != "guest-1", "guest-1 serves still");
    Ok(())
}

/// What `allow` names arrives and is answered; other traffic of a replica does not.
fn allow(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 1, &[Service::Redis]), |config| {
        config.replace(
            "attach =",
            "allow = [\"dhcp\", \"udp/9999\", \"tcp/7777\"]\nown_connections = \"tolerate\"\nattach =",
        )
    })?;
    let load = stage.load("allow")?;
    let replica = stage.lab.domain("guest-2")?;
    let (client, inside) = (stage.client(), Place::new(replica.host.netns.clone()));
    let bind = move |port: u16| Ok(UdpSocket::bind((Ipv4Addr::new(10, 77, 0, 1), port))?);
    for (port, expected) in [(9_999, true), (9_998, false)] {
        let echo = client.run(move || bind(port))?;
        echo.set_read_timeout(Some(Duration::from_secs(2)))?;
        let echoing = std::thread::spawn(move || -> std::io::Result<()> {
            let mut bytes = [0; 16];
            let (length, from) = echo.recv_from(&mut bytes)?;
            echo.send_to(&bytes[..length], from).map(drop)
        });
        let answered = inside.run(move || {
            let socket = UdpSocket::bind("10.77.0.12:0")?;
            socket.set_read_timeout(Some(Duration::from_millis(1_500)))?;
            socket.send_to(b"what time is it", ("10.77.0.1", port))?;
            Ok(socket.recv(&mut [0; 16]).is_ok())
        })?;
        let _ = echoing.join();
        ensure!(answered == expected, "udp/{port}: answered {answered}");
    }
    for (port, expected) in [(7_777, true), (7_778, false)] {
        let listener = client.run(move || Ok(TcpListener::bind((Ipv4Addr::new(10, 77, 0, 1), port))?))?;
        let to = SocketAddr::from(([10, 77, 0, 1], port));
        let connected =
            inside.run(move || Ok(TcpStream::connect_timeout(&to, Duration::from_millis(1_500)).is_ok()))?;
        drop(listener);
        ensure!(connected == expected, "tcp/{port}: connected {connected}");
    }
    // A DHCP request of a client without an address.
    let ear = listen(&client, "eth0", |frame| {
        frame.get(12..14) == Some(&[8, 0]) && frame.get(34..38) == Some(&[0, 68, 0, 67])
    })?;
    inside.run(|| {
        let wire = Wire::open_only()?;
        let mut ip = vec![0x45, 0, 0, 128, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
        ip.extend_from_slice(&[0, 68, 0, 67, 0, 108, 0, 0]);
        ip.resize(128, 0);
        wire.send(&[&BROADCAST[..], &wire.mac, &[8, 0], &ip].concat()).map(drop)
    })?;
    sleep(Duration::from_millis(200));
    ensure!(ear.end()? == 1, "the replica's DHCP request was not heard");
    // Allowed ports are not the PSC's: still nobody speaks for it, or for another guest.
    let (own, psc) = (Own::of(&replica)?, Psc::of(&stage)?);
    let other = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x99);
    let ear = listen(&client, "eth0", move |frame| {
        let has = |address: Ipv6Addr| frame.windows(16).any(|part| part == address.octets());
        frame.get(6..12) == Some(&own.mac) && (has(psc.v6) || has(other))
    })?;
    inside.run(move || {
        let wire = Wire::open_only()?;
        for target in [psc.v6, other] {
            wire.send(&discovery(136, own.mac, own.v6, target))?;
        }
        Ok(())
    })?;
    sleep(Duration::from_millis(200));
    ensure!(ear.end()? == 0, "the replica advertised addresses that it does not have");
    expect_as_before(&stage, 1)?;
    stage.survives_freeze(load)
}

/// A deposed OVM's domain is destroyed.
fn fence_destroy(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 1, &[Service::Redis]), |config| {
        config.replace("attach =", "fence = \"destroy\"\nattach =")
    })?;
    let load = stage.load("destroy")?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    let fenced = stage.events.wait("fenced", "redis", at.monotonic_ns / 1_000, Duration::from_secs(10))?;
    ensure!(fenced.what["by"] == "destroy", "it was fenced otherwise: {fenced:?}");
    let deadline = Instant::now() + Duration::from_secs(10);
    while stage.lab.domain("guest-1").is_ok() {
        ensure!(Instant::now() < deadline, "guest-1 is still there");
        sleep(Duration::from_millis(20));
    }
    end_well(&stage, load)?;
    failover.expect_plausible()
}

/// A deposed OVM's domain continues to run, and nobody hears it.
fn fence_isolate(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 1, &[Service::Redis]), isolating)?;
    let load = stage.load("isolate")?;
    let deposed = stage.lab.domain("guest-1")?;
    depose(&stage, "isolate")?;
    let ear = ear_for(&stage, &deposed)?;
    let babble = Babble::begin(&deposed, "eth0", Psc::of(&stage)?)?;
    sleep(Duration::from_millis(500));
    let (inside, address) = own_address(&deposed, Service::Redis)?;
    inside.run(move || Session::connect(address)?.ask(&["PING"]))?;
    babble.end()?;
    ensure!(ear.heard() == 0, "{} frames of the deposed OVM were heard", ear.heard());
    ear.end()?;
    ensure!(stage.lab.domain("guest-1")?.state == "running", "the deposed OVM does not run");
    end_well(&stage, load)
}

fn end_well(stage: &Stage, load: Running) -> Result<()> {
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}
