//! A domU as the rest of the lab sees it.

use std::net::IpAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use uuid::Uuid;

use super::Host;

/// A domU at one moment of its life. It dereferences to its [`Host`].
#[derive(Debug, Clone)]
pub(crate) struct Domain {
    /// Its place, from 1; addresses, MAC and namespace stay with the place.
    pub(crate) place: usize,
    /// Its name, e.g. `guest-1`.
    pub(crate) name: String,
    /// Its domid, a new one with every creation and reboot.
    pub(crate) domid: u32,
    /// Its UUID; survives a reboot.
    pub(crate) uuid: Uuid,
    /// IPv4 and, if the lab has it, IPv6 address.
    pub(crate) addresses: Vec<IpAddr>,
    /// The frontend's MAC.
    pub(crate) mac: String,
    /// The backend interface in dom0, `vif<domid>.0`.
    pub(crate) vif: String,
    /// As `domains.json` says.
    pub(crate) paused: bool,
    /// Where its services keep their data: `redis/`, `http/upload/`, `postgresql/`.
    pub(crate) data: PathBuf,
    /// Its namespace.
    pub(crate) host: Host,
}

impl Deref for Domain {
    type Target = Host;
    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Domain {
    /// Where `PUT /upload/NAME` has put its body.
    pub(crate) fn uploaded(&self, name: &str) -> PathBuf {
        self.data.join("http/upload").join(name)
    }
}

pub(crate) fn list(_directory: &Path) -> Result<Vec<Domain>> {
    Ok(Vec::new())
}

pub(crate) fn find(directory: &Path, which: &str) -> Result<Domain> {
    for domain in list(directory)? {
        if domain.name == which
            || domain.domid.to_string() == which
            || domain.uuid.to_string() == which
        {
            return Ok(domain);
        }
    }
    bail!("the lab has no domain \"{which}\"")
}

pub(crate) fn create(directory: &Path, name: &str) -> Result<Domain> {
    find(directory, name)
}

pub(crate) fn rename(_directory: &Path, _domain: &str, _new_name: &str) -> Result<()> {
    Ok(())
}

pub(crate) fn restart_xenstored(_directory: &Path, _down_for: Duration) -> Result<()> {
    Ok(())
}
