//! Hostile clients: segments that no TCP sends, handshakes that never end, more conversations than
//! the table holds. The honest ones notice nothing.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::Scenario;
use super::transfer::{Direction, Large};
use crate::client::forger::{self, BENDS, BROKEN_IP, BROKEN_TCP, Forger, PARTIAL_TCP, command};
use crate::client::frames::{ACK, Mac, PSH, Segment};
use crate::client::hostile::{malformed, syn_flood};
use crate::client::redis::load::{Plan, Running};
use crate::client::redis::session::Session;
use crate::client::sniff::Wire;
use crate::host::{Fault, Lab, Plane, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, with_plane};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("hostile/malformed/ipv4", |lab| garbage(lab, false)),
        Scenario::new("hostile/malformed/ipv6", |lab| garbage(lab, true)),
        Scenario::new("hostile/malformed/from-ovm", garbage_of_ovm),
        Scenario::new("hostile/bent/bpf", |lab| bent(lab, Plane::Bpf)),
        Scenario::new("hostile/bent/pcap", |lab| bent(lab, Plane::Pcap)),
        Scenario::new("hostile/broken-acknowledgments/bpf", |lab| broken_acknowledgments(lab, Plane::Bpf)),
        Scenario::new("hostile/broken-acknowledgments/pcap", |lab| broken_acknowledgments(lab, Plane::Pcap)),
        Scenario::new("hostile/syn-flood", flood),
        Scenario::new("hostile/syn-flood/while-suspended", flood_while_suspended),
        Scenario::new("hostile/full-table", full_table),
        Scenario::new("hostile/handshake-pushed-out", pushed_out),
        Scenario::new("hostile/out-of-order", out_of_order),
    ]
}

/// Malformed, truncated and contradictory segments in the name of an honest connection, and then a
/// failover: the honest connection and its replica are unharmed.
fn garbage(lab: &str, ipv6: bool) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let target = stage.psc_of_family(Service::Redis, ipv6)?;
    let (mut session, template) = stage.client().run(move || {
        let wire = Wire::open_only()?;
        let mut session = Session::connect(target)?;
        for n in 0..50 {
            session.ask(&["INCR", "honest"])?;
            session.ask(&["SET", &format!("key{n}"), "value"])?;
        }
        let local = session.local()?;
        // What was captured so far is old; the newest request is the template.
        session.ask(&["INCR", "honest"])?;
        let mut template = None;
        while let Some(seen) =
            wire.next(Duration::from_millis(200), |seen| seen.from == local && seen.flags & PSH != 0)?
        {
            template = Some(seen);
        }
        Ok((session, template.context("no request was seen on the client's link")?))
    })?;
    let load = Plan::new(target, "honest").start(&stage.client())?;
    stage.client().run(move || {
        let wire = Wire::open_only()?;
        malformed(&wire, &template, 17_000, 11)
    })?;
    load.wait_answers(1_000, Duration::from_secs(20))?;
    ensure!(
        session.ask(&["GET", "honest"])?.text().as_deref() == Some("51"),
        "the honest connection's counter is wrong"
    );
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    load.wait_answers(1_000, Duration::from_secs(20))?;
    ensure!(
        session.ask(&["GET", "honest"])?.text().as_deref() == Some("51"),
        "the honest connection's counter is wrong after the failover"
    );
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    failover.expect_plausible()
}

/// The same from the OVM's own vif, in the name of its conversations.
fn garbage_of_ovm(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("honest")?;
    // Well-formed new bytes are its answer, whatever they say: these contradict what was acknowledged.
    super::replica::garbage(&stage.lab.domain("guest-1")?, 100)?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.survives_freeze(load)
}

/// Writes in segments that a kernel drops or that can be read in more than one way: either nobody acknowledges the write, or
/// every replica has it.
fn bent(lab: &str, plane: Plane) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis]), |config| with_plane(&config, plane))?;
    let (psc, psc_mac) = (stage.psc(Service::Redis)?, stage.psc_mac(Service::Redis)?);
    let load = stage.load("honest")?;
    let answered = stage.client().run(move || {
        let mut answered = Vec::new();
        for (n, (name, bend)) in BENDS.into_iter().enumerate() {
            let mut forger = Forger::connect(forger::address(n)?, psc, psc_mac)?;
            // Twice: with the first the kernel does not know the conversation yet.
            for _ in 0..2 {
                forger.ask(&command(&["PING"]))?;
                std::thread::sleep(Duration::from_millis(5));
            }
            let write = command(&["SET", &format!("bent{n}"), "written"]);
            let mut frame = forger.frame(&forger.segment(ACK | PSH, &write));
            bend(&mut frame);
            forger.send(&frame)?;
            let answer = forger.line(Duration::from_millis(300))?;
            println!("  {name}: {}", answer.as_deref().unwrap_or("no answer"));
            if answer.is_some() {
                forger.advance(write.len());
            }
            let again = forger.ask(&command(&["INCR", &format!("count{n}")]));
            if answer.is_some() {
                answered.push(n);
                ensure!(again.is_ok_and(|line| line == ":1"), "{name}: the conversation does not go on");
            }
            forger.reset()?;
        }
        Ok(answered)
    })?;
    load.wait_answers(300, Duration::from_secs(20))?;
    let report = stage.operator.service("redis")?;
    ensure!(report.promotable() == 2, "a replica lacks something: {:#?}", report.servers);
    ensure!(stage.ovm(Service::Redis)?.name == "guest-1", "a healthy OVM was deposed");
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    stage.client().run(move || {
        let mut session = Session::connect(psc)?;
        for n in answered {
            let held = session.ask(&["GET", &format!("bent{n}")])?.text();
            ensure!(
                held.as_deref() == Some("written"),
                "{}: its write was acknowledged, and is lost",
                BENDS[n].0
            );
        }
        Ok(())
    })?;
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.expect_unharmed(&load.finish()?)?;
    failover.expect_plausible()
}

/// A client fetches several windows of data, and acknowledges only with segments that the OVM's kernel drops: nobody takes
/// them for acknowledgments, and nobody is accused because the answer stops.
fn broken_acknowledgments(lab: &str, plane: Plane) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis]), |config| with_plane(&config, plane))?;
    let (psc, psc_mac) = (stage.psc(Service::Redis)?, stage.psc_mac(Service::Redis)?);
    stage.client().run(move || {
        let mut session = Session::connect(psc)?;
        session.ask(&["SET", "big", &"x".repeat(400_000)])?;
        for (n, (name, bend)) in [BROKEN_IP, BROKEN_TCP, PARTIAL_TCP].into_iter().enumerate() {
            let mut forger = Forger::connect(forger::address(n)?, psc, psc_mac)?;
            forger.ask(&command(&["PING"]))?;
            std::thread::sleep(Duration::from_millis(50));
            let request = command(&["GET", "big"]);
            forger.send(&forger.frame(&forger.segment(ACK | PSH, &request)))?;
            forger.advance(request.len());
            let end = Instant::now() + Duration::from_secs(3);
            while Instant::now() < end {
                if forger.hear(Duration::from_millis(50))? {
                    let mut frame = forger.frame(&forger.segment(ACK, b""));
                    bend(&mut frame);
                    forger.send(&frame)?;
                }
            }
            println!("  {name}: {} bytes came", forger.said.len());
            ensure!(!forger.said.is_empty(), "{name}: nothing came");
            forger.reset()?;
        }
        session.ask(&["PING"])
    })?;
    let suspected = stage.events.since("suspected", "redis", 0);
    ensure!(suspected.is_empty(), "a healthy OVM was accused: {suspected:#?}");
    ensure!(stage.ovm(Service::Redis)?.name == "guest-1", "a healthy OVM was deposed");
    let report = stage.operator.service("redis")?;
    ensure!(report.promotable() == 2, "a replica lacks something: {:#?}", report.servers);
    Ok(())
}

/// 100,000 SYNs of clients that never answer, within ten seconds, while honest ones work and new
/// honest ones come; then a failover.
fn flood(lab: &str) -> Result<()> {
    let plan = Stage::plan(lab, 1, &[Service::Redis]);
    let stage = Stage::up_with(plan, |config| format!("{config}\n[service.limits]\nembryonic = 32768\n"))?;
    let target = stage.psc(Service::Redis)?;
    let mac = stage.psc_mac(Service::Redis)?;
    let load = Plan::new(target, "honest").start(&stage.client())?;
    load.wait_answers(300, Duration::from_secs(20))?;
    let flooding = stage.client().spawn("flood", move || {
        let wire = Wire::open_only()?;
        syn_flood(&wire, mac, target, (100_000, 0), Duration::from_secs(10))
    })?;
    let mut newcomers = 0;
    while !flooding.is_finished() {
        stage.client().run(move || {
            let mut session = Session::connect(target)?;
            session.ask(&["INCR", "newcomers"])
        })?;
        newcomers += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    let sent = crate::client::place::join(flooding)?;
    let service = stage.operator.service("redis")?;
    println!(
        "  {sent} SYNs, {newcomers} honest clients came meanwhile; {} handshakes pending, {} bytes held",
        service.embryonic, service.retained_bytes
    );
    ensure!(sent > 10_000, "only {sent} SYNs were sent");
    ensure!(
        service.embryonic <= 32_768,
        "{} pending handshakes are kept, the limit is 32,768",
        service.embryonic
    );
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.survives_freeze(load)
}

/// A flood pushes a client's handshake out of the table; then the client completes it and writes. Its connection is refused,
/// and no replica is lost.
fn pushed_out(lab: &str) -> Result<()> {
    let plan = Stage::plan(lab, 1, &[Service::Redis]);
    let stage = Stage::up_with(plan, |config| format!("{config}\n[service.limits]\nembryonic = 2048\n"))?;
    let (target, mac) = (stage.psc(Service::Redis)?, stage.psc_mac(Service::Redis)?);
    let client = stage.lab.client();
    // All but its SYN is lost on the way.
    let lose = format!(
        "add table inet lost; add chain inet lost out {{ type filter hook output priority 0; }}; \
         add rule inet lost out tcp dport {} tcp flags & syn == 0 drop",
        target.port()
    );
    client.run(&["nft", &lose])?;
    let mut session = stage.client().run(move || Session::connect(target))?;
    let sent = stage.client().run(move || {
        let wire = Wire::open_only()?;
        syn_flood(&wire, mac, target, (20_000, 0), Duration::from_secs(5))
    })?;
    stage.until("the flood heard", Duration::from_secs(10), |status| {
        status.services[0].counters.get("embryonic").is_some_and(|n| *n > 0)
    })?;
    client.run(&["nft", "delete table inet lost"])?;
    let answer = session.ask(&["SET", "embryo", "acknowledged"]);
    println!("  after {sent} SYNs: {answer:?}");
    let service = stage.operator.service("redis")?;
    ensure!(service.promotable() == 1, "the replica was lost to it: {:#?}", service.servers);
    if answer.is_ok() {
        let held = stage.lab.domain("guest-2")?.run(&["redis-cli", "GET", "embryo"])?;
        ensure!(
            String::from_utf8_lossy(&held.stdout).contains("acknowledged"),
            "the write is on the OVM alone"
        );
    } else {
        ensure!(
            service.counters.get("unknown_refused").is_some_and(|n| *n > 0),
            "nothing counts the refusal"
        );
    }
    stage.survives_freeze(stage.load("honest")?)
}

/// Bytes behind gaps, in many connections, take no memory from other connections: they are dropped, and no replica is
/// evicted for them.
fn out_of_order(lab: &str) -> Result<()> {
    let plan = Stage::plan(lab, 2, &[Service::Redis]);
    let limits = "conversation_bytes = 1048576\nretained_bytes = 8388608\nout_of_order_bytes = 2097152";
    let stage = Stage::up_with(plan, |config| format!("{config}\n[service.limits]\n{limits}\n"))?;
    let target = stage.psc(Service::Redis)?;
    let load = stage.load("honest")?;
    let hostile = stage.client().run(move || {
        let wire = Wire::open_only()?;
        (0..250).map(|_| leave_gap(&wire, target)).collect::<Result<Vec<_>>>()
    })?;
    let service = stage.operator.service("redis")?;
    let counted = service.counters.get("out_of_order_bytes").copied().unwrap_or_default();
    println!("  {} bytes held, {counted} segments found no room", service.retained_bytes);
    ensure!(counted > 0, "nothing was refused");
    ensure!(service.promotable() == 2, "replicas were lost to it: {:#?}", service.servers);
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.survives_freeze(load)?;
    drop(hostile);
    Ok(())
}

/// A connection in which 60 KB come behind a gap.
fn leave_gap(wire: &Wire, target: SocketAddr) -> Result<Session> {
    let mut session = Session::connect(target)?;
    let local = session.local()?;
    session.ask(&["PING"])?;
    let asks = |seen: &crate::client::frames::Seen| seen.from == local && seen.flags & PSH != 0;
    let seen =
        wire.next(Duration::from_secs(1), asks)?.context("no request was seen on the client's link")?;
    for offset in (1_400..60_000).step_by(1_400) {
        let mut segment = Segment::new(seen.from, seen.to, ACK);
        segment.sequence = seen.sequence.wrapping_add(seen.payload as u32 + offset);
        segment.acknowledgment = seen.acknowledgment;
        segment.options = [&[1, 1, 8, 10], &seen.tsval.to_be_bytes()[..], &[0; 4]].concat();
        segment.payload = vec![b'y'; 1_400];
        // An interface without room loses the frame, as a wire may.
        wire.send(&segment.frame(seen.source, seen.destination))?;
    }
    Ok(session)
}

/// Nobody reads the rings while a flood of SYNs arrives that would fill them several times: it gets its share and no more.
/// Open conversations continue, a download as far as its window reaches, and replicas lack nothing: each serves in turn.
fn flood_while_suspended(lab: &str) -> Result<()> {
    let services = [Service::Redis, Service::Http];
    let lab = Lab::up(Stage::plan(lab, 2, &services), &|line| println!("  {line}"))?;
    // Far longer than it is away: else the kernel would have gone on alone. In both services the same one takes over.
    let config = with_plane(&lab.default_config(), Plane::Bpf)
        .replace("rvms = ", "daemon_grace_ms = 60000\ncandidate = \"queue\"\nrvms = ");
    let stage = Stage::take(lab, &config)?;
    let load = stage.load("suspended")?;
    let large = Large::begin(&stage, Direction::Download, false)?;
    large.wait_part(0.2)?;
    let dom0d = stage.dom0d.as_ref().context("no dom0d")?;
    let targets = services
        .map(|service| Ok((stage.psc(service)?, stage.psc_mac(service)?)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    dom0d.signal(Signal::SIGSTOP)?;
    let flooded = flood_all(&stage, targets, &load);
    dom0d.signal(Signal::SIGCONT)?;
    flooded?;
    for service in services {
        let report = stage.operator.service(service.name())?;
        let counted = |name: &str| report.plane_counters.get(name).copied().unwrap_or_default();
        println!("  {}: {} SYNs found their share full", service.name(), counted("ring_share_full"));
        ensure!(counted("ring_share_full") > 0, "the SYNs did not fill the share of strangers");
        for name in ["ring_full", "unrecorded"] {
            ensure!(counted(name) == 0, "{name} is {}: SYNs filled what clients depend on", counted(name));
        }
        ensure!(report.promotable() == 2, "a replica missed something: {:#?}", report.servers);
    }
    load.wait_answers(300, Duration::from_secs(20))?;
    stage.client().run({
        let target = stage.psc(Service::Redis)?;
        move || Session::connect(target)?.ask(&["PING"])
    })?;
    for part in [0.4, 0.7] {
        large.wait_part(part)?;
        let ovm = stage.ovm(Service::Redis)?.name;
        let at = stage.lab.fault(Fault::Freeze, &ovm)?;
        for service in services {
            Failover::observe(&stage, service, Fault::Freeze, at)?.expect_plausible()?;
        }
        load.wait_answers(300, Duration::from_secs(20))?;
    }
    let whole = large.expect_whole(&stage)?;
    ensure!(
        whole.longest_gap.0 > Duration::from_millis(500),
        "dom0d's absence did not show: was it suspended?"
    );
    stage.expect_unharmed(&load.finish()?)
}

/// Floods the service, while the load must continue.
fn flood_all(stage: &Stage, targets: Vec<(SocketAddr, Mac)>, load: &Running) -> Result<()> {
    // A ring is 32 MiB, and the record of such a SYN 2 KiB.
    const SYNS: usize = 40_000;
    let begun = Instant::now();
    let flooding = stage.client().spawn("flood", move || {
        let wire = Wire::open_only()?;
        let flood = |(target, mac)| syn_flood(&wire, mac, target, (SYNS, 1_200), Duration::from_secs(5));
        targets.into_iter().map(flood).sum::<Result<usize>>()
    })?;
    while !flooding.is_finished() || begun.elapsed() < Duration::from_millis(1_500) {
        load.wait_answers(50, Duration::from_secs(10))?;
    }
    let sent = crate::client::place::join(flooding)?;
    println!("  {sent} SYNs while dom0d was suspended");
    // The rings are as full as they get now.
    load.wait_answers(300, Duration::from_secs(10))
}

/// The table holds 16 conversations and 24 come: the last 8 are served, visibly unprotected; the first 16 survive a promotion
/// that an operator forces.
fn full_table(lab: &str) -> Result<()> {
    let plan = Stage::plan(lab, 1, &[Service::Redis]);
    let stage = Stage::up_with(plan, |config| format!("{config}\n[service.limits]\nconversations = 16\n"))?;
    let target = stage.psc(Service::Redis)?;
    let open = |prefix: &str, connections: usize| {
        let mut plan = Plan::new(target, prefix);
        plan.connections = connections;
        plan.busy = connections;
        plan.start(&stage.client())
    };
    let first = open("first", 16)?;
    first.wait_answers(200, Duration::from_secs(20))?;
    let late = open("late", 8)?;
    late.wait_answers(200, Duration::from_secs(20))?;
    first.wait_answers(200, Duration::from_secs(20))?;
    let service = stage.operator.service("redis")?;
    ensure!(service.conversations <= 16, "{} conversations are in a table of 16", service.conversations);
    let told = stage.events.since("unprotected", "redis", 0);
    ensure!(
        !told.is_empty() || service.counters.iter().any(|(name, n)| name == "conversations" && *n > 0),
        "nothing tells that conversations flow unprotected: {:?}",
        service.counters
    );
    let late = late.finish()?;
    ensure!(late.troubles() == 0, "latecomers were hurt: {:#?}", late.errors);
    stage.operator.order(&["failover", "redis", "--to", "guest-2", "--force"])?;
    first.wait_answers(200, Duration::from_secs(20))?;
    let outcome = first.finish()?;
    stage.expect_unharmed(&outcome)
}
