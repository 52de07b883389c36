//! A client is no witness (rule 11): its address, its silence and its handshakes depose nobody. Nor does unsolicited data of a
//! replica.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Scenario;
use crate::client::hostile::{lone_syn, syn_flood};
use crate::client::place::{Place, join};
use crate::client::redis::session::Session;
use crate::client::sniff::Wire;
use crate::host::{Fault, Lab, Service};
use crate::stage::failover::Failover;
use crate::stage::{Stage, own_address};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("witness/address-that-nobody-has", |lab| idle_under(lab, strangers)),
        Scenario::new("witness/syn-flood", |lab| idle_under(lab, flood)),
        Scenario::new("witness/own-clock", own_clock),
        Scenario::new("witness/silence", silence),
    ]
}

/// Longer than a SYN may stay unanswered before replicas are asked about it.
const UNANSWERED: Duration = Duration::from_secs(3);

/// Attacks an idle service. Afterwards honest clients use it, and its OVM dies.
fn idle_under(
    lab: &str,
    attack: impl Fn(&Wire, [u8; 6], SocketAddr) -> Result<()> + Send + 'static,
) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let (target, mac) = (stage.psc(Service::Redis)?, stage.psc_mac(Service::Redis)?);
    stage.client().run(move || attack(&Wire::open_only()?, mac, target))?;
    sleep(UNANSWERED);
    expect_nobody_suspected(&stage)?;
    let load = stage.load("after")?;
    stage.survives_freeze(load)
}

fn strangers(wire: &Wire, psc_mac: [u8; 6], target: SocketAddr) -> Result<()> {
    for host in [250, 251] {
        let from = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 77, 0, host)), 40_000);
        ensure!(lone_syn(wire, psc_mac, from, target)?, "the SYN was not sent");
        sleep(UNANSWERED);
    }
    Ok(())
}

fn flood(wire: &Wire, psc_mac: [u8; 6], target: SocketAddr) -> Result<()> {
    let sent = syn_flood(wire, psc_mac, target, (100_000, 0), Duration::from_secs(5))?;
    println!("  {sent} SYNs");
    ensure!(sent > 10_000, "only {sent} SYNs were sent");
    Ok(())
}

fn expect_nobody_suspected(stage: &Stage) -> Result<()> {
    let suspected = stage.events.since("suspected", Service::Redis.name(), 0);
    let service = stage.operator.service(Service::Redis.name())?;
    let counted = |name: &str| service.counters.get(name).copied().unwrap_or_default();
    println!(
        "  asked {} times for a sign of life, acquitted {} times",
        counted("questions"),
        counted("acquittals")
    );
    ensure!(suspected.is_empty(), "a healthy OVM was suspected: {suspected:?}");
    ensure!(service.promotable() == 2, "a replica was hurt: {:#?}", service.servers);
    Ok(())
}

/// Clients say nothing until the OVM closes their connections, a second before its replicas would. It lives, and serves.
fn silence(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let target = stage.psc(Service::Redis)?;
    time_out(&stage, [2, 3, 3])?;
    stage.client().run(move || {
        let mut silent = (0..4).map(|_| TcpStream::connect(target)).collect::<std::io::Result<Vec<_>>>()?;
        for stream in &mut silent {
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            stream.write_all(b"PING\r\n")?;
            stream.read_exact(&mut [0; 7])?;
        }
        for stream in &mut silent {
            ensure!(stream.read(&mut [0; 7])? == 0, "the connection was not closed");
        }
        Ok(())
    })?;
    sleep(UNANSWERED);
    expect_nobody_suspected(&stage)?;
    time_out(&stage, [0; 3])?;
    let load = stage.load("after")?;
    stage.survives_freeze(load)
}

/// How long a Redis keeps an idle connection, in seconds, in each domain; 0 for ever.
fn time_out(stage: &Stage, seconds: [u32; 3]) -> Result<()> {
    for (name, seconds) in ["guest-1", "guest-2", "guest-3"].into_iter().zip(seconds) {
        let (place, own) = own_address(&stage.lab.domain(name)?, Service::Redis)?;
        place.run(move || Session::connect(own)?.ask(&["CONFIG", "SET", "timeout", &seconds.to_string()]))?;
    }
    Ok(())
}

/// The port of the services that send unsolicited data.
const TICKS: u16 = 7_000;

/// How much later the first server sends than the replicas.
const LATER: Duration = Duration::from_millis(500);

/// A service sends a line each second to every client, and echoes lines. Replicas send half a second earlier than the OVM:
/// nobody is accused until the OVM freezes.
fn own_clock(lab: &str) -> Result<()> {
    let lab = Lab::up(Stage::plan(lab, 2, &[Service::Redis]), &|line| println!("  {line}"))?;
    let tickers = ["guest-1", "guest-2", "guest-3"]
        .map(|name| Ticker::start(&lab, name, if name == "guest-1" { LATER } else { Duration::ZERO }))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let config = lab.default_config().replace("ports = [6379]", &format!("ports = [{TICKS}]"));
    let stage = Stage::take(lab, &config)?;
    let target = SocketAddr::new(stage.psc(Service::Redis)?.ip(), TICKS);
    let listeners = [false, true].map(|speaks| {
        let name = if speaks { "speaking" } else { "silent" };
        stage.client().spawn(name, move || listen(target, speaks, 16))
    });
    sleep(Duration::from_secs(8));
    expect_nobody_suspected(&stage)?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Redis, Fault::Freeze, at)?;
    for listener in listeners {
        join(listener?)?;
    }
    failover.expect_plausible()?;
    drop(tickers);
    Ok(())
}

/// Reads this many unsolicited lines, none of which may be missing or come twice.
fn listen(target: SocketAddr, speaks: bool, lines: usize) -> Result<()> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    if speaks {
        stream.write_all(b"hello\n")?;
        reader.read_line(&mut line)?;
        ensure!(line == "hello\n", "not an echo: {line:?}");
    }
    for n in 0..lines {
        line.clear();
        reader.read_line(&mut line).with_context(|| format!("line {n}"))?;
        ensure!(line == format!("tick {n}\n"), "line {n} is {line:?}");
    }
    Ok(())
}

/// A service in one domain that sends unsolicited data as long as this value lives.
struct Ticker {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Ticker {
    /// It sends this much after each full second.
    fn start(lab: &Lab, domain: &str, later: Duration) -> Result<Self> {
        let place = Place::new(lab.domain(domain)?.host.netns);
        let over = Arc::new(AtomicBool::new(false));
        let ends = over.clone();
        // All servers' clocks are this machine's.
        let begun = Instant::now() - later;
        let thread = place.spawn("ticker", move || serve(begun, &ends))?;
        Ok(Self { over, thread: Some(thread) })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // What it complains of, its clients have noticed.
        self.thread.take().map(JoinHandle::join);
    }
}

fn serve(begun: Instant, over: &AtomicBool) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, TICKS))?;
    listener.set_nonblocking(true)?;
    let mut clients: Vec<(TcpStream, usize)> = Vec::new();
    let mut second = begun.elapsed().as_secs();
    while !over.load(Ordering::Relaxed) {
        while let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            clients.push((stream, 0));
        }
        let now = begun.elapsed().as_secs();
        let is_time = std::mem::replace(&mut second, now) != now;
        clients.retain_mut(|(stream, ticks)| {
            let mut line = [0; 64];
            let alive = match stream.read(&mut line) {
                Ok(0) => false,
                Ok(length) => stream.write_all(&line[..length]).is_ok(),
                Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
            };
            if is_time && alive {
                *ticks += 1;
                return writeln!(stream, "tick {}", *ticks - 1).is_ok();
            }
            alive
        });
        sleep(Duration::from_millis(1));
    }
    Ok(())
}
