//! The alternative that a user would pick: HAProxy in TCP mode, in dom0, in front of the same servers, with a replica as backup.
//! It is configured to be quick: it checks the servers ten times a second, gives a server up after two missing answers, and
//! then ends its connections.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::failover::Spread;
use super::rtt::{clear, hang_up};
use crate::client::clock::now_ns;
use crate::client::place::Place;
use crate::client::redis::load::Plan;
use crate::client::redis::session::{Answer, Session};
use crate::host::{Fault, Lab, Service, lab_addresses, setup};
use crate::stage::repair::repair;

/// Until it takes connections.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Until it serves again after a fault.
const SERVES_AGAIN: Duration = Duration::from_secs(20);
/// Of dom0's own addresses on the bridge.
const DOM0: u8 = 2;

const CONFIG: &str = "\
global
    maxconn 4000
    nbthread 1
defaults
    mode tcp
    option splice-auto
    timeout connect 1s
    timeout client 1h
    timeout server 1h
    default-server inter 100ms fall 2 rise 1 on-marked-down shutdown-sessions
";

/// A running HAProxy; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Proxy {
    child: Child,
}

impl Proxy {
    /// In front of `guest-1`, with `guest-2` as backup.
    pub(crate) fn start(lab: &Lab) -> Result<Self> {
        let mut text = CONFIG.to_owned();
        for service in &lab.config().services {
            let check = match service {
                Service::Redis => {
                    "    option tcp-check\n    tcp-check send PING\\r\\n\n    tcp-check expect string +PONG\n"
                }
                Service::Http | Service::Postgresql => "",
            };
            text += &format!("listen {}\n    bind {}\n{check}", service.name(), Self::address(*service));
            for (name, role) in [("guest-1", ""), ("guest-2", " backup")] {
                let server = crate::stage::own_address(&lab.domain(name)?, *service)?.1;
                text += &format!("    server {name} {server} check{role}\n");
            }
        }
        let config = lab.directory().join("haproxy.cfg");
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let log_path = lab.directory().join("log/haproxy.log");
        let log = fs::File::create(&log_path)?;
        let dom0 = lab.dom0();
        let mut command = dom0.command("haproxy");
        command.arg("-db").arg("-f").arg(&config);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut proxy = Self { child: dom0.spawn(&mut command)? };
        let deadline = Instant::now() + START_LIMIT;
        let client = Place::new(lab.client().netns);
        while client.run(|| ask(Self::address(Service::Redis))).is_err() {
            if let Some(status) = proxy.child.try_wait()? {
                let said = fs::read_to_string(&log_path).unwrap_or_default();
                bail!("HAProxy ended at once ({status}): {}", said.trim());
            }
            ensure!(Instant::now() < deadline, "HAProxy serves nobody after {START_LIMIT:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(proxy)
    }

    /// Where clients find a service behind it.
    pub(crate) fn address(service: Service) -> SocketAddr {
        let addresses = lab_addresses(DOM0, false);
        SocketAddr::new(addresses.first().copied().unwrap_or(IpAddr::V4([0, 0, 0, 0].into())), service.port())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Fails only for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Its Debian package.
pub(crate) fn install() -> Result<()> {
    setup::install_packages(&["haproxy"], &["haproxy"], &|line| println!("  {line}"))
}

/// Why IPVS, by which keepalived balances, is or is not measured in the same way.
pub(crate) fn ipvs() -> &'static str {
    let mut asked = std::process::Command::new("modprobe");
    asked.args(["--dry-run", "--quiet", "ip_vs"]);
    if Path::new("/proc/net/ip_vs").exists() || asked.status().is_ok_and(|status| status.success()) {
        "not measured here: this kernel has ip_vs, but the bench does not know how"
    } else {
        "not measured here: this kernel has no ip_vs"
    }
}

/// One fault of the server behind it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) fault: Fault,
    /// Open connections at the fault, over all samples, and those that broke.
    pub(crate) connections: u64,
    pub(crate) broken: u64,
    /// Until a new connection was served.
    pub(crate) fault_to_new_connection_us: Spread,
}

pub(crate) fn measure(lab: &Lab, samples: usize) -> Result<Vec<Row>> {
    [Fault::Freeze, Fault::Kill].into_iter().map(|fault| row(lab, fault, samples)).collect()
}

fn row(lab: &Lab, fault: Fault, samples: usize) -> Result<Row> {
    let client = Place::new(lab.client().netns);
    let target = Proxy::address(Service::Redis);
    let (mut connections, mut broken, mut waits) = (0, 0, Vec::new());
    for _ in 0..samples {
        clear(lab)?;
        let proxy = Proxy::start(lab)?;
        let mut plan = Plan::new(target, "proxy");
        plan.pace = Some(Duration::from_millis(1));
        connections += plan.connections as u64;
        let load = plan.start(&client)?;
        load.wait_answers(300, Duration::from_secs(20))?;
        let at = lab.fault(fault, "guest-1")?;
        let deadline = Instant::now() + SERVES_AGAIN;
        while let Err(error) = client.run(move || ask(target)) {
            ensure!(
                Instant::now() < deadline,
                "HAProxy serves nobody {SERVES_AGAIN:?} after {fault:?}: {error:#}"
            );
        }
        waits.push((now_ns() - at.monotonic_ns) / 1_000);
        let outcome = load.finish()?;
        broken += outcome.resets + outcome.closed;
        drop(proxy);
        repair(lab, fault, "guest-1")?;
        hang_up(&lab.domains()?)?;
    }
    Ok(Row { fault, connections, broken, fault_to_new_connection_us: Spread::of(&waits) })
}

/// Whether a new connection is served.
fn ask(target: SocketAddr) -> Result<()> {
    // A frozen server's kernel still takes connections: HAProxy must have given it up.
    let answer = Session::connect_for(target, Duration::from_millis(50))?.ask(&["PING"])?;
    ensure!(answer == Answer::Status("PONG".to_owned()), "PING was answered with {answer:?}");
    Ok(())
}

pub(crate) fn print(rows: &[Row]) {
    for row in rows {
        let wait = &row.fault_to_new_connection_us;
        println!(
            "  {:<8} {} of {} open connections broke; a new one was served after p50 {} ms, max {} ms",
            format!("{:?}", row.fault).to_lowercase(),
            row.broken,
            row.connections,
            wait.p50 / 1_000,
            wait.max / 1_000
        );
    }
}
