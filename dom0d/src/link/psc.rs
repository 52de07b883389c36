//! The PSC's addresses, which the daemon alone answers for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use understudy_api::config;

use super::frame::Mac;

/// The PSC's addresses.
#[derive(Clone, Debug)]
pub(crate) struct Psc {
    /// IPv4, if it has one.
    pub(crate) v4: Option<Ipv4Addr>,
    /// IPv6, if it has one.
    pub(crate) v6: Option<Ipv6Addr>,
    /// The MAC that answers for both.
    pub(crate) mac: Mac,
    /// The VLAN that it is in; `None` if its frames have no tag.
    pub(crate) vlan: Option<u16>,
}

impl Psc {
    /// A service's, by its configuration.
    pub(crate) fn of(service: &config::Service) -> Self {
        let addresses = &service.engine.psc;
        let v4 = addresses.iter().find_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        });
        let v6 = addresses.iter().find_map(|address| match address {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        });
        Self { v4, v6, mac: service.psc_mac, vlan: service.vlan }
    }

    /// Whether it has this address.
    pub(crate) fn has(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.v4 == Some(v4),
            IpAddr::V6(v6) => self.v6 == Some(v6),
        }
    }
}
