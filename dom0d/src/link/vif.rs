//! A domain's vif: its backend in dom0, through which the domain's frames come and go.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::device::Device;
use super::frame::Mac;
use crate::domain::DomainRef;

/// The vif that a domain serves through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Vif {
    /// Its interface in dom0.
    pub(crate) name: String,
    /// The guest's MAC.
    pub(crate) mac: Mac,
    /// The guest's addresses: at most one per family.
    pub(crate) addresses: Vec<IpAddr>,
    /// In bytes.
    pub(crate) mtu: u16,
}

/// A domain that a service can use, as placement hands it over.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    /// As operators know it.
    pub(crate) domain: DomainRef,
    /// What it serves through.
    pub(crate) vif: Vif,
}

/// A vif of a domain of the service, whether the domain can be used or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestVif {
    /// Whose, in which life.
    pub(crate) domain: DomainRef,
    /// That life is being received by a migration.
    pub(crate) is_incoming: bool,
    /// The guest's MAC there.
    pub(crate) mac: Mac,
    /// The number of its interface, once it has one.
    pub(crate) index: Option<u32>,
}

/// An open interface.
pub(crate) struct Interface {
    /// Its number.
    pub(crate) index: u32,
    /// What is captured there.
    pub(crate) device: Device,
}
