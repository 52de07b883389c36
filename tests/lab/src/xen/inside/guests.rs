//! The domUs: `guest-1` is the OVM, the others its replicas, on dom0's bridge, as an operator would
//! create them with xl; and what can happen to them.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::command::{in_domain, run};
use crate::client::clock::now_ns;
use crate::client::http;
use crate::client::place::Place;
use crate::client::postgres;
use crate::client::redis::session::{Answer, Session};
use crate::host::{BRIDGE, Fault, FaultInstant, Service, domain_name, guest_addresses, guest_mac};
use crate::xen::Kind;

/// How long `xl` may take to remove a domain that it restarts at the same time.
const DESTROY_LIMIT: Duration = Duration::from_secs(60);
/// From a guest's creation to services that answer; 12 s were seen.
const SERVICES_LIMIT: Duration = Duration::from_secs(180);

/// The domUs of a lab.
#[derive(Debug, Clone, Copy)]
pub(in crate::xen) struct Guests {
    pub(in crate::xen) kind: Kind,
    pub(in crate::xen) replicas: usize,
    /// With PostgreSQL as well, which takes more memory.
    pub(in crate::xen) postgresql: bool,
}

impl Guests {
    /// Restores the guests: each runs, answers, and its Redis is empty. No dom0d may run, since it would contain
    /// the replicas.
    pub(super) fn prepare(self, progress: &dyn Fn(&str)) -> Result<()> {
        let places = 1..=self.replicas + 1;
        for place in places.clone() {
            let name = domain_name(place);
            if self.is_fit(place) {
                continue;
            }
            destroy(&name)?;
            let begun = Instant::now();
            self.create(place)?;
            progress(&format!("{name} created in {:.0} s", begun.elapsed().as_secs_f64()));
        }
        for place in places {
            let deadline = Instant::now() + SERVICES_LIMIT;
            while let Err(error) = self.ask(place) {
                if Instant::now() > deadline {
                    let name = domain_name(place);
                    return Err(error.context(format!("{name} does not serve after {SERVICES_LIMIT:?}")));
                }
                sleep(Duration::from_millis(200));
            }
        }
        progress("every guest's services answer");
        Ok(())
    }

    /// `xl create`s one.
    pub(super) fn create(self, place: usize) -> Result<()> {
        let path = format!("/etc/xen/{}.cfg", domain_name(place));
        fs::write(&path, self.configuration(place)).with_context(|| format!("writing {path}"))?;
        run(&["xl", "create", &path]).map(drop)
    }

    /// What `xl create` is given.
    fn configuration(self, place: usize) -> String {
        let name = domain_name(place);
        let addresses: Vec<String> = guest_addresses(place, true).iter().map(IpAddr::to_string).collect();
        let (system, services, memory) = match self.postgresql {
            false => ("guest", "redis,http", 192),
            true => ("guest-postgresql", "redis,http,postgresql", 512),
        };
        format!(
            r#"name = "{name}"
type = "{kind}"
kernel = "/srv/guests/vmlinux"
ramdisk = "/srv/guests/{system}.cpio"
extra = "console=hvc0 quiet lab.name={name} lab.address={v4}/24 lab.address6={v6}/64 lab.services={services}"
memory = {memory}
vcpus = 1
vif = [ "mac={mac},bridge={BRIDGE},ip={v4} {v6}" ]
# The lab's emulated SVM can't emulate RDTSCP.
tsc_mode = "native"
"#,
            kind = self.kind.name(),
            v4 = addresses[0],
            v6 = addresses[1],
            mac = guest_mac(place),
        )
    }

    /// Whether a guest is as it was created, or can be made so without creating it again.
    fn is_fit(self, place: usize) -> bool {
        let name = domain_name(place);
        let Ok(domid) = domid(&name) else { return false };
        let kind = run(&["xenstore-read", &format!("/libxl/{domid}/type")]);
        if !kind.is_ok_and(|kind| kind.trim() == self.kind.name()) {
            return false;
        }
        let state = state(&name).unwrap_or_default();
        if state.contains(['s', 'c', 'd']) {
            return false;
        }
        if state.contains('p') {
            return run(&["xl", "unpause", &name]).is_ok() && restart_services(&name).is_ok();
        }
        self.ask(place).is_ok() || (!self.postgresql && restart_services(&name).is_ok())
    }

    /// Empties a guest's Redis, and sees that its other servers have what stories want of them.
    fn ask(self, place: usize) -> Result<()> {
        let address = guest_addresses(place, false)[0];
        let at = move |service: Service| SocketAddr::new(address, service.port());
        client().run(move || {
            let answer = Session::connect(at(Service::Redis))?.ask(&["FLUSHALL"])?;
            ensure!(answer == Answer::Status("OK".to_owned()), "FLUSHALL was answered with {answer:?}");
            http::head(&mut http::connect(at(Service::Http))?, LARGE)?;
            if self.postgresql {
                let mut session = postgres::Session::connect(at(Service::Postgresql))?;
                session.query("DROP TABLE IF EXISTS account")?;
            }
            Ok(())
        })
    }
}

/// Their connections end, without a kernel that repeats for minutes what nobody acknowledges any more (no orphans,
/// tcp(7)); and what [`Fault::Hang`] stopped begins anew.
pub(super) fn restart_services(name: &str) -> Result<()> {
    let orphans = "/proc/sys/net/ipv4/tcp_max_orphans";
    in_domain(name, &format!("n=$(cat {orphans}); echo 0 >{orphans}; killall -KILL redis-server nginx; sleep 0.2; echo $n >{orphans}")).map(drop)
}

/// The file that every guest offers, the same in all.
pub(super) const LARGE: &str = "/large.bin";

/// Where clients are: a network namespace of dom0.
pub(super) fn client() -> Place {
    Place::new("client")
}

/// The domain's present number.
pub(super) fn domid(name: &str) -> Result<u16> {
    let said = run(&["xl", "domid", name])?;
    said.trim().parse().with_context(|| format!("not a domid: {said}"))
}

pub(super) fn exists(name: &str) -> bool {
    domid(name).is_ok()
}

/// Destroys a domain, if there is one. `xl` fails if it destroys or restarts the domain itself at that moment, as
/// it does when a guest has crashed.
pub(super) fn destroy(name: &str) -> Result<()> {
    let deadline = Instant::now() + DESTROY_LIMIT;
    while exists(name) {
        let destroyed = run(&["xl", "destroy", name]);
        if Instant::now() > deadline {
            destroyed?;
        }
        sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// The letters by which `xl list` shows a domain's state.
fn state(name: &str) -> Result<String> {
    let said = run(&["xl", "list", name])?;
    let line = said.lines().nth(1).context("xl list shows no domain")?;
    Ok(line.split_whitespace().nth(4).context("xl list shows no state")?.to_owned())
}

/// Makes a fault happen, the instant taken right before the order is given: an `xl` takes a tenth of
/// a second to start in emulation, an order over a console several.
pub(super) fn fault(fault: Fault, name: &str) -> Result<FaultInstant> {
    let at = FaultInstant { monotonic_ns: now_ns() };
    // The console must have answered before the guest ends or is fenced.
    let soon = |order: &str| in_domain(name, &format!("(sleep 0.3; {order}) >/dev/null 2>&1 &"));
    match fault {
        Fault::Freeze => run(&["xl", "pause", name])?,
        Fault::Destroy => run(&["xl", "destroy", name])?,
        Fault::Crash => soon("echo c >/proc/sysrq-trigger")?,
        Fault::Poweroff => soon("poweroff -f")?,
        Fault::Reboot => soon("reboot -f")?,
        Fault::Hang => soon("killall -STOP redis-server nginx")?,
        Fault::Kill => soon("killall -KILL redis-server nginx")?,
        Fault::Spin => soon("modprobe spin")?,
    };
    Ok(at)
}

/// SHA-256 of the large file, as a guest reads it from its own file system.
pub(super) fn large_sha256(name: &str) -> Result<String> {
    let said = in_domain(name, "sha256sum /srv/www/large.bin")?;
    Ok(said.split_whitespace().next().context("sha256sum said nothing")?.to_owned())
}
