//! What a namespace lab is: dom0, a client and N+1 domUs, each a network namespace of this machine.
//!
//! The state of a running lab lives in one *hypervisor* process and in `/run/understudy-lab/<NAME>`;
//! a [`Lab`] is a handle on it, so that several processes (`cargo lab up`, then `cargo lab fault`)
//! act on one lab. Everything that the lab starts runs in a control group of its own, by which it is
//! found and ended again, whichever process died in between.
//!
//! How to use it:
//!
//! ```text
//! let lab = Lab::up(LabConfig::new(instance_name()?), &progress)?;   // torn down on drop
//! let mut dom0d = lab.start_dom0d(&lab.default_config())?;
//! lab.client().run(&["redis-cli", "-h", "10.77.0.100", "PING"])?;
//! let fault = lab.fault(Fault::Freeze, "guest-1")?;                   // CLOCK_MONOTONIC ns
//! lab.thaw("guest-1")?;
//! dom0d.stop()?;
//! ```

mod cgroup;
mod daemon;
mod domain;
mod fault;
mod gate;
mod link;
mod machine;
pub(crate) mod network;
mod plan;
mod service;
pub(crate) mod setup;
mod vlan;

pub(crate) use cgroup::Group;
pub(crate) use daemon::Daemon;
pub(crate) use domain::Domain;
pub(crate) use fault::{Fault, FaultInstant};
pub(crate) use gate::Gate;
pub(crate) use link::Link;
pub(crate) use machine::{Host, hear_signals, in_group};
pub(crate) use network::BRIDGE;
pub(crate) use plan::{
    LabConfig, Plane, default_config, domain_name, guest_addresses, guest_mac, instance_name, lab_addresses,
    psc_addresses,
};
pub(crate) use service::{PROXIED, Service};
pub(crate) use vlan::Vlan;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::hypervisor::request::{Record, Request, ask};
use plan::REPLICAS_MAX;

/// How long the hypervisor may take to answer after its start.
const HYPERVISOR_LIMIT: Duration = Duration::from_secs(10);

/// A running namespace lab. Dropping it takes the lab down, unless [`Lab::leave_running`] was called
/// or the handle came from [`Lab::find`].
#[derive(Debug)]
pub(crate) struct Lab {
    config: LabConfig,
    directory: PathBuf,
    group: Group,
    owned: bool,
}

impl Lab {
    /// Builds a lab: installs what is missing, makes the namespaces, starts the hypervisor, the
    /// domains (`guest-1` is the OVM, `guest-2`... its replicas) and their services. Blocks until
    /// every service answers. Does not start dom0d. On failure nothing is left behind. A stale
    /// instance (its hypervisor is dead) is removed first, a live one is an error.
    pub(crate) fn up(config: LabConfig, progress: &dyn Fn(&str)) -> Result<Lab> {
        ensure!(
            config.replicas <= REPLICAS_MAX,
            "{} replicas asked for: a lab has at most {REPLICAS_MAX}",
            config.replicas
        );
        ensure!(!config.services.is_empty(), "a lab needs at least one service");
        setup::install(&config.services, progress)?;
        if config.build {
            setup::build(progress)?;
        }
        let directory = config.directory();
        let _only_one = claim(&config.name, &directory)?;
        if directory.exists() {
            progress("removing what an earlier run left behind");
            Lab::remove(&config.name)?;
        }
        let group = lab_group(&config.name)?;
        // From here on whatever fails, dropping this removes what was made.
        let lab = Lab { config, directory, group, owned: true };
        lab.make(progress)?;
        Ok(lab)
    }

    fn make(&self, progress: &dyn Fn(&str)) -> Result<()> {
        let Lab { config, directory, group, .. } = self;
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        // In memory: what disks add would be measured with the rest.
        let options = Some("mode=0755,size=75%");
        mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::MS_NOSUID, options)
            .with_context(|| format!("mounting a tmpfs on {}", directory.display()))?;
        let bpffs = plan::bpffs(&config.name);
        fs::create_dir(&bpffs).with_context(|| format!("making {}", bpffs.display()))?;
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting a bpffs on {}", bpffs.display()))?;
        let log = directory.join("log");
        fs::create_dir_all(&log).with_context(|| format!("making {}", log.display()))?;
        config.save()?;
        if let Some(vlan) = config.vlan {
            vlan.compile(directory)?;
        }

        progress("namespaces: dom0 with xenbr0, client");
        let (dom0, client) = (self.dom0(), self.client());
        dom0.processes.create()?;
        client.processes.create()?;
        network::make_dom0_and_client(config, &dom0, &client)?;

        progress("hypervisor and xenstored");
        self.start_hypervisor(group)?;

        for &service in &config.services {
            progress(&format!("{}: what all domains start from", service.name()));
            service.share(directory, config.large_file_bytes)?;
        }
        for place in 1..=config.replicas + 1 {
            let begun = Instant::now();
            let domain = self.create(&plan::domain_name(place))?;
            progress(&format!(
                "{}: domid {}, {}, {} ({:.1} s)",
                domain.name,
                domain.domid,
                domain.vif,
                domain.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
                begun.elapsed().as_secs_f64()
            ));
        }
        Ok(())
    }

    fn start_hypervisor(&self, group: &Group) -> Result<()> {
        let own = group.inside("hypervisor");
        own.create()?;
        let log_path = self.directory.join("log/hypervisor.log");
        let log = File::create(&log_path).with_context(|| format!("writing {}", log_path.display()))?;
        let program = std::env::current_exe().context("finding this program's file")?;
        let mut command = in_group(&own, &program.to_string_lossy());
        command
            .args(["hypervisor", &self.config.name])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = machine::spawn_detached(&mut command)?;
        let deadline = Instant::now() + HYPERVISOR_LIMIT;
        while ask(&self.directory, &Request::List).is_err() {
            if let Some(status) = child.try_wait()? {
                let said = fs::read_to_string(&log_path).unwrap_or_default();
                bail!("the lab's hypervisor ended at once ({status}): {}", said.trim());
            }
            ensure!(Instant::now() < deadline, "the lab's hypervisor does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// A handle on the running lab of this name, which stays up when the handle is dropped.
    pub(crate) fn find(name: &str) -> Result<Lab> {
        let config = LabConfig::saved(name)?;
        let directory = config.directory();
        let group = lab_group(name)?;
        let lab = Lab { config, directory, group, owned: false };
        ask(&lab.directory, &Request::List)?;
        Ok(lab)
    }

    /// Takes the lab of this name down, also the leftovers of a run that was killed. Idempotent;
    /// takes every step though another failed.
    pub(crate) fn remove(name: &str) -> Result<()> {
        let directory = plan::directory(name);
        let mut steps = vec![setup::restore_policy()];
        steps.push(lab_group(name).and_then(|group| group.remove()));
        let hosts = ["client".to_owned(), "dom0".to_owned()];
        let places = (1..=REPLICAS_MAX + 1).map(|place| format!("d{place}"));
        for host in places.chain(hosts) {
            steps.push(network::remove_namespace(&format!("{name}-{host}")));
        }
        steps.push(remove_directory(&directory));
        steps.push(cgroup::unmount_own());
        let failed: Vec<String> =
            steps.into_iter().filter_map(|step| step.err().map(|error| format!("{error:#}"))).collect();
        ensure!(failed.is_empty(), "lab {name}: {}", failed.join("; "));
        Ok(())
    }

    /// Takes this lab down and reports what could not be removed.
    pub(crate) fn down(mut self) -> Result<()> {
        self.owned = false;
        Lab::remove(&self.config.name)
    }

    /// Keeps the lab up after this handle is gone.
    pub(crate) fn leave_running(mut self) {
        self.owned = false;
    }

    /// What the lab was made from.
    pub(crate) fn config(&self) -> &LabConfig {
        &self.config
    }

    /// The lab's run-time directory: `domains.json`, `hypervisor.sock`, `xenstored.sock`, `log/`.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The client's namespace: 10.77.0.1, fd77::1.
    pub(crate) fn client(&self) -> Host {
        self.host_called("client")
    }

    /// dom0's namespace: `xenbr0` with the vifs and the client's uplink as ports; dom0's own kernel
    /// has 10.77.0.2 and fd77::2 there.
    pub(crate) fn dom0(&self) -> Host {
        self.host_called("dom0")
    }

    fn host_called(&self, name: &str) -> Host {
        Host::new(&self.config.name, &self.group, name)
    }

    /// `client`, `dom0`, or a domain by any of its names.
    pub(crate) fn host(&self, which: &str) -> Result<Host> {
        match which {
            "client" => Ok(self.client()),
            "dom0" => Ok(self.dom0()),
            domain => Ok(self.domain(domain)?.host),
        }
    }

    /// A domain by name (`guest-1`), domid (`"3"`), or UUID, as it is now; after a reboot or
    /// creation ask again.
    pub(crate) fn domain(&self, which: &str) -> Result<Domain> {
        let domains = self.domains()?;
        let names: Vec<String> = domains.iter().map(|domain| domain.name.clone()).collect();
        let is = |domain: &Domain| {
            domain.name == which
                || domain.host.name == which
                || domain.domid.to_string() == which
                || domain.uuid.to_string() == which
        };
        domains
            .into_iter()
            .find(is)
            .with_context(|| format!("the lab has no domain \"{which}\"; there are: {}", names.join(", ")))
    }

    /// All domains, in the order of their places.
    pub(crate) fn domains(&self) -> Result<Vec<Domain>> {
        let reply = ask(&self.directory, &Request::List)?;
        Ok(reply.domains.into_iter().map(|record| self.seen(record)).collect())
    }

    fn seen(&self, record: Record) -> Domain {
        let place = format!("d{}", record.place);
        let mut state = Vec::new();
        if record.paused {
            state.push("paused".to_owned());
        }
        if record.spinning {
            state.push("spinning".to_owned());
        }
        if let Some(code) = record.shutdown {
            state.push(format!("shut down ({code:?})").to_lowercase());
        }
        for service in &record.hung {
            state.push(format!("{} hung", service.name()));
        }
        Domain {
            state: if state.is_empty() { "running".to_owned() } else { state.join(", ") },
            data: self.directory.join(&place),
            host: self.host_called(&place),
            place: record.place,
            name: record.name,
            domid: record.domid,
            uuid: record.uuid,
            addresses: record.addresses,
            mac: record.mac,
            vif: record.vif,
        }
    }

    /// Starts `target/release/dom0d` in dom0 with this configuration and waits until its control
    /// socket answers. `control_socket` must not be in `config_toml`: the lab sets it.
    pub(crate) fn start_dom0d(&self, config_toml: &str) -> Result<Daemon> {
        Daemon::start(self, config_toml)
    }

    /// A configuration with one entry per service of this lab, `guest-1` as OVM and the others as
    /// RVMs, `attach = "assume-identical"`.
    pub(crate) fn default_config(&self) -> String {
        plan::default_config(&self.config)
    }

    /// Makes a fault happen. The instant is taken right before it takes effect.
    pub(crate) fn fault(&self, fault: Fault, domain: &str) -> Result<FaultInstant> {
        self.fault_of_service(fault, domain, None)
    }

    /// The same; `hang` and `kill` of one service only.
    pub(crate) fn fault_of_service(
        &self,
        fault: Fault,
        domain: &str,
        service: Option<Service>,
    ) -> Result<FaultInstant> {
        let request = Request::Fault { fault, domain: domain.to_owned(), service };
        let instant = ask(&self.directory, &request)?.monotonic_ns;
        Ok(FaultInstant { monotonic_ns: instant.context("the hypervisor gave no instant")? })
    }

    /// Undoes `freeze`, `spin` and `hang`, and every pause (also the one by which dom0d fenced the
    /// domain): the guest runs on where it stood, and may speak at once.
    pub(crate) fn thaw(&self, domain: &str) -> Result<()> {
        ask(&self.directory, &Request::Thaw { domain: domain.to_owned() }).map(drop)
    }

    /// Creates the domain of this name again (new domid; new UUID, as `xl create` of a configuration
    /// without one gives), after it was destroyed; its services are in their initial state. Returns
    /// it once they answer.
    pub(crate) fn create(&self, name: &str) -> Result<Domain> {
        let reply = ask(&self.directory, &Request::Create { name: name.to_owned() })?;
        let record = reply.domains.into_iter().next();
        Ok(self.seen(record.context("the hypervisor did not say what it created")?))
    }

    /// `xl rename`.
    pub(crate) fn rename(&self, domain: &str, new_name: &str) -> Result<()> {
        let (domain, new_name) = (domain.to_owned(), new_name.to_owned());
        ask(&self.directory, &Request::Rename { domain, new_name }).map(drop)
    }

    /// Starts a service that does not run, on the data it has; returns once it answers.
    pub(crate) fn start_service(&self, domain: &str, service: Service) -> Result<()> {
        let domain = domain.to_owned();
        ask(&self.directory, &Request::StartService { domain, service }).map(drop)
    }

    /// Asks a service to end and waits for it.
    pub(crate) fn stop_service(&self, domain: &str, service: Service) -> Result<()> {
        let domain = domain.to_owned();
        ask(&self.directory, &Request::StopService { domain, service }).map(drop)
    }

    /// Ends a service if it runs and starts it again on the data it has.
    pub(crate) fn restart_service(&self, domain: &str, service: Service) -> Result<()> {
        self.stop_service(domain, service)?;
        self.start_service(domain, service)
    }

    /// Copies the state of every service from one domain to another, for seeding it again. Nothing
    /// may be written to `from` meanwhile; it is not interrupted. PostgreSQL of `to` is restarted.
    pub(crate) fn copy_state(&self, from: &str, to: &str) -> Result<()> {
        service::copy_state(self, from, to)
    }

    /// Impairs the link of `client` or of a domain, both ways; replaces an earlier impairment.
    /// `Link::default()` removes it. Nothing of it is seen in dom0.
    pub(crate) fn link(&self, host: &str, link: Link) -> Result<()> {
        ask(&self.directory, &Request::Link { host: host.to_owned(), link }).map(drop)
    }

    /// Stops xenstored, closes all its connections, and starts it again with the same contents
    /// after `down_for`.
    pub(crate) fn restart_xenstored(&self, down_for: Duration) -> Result<()> {
        ask(&self.directory, &Request::RestartXenstored { down_for }).map(drop)
    }
}

/// The control group of the lab of this name.
pub(crate) fn lab_group(name: &str) -> Result<Group> {
    Group::of_lab(name)
}

/// Makes sure that nobody else builds or runs the lab of this name; holds until dropped. An abstract
/// socket is a lock that can't be left behind.
fn claim(name: &str, directory: &Path) -> Result<UnixListener> {
    let address = SocketAddr::from_abstract_name(format!("understudy-lab-{name}"))?;
    UnixListener::bind_addr(&address).ok().filter(|_| ask(directory, &Request::List).is_err()).with_context(
        || {
            format!(
                "lab \"{name}\" is up already, or being built; `cargo lab down` ends it, and with \
                 LAB_NAME=... another one can run beside it"
            )
        },
    )
}

/// Removes the run-time directory with all that is mounted on and in it. Nothing there is no error.
fn remove_directory(directory: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    let point = directory.to_string_lossy();
    for _ in mounts.lines().filter(|line| line.split(' ').nth(1) == Some(&point)) {
        // Lazily: somebody may have a shell there.
        umount2(directory, MntFlags::MNT_DETACH)
            .with_context(|| format!("unmounting {}", directory.display()))?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).context(format!("removing {}", directory.display()));
        }
        _ => {}
    }
    // The directory of all labs, unless there are others.
    if let Some(parent) = directory.parent() {
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = Lab::remove(&self.config.name)
        {
            eprintln!("lab {}: not everything was removed: {error:#}", self.config.name);
        }
    }
}
