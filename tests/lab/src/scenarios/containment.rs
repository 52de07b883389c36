//! Contained before it breathes (rule 13): no frame of a replica or of a deposed server reaches anybody, no guest speaks in the
//! PSC's name, and none is reached beside the PSC, whatever state its vif is in and whoever removes the fences. Clients notice
//! nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Scenario;
use super::bridge::Psc;
use crate::client::clock::now_ns;
use crate::client::frames::{
    ACK, BROADCAST, Mac, PSH, RST, SYN, Segment, arp, arp_announcement, behind_options, discovery,
    solicitation, tagged,
};
use crate::client::place::{Place, join};
use crate::client::redis::load::Running;
use crate::client::redis::session::Session;
use crate::client::sniff::Wire;
use crate::host::{BRIDGE, Domain, Fault, Host, Lab, Plane, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, own_address, with_plane};

/// How long dom0d may take to restore rules or programs on a busy machine. On an idle one it takes a tenth of a second.
const NOTICED: Duration = Duration::from_secs(2);

/// A MAC that nobody has.
const NOBODY: Mac = [0x02, 0, 0, 0, 0x0d, 0x13];

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = vec![
        Scenario::new("containment/claims/ovm", |lab| claims(lab, "guest-1")),
        Scenario::new("containment/claims/replica", |lab| claims(lab, "guest-2")),
        Scenario::new("containment/direct/reset", direct_reset),
        Scenario::new("containment/direct/conversation", direct_conversation),
        Scenario::new("containment/direct/allowed", direct_allowed),
        Scenario::new("containment/netfront-toggles/replica", toggling_replica),
        Scenario::new("containment/netfront-toggles/isolated", toggling_isolated),
        Scenario::new("containment/second-vif/same-bridge", |lab| second_vif(lab, BRIDGE)),
        Scenario::new("containment/second-vif/other-bridge", |lab| second_vif(lab, "xenbr1")),
        Scenario::new("containment/second-vif/routed", second_vif_routed),
        Scenario::new("containment/second-vif/refused", second_vif_refused),
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
        let story = move |lab: &str| rules_taken(lab, script);
        all.push(Scenario::new(format!("containment/rules/{name}"), story));
    }
    for (name, of_anchor, what) in [
        ("vif-qdisc", false, "tc qdisc del dev DEV clsact"),
        ("vif-filter", false, "tc filter del dev DEV ingress"),
        ("anchor-qdisc", true, "tc qdisc del dev DEV clsact"),
    ] {
        let story = move |lab: &str| program_taken(lab, of_anchor, what);
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

/// Every frame by which a guest could claim to be the PSC.
fn lies(own: Own, psc: Psc) -> Vec<(&'static str, Vec<u8>)> {
    let reply = arp_announcement(own.mac, psc.v4);
    let by_own = discovery(136, own.mac, own.v6, psc.v6);
    let mut by_other = reply.clone();
    by_other[22..28].copy_from_slice(&NOBODY);
    vec![
        ("an ARP reply", reply.clone()),
        ("an ARP announcement", arp(1, (own.mac, psc.v4), ([0; 6], psc.v4), BROADCAST)),
        ("an ARP reply about another MAC", by_other),
        ("an ARP reply with a priority", tagged(&reply, &[0x81, 0, 0, 0])),
        ("an ARP reply with a provider's tag", tagged(&reply, &[0x88, 0xa8, 0, 0])),
        ("an ARP reply behind 8100/8100", tagged(&reply, &[0x81, 0, 0, 0, 0x81, 0, 0, 0])),
        ("an ARP reply behind 88a8/8100", tagged(&reply, &[0x88, 0xa8, 0, 0, 0x81, 0, 0, 0])),
        ("an ARP reply behind 8100/88a8", tagged(&reply, &[0x81, 0, 0, 0, 0x88, 0xa8, 0, 0])),
        ("a neighbour advertisement", discovery(136, own.mac, psc.v6, psc.v6)),
        ("a neighbour advertisement of its own address", by_own.clone()),
        ("a neighbour advertisement with a priority", tagged(&by_own, &[0x81, 0, 0, 0])),
        ("a neighbour advertisement behind two tags", tagged(&by_own, &[0x81, 0, 0, 0, 0x81, 0, 0, 0])),
        ("a neighbour advertisement behind options", behind_options(&by_own)),
        ("a neighbour solicitation", solicitation(own.mac, psc.v6, own.v6)),
        ("a neighbour solicitation behind options", behind_options(&solicitation(own.mac, psc.v6, own.v6))),
    ]
}

/// Whether a frame claims the PSC for a guest's MAC, or for nobody's.
fn is_lie(frame: &[u8], own: Own, psc: Psc) -> bool {
    let has = |bytes: &[u8]| frame.windows(bytes.len()).any(|part| part == bytes);
    let source = frame.get(6..12);
    (source == Some(&own.mac) || source == Some(&NOBODY)) && (has(&psc.v4.octets()) || has(&psc.v6.octets()))
}

/// The PSC's MACs in the client's neighbour table.
fn believed(client: &Host) -> Result<Vec<String>> {
    let output = client.run(&["ip", "-j", "neigh", "show"])?;
    let all: Vec<Value> = serde_json::from_slice(&output.stdout).context("ip neigh")?;
    let of_psc = all
        .iter()
        .filter(|entry| entry["dst"].as_str().is_some_and(|dst| dst == "10.77.0.100" || dst == "fd77::100"));
    Ok(of_psc.filter_map(|entry| Some(entry["lladdr"].as_str()?.to_owned())).collect())
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

/// A guest claims in every way to be the PSC; nobody hears it.
fn claims(lab: &str, liar: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let (psc, guest) = (Psc::of(&stage)?, stage.lab.domain(liar)?);
    let own = Own::of(&guest)?;
    let load = stage.load("claims")?;
    let target = stage.psc_of_family(Service::Redis, true)?;
    let mut over_v6 = stage.client().run(move || Session::connect(target))?;
    let before = believed(&stage.lab.client())?;
    ensure!(before.len() == 2, "the client does not know the PSC: {before:?}");
    let frames = lies(own, psc);
    let mut heard = Vec::new();
    for (what, frame) in &frames {
        let ear = listen(&stage.client(), "eth0", move |frame| is_lie(frame, own, psc))?;
        let (frame, inside) = (frame.clone(), Place::new(guest.host.netns.clone()));
        inside.run(move || {
            let wire = Wire::open_only()?;
            for _ in 0..3 {
                wire.send(&frame)?;
            }
            Ok(())
        })?;
        sleep(Duration::from_millis(50));
        if ear.end()? > 0 {
            heard.push(*what);
        }
    }
    ensure!(heard.is_empty(), "the client's link saw {liar}'s: {heard:#?}");
    ensure!(believed(&stage.lab.client())? == before, "the client believes {liar}");
    over_v6.ask(&["PING"])?;
    wait_counted(&stage, if liar == "guest-1" { "claims_refused" } else { "contained_frames" }, 3)?;
    if liar == "guest-1" {
        wait_counted(&stage, "claims_refused", 3 * frames.len() as u64)?;
    }
    stage.survives_freeze(load)
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

/// A client of two conversations resets both at a server's own address, beside the PSC: at the replica's, then at the OVM's.
fn direct_reset(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("direct")?;
    let target = stage.psc(Service::Redis)?;
    for name in ["guest-2", "guest-1"] {
        let guest = stage.lab.domain(name)?;
        let (own, refused) = (Own::of(&guest)?, counter(&stage, "direct_refused")?);
        let mut sessions = stage.client().run(move || {
            let mut sessions = Vec::new();
            for n in 0..2 {
                let wire = Wire::open_only()?;
                let mut session = Session::connect(target)?;
                session.ask(&["SET", &format!("direct{n}"), "1"])?;
                let local = session.local()?;
                let request =
                    wire.next(Duration::from_secs(1), |seen| seen.from == local && seen.flags & PSH != 0)?;
                let request = request.context("no request was seen on the client's link")?;
                let victim = SocketAddr::new(own.v4.into(), target.port());
                let mut reset = Segment::new(local, victim, RST);
                reset.sequence = request.sequence.wrapping_add(request.payload as u32);
                let frame = reset.frame(wire.mac, own.mac);
                for tags in [&[][..], &[0x81, 0, 0, 0], &[0x81, 0, 0, 0, 0x81, 0, 0, 0]] {
                    wire.send(&tagged(&frame, tags))?;
                }
                sessions.push(session);
            }
            Ok(sessions)
        })?;
        sleep(Duration::from_millis(500));
        for session in &mut sessions {
            session.ask(&["PING"]).with_context(|| format!("after resets to {name}'s own address"))?;
        }
        expect_as_before(&stage, 1)?;
        wait_counted(&stage, "direct_refused", refused + 6)?;
    }
    stage.survives_freeze(load)
}

fn expect_as_before(stage: &Stage, promotable: usize) -> Result<()> {
    let service = stage.operator.service("redis")?;
    ensure!(service.epoch == 1, "the OVM was deposed: {:#?}", service.servers);
    ensure!(service.promotable() == promotable, "a replica was hurt: {:#?}", service.servers);
    Ok(())
}

/// A client's handshake and SET at a server's own address; returns the server's answer.
fn converse_directly(client: &Place, own: Own, port: u16) -> Result<bool> {
    const ME: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 225);
    client.run(move || {
        let wire = Wire::open_only()?;
        let mac = wire.mac;
        let (me, victim) = (SocketAddr::new(ME.into(), port), SocketAddr::new(own.v4.into(), 6379));
        let answer = |limit| {
            wire.next_frame(limit, |frame| {
                let asks = frame.get(12..14) == Some(&[8, 6]) && frame.get(38..42) == Some(&ME.octets());
                if asks
                    && let (Some(Ok(asker)), Some(Ok(address))) =
                        (frame.get(22..28).map(Mac::try_from), frame.get(28..32).map(<[u8; 4]>::try_from))
                {
                    // Nobody else has that address.
                    let _ = wire.send(&arp(2, (mac, ME), (asker, address.into()), asker));
                }
                crate::client::frames::parse(frame).filter(|seen| seen.to == me)
            })
        };
        let mut segment = Segment::new(me, victim, SYN);
        segment.sequence = 1_000;
        wire.send(&segment.frame(mac, own.mac))?;
        let Some(accepted) = answer(Duration::from_millis(1_500))? else { return Ok(false) };
        segment.sequence = 1_001;
        segment.acknowledgment = accepted.sequence.wrapping_add(1);
        segment.flags = ACK;
        wire.send(&segment.frame(mac, own.mac))?;
        segment.flags = ACK | PSH;
        segment.payload = b"SET direct written\r\n".to_vec();
        wire.send(&segment.frame(mac, own.mac))?;
        answer(Duration::from_millis(1_000))?;
        Ok(true)
    })
}

/// Neither a client nor dom0 itself can open a connection to the OVM's own address at the service's port; other ports are not
/// touched.
fn direct_conversation(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("direct")?;
    let (ovm, dom0) = (stage.lab.domain("guest-1")?, stage.lab.dom0());
    let own = Own::of(&ovm)?;
    let answered = converse_directly(&stage.client(), own, 40_001)?;
    sleep(Duration::from_millis(500));
    expect_as_before(&stage, 1)?;
    let inside = own_address(&ovm, Service::Redis)?;
    let held = inside.0.run(move || Session::connect(inside.1)?.ask(&["GET", "direct"]))?;
    ensure!(held.text().is_none(), "what was written at the OVM's own address is there: {held:?}");
    ensure!(!answered, "a conversation with the OVM's own address began");
    wait_counted(&stage, "direct_refused", 1)?;
    let from_dom0 = Place::new(dom0.netns.clone());
    let service = SocketAddr::new(own.v4.into(), 6379);
    let connected = from_dom0
        .run(move || Ok(TcpStream::connect_timeout(&service, Duration::from_millis(500)).is_ok()))?;
    ensure!(!connected, "dom0 reaches the OVM's service beside the PSC");
    wait_counted(&stage, "direct_refused", 2)?;
    expect_as_before(&stage, 1)?;
    // A monitor on another port.
    let listener = Place::new(ovm.host.netns.clone()).run(move || Ok(TcpListener::bind((own.v4, 9_100))?))?;
    let monitor = SocketAddr::new(own.v4.into(), 9_100);
    for place in [stage.client(), from_dom0] {
        place.run(move || Ok(TcpStream::connect_timeout(&monitor, Duration::from_secs(2)).map(drop)?))?;
    }
    drop(listener);
    stage.survives_freeze(load)
}

/// With `direct = "allow"`, clients reach the server's own address.
fn direct_allowed(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 1, &[Service::Redis]), |config| {
        config.replace("attach =", "direct = \"allow\"\nattach =")
    })?;
    let ovm = stage.lab.domain("guest-1")?;
    let own = Own::of(&ovm)?;
    let ear = listen(&Place::new(ovm.host.netns.clone()), "eth0", |frame| {
        crate::client::frames::parse(frame).is_some_and(|seen| seen.to.port() == 6379 && seen.flags == SYN)
    })?;
    converse_directly(&stage.client(), own, 40_002)?;
    ensure!(ear.end()? == 1, "nobody is heard at the OVM's own address");
    ensure!(counter(&stage, "direct_refused")? == 0, "it was refused");
    Ok(())
}

/// Sets a vif's backend node in xenstore to the state that follows from a netfront's.
fn set_backend_state(lab: &Lab, guest: &Domain, state: u32) -> Result<()> {
    let path = format!("/local/domain/0/backend/vif/{}/0/state", guest.domid);
    write_nodes(lab, &[(path, state.to_string())])
}

fn write_nodes(lab: &Lab, nodes: &[(String, String)]) -> Result<()> {
    let mut command = std::process::Command::new("xenstore-write");
    command.env("XENSTORED_PATH", lab.directory().join("xenstored.sock"));
    for (path, value) in nodes {
        command.arg(path).arg(value);
    }
    let output = command.output().context("xenstore-write (package xenstore-utils)")?;
    ensure!(output.status.success(), "xenstore-write: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A replica's netfront closes and connects again and again, while the guest sends; nobody hears it.
fn toggle(stage: &Stage, guest: &Domain) -> Result<()> {
    let psc = Psc::of(stage)?;
    let ear = ear_for(stage, guest)?;
    let babble = Babble::begin(guest, "eth0", psc)?;
    for _ in 0..4 {
        for state in [5, 6, 2, 4] {
            set_backend_state(&stage.lab, guest, state)?;
            sleep(Duration::from_millis(120));
        }
    }
    // Away for good, its interface as it was.
    set_backend_state(&stage.lab, guest, 6)?;
    sleep(Duration::from_millis(500));
    babble.end()?;
    let heard = ear.end()?;
    ensure!(heard == 0, "{heard} frames of {} reached the client's link", guest.name);
    Ok(())
}

fn toggling_replica(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let load = stage.load("toggles")?;
    toggle(&stage, &stage.lab.domain("guest-2")?)?;
    expect_as_before(&stage, 1)?;
    stage.survives_freeze(load)
}

/// The same for a deposed OVM that is fenced by isolation.
fn toggling_isolated(lab: &str) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis]), isolating)?;
    let load = stage.load("toggles")?;
    depose(&stage, "isolate")?;
    toggle(&stage, &stage.lab.domain("guest-1")?)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
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

/// Somebody removes the rules, under load and while a replica sends: dom0d restores them within a second, and reports it.
fn rules_taken(lab: &str, script: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("rules")?;
    let (dom0, guest) = (stage.lab.dom0(), stage.lab.domain("guest-2")?);
    let babble = Babble::begin(&guest, "eth0", Psc::of(&stage)?)?;
    let rules = || Ok::<_, anyhow::Error>(dom0.run(&["nft", "--stateless", "list", "ruleset"])?.stdout);
    // What is written at the moment settles.
    sleep(Duration::from_millis(300));
    let before = rules()?;
    for _ in 0..3 {
        let now_us = now_ns() / 1_000;
        let ear = ear_for(&stage, &guest)?;
        let begun = Instant::now();
        dom0.run(&["sh", "-c", script])?;
        ensure!(rules()? != before || begun.elapsed() > Duration::from_millis(50), "nothing was taken away");
        let restored = stage.events.wait("restored", "redis", now_us, Duration::from_secs(5));
        let said = restored.map(|_| begun.elapsed())?;
        let leaked = ear.end()?;
        println!("  put back after {} ms, {leaked} frames leaked", said.as_millis());
        ensure!(leaked == 0, "{leaked} frames of the replica were heard while the rules were away");
        ensure!(said < NOTICED, "that took {said:?}");
        ensure!(rules()? == before, "the rules are others than before");
        let ear = ear_for(&stage, &guest)?;
        sleep(Duration::from_millis(200));
        ensure!(ear.end()? == 0, "the replica is heard though the rules are back");
    }
    let restored = stage.operator.status()?.counters.get("rules_restored").copied();
    ensure!(restored >= Some(3), "rules_restored is {restored:?}");
    babble.end()?;
    expect_as_before(&stage, 1)?;
    stage.survives_freeze(load)
}

/// Somebody detaches a program of the fast path, under load: dom0d restores it at once, and accuses nobody for the segments
/// that it missed.
fn program_taken(lab: &str, of_anchor: bool, script: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 2, &[Service::Redis]), &|line| println!("  {line}"))?;
    let config = with_plane(&lab.default_config(), Plane::Bpf);
    let stage = Stage::take(lab, &config)?;
    let load = stage.load("programs")?;
    let dom0 = stage.lab.dom0();
    let hex: String = stage.psc_mac(Service::Redis)?.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut interfaces = vec![stage.lab.domain("guest-1")?.vif, stage.lab.domain("guest-2")?.vif];
    if of_anchor {
        interfaces = vec![format!("usa{hex}")];
    }
    for interface in interfaces {
        for _ in 0..3 {
            let now_us = now_ns() / 1_000;
            let begun = Instant::now();
            dom0.run(&["sh", "-c", &script.replace("DEV", &interface)])?;
            stage.events.wait("restored", "redis", now_us, Duration::from_secs(5))?;
            let said = begun.elapsed();
            println!("  {interface}: put back after {} ms", said.as_millis());
            ensure!(said < NOTICED, "that took {said:?}");
            load.wait_answers(300, Duration::from_secs(20))?;
            ensure!(load.broken() == 0, "clients noticed");
        }
        expect_as_before(&stage, 2)?;
    }
    let forwarded = |name| counter(&stage, name);
    let before = (forwarded("client_forwarded")?, forwarded("server_forwarded")?);
    load.wait_answers(300, Duration::from_secs(20))?;
    let after = (forwarded("client_forwarded")?, forwarded("server_forwarded")?);
    ensure!(
        after.0 > before.0 && after.1 > before.1,
        "the kernel passes nothing any more: {before:?}, {after:?}"
    );
    stage.survives_freeze(load)
}

/// Gives a guest another vif, a port of this bridge, with its nodes in xenstore.
fn plug_second(stage: &Stage, guest: &Domain, bridge: &str) -> Result<()> {
    let dom0 = stage.lab.dom0();
    let vif = format!("vif{}.1", guest.domid);
    let backend = format!("/local/domain/0/backend/vif/{}/1", guest.domid);
    let frontend = format!("/local/domain/{}/device/vif/1", guest.domid);
    let nodes = [
        ("frontend", frontend.as_str()),
        ("frontend-id", &guest.domid.to_string()),
        ("online", "1"),
        ("mac", "00:16:3e:77:02:01"),
        ("bridge", bridge),
        ("handle", "1"),
        ("vifname", &vif),
        ("state", "2"),
    ];
    let nodes = nodes.map(|(key, value)| (format!("{backend}/{key}"), value.to_owned()));
    write_nodes(&stage.lab, &nodes)?;
    let master = if bridge.is_empty() { String::new() } else { format!("ip link set {vif} master {bridge}") };
    let script = format!(
        "set -e; ip link add {vif} type veth peer name eth1 netns {inside}
         echo 1 > /proc/sys/net/ipv6/conf/{vif}/disable_ipv6
         ip link set {vif} address fe:ff:ff:ff:ff:ff arp off; {master}
         ip link set {vif} up; ip netns exec {inside} ip link set eth1 address 00:16:3e:77:02:01 up",
        inside = guest.host.netns
    );
    dom0.run(&["sh", "-c", &script])?;
    write_nodes(&stage.lab, &[(format!("{backend}/state"), "4".to_owned())])
}

/// A replica's second vif is contained like the first, and before it is up; the OVM's is free, except to claim the PSC.
fn second_vif(lab: &str, bridge: &'static str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("second")?;
    let (dom0, psc, replica) = (stage.lab.dom0(), Psc::of(&stage)?, stage.lab.domain("guest-2")?);
    let (ear_place, ear_at) = if bridge == BRIDGE {
        (stage.client(), "eth0")
    } else {
        let script = "set -e; ip link add xenbr1 type bridge stp_state 0 forward_delay 0; ip link set xenbr1 up
            ip link add other type veth peer name otherend; ip link set other master xenbr1 up; ip link set otherend up";
        dom0.run(&["sh", "-c", script])?;
        (Place::new(dom0.netns.clone()), "otherend")
    };
    let mac = [0x00, 0x16, 0x3e, 0x77, 0x02, 0x01];
    let from_second = move |frame: &[u8]| frame.get(6..12) == Some(&mac);
    plug_second(&stage, &replica, bridge)?;
    // What xenstore tells is known by then.
    sleep(Duration::from_millis(500));
    let ear = listen(&ear_place, ear_at, from_second)?;
    let babble = Babble::begin(&replica, "eth1", psc)?;
    sleep(Duration::from_millis(500));
    babble.end()?;
    let heard = ear.end()?;
    ensure!(heard == 0, "{heard} frames of the replica's second vif were heard on {bridge}");
    stage.until("the second vif is known", Duration::from_secs(5), |status| {
        status.services.iter().flat_map(|service| &service.contained).any(|vif| vif.ends_with(".1"))
    })?;
    expect_as_before(&stage, 1)?;

    // Once it serves, it may talk there.
    stage.operator.order(&["switchover", "redis"])?;
    sleep(Duration::from_millis(500));
    let ear = listen(&ear_place, ear_at, from_second)?;
    let lie = listen(&ear_place, ear_at, move |frame| {
        from_second(frame) && frame.windows(4).any(|part| part == psc.v4.octets())
    })?;
    let babble = Babble::begin(&replica, "eth1", psc)?;
    sleep(Duration::from_millis(500));
    babble.end()?;
    ensure!(ear.end()? > 100, "the OVM's second vif is cut off");
    ensure!(lie.end()? == 0, "the OVM speaks for the PSC through its second vif");
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// A replica's second vif is routed and no port of a bridge: dom0 itself hears it only once the domain serves.
fn second_vif_routed(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("routed")?;
    let (dom0, replica) = (stage.lab.dom0(), stage.lab.domain("guest-2")?);
    plug_second(&stage, &replica, "")?;
    dom0.run(&["ip", "address", "add", "10.99.0.1/24", "dev", &format!("vif{}.1", replica.domid)])?;
    replica.run(&["ip", "address", "add", "10.99.0.2/24", "dev", "eth1"])?;
    // The vif answers no ARP.
    let vif_mac = "fe:ff:ff:ff:ff:ff";
    replica.run(&["ip", "neigh", "replace", "10.99.0.1", "lladdr", vif_mac, "dev", "eth1"])?;
    let heard = || {
        let socket = Place::new(dom0.netns.clone()).run(|| Ok(UdpSocket::bind("10.99.0.1:9000")?))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        Place::new(replica.host.netns.clone()).run(|| {
            UdpSocket::bind("10.99.0.2:0")?.send_to(b"hello", "10.99.0.1:9000")?;
            Ok(())
        })?;
        Ok::<_, anyhow::Error>(socket.recv(&mut [0; 8]).is_ok())
    };
    ensure!(!heard()?, "dom0 hears what the replica sends through a routed vif");
    expect_as_before(&stage, 1)?;
    stage.operator.order(&["switchover", "redis"])?;
    sleep(Duration::from_millis(500));
    ensure!(heard()?, "dom0 does not hear the OVM");
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)
}

/// A vif with its backend in a driver domain can't be contained: the domain does not become a replica, and the status says why.
fn second_vif_refused(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let load = stage.load("elsewhere")?;
    let replica = stage.lab.domain("guest-2")?;
    let node = format!("/libxl/{}/device/vif/1/backend", replica.domid);
    write_nodes(&stage.lab, &[(node, format!("/local/domain/77/backend/vif/{}/1", replica.domid))])?;
    // What tells dom0d to list anew.
    set_backend_state(&stage.lab, &replica, 4)?;
    stage.until("guest-2 is refused", Duration::from_secs(5), |status| {
        let known = status.services.iter().flat_map(|service| &service.known);
        known.into_iter().any(|known| {
            let said = ["vif 1", "another domain", "understudy detach"];
            known.domain.name == "guest-2" && said.iter().all(|part| known.reason.contains(part))
        })
    })?;
    expect_as_before(&stage, 1)?;
    // It is held all the same, until the operator lets it go.
    let is_heard = || {
        let ear = ear_for(&stage, &replica)?;
        let babble = Babble::begin(&replica, "eth0", Psc::of(&stage)?)?;
        sleep(Duration::from_millis(500));
        babble.end()?;
        Ok::<_, anyhow::Error>(ear.end()? > 0)
    };
    ensure!(!is_heard()?, "a domain that is refused is heard");
    stage.operator.order(&["detach", "redis", "guest-2"])?;
    sleep(Duration::from_millis(500));
    ensure!(is_heard()?, "a domain that was detached is not heard");
    stage.survives_freeze(load)
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
