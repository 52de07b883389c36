//! A domain's life: creation, pause, faults, shutdown, destruction; what is done in which order.

use std::fs;
use std::io::ErrorKind;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use uuid::Uuid;

use crate::client::clock::now_ns;
use crate::host::{Fault, Host, Service, domain_name, lab_group, network};

use super::guest::{Guest, Stop, data_directory, identity, wait_ready, wait_stopped};
use super::request::{Record, Shutdown};
use super::{Hypervisor, lock, nodes};

/// From a domain's shutdown to what xl does about it (`on_crash = destroy`, ...).
const TOOLSTACK_DELAY: Duration = Duration::from_millis(100);
/// How long a creation waits for the place's former domain to be cleared away.
const PLACE_LIMIT: Duration = Duration::from_secs(30);

impl Hypervisor {
    /// `xl create` of the domain of this name, with a new UUID.
    pub(super) fn create_named(&self, name: &str) -> Result<Record> {
        let places = 1..=self.config.replicas + 1;
        let place = places.clone().find(|&place| domain_name(place) == name).with_context(|| {
            let names: Vec<String> = places.map(domain_name).collect();
            format!("there is no configuration of a domain \"{name}\", only of {}", names.join(", "))
        })?;
        ensure!(
            !lock(&self.domains).guests.iter().any(|guest| guest.place == place),
            "{name} exists already; `cargo lab fault destroy {name}` ends it"
        );
        self.create(place, name, Uuid::new_v4())
    }

    /// Makes a domain and returns once its services answer.
    fn create(&self, place: usize, name: &str, uuid: Uuid) -> Result<Record> {
        let domid = self.take_place(place)?;
        let record = identity(place, name, domid, uuid, self.config.ipv6);
        let group = lab_group(&self.config.name)?;
        let host = Host::new(&self.config.name, &group, &format!("d{place}"));
        let made = self.make(&record, &host).and_then(|()| self.start_services(domid, &host));
        if let Err(error) = made {
            let known = lock(&self.domains).guests.iter().any(|guest| guest.domid == domid);
            let cleared = if known { self.destroy(domid) } else { self.clear_away(&record, &host) };
            if let Err(also) = cleared {
                eprintln!("clearing away {name}: {also:#}");
            }
            return Err(error.context(format!("creating {name}")));
        }
        Ok(record)
    }

    /// Waits until the place is free, takes it, and gives a domid that was never used.
    fn take_place(&self, place: usize) -> Result<u32> {
        let deadline = Instant::now() + PLACE_LIMIT;
        loop {
            let mut domains = lock(&self.domains);
            if !domains.taken.contains(&place) {
                domains.taken.push(place);
                let domid = domains.next_domid;
                domains.next_domid += 1;
                return Ok(domid);
            }
            drop(domains);
            ensure!(Instant::now() < deadline, "the former {} is still there", domain_name(place));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The domain runs, with its vif on the bridge, without services.
    fn make(&self, record: &Record, host: &Host) -> Result<()> {
        let data = data_directory(&self.directory, record.place);
        match fs::remove_dir_all(&data) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).context(format!("removing {}", data.display()));
            }
            _ => {}
        }
        let start_time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        nodes::create(&lock(&self.xenstored), record, &format!("{start_time:.2}"))?;
        host.processes.create()?;
        let Record { vif, mac, addresses, .. } = record;
        network::make_guest(&self.config, &self.dom0, host, vif, mac, addresses)?;
        let guest = Guest::new(record, host.clone(), self.config.ipv6)?;
        {
            let mut domains = lock(&self.domains);
            domains.guests.push(guest);
            domains.guests.sort_by_key(|guest| guest.place);
            self.publish(&domains)?;
        }
        lock(&self.xenstored).introduce(record.domid);
        network::plug(&self.dom0, vif, self.config.vlan)?;
        nodes::connect(&lock(&self.xenstored), record)
    }

    fn start_services(&self, domid: u32, host: &Host) -> Result<()> {
        for &service in &self.config.services {
            lock(&self.domains).of_domid(domid)?.start(service, &self.directory)?;
        }
        for &service in &self.config.services {
            wait_ready(host, service, &self.directory)?;
        }
        Ok(())
    }

    pub(super) fn pause(&self, domid: u32) -> Result<()> {
        self.stop_domain(domid, Stop::Pause).map(drop)
    }

    pub(super) fn unpause(&self, domid: u32) -> Result<()> {
        let mut domains = lock(&self.domains);
        domains.of_domid(domid)?.unpause()?;
        self.publish(&domains)
    }

    pub(super) fn thaw(&self, which: &str) -> Result<()> {
        let mut domains = lock(&self.domains);
        domains.find(which)?.thaw()?;
        self.publish(&domains)
    }

    pub(super) fn rename(&self, which: &str, name: &str) -> Result<()> {
        let mut domains = lock(&self.domains);
        ensure!(
            !domains.guests.iter().any(|guest| guest.name == name),
            "there is a domain \"{name}\" already"
        );
        let guest = domains.find(which)?;
        nodes::rename(&lock(&self.xenstored), guest.domid, guest.uuid, name)?;
        guest.name = name.to_owned();
        Ok(())
    }

    /// Stops a domain; what `domains.json` tells of it appears before its network falls silent.
    /// Returns CLOCK_MONOTONIC right before the first step.
    fn stop_domain(&self, domid: u32, reason: Stop) -> Result<u64> {
        let mut domains = lock(&self.domains);
        let guest = domains.of_domid(domid)?;
        if guest.is_shut_down() && reason != Stop::Destroy {
            bail!("domain {domid} ({}) has shut down already", guest.name);
        }
        let instant = now_ns();
        guest.stop(reason)?;
        // Domain info of a spinning guest tells nothing, and a destroyed one is published as gone.
        if !matches!(reason, Stop::Spin | Stop::Destroy) {
            self.publish(&domains)?;
        }
        domains.of_domid(domid)?.silence()?;
        Ok(instant)
    }

    /// Makes a fault happen; returns CLOCK_MONOTONIC right before its first step.
    pub(super) fn strike(
        self: &Arc<Self>,
        fault: Fault,
        which: &str,
        service: Option<Service>,
    ) -> Result<u64> {
        let domid = lock(&self.domains).find(which)?.domid;
        match fault {
            Fault::Freeze => self.stop_domain(domid, Stop::Pause),
            Fault::Spin => self.stop_domain(domid, Stop::Spin),
            Fault::Crash => {
                let instant = self.stop_domain(domid, Stop::Shutdown(Shutdown::Crash))?;
                self.let_toolstack_react(domid, Shutdown::Crash)?;
                Ok(instant)
            }
            Fault::Destroy => {
                let instant = now_ns();
                self.destroy(domid)?;
                Ok(instant)
            }
            Fault::Hang | Fault::Kill => {
                let mut domains = lock(&self.domains);
                let guest = domains.of_domid(domid)?;
                let services = guest.running(service)?;
                let instant = now_ns();
                for service in services {
                    if fault == Fault::Hang { guest.hang(service) } else { guest.kill(service) }?;
                }
                Ok(instant)
            }
            Fault::Poweroff => self.shut_down(domid, Shutdown::Poweroff),
            Fault::Reboot => self.shut_down(domid, Shutdown::Reboot),
        }
    }

    /// The guest ends its services, then itself.
    fn shut_down(self: &Arc<Self>, domid: u32, code: Shutdown) -> Result<u64> {
        let mut domains = lock(&self.domains);
        let guest = domains.of_domid(domid)?;
        let services = guest.running(None)?;
        let groups = guest.groups(&services);
        let instant = now_ns();
        guest.ask_to_stop(&services);
        drop(domains);
        let hypervisor = Arc::clone(self);
        in_background("shutdown", move || {
            wait_stopped(&groups)?;
            hypervisor.stop_domain(domid, Stop::Shutdown(code))?;
            hypervisor.let_toolstack_react(domid, code)
        })?;
        Ok(instant)
    }

    /// xl learns of a shutdown by `@releaseDomain`, then does what the domain's configuration says.
    fn let_toolstack_react(self: &Arc<Self>, domid: u32, code: Shutdown) -> Result<()> {
        lock(&self.xenstored).announce_shutdown();
        let hypervisor = Arc::clone(self);
        in_background("toolstack", move || {
            std::thread::sleep(TOOLSTACK_DELAY);
            let (place, name, uuid) = {
                let mut domains = lock(&hypervisor.domains);
                let guest = domains.of_domid(domid)?;
                (guest.place, guest.name.clone(), guest.uuid)
            };
            hypervisor.destroy(domid)?;
            if code == Shutdown::Reboot {
                hypervisor.create(place, &name, uuid)?;
            }
            Ok(())
        })
    }

    /// `xl destroy`: returns when nothing of the domain is left.
    pub(super) fn destroy(&self, domid: u32) -> Result<()> {
        self.stop_domain(domid, Stop::Destroy)?;
        let guest = {
            let mut domains = lock(&self.domains);
            let at = domains.guests.iter().position(|guest| guest.domid == domid);
            // Another request was quicker.
            let Some(at) = at else { return Ok(()) };
            let guest = domains.guests.remove(at);
            self.publish(&domains)?;
            guest
        };
        lock(&self.xenstored).release(domid);
        let (record, host) = (guest.record(), guest.host.clone());
        // Its netlink socket would keep the namespace.
        drop(guest);
        self.clear_away(&record, &host)
    }

    /// Removes what a domain consisted of, and frees its place. Every step is taken though another
    /// failed.
    fn clear_away(&self, record: &Record, host: &Host) -> Result<()> {
        if let Some(relay) = lock(&self.relays).remove(&host.name) {
            relay.abandon();
        }
        let mut steps = vec![host.cgroup.remove()];
        steps.push(nodes::remove_backend(&lock(&self.xenstored), record.domid));
        steps.push(network::unplug(&self.dom0, &record.vif));
        steps.push(network::remove_namespace(&host.netns));
        steps.push(nodes::remove(&lock(&self.xenstored), record.domid, record.uuid));
        lock(&self.domains).taken.retain(|&place| place != record.place);
        steps.into_iter().collect::<Result<()>>().with_context(|| format!("destroying {}", record.name))
    }

    pub(super) fn start_service(&self, which: &str, service: Service) -> Result<()> {
        let host = {
            let mut domains = lock(&self.domains);
            let guest = domains.find(which)?;
            guest.start(service, &self.directory)?;
            guest.host.clone()
        };
        wait_ready(&host, service, &self.directory)
    }

    pub(super) fn stop_service(&self, which: &str, service: Service) -> Result<()> {
        let groups = {
            let mut domains = lock(&self.domains);
            let guest = domains.find(which)?;
            guest.ask_to_stop(&[service]);
            guest.forget(service);
            guest.groups(&[service])
        };
        wait_stopped(&groups)
    }
}

fn in_background<F>(name: &str, work: F) -> Result<()>
where
    F: FnOnce() -> Result<()> + Send + 'static,
{
    let label = name.to_owned();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            if let Err(error) = work() {
                eprintln!("{label}: {error:#}");
            }
        })
        .context("starting a thread")?;
    Ok(())
}
