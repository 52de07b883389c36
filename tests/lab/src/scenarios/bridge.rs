//! Others share the bridge: they claim to be the PSC, come and go, make the bridge forget what it learned, and remove vifs.
//! Clients of the PSC notice nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Scenario;
use super::shared::expect_one_reason;
use super::transfer::{Direction, Large};
use crate::client::clock::now_ns;
use crate::client::frames::{BROADCAST, Mac, advertisement, arp_announcement, bare};
use crate::client::place::{Place, join};
use crate::client::random::Random;
use crate::client::redis::load::Plan;
use crate::client::sniff::Wire;
use crate::host::{BRIDGE, Fault, FaultInstant, Host, Lab, Service};
use crate::stage::Stage;
use crate::stage::failover::Failover;

/// A domain that has nothing to do with any service.
const STRANGER: Port = Port { domid: 900 };
/// How many others come and go, and how many at a time.
const ROUNDS: u32 = 12;
const AT_ONCE: u32 = 6;

/// Who claims to be the PSC.
#[derive(Clone, Copy, Debug)]
enum Liar {
    /// Another domain on the bridge.
    Stranger,
    Replica,
    Ovm,
}

pub(super) fn scenarios() -> Vec<Scenario> {
    let liars =
        [(Liar::Stranger, "stranger"), (Liar::Replica, "replica"), (Liar::Ovm, "ovm")].map(|(liar, name)| {
            Scenario::new(format!("bridge/spoofed-psc-mac/{name}"), move |lab| spoofed(lab, liar))
        });
    let mut all: Vec<_> = liars.into();
    all.extend([
        Scenario::new("bridge/churn", churn).within(Duration::from_secs(120)),
        Scenario::new("bridge/flushed", flushed),
        Scenario::new("bridge/vif-vanishes/ovm", ovm_unplugged),
        Scenario::new("bridge/vif-vanishes/replica", replica_unplugged),
    ]);
    all
}

/// The vif of a domain that has nothing else: its other end is in dom0, too, without addresses.
#[derive(Clone, Copy, Debug)]
struct Port {
    domid: u32,
}

impl Port {
    fn vif(self) -> String {
        format!("vif{}.0", self.domid)
    }

    /// Where the domain would be.
    fn inside(self) -> String {
        format!("inside{}", self.domid)
    }

    fn plug(self, dom0: &Host) -> Result<()> {
        let script = format!(
            "set -e; ip link add {vif} type veth peer name {inside}
             for end in {vif} {inside}; do echo 1 > /proc/sys/net/ipv6/conf/$end/disable_ipv6; done
             ip link set {vif} address fe:ff:ff:ff:ff:ff arp off
             ip link set {vif} master {BRIDGE} up; ip link set {inside} arp off up",
            vif = self.vif(),
            inside = self.inside()
        );
        dom0.run(&["sh", "-c", &script]).map(drop)
    }
}

fn unplug(dom0: &Host, vif: &str) -> Result<()> {
    dom0.run(&["ip", "link", "del", vif]).map(drop)
}

/// The PSC, as a liar must know it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Psc {
    mac: Mac,
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
}

impl Psc {
    pub(super) fn of(stage: &Stage) -> Result<Self> {
        let address = |ipv6| Ok::<_, anyhow::Error>(stage.psc_of_family(Service::Redis, ipv6)?.ip());
        match (address(false)?, address(true)?) {
            (IpAddr::V4(v4), IpAddr::V6(v6)) => Ok(Self { mac: stage.psc_mac(Service::Redis)?, v4, v6 }),
            other => bail!("not one address per family: {other:?}"),
        }
    }

    /// Checks that the bridge sends the PSC's frames to the anchor, whatever anybody claims.
    fn expect_at_home(&self, dom0: &Host) -> Result<()> {
        let [mac, hex] = [":", ""].map(|between| self.mac.map(|byte| format!("{byte:02x}")).join(between));
        let anchor = format!("usa{hex}");
        let entries = forwarding(dom0, &mac)?;
        let [entry] = entries.as_slice() else { bail!("not one entry of {mac}: {entries:?}") };
        let flags = entry["flags"].as_array().map(Vec::as_slice).unwrap_or_default();
        ensure!(
            entry["ifname"] == anchor && entry["state"] == "static" && flags.contains(&"sticky".into()),
            "the PSC's MAC is not tied to {anchor}: {entry}"
        );
        Ok(())
    }
}

/// What the bridge's forwarding table says of a MAC.
fn forwarding(dom0: &Host, mac: &str) -> Result<Vec<Value>> {
    let output = dom0.run(&["bridge", "-j", "fdb", "show", "br", BRIDGE])?;
    let entries: Vec<Value> = serde_json::from_slice(&output.stdout).context("bridge fdb")?;
    Ok(entries.into_iter().filter(|entry| entry["mac"] == mac).collect())
}

/// Sends frames in the PSC's name, some thousand a second, until told to stop; returns how many.
fn lie(wire: &Wire, frames: &[Vec<u8>], done: &AtomicBool) -> Result<u64> {
    let mut sent = 0;
    while !done.load(Ordering::Relaxed) {
        for frame in frames {
            sent += u64::from(wire.send(frame)?);
        }
        sleep(Duration::from_millis(1));
    }
    Ok(sent)
}

/// Under load over both families, somebody sends frames from the PSC's MAC, then announces its addresses and MAC. The bridge
/// keeps sending the PSC's frames to the anchor, and a failover succeeds.
fn spoofed(lab: &str, liar: Liar) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let (dom0, psc) = (stage.lab.dom0(), Psc::of(&stage)?);
    let (place, interface) = match liar {
        Liar::Stranger => {
            STRANGER.plug(&dom0)?;
            (Place::new(dom0.netns.clone()), STRANGER.inside())
        }
        Liar::Replica => (Place::new(stage.lab.domain("guest-2")?.host.netns), "eth0".to_owned()),
        Liar::Ovm => (Place::new(stage.lab.domain("guest-1")?.host.netns), "eth0".to_owned()),
    };
    let client = stage.client().run(|| Ok(Wire::open_only()?.mac))?;
    let load = stage.load("spoofed")?;
    let over_v6 = Plan::new(stage.psc_of_family(Service::Redis, true)?, "v6").start(&stage.client())?;
    psc.expect_at_home(&dom0)?;
    for (what, frames) in [
        ("as a source", [BROADCAST, client, psc.mac].map(|to| bare(psc.mac, to)).to_vec()),
        ("announced", vec![arp_announcement(psc.mac, psc.v4), advertisement(psc.mac, psc.v6)]),
    ] {
        let done = Arc::new(AtomicBool::new(false));
        let (interface, until) = (interface.clone(), done.clone());
        let lies = place.spawn("liar", move || lie(&Wire::open(&interface)?, &frames, &until))?;
        let begun = Instant::now();
        let looked = (|| -> Result<()> {
            while begun.elapsed() < Duration::from_secs(2) {
                psc.expect_at_home(&dom0)?;
                load.wait_answers(100, Duration::from_secs(10))?;
                over_v6.wait_answers(100, Duration::from_secs(10))?;
            }
            Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        let sent = join(lies)?;
        println!("  {sent} frames with the PSC's MAC {what}");
        ensure!(sent > 500, "too few for the bridge to be misled");
        looked.with_context(|| format!("while the PSC's MAC came {what}"))?;
    }
    if let Liar::Stranger = liar {
        // Had the bridge not heard it at all, all this would show nothing.
        place.run(|| {
            let wire = Wire::open(&STRANGER.inside())?;
            ensure!(wire.send(&bare([2, 0, 0, 0, 9, 0], BROADCAST))?, "the stranger's interface has no room");
            Ok(())
        })?;
        let learned = forwarding(&dom0, "02:00:00:00:09:00")?;
        ensure!(learned.iter().any(|entry| entry["ifname"] == STRANGER.vif()), "the bridge learns nothing");
        let service = stage.operator.service("redis")?;
        let conflicts = service.plane_counters.get("psc_conflicts").copied().unwrap_or_default();
        println!("  dom0d has counted {conflicts} claims to the PSC's addresses");
    }
    stage.survives_freeze(load)?;
    psc.expect_at_home(&dom0)?;
    over_v6.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&over_v6.finish()?)
}

/// Dozens of other domains come, send to everybody from many MACs, and go, and the bridge is made to forget what it learned,
/// while a pipeline and large downloads run; then the OVM freezes.
fn churn(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis, Service::Http])?;
    let psc = Psc::of(&stage)?;
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "churn");
    plan.depth = 32;
    plan.pace = Some(Duration::from_millis(20));
    let load = plan.start(&stage.client())?;
    load.wait_answers(1_000, Duration::from_secs(20))?;
    let dom0 = stage.lab.dom0();
    let others = std::thread::spawn(move || come_and_go(&dom0));
    let mut downloads = 0;
    while !others.is_finished() || downloads == 0 {
        Large::begin(&stage, Direction::Download, false)?.expect_whole(&stage)?;
        downloads += 1;
    }
    let frames = join(others)?;
    println!("  {} domains came and went with {frames} frames, {downloads} downloads", ROUNDS * AT_ONCE);
    psc.expect_at_home(&stage.lab.dom0())?;
    load.wait_answers(1_000, Duration::from_secs(20))?;
    for service in ["redis", "http"] {
        ensure!(stage.operator.service(service)?.promotable() == 1, "the replica of {service} was hurt");
    }
    let large = Large::begin(&stage, Direction::Download, false)?;
    large.wait_part(0.33)?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    for service in [Service::Redis, Service::Http] {
        Failover::observe(&stage, service, Fault::Freeze, at)?.expect_plausible()?;
    }
    large.expect_whole(&stage)?;
    load.wait_answers(1_000, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// An operator makes the bridge forget everything, static entries included: the kernel tells dom0d, which ties the PSC's MAC
/// to its anchor again.
fn flushed(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let (dom0, psc) = (stage.lab.dom0(), Psc::of(&stage)?);
    let load = stage.load("flushed")?;
    dom0.run(&["bridge", "fdb", "flush", "dev", BRIDGE])?;
    let begun = Instant::now();
    while let Err(error) = psc.expect_at_home(&dom0) {
        ensure!(begun.elapsed() < Duration::from_secs(5), "it stays so: {error:#}");
        sleep(Duration::from_millis(20));
    }
    println!("  back where it belongs after {} ms", begun.elapsed().as_millis());
    load.wait_answers(300, Duration::from_secs(30))?;
    stage.survives_freeze(load)
}

/// Gives how many frames the others sent.
fn come_and_go(dom0: &Host) -> Result<u64> {
    let place = Place::new(dom0.netns.clone());
    let mut sent = 0;
    for round in 0..ROUNDS {
        let ports = (0..AT_ONCE).map(|n| Port { domid: 1_000 + round * AT_ONCE + n });
        for port in ports.clone() {
            port.plug(dom0)?;
            sent += place.run(move || {
                let (wire, mut random) = (Wire::open(&port.inside())?, Random::new(u64::from(port.domid)));
                let mut sent = 0;
                for _ in 0..200 {
                    // Neighbours that there are, that there were, and that there never will be.
                    let [a, b] =
                        [(); 2].map(|()| [2, 0, 0, 0, random.below(4) as u8, random.below(64) as u8]);
                    sent += u64::from(wire.send(&bare(a, b))?) + u64::from(wire.send(&bare(a, BROADCAST))?);
                }
                Ok(sent)
            })?;
        }
        dom0.run(&["ip", "link", "set", BRIDGE, "type", "bridge", "fdb_flush"])?;
        for port in ports {
            unplug(dom0, &port.vif())?;
        }
    }
    Ok(sent)
}

/// The OVM's vif is deleted under a load and a download, while its domain continues to run: a replica takes over, the domain
/// is fenced, and the next replica can follow.
fn ovm_unplugged(lab: &str) -> Result<()> {
    // In both services the same one takes over, and no stall of a busy machine moves only one of them.
    let options = "candidate = \"queue\"\ntiming = { unacked_limit_ms = 5000, progress_limit_ms = 5000 }";
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis, Service::Http]), |config| {
        config.replace("attach =", &format!("{options}\nattach ="))
    })?;
    let load = stage.load("unplugged")?;
    let large = Large::begin(&stage, Direction::Download, false)?;
    large.wait_part(0.2)?;
    let at = FaultInstant { monotonic_ns: now_ns() };
    unplug(&stage.lab.dom0(), &stage.lab.domain("guest-1")?.vif)?;
    // Known long before anybody misses what the OVM does not do.
    let evidence = expect_one_reason(&stage, Fault::Destroy, at)?;
    ensure!(evidence == "domain_gone", "{evidence} was the evidence");
    load.wait_answers(300, Duration::from_secs(20))?;
    large.wait_part(0.6)?;
    expect_stopped(&stage.lab, "guest-1")?;
    let second = stage.ovm(Service::Redis)?.name;
    ensure!(second == stage.ovm(Service::Http)?.name, "two domains were promoted");
    let at = stage.lab.fault(Fault::Freeze, &second)?;
    for service in [Service::Redis, Service::Http] {
        Failover::observe(&stage, service, Fault::Freeze, at)?.expect_plausible()?;
    }
    large.expect_whole(&stage)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// Nobody can hear its services any more, but they must not run on by themselves either.
fn expect_stopped(lab: &Lab, name: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while lab.domain(name).is_ok_and(|domain| !domain.state.contains("paused")) {
        ensure!(Instant::now() < deadline, "{name} was deposed and runs on: {}", lab.domain(name)?.state);
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A replica's vif is deleted under a load: it leaves the queue, clients notice nothing, and the other replica takes over
/// when it is needed.
fn replica_unplugged(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let load = stage.load("unplugged")?;
    let now_us = now_ns() / 1_000;
    unplug(&stage.lab.dom0(), &stage.lab.domain("guest-2")?.vif)?;
    let event = stage.events.wait("evicted", "redis", now_us, Duration::from_secs(5))?;
    ensure!(event.domain("server").as_deref() == Some("guest-2"), "another one was evicted: {event:?}");
    load.wait_answers(1_000, Duration::from_secs(20))?;
    ensure!(stage.operator.service("redis")?.promotable() == 1, "guest-3 is not promotable any more");
    stage.survives_freeze(load)?;
    let ovm = stage.ovm(Service::Redis)?.name;
    ensure!(ovm == "guest-3", "{ovm} serves, though nobody can hear it");
    Ok(())
}
