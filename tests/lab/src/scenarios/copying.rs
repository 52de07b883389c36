//! `attach --copy` makes a domain equal to the OVM while clients write all the time: they wait for the copy, and after the next
//! failover nothing is missing. However the copy ends, clients are let in again.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Scenario;
use crate::client::place::join;
use crate::host::{Fault, Service};
use crate::stage::Stage;

/// Longer than a client's SYN waits for its second repetition (RFC 6298).
const LET_IN: Duration = Duration::from_secs(8);

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::new("copying/while-clients-write", while_clients_write),
        Scenario::new("copying/command-fails", |lab| in_vain(lab, "exit 7", &[], "status: 7", |_, _| Ok(()))),
        Scenario::new("copying/takes-too-long", |lab| {
            in_vain(lab, "sleep 20", &["--copy-limit", "1s"], "took longer", |_, _| Ok(()))
        }),
        Scenario::new("copying/cancelled", |lab| in_vain(lab, "sleep 20", &[], "cancelled", interrupt)),
        Scenario::new("copying/command-killed", |lab| {
            in_vain(lab, "sleep 20", &[], "", |_, cli| Ok(cli.kill()?))
        }),
        Scenario::new("copying/ovm-frozen-meanwhile", |lab| {
            in_vain(lab, "sleep 20", &[], "another OVM serves", |stage, _| {
                let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
                stage.until("another serves", LET_IN, |status| status.services[0].epoch > 1)?;
                ensure!(stage.ovm(Service::Redis)?.name == "guest-2", "{at:?}");
                Ok(())
            })
        }),
        Scenario::new("copying/domain-gone-meanwhile", |lab| {
            in_vain(lab, "sleep 20", &[], "given up", |stage, _| {
                stage.lab.fault(Fault::Destroy, "guest-3")?;
                stage.lab.create("guest-3").map(drop)
            })
        }),
        Scenario::new("copying/dom0d-killed", dom0d_killed),
        Scenario::new("copying/connection-stays", connection_stays),
    ]
}

/// A client with a connection per write, one after the other.
struct Writer {
    written: Arc<AtomicU64>,
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

fn set(target: SocketAddr, n: u64) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(40))?;
    stream.set_read_timeout(Some(Duration::from_secs(40)))?;
    stream.write_all(format!("SET w{n} {n}\r\n").as_bytes())?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer)?;
    ensure!(&answer == b"+OK\r\n", "{:?}", String::from_utf8_lossy(&answer));
    Ok(())
}

impl Writer {
    fn begin(stage: &Stage) -> Result<Self> {
        let (written, ends) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let target = stage.psc(Service::Redis)?;
        let (counts, wants) = (Arc::clone(&written), Arc::clone(&ends));
        let thread = stage.client().spawn("writer", move || {
            while !wants.load(Ordering::Relaxed) {
                let n = counts.load(Ordering::Relaxed);
                set(target, n).with_context(|| format!("write {n}"))?;
                counts.store(n + 1, Ordering::Relaxed);
            }
            Ok(())
        })?;
        let writer = Self { written, ends, thread };
        writer.goes_on()?;
        Ok(writer)
    }

    fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    fn goes_on(&self) -> Result<()> {
        let (before, deadline) = (self.written(), Instant::now() + LET_IN);
        while self.written() < before + 50 {
            ensure!(Instant::now() < deadline && !self.thread.is_finished(), "clients are not let in");
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// How many writes were acknowledged; no client noticed anything.
    fn end(self) -> Result<u64> {
        self.ends.store(true, Ordering::Relaxed);
        join(self.thread)?;
        Ok(self.written.load(Ordering::Relaxed))
    }
}

/// Redis' state as a file, from one domain's disk to the other's; then this.
fn copy(stage: &Stage, from: &str, to: &str) -> Result<String> {
    let (from, to) = (stage.lab.domain(from)?, stage.lab.domain(to)?);
    let inside = |domain: &crate::host::Domain| format!("ip netns exec {} redis-cli", domain.host.netns);
    let (source, target) = (from.data.join("redis/dump.rdb"), to.data.join("redis/dump.rdb"));
    let (source, target) = (source.display(), target.display());
    Ok(format!(
        "set -e; test \"$UNDERSTUDY_SERVICE $UNDERSTUDY_FROM $UNDERSTUDY_TO\" = \"redis {} {}\"; test $UNDERSTUDY_TO_ADDRESS = {}
         {} SAVE; mv {source} {target}; {} DEBUG RELOAD NOSAVE; rm {target}
         ip netns exec {} ping -c 1 -W 5 10.77.0.2; sleep 1",
        from.name,
        to.name,
        to.addresses[0],
        inside(&from),
        inside(&to),
        to.host.netns
    ))
}

/// guest-1 was deposed, and comes back without data; clients write before, during and after the copy.
fn while_clients_write(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let writer = Writer::begin(&stage)?;
    stage.until("guest-2 serves", LET_IN, |status| status.services[0].epoch > 1)?;
    println!("  frozen at {at:?}");
    stage.lab.fault(Fault::Destroy, "guest-1")?;
    let id = stage.lab.create("guest-1")?.uuid;
    stage.until("guest-1 follows", LET_IN, |status| {
        status.services[0].servers.iter().any(|s| s.domain.as_ref().is_some_and(|d| d.uuid == id))
    })?;
    let command = copy(&stage, "guest-2", "guest-1")?;
    let before = writer.written();
    stage.operator.order(&["attach", "redis", "guest-1", "--copy", &command, "--timeout", "10s"])?;
    ensure!(stage.operator.service("redis")?.promotable() == 1, "the copy does not count");
    println!("  {before} writes before the copy, {} then", writer.written());
    writer.goes_on()?;
    let at = stage.lab.fault(Fault::Freeze, "guest-2")?;
    println!("  frozen at {at:?}");
    stage.until("guest-1 serves", LET_IN, |status| status.services[0].epoch > 2)?;
    writer.goes_on()?;
    let written = writer.end()?;
    let keys: Vec<String> = (0..written).map(|n| format!("w{n}")).collect();
    let mut words = vec!["redis-cli", "EXISTS"];
    words.extend(keys.iter().map(String::as_str));
    let output = stage.lab.domain("guest-1")?.run(&words)?;
    let there = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(there == written.to_string(), "of {written} acknowledged writes guest-1 has {there}");
    Ok(())
}

fn interrupt(_: &Stage, cli: &mut Child) -> Result<()> {
    Ok(kill(Pid::from_raw(i32::try_from(cli.id())?), Signal::SIGINT)?)
}

/// guest-3 follows without data, and a copy to it begins; then this happens, and clients are let in again.
fn in_vain(
    lab: &str,
    command: &str,
    limits: &[&str],
    saying: &str,
    happens: impl Fn(&Stage, &mut Child) -> Result<()>,
) -> Result<()> {
    let stage = Stage::up(lab, 2, &[Service::Redis])?;
    let writer = Writer::begin(&stage)?;
    stage.operator.order(&["detach", "redis", "guest-3"])?;
    let mark = stage.lab.directory().join("copying");
    // It outlives an understudy that is killed, and must not keep what that said open.
    let command = format!("exec >/dev/null 2>&1; touch {}; {command}", mark.display());
    let words = [&["attach", "redis", "guest-3", "--copy", command.as_str()], limits].concat();
    let mut cli = stage.operator.begin(&words)?;
    let deadline = Instant::now() + LET_IN;
    while !mark.exists() {
        ensure!(Instant::now() < deadline, "the command to copy does not run");
        sleep(Duration::from_millis(5));
    }
    happens(&stage, &mut cli)?;
    let output = cli.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && said.contains(saying),
        "understudy ended with {}: {said}",
        output.status
    );
    writer.goes_on()?;
    let service = stage.operator.service("redis")?;
    let is_guest_3 = |name: &str| name == "guest-3";
    ensure!(
        !service
            .servers
            .iter()
            .any(|s| s.promotable && s.domain.as_ref().is_some_and(|d| is_guest_3(&d.name))),
        "half a copy counts"
    );
    writer.end()?;
    Ok(())
}

/// A dom0d that is killed holds nobody, and what is copied then counts for nothing.
fn dom0d_killed(lab: &str) -> Result<()> {
    let mut stage = Stage::up(lab, 1, &[Service::Redis])?;
    let config = stage.lab.default_config();
    let writer = Writer::begin(&stage)?;
    stage.operator.order(&["detach", "redis", "guest-2"])?;
    let mark = stage.lab.directory().join("copying");
    let command = format!("exec >/dev/null 2>&1; touch {}; sleep 20", mark.display());
    let cli = stage.operator.begin(&["attach", "redis", "guest-2", "--copy", &command])?;
    while !mark.exists() {
        sleep(Duration::from_millis(5));
    }
    stage.dom0d.take().context("no dom0d")?.kill9()?;
    let output = cli.wait_with_output()?;
    ensure!(!output.status.success(), "a copy under a dom0d that is gone counts");
    let Stage { lab, .. } = stage;
    let stage = Stage::take_unready(lab, &config)?;
    stage.until("the successor serves", LET_IN, |status| status.services[0].serving)?;
    writer.goes_on()?;
    ensure!(stage.operator.service("redis")?.promotable() == 0, "half a copy counts");
    writer.end()?;
    Ok(())
}

/// Who stays connected may write until the deadline, and then nothing is copied.
fn connection_stays(lab: &str) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Redis])?;
    let load = stage.load("stays")?;
    stage.operator.order(&["detach", "redis", "guest-2"])?;
    let words = ["attach", "redis", "guest-2", "--copy", "true", "--timeout", "1s"];
    stage.operator.refused(&words, &["open conversations", "let in again"])?;
    load.wait_answers(300, LET_IN)?;
    ensure!(stage.operator.service("redis")?.promotable() == 0, "what was not copied counts");
    stage.expect_unharmed(&load.finish()?)
}
