//! What a namespace lab is: dom0, a client and N+1 domUs, each a network namespace of this machine.
//!
//! The state of a running lab lives in one *hypervisor* process and in `/run/understudy-lab/<NAME>`;
//! a [`Lab`] is a handle on it, so that several processes (`cargo lab up`, then `cargo lab fault`)
//! act on one lab. Everything that the lab starts runs in a control group of its own, by which it is
//! found and ended again, whoever died in between.
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

mod daemon;
mod domain;
mod fault;
mod link;
mod machine;
mod plan;
mod service;

pub(crate) use daemon::Daemon;
pub(crate) use domain::Domain;
pub(crate) use fault::{Fault, FaultInstant};
pub(crate) use link::Link;
pub(crate) use machine::Host;
pub(crate) use plan::{LabConfig, instance_name};
pub(crate) use service::Service;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

/// A running namespace lab. Dropping it takes the lab down, unless [`Lab::leave_running`] was called
/// or the handle came from [`Lab::find`].
#[derive(Debug)]
pub(crate) struct Lab {
    config: LabConfig,
    directory: PathBuf,
    owned: bool,
}

impl Lab {
    /// Builds a lab: installs what is missing, makes the namespaces, starts the hypervisor, the
    /// domains (`guest-1` is the OVM, `guest-2`... its replicas) and their services. Blocks until
    /// every service answers. Does not start dom0d. On failure nothing is left behind. A stale
    /// instance (its hypervisor is dead) is removed first, a live one is an error.
    pub(crate) fn up(config: LabConfig, progress: &dyn Fn(&str)) -> Result<Lab> {
        let _ = progress;
        let directory = config.directory();
        Ok(Lab {
            config,
            directory,
            owned: true,
        })
    }

    /// A handle on the running lab of this name, which stays up when the handle is dropped.
    pub(crate) fn find(name: &str) -> Result<Lab> {
        let config = LabConfig::new(name.to_owned());
        let directory = config.directory();
        Ok(Lab {
            config,
            directory,
            owned: false,
        })
    }

    /// Takes the lab of this name down, also the leftovers of a run that was killed. Idempotent.
    pub(crate) fn remove(name: &str) -> Result<()> {
        let _ = name;
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
        Host::new(&self.config, "client")
    }

    /// dom0's namespace: `xenbr0` with the vifs and the client's uplink as ports.
    pub(crate) fn dom0(&self) -> Host {
        Host::new(&self.config, "dom0")
    }

    /// A domain by name (`guest-1`), domid (`"3"`), or UUID, as it is now; after a reboot or
    /// creation ask again.
    pub(crate) fn domain(&self, which: &str) -> Result<Domain> {
        domain::find(&self.directory, which)
    }

    /// All domains, in the order of their places, also those that are being destroyed.
    pub(crate) fn domains(&self) -> Result<Vec<Domain>> {
        domain::list(&self.directory)
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
        fault::strike(&self.directory, fault, domain)
    }

    /// Undoes `freeze`, `spin` and `hang`, and every pause (also the one by which dom0d fenced the
    /// domain): the guest runs on where it stood, and may speak at once.
    pub(crate) fn thaw(&self, domain: &str) -> Result<()> {
        fault::thaw(&self.directory, domain)
    }

    /// Creates the domain of this name again (new domid; new UUID, as `xl create` of a configuration
    /// without one gives), after it was destroyed; its services start empty. Returns it once they answer.
    pub(crate) fn create(&self, name: &str) -> Result<Domain> {
        domain::create(&self.directory, name)
    }

    /// `xl rename`.
    pub(crate) fn rename(&self, domain: &str, new_name: &str) -> Result<()> {
        domain::rename(&self.directory, domain, new_name)
    }

    /// Starts a service of a domain again after [`Fault::Kill`], on the data it had.
    pub(crate) fn restart_service(&self, domain: &str, service: Service) -> Result<()> {
        service::restart(&self.directory, domain, service)
    }

    /// Copies the state of every service from one domain to another, for seeding it again. `from`
    /// must be quiet meanwhile; its PostgreSQL is stopped for the copy, so is all of `to`.
    pub(crate) fn copy_state(&self, from: &str, to: &str) -> Result<()> {
        service::copy_state(&self.directory, from, to)
    }

    /// Impairs the link of `client` or of a domain, both ways; replaces an earlier impairment.
    /// `Link::default()` removes it. Nothing of it is seen in dom0.
    pub(crate) fn link(&self, host: &str, link: Link) -> Result<()> {
        link::set(&self.directory, host, link)
    }

    /// Stops xenstored, closes all its connections, and starts it again with the same contents
    /// after `down_for`.
    pub(crate) fn restart_xenstored(&self, down_for: Duration) -> Result<()> {
        domain::restart_xenstored(&self.directory, down_for)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = Lab::remove(&self.config.name)
        {
            eprintln!(
                "lab {}: not everything was removed: {error:#}",
                self.config.name
            );
        }
    }
}
