//! One domU: what runs in it, and how it is stopped and let run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use uuid::Uuid;

use crate::host::{Gate, Group, Host, Service, guest_addresses, guest_mac, in_group};

use super::request::{Record, Shutdown};

/// How long a service may take until it answers.
const SERVICE_READY_LIMIT: Duration = Duration::from_secs(60);
/// How long a process may take from its start until it has joined its control group.
const JOIN_LIMIT: Duration = Duration::from_secs(1);
/// How long services may take to end when the guest shuts down, then they are killed.
const SERVICE_STOP_LIMIT: Duration = Duration::from_secs(2);

/// A domU.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) place: usize,
    pub(super) name: String,
    pub(super) domid: u32,
    pub(super) uuid: Uuid,
    pub(super) host: Host,
    ipv6: bool,
    gate: Gate,
    /// Pauses that were not undone, counted as Xen does it.
    pauses: u32,
    spinning: bool,
    hung: Vec<Service>,
    shutdown: Option<Shutdown>,
    /// Main process of each service that was started.
    services: BTreeMap<Service, Pid>,
}

impl Guest {
    /// A running domain without services, whose namespace and interface exist.
    pub(super) fn new(record: &Record, host: Host, ipv6: bool) -> Result<Guest> {
        Ok(Guest {
            place: record.place,
            name: record.name.clone(),
            domid: record.domid,
            uuid: record.uuid,
            ipv6,
            gate: Gate::new(&host)?,
            host,
            pauses: 0,
            spinning: false,
            hung: Vec::new(),
            shutdown: None,
            services: BTreeMap::new(),
        })
    }

    pub(super) fn record(&self) -> Record {
        Record {
            paused: self.pauses > 0,
            spinning: self.spinning,
            hung: self.hung.clone(),
            shutdown: self.shutdown,
            ..identity(self.place, &self.name, self.domid, self.uuid, self.ipv6)
        }
    }

    /// Its entry of `domains.json`.
    pub(super) fn to_json(&self) -> serde_json::Value {
        json!({
            "domid": self.domid,
            "uuid": self.uuid,
            "paused": self.pauses > 0,
            "dying": false,
            "shutdown": self.shutdown,
            "cpu_time_ns": self.host.cgroup.cpu_time_ns(),
        })
    }

    pub(super) fn is(&self, which: &str) -> bool {
        self.name == which
            || self.host.name == which
            || self.domid.to_string() == which
            || self.uuid.to_string() == which
    }

    fn stopped(&self) -> bool {
        self.pauses > 0 || self.spinning || self.shutdown.is_some()
    }

    pub(super) fn is_shut_down(&self) -> bool {
        self.shutdown.is_some()
    }

    /// Stops the vCPUs for a reason that `domains.json` tells or not. The caller publishes it, then
    /// calls [`Guest::silence`]; what counts as the fault's instant lies before this.
    pub(super) fn stop(&mut self, reason: Stop) -> Result<()> {
        match reason {
            Stop::Pause => self.pauses = self.pauses.saturating_add(1),
            Stop::Spin => self.spinning = true,
            Stop::Shutdown(code) => self.shutdown = Some(code),
            Stop::Destroy => {}
        }
        self.host.cgroup.freeze(true)
    }

    /// Stops the network stack.
    pub(super) fn silence(&self) -> Result<()> {
        self.gate.shut()
    }

    /// Undoes one pause.
    pub(super) fn unpause(&mut self) -> Result<()> {
        if self.pauses == 0 {
            bail!("domain {} ({}) is not paused", self.domid, self.name);
        }
        self.pauses -= 1;
        self.resume()
    }

    /// Undoes whatever stopped it or its services, except a shutdown.
    pub(super) fn thaw(&mut self) -> Result<()> {
        if let Some(code) = self.shutdown {
            bail!("domain {} ({}) has shut down ({code:?}): it can't run on", self.domid, self.name);
        }
        for service in std::mem::take(&mut self.hung) {
            self.service_group(service).freeze(false)?;
        }
        self.pauses = 0;
        self.spinning = false;
        self.resume()
    }

    fn resume(&self) -> Result<()> {
        if !self.stopped() {
            self.gate.open()?;
            self.host.cgroup.freeze(false)?;
        }
        Ok(())
    }

    /// Stops a service's processes, all of them; its kernel goes on.
    pub(super) fn hang(&mut self, service: Service) -> Result<()> {
        self.service_group(service).freeze(true)?;
        if !self.hung.contains(&service) {
            self.hung.push(service);
        }
        Ok(())
    }

    /// Kills a service's processes; its kernel closes their connections.
    pub(super) fn kill(&mut self, service: Service) -> Result<()> {
        self.services.remove(&service);
        self.service_group(service).kill()
    }

    /// The services that run, or the one if it does.
    pub(super) fn running(&self, one: Option<Service>) -> Result<Vec<Service>> {
        if let Some(service) = one
            && !self.services.contains_key(&service)
        {
            bail!("{} does not run in {}", service.name(), self.name);
        }
        Ok(self.services.keys().copied().filter(|service| one.is_none_or(|one| one == *service)).collect())
    }

    fn service_group(&self, service: Service) -> Group {
        self.host.cgroup.inside(service.name())
    }

    /// Starts a service; it does not answer yet.
    pub(super) fn start(&mut self, service: Service, directory: &Path) -> Result<()> {
        if self.services.contains_key(&service) && self.service_group(service).populated() {
            bail!("{} runs in {} already", service.name(), self.name);
        }
        let data = data_directory(directory, self.place).join(service.name());
        let command_line = service.prepare(directory, &data)?;
        let [program, arguments @ ..] = command_line.as_slice() else {
            bail!("{} has no command line", service.name());
        };
        let log_path = log_path(directory, &self.host, service);
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .with_context(|| format!("writing {}", log_path.display()))?;
        let group = self.service_group(service);
        group.create()?;
        let mut command = in_group(&group, program);
        command.args(arguments).current_dir(&data).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut child = self.host.spawn(&mut command)?;
        let pid = i32::try_from(child.id()).context("a process id beyond what Linux gives")?;
        self.services.insert(service, Pid::from_raw(pid));
        std::thread::Builder::new()
            .name("reaper".to_owned())
            .spawn(move || child.wait())
            .context("starting a thread")?;
        // Until it has joined its group, a service that starts looks like one that has ended.
        let deadline = Instant::now() + JOIN_LIMIT;
        while !group.populated() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Asks services to end, as the guest's init would; kills what does not.
    pub(super) fn ask_to_stop(&self, services: &[Service]) {
        for service in services {
            if let Some(&pid) = self.services.get(service) {
                // PostgreSQL waits for its clients on SIGTERM.
                let signal = if *service == Service::Postgresql { Signal::SIGINT } else { Signal::SIGTERM };
                // It may have ended by itself.
                let _ = kill(pid, signal);
            }
        }
    }

    pub(super) fn forget(&mut self, service: Service) {
        self.services.remove(&service);
    }

    pub(super) fn groups(&self, services: &[Service]) -> Vec<Group> {
        services.iter().map(|&service| self.service_group(service)).collect()
    }
}

/// Why a domain stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    Pause,
    Spin,
    Shutdown(Shutdown),
    Destroy,
}

/// What is fixed when a domain is made.
pub(super) fn identity(place: usize, name: &str, domid: u32, uuid: Uuid, ipv6: bool) -> Record {
    Record {
        place,
        name: name.to_owned(),
        domid,
        uuid,
        addresses: guest_addresses(place, ipv6),
        mac: guest_mac(place),
        vif: format!("vif{domid}.0"),
        paused: false,
        spinning: false,
        hung: Vec::new(),
        shutdown: None,
    }
}

/// Where the services of the domain at this place keep their data.
pub(super) fn data_directory(directory: &Path, place: usize) -> PathBuf {
    directory.join(format!("d{place}"))
}

/// Waits until the processes of these groups have ended, kills those that do not.
pub(super) fn wait_stopped(groups: &[Group]) -> Result<()> {
    let deadline = Instant::now() + SERVICE_STOP_LIMIT;
    for group in groups {
        if !group.wait_empty(deadline.saturating_duration_since(Instant::now())) {
            group.kill()?;
            group.wait_empty(SERVICE_STOP_LIMIT);
        }
    }
    Ok(())
}

/// Waits until a service answers.
pub(super) fn wait_ready(host: &Host, service: Service, directory: &Path) -> Result<()> {
    let deadline = Instant::now() + SERVICE_READY_LIMIT;
    while !service.answers(host) {
        if Instant::now() >= deadline || !host.cgroup.inside(service.name()).populated() {
            let log = fs::read_to_string(log_path(directory, host, service)).unwrap_or_default();
            let lines: Vec<&str> = log.trim_end().lines().collect();
            let said = lines[lines.len().saturating_sub(5)..].join("\n");
            bail!("{} in {} does not come up: {said}", service.name(), host.name);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn log_path(directory: &Path, host: &Host, service: Service) -> PathBuf {
    directory.join("log").join(format!("{}-{}.log", host.name, service.name()))
}
