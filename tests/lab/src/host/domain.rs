//! A domU as the rest of the lab sees it.

use std::net::IpAddr;
use std::ops::Deref;
use std::path::PathBuf;

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
    /// Its state in words: `running`, `paused`, `spinning`, ...
    pub(crate) state: String,
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
