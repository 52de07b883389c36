//! A replica can't hurt: whatever one of them does, at whatever stage, clients notice nothing, and
//! a sound one is promoted when it is needed.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::Scenario;
use super::transfer::{Direction, Large};
use crate::client::frames::{ACK, RST, Segment};
use crate::client::hostile::malformed;
use crate::client::redis::load::Plan;
use crate::client::redis::session::Session;
use crate::client::sniff::Wire;
use crate::host::{Domain, Fault, Lab, Link, Plane, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, own_address, with_plane};

/// What the replica does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Destroyed,
    Crashes,
    Frozen,
    Spins,
    Hangs,
    ServiceDies,
    AnswersWrong,
    Floods,
    SendsResets,
    SendsGarbage,
}

const TROUBLES: [(Trouble, &str); 10] = [
    (Trouble::Destroyed, "destroyed"),
    (Trouble::Crashes, "crashes"),
    (Trouble::Frozen, "frozen"),
    (Trouble::Spins, "spins"),
    (Trouble::Hangs, "hangs"),
    (Trouble::ServiceDies, "service-dies"),
    (Trouble::AnswersWrong, "answers-wrong"),
    (Trouble::Floods, "floods"),
    (Trouble::SendsResets, "sends-resets"),
    (Trouble::SendsGarbage, "sends-garbage"),
];

impl Trouble {
    /// Whether an OVM is deposed for it. An OVM may answer what it likes.
    fn deposes(self) -> bool {
        matches!(
            self,
            Self::Destroyed | Self::Crashes | Self::Frozen | Self::Spins | Self::Hangs | Self::ServiceDies
        )
    }
}

/// When it does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Before any client came.
    Before,
    /// While clients are connecting.
    Opening,
    /// Under load.
    Busy,
    /// While another replica takes over.
    Recuperating,
    /// When it has itself just taken over.
    Successor,
}

const STAGES: [(When, &str); 5] = [
    (When::Before, "before"),
    (When::Opening, "opening"),
    (When::Busy, "busy"),
    (When::Recuperating, "recuperating"),
    (When::Successor, "successor"),
];

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (trouble, name) in TROUBLES {
        for (stage, stage_name) in STAGES {
            if stage == When::Successor && !trouble.deposes() {
                continue;
            }
            all.push(
                Scenario::new(format!("replica/{name}/{stage_name}"), move |lab| play(lab, trouble, stage))
                    .within(Duration::from_secs(90)),
            );
        }
    }
    all.push(Scenario::new("replica/hangs/download", hangs_in_download));
    all.push(Scenario::new("replica/slow/never-waited-for", slow));
    all.push(Scenario::new("replica/evicted/goes-on", evicted));
    all.push(Scenario::new("replica/floods/own-ring", own_ring));
    all
}

/// guest-2 makes the trouble, guest-1 serves, guest-3 is sound and takes over at the end. While
/// another one takes over, it is guest-3 that makes the trouble: guest-2 is the first in the queue.
fn play(lab: &str, trouble: Trouble, when: When) -> Result<()> {
    let stage = Stage::up_with(Stage::plan(lab, 2, &[Service::Redis]), |config| match when {
        When::Recuperating => config.replace("attach =", "candidate = \"queue\"\nattach ="),
        _ => config,
    })?;
    if matches!(when, When::Before) {
        make(&stage, trouble, "guest-2")?;
    }
    let mut plan = Plan::new(stage.psc(Service::Redis)?, "trouble");
    plan.connections = 60;
    plan.busy = 10;
    plan.depth = 4;
    plan.pace = Some(Duration::from_millis(10));
    let load = if matches!(when, When::Opening) {
        std::thread::scope(|scope| {
            let trouble = scope.spawn(|| {
                sleep(Duration::from_millis(3));
                make(&stage, trouble, "guest-2")
            });
            let load = plan.start(&stage.client());
            trouble.join().map_err(|_| anyhow::anyhow!("the trouble could not be made"))??;
            load
        })?
    } else {
        plan.start(&stage.client())?
    };
    load.wait_answers(2_000, Duration::from_secs(30))?;
    if matches!(when, When::Busy) {
        make(&stage, trouble, "guest-2")?;
        load.wait_answers(2_000, Duration::from_secs(30))?;
    }
    if trouble == Trouble::SendsResets && matches!(when, When::Opening | When::Busy) {
        // A RST misses while its conversation moves on.
        let deadline = Instant::now() + Duration::from_secs(10);
        while covers_all(&stage, "guest-2")? {
            ensure!(Instant::now() < deadline, "guest-2 has reset no conversation");
            make(&stage, trouble, "guest-2")?;
        }
    }
    ensure!(load.broken() == 0, "clients noticed the replica's trouble");
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    if when == When::Recuperating {
        make(&stage, trouble, "guest-3")?;
    }
    let failover = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    if when == When::Successor {
        make(&stage, trouble, "guest-2")?;
    }
    load.wait_answers(2_000, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    ensure!(failover.reset == 0, "{} connections were reset", failover.reset);
    // As long as nothing was wrong with it, guest-2 is as good as guest-3.
    let either = matches!(trouble, Trouble::Floods | Trouble::SendsGarbage)
        || (trouble, when) == (Trouble::SendsResets, When::Before);
    let ovm = stage.ovm(Service::Redis)?.name;
    let expected = if when == When::Recuperating { "guest-2" } else { "guest-3" };
    ensure!(either || ovm == expected, "{ovm} serves, {expected} should");
    Ok(())
}

fn make(stage: &Stage, trouble: Trouble, guest: &str) -> Result<()> {
    let fault = |fault| stage.lab.fault(fault, guest).map(|_| ());
    let guest = stage.lab.domain(guest);
    match trouble {
        Trouble::Destroyed => fault(Fault::Destroy),
        Trouble::Crashes => fault(Fault::Crash),
        Trouble::Frozen => fault(Fault::Freeze),
        Trouble::Spins => fault(Fault::Spin),
        Trouble::Hangs => fault(Fault::Hang),
        Trouble::ServiceDies => fault(Fault::Kill),
        Trouble::AnswersWrong => answer_wrong(&guest?),
        Trouble::Floods => flood(&guest?),
        Trouble::SendsResets => reset(&guest?),
        Trouble::SendsGarbage => garbage(&guest?, 0),
    }
}

/// Changes the replica's data without the OVM's: its counters and lists start elsewhere.
fn answer_wrong(guest: &Domain) -> Result<()> {
    let (place, address) = own_address(guest, Service::Redis)?;
    place.run(move || {
        let mut session = Session::connect(address)?;
        for n in 0..60 {
            session.ask(&["INCRBY", &format!("trouble:{n}:n"), "1000000"])?;
            session.ask(&["RPUSH", &format!("trouble:{n}:list"), "intruder"])?;
            session.ask(&["APPEND", &format!("trouble:{n}:log"), "<intruder>"])?;
        }
        Ok(())
    })
}

/// Frames as fast as the vif takes them, 30,000 at most, to clients, to neighbours and to everybody.
fn flood(guest: &Domain) -> Result<()> {
    let (place, own) = own_address(guest, Service::Redis)?;
    place.run(move || {
        let wire = Wire::open_only()?;
        let client = "10.77.0.1:40000".parse()?;
        let until = Instant::now() + Duration::from_secs(1);
        let mut segment = Segment::new(own, client, ACK);
        segment.payload = vec![b'x'; 1_000];
        for n in 0..30_000_u32 {
            if Instant::now() > until {
                break;
            }
            segment.sequence = n.wrapping_mul(7_919);
            let to = match n % 3 {
                0 => [0xff; 6],
                1 => [0x02, 0, 0, 0, 0, n as u8],
                _ => [0x00, 0x16, 0x3e, 0, 0, 1],
            };
            wire.send(&segment.frame(wire.mac, to))?;
        }
        Ok(())
    })
}

/// A RST at exactly the right position, on as many conversations as can be seen in half a second;
/// if there is none yet, on ones that do not exist.
fn reset(guest: &Domain) -> Result<()> {
    let (place, own) = own_address(guest, Service::Redis)?;
    place.run(move || {
        let wire = Wire::open_only()?;
        let until = Instant::now() + Duration::from_millis(500);
        let mut sent = 0;
        while sent < 50 && Instant::now() < until {
            let seen =
                wire.next(Duration::from_millis(100), |seen| seen.to == own && seen.flags & ACK != 0)?;
            let Some(seen) = seen else { continue };
            let mut segment = Segment::new(seen.to, seen.from, RST);
            segment.sequence = seen.acknowledgment;
            wire.send(&segment.frame(seen.destination, seen.source))?;
            sent += 1;
        }
        if sent == 0 {
            for port in 40_000..40_050 {
                let to = std::net::SocketAddr::new([10, 77, 0, 1].into(), port);
                let segment = Segment::new(own, to, RST);
                wire.send(&segment.frame(wire.mac, [0xff; 6]))?;
            }
        }
        Ok(())
    })
}

/// Malformed and contradictory segments, as if they belonged to the guest's conversations, at a position
/// `behind` bytes before what the client has acknowledged.
pub(super) fn garbage(guest: &Domain, behind: u32) -> Result<()> {
    let (place, own) = own_address(guest, Service::Redis)?;
    place.run(move || {
        let wire = Wire::open_only()?;
        let seen = wire.next(Duration::from_millis(500), |seen| seen.to == own && seen.flags & ACK != 0)?;
        let template = match seen {
            // As the replica would answer it.
            Some(seen) => crate::client::frames::Seen {
                source: seen.destination,
                destination: seen.source,
                from: seen.to,
                to: seen.from,
                sequence: seen.acknowledgment.wrapping_sub(behind),
                acknowledgment: seen.sequence,
                flags: ACK,
                tsval: 0,
                payload: 0,
            },
            None => crate::client::frames::Seen {
                source: wire.mac,
                destination: [0xff; 6],
                from: own,
                to: "10.77.0.1:40000".parse()?,
                sequence: 1,
                acknowledgment: 1,
                flags: ACK,
                tsval: 0,
                payload: 0,
            },
        };
        malformed(&wire, &template, 5_000, 3)
    })
}

/// In a large download the OVM's window ends for a replica that has fallen silent, and the other two answer beyond it: the
/// OVM is not accused for that.
fn hangs_in_download(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 3, &[Service::Http])?;
    let large = Large::begin(&stage, Direction::Download, false)?;
    large.wait_part(0.2)?;
    stage.lab.fault(Fault::Hang, "guest-2")?;
    large.expect_whole(&stage)?;
    let service = stage.operator.service("http")?;
    let servers = &service.servers;
    let ovm = stage.ovm(Service::Http)?.name;
    ensure!(ovm == "guest-1" && service.epoch == 1, "a replica hung, and the OVM was deposed: {servers:#?}");
    // On a busy machine another one may fall behind, too.
    ensure!(!is_promotable(&service, "guest-2"), "the replica that hung was waited for: {servers:#?}");
    Ok(())
}

/// Clients never wait for a replica that is a hundred times slower than the OVM: the same load is as
/// quick with it as without it. The replica is lagging or evicted, and the status says so.
fn slow(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let target = stage.psc(Service::Redis)?;
    let run = |prefix: &str| -> Result<u64> {
        let mut plan = Plan::new(target, prefix);
        plan.pace = Some(Duration::from_millis(5));
        let load = plan.start(&stage.client())?;
        load.wait_answers(3_000, Duration::from_secs(30))?;
        let outcome = load.finish()?;
        ensure!(outcome.troubles() == 0, "clients noticed: {:#?}", outcome.errors);
        Ok(outcome.latency.value_at_quantile(0.9))
    };
    let quick = run("quick")?;
    let link = Link { delay: Duration::from_millis(200), ..Link::default() };
    stage.lab.link("guest-2", link)?;
    let slow = run("slow")?;
    println!("  p90 {} us without, {} us with the slow replica", quick / 1_000, slow / 1_000);
    // The replica's round trip is 400 ms: a client that waited for it even once in ten times would show it.
    ensure!(slow < 200_000_000, "clients waited for the slow replica");
    Ok(())
}

fn is_promotable(service: &understudy_api::Service, guest: &str) -> bool {
    server(service, guest).is_some_and(|server| server.promotable)
}

fn covers_all(stage: &Stage, guest: &str) -> Result<bool> {
    let service = stage.operator.service(Service::Redis.name())?;
    Ok(server(&service, guest).is_some_and(|server| server.uncovered == 0))
}

fn server<'a>(service: &'a understudy_api::Service, guest: &str) -> Option<&'a understudy_api::Server> {
    let is_named =
        |server: &&understudy_api::Server| server.domain.as_ref().is_some_and(|domain| domain.name == guest);
    service.servers.iter().find(is_named)
}

/// Nobody reads the rings while a replica floods: it fills its own ring, and clients continue in theirs. It loses only its own
/// answers, which it repeats; the other replica is unharmed.
fn own_ring(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 2, &[Service::Redis]), &|line| println!("  {line}"))?;
    let config =
        with_plane(&lab.default_config(), Plane::Bpf).replace("rvms = ", "daemon_grace_ms = 60000\nrvms = ");
    let stage = Stage::take(lab, &config)?;
    let load = stage.load("floods")?;
    let dom0d = stage.dom0d.as_ref().context("no dom0d")?;
    dom0d.signal(Signal::SIGSTOP)?;
    let flooded =
        flood(&stage.lab.domain("guest-2")?).and_then(|()| load.wait_answers(300, Duration::from_secs(10)));
    dom0d.signal(Signal::SIGCONT)?;
    flooded?;
    let service = stage.operator.service("redis")?;
    let counted = |name: &str| service.plane_counters.get(name).copied().unwrap_or_default();
    println!("  {} of the replica's frames found its ring full", counted("rvm_ring_full"));
    ensure!(counted("rvm_ring_full") > 0, "the replica did not fill its ring");
    for name in ["ring_full", "ring_share_full", "unrecorded"] {
        ensure!(counted(name) == 0, "{name} is {}: a replica filled what clients depend on", counted(name));
    }
    ensure!(is_promotable(&service, "guest-3"), "the other replica was hurt: {:#?}", service.servers);
    stage.survives_freeze(load)
}

/// A replica is evicted under load and its memory released, while the clients and the other replica continue.
fn evicted(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let load = Plan::new(stage.psc(Service::Redis)?, "evict").start(&stage.client())?;
    load.wait_answers(1_000, Duration::from_secs(30))?;
    let at = stage.lab.fault(Fault::Freeze, "guest-2")?;
    let event = stage.events.wait("evicted", "redis", at.monotonic_ns / 1_000, Duration::from_secs(5))?;
    let who = event.domain("server").context("no server in the event")?;
    ensure!(who == "guest-2", "{who} was evicted");
    load.wait_answers(1_000, Duration::from_secs(30))?;
    let outcome = load.finish()?;
    stage.expect_unharmed(&outcome)?;
    let service = stage.operator.service("redis")?;
    ensure!(service.promotable() == 1, "guest-3 is not promotable any more: {:#?}", service.servers);
    Ok(())
}
