//! What dom0's kernel must not forward by itself (rule 13): the nft table `bridge understudy`, and the same for tc programs.
//!
//! The table is replaced as a whole; at no moment does a frame pass that both the old and the new one would drop. It is put
//! back when somebody else changes it, and removed at a clean end.
//!
//! The kernel drops the OVM's segments of the service because dom0d forwards them, rewritten; a client would answer the
//! originals with a RST. It drops everything that an RVM sends from any of its vifs, except what the operator allows. It
//! drops what is sent to a server's own address at a port of the service: a client could change one server without the
//! others. A guest is recognised by its vifs and by their MACs, since a guest that was migrated within this host may send
//! from a new vif before dom0d knows it. The table is not the fence (the engine is), so it is rewritten after a promotion,
//! off the packet path.

mod table;
mod watch;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use understudy_api::config::Allowed;
use understudy_bpf::layout::Hold;

pub(crate) use self::table::remove;
pub(crate) use self::writer::{Numbered, RulesNews, spawn_writer};
use crate::link::frame::Mac;

/// Why frames are dropped, each counted per service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Refusal {
    /// A guest says that it is the PSC.
    Claim,
    /// A server that is not the OVM says something that nobody allowed.
    Contained,
    /// A server is spoken to at its own address.
    Direct,
}

impl Refusal {
    pub(crate) const ALL: [Self; 3] = [Self::Claim, Self::Contained, Self::Direct];

    /// Its name among the counters of a service's plane.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Claim => "claims_refused",
            Self::Contained => "contained_frames",
            Self::Direct => "direct_refused",
        }
    }

    /// The nft counter of a service, given by its place in the configuration.
    fn counter(self, service: usize) -> String {
        format!("{}_{service}", self.name())
    }

    /// Which refusal of which service a counter of this name is for.
    fn of_counter(name: &str) -> Option<(usize, Self)> {
        let (name, service) = name.rsplit_once('_')?;
        let refusal = Self::ALL.into_iter().find(|refusal| refusal.name() == name)?;
        Some((service.parse().ok()?, refusal))
    }
}

/// Frames dropped, by the service's place in the configuration.
pub(crate) type Refused = BTreeMap<(usize, Refusal), u64>;

/// What may pass from the vifs that dom0d knows; vifs that are not in it are nobody's business.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RuleSet {
    /// By the vif's name.
    pub(crate) vifs: BTreeMap<String, VifRules>,
}

/// What may pass from one vif, over all services that its domain belongs to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VifRules {
    /// The number of its interface, if it has one.
    pub(crate) index: Option<u32>,
    /// The guest's MAC.
    pub(crate) mac: Mac,
    /// The guest's part in each of its services.
    pub(crate) parts: Vec<Part>,
}

/// A guest's part in one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// The service's place in the configuration.
    pub(crate) service: usize,
    /// It is the OVM; else everything is dropped.
    pub(crate) is_ovm: bool,
    /// The guest's addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// The service's ports.
    pub(crate) ports: Vec<u16>,
    /// The PSC's addresses, which no guest may speak for.
    pub(crate) psc: Vec<IpAddr>,
    /// The PSC's MAC.
    pub(crate) psc_mac: Mac,
    /// What it may send as an RVM.
    pub(crate) allow: Vec<Allowed>,
    /// Others may speak to its own addresses at the service's ports.
    pub(crate) direct: bool,
}

impl RuleSet {
    /// What tc programs need to know of the vifs, by the numbers of their interfaces.
    fn holds(&self) -> BTreeMap<u32, Hold> {
        self.vifs.values().filter_map(|vif| Some((vif.index?, vif.hold()))).collect()
    }
}

impl VifRules {
    /// What may go on from it. Of more than there is room for, the first; the rest stays held.
    fn hold(&self) -> Hold {
        let is_ovm = self.parts.iter().any(|part| part.is_ovm);
        let mut hold = Hold { is_ovm: is_ovm.into(), ..Hold::default() };
        let mut udp = hold.udp.iter_mut();
        let mut tcp = hold.tcp.iter_mut();
        let ports = self.parts.iter().filter(|_| is_ovm).flat_map(|part| &part.ports);
        for (port, place) in ports.zip(tcp.by_ref()) {
            *place = *port;
        }
        for allowed in self.parts.iter().filter(|_| !is_ovm).flat_map(|part| &part.allow) {
            hold.found = 1;
            let (place, port) = match allowed {
                Allowed::Dhcp => {
                    hold.dhcp = 1;
                    continue;
                }
                Allowed::Udp(port) => (udp.next(), port),
                Allowed::Tcp(port) => (tcp.next(), port),
            };
            if let Some(place) = place {
                *place = *port;
            }
        }
        let (mut v4, mut v6) = (hold.v4.chunks_exact_mut(4), hold.v6.chunks_exact_mut(16));
        // In several services it has the same.
        for address in self.parts.iter().flat_map(|part| &part.addresses).collect::<BTreeSet<_>>() {
            match address {
                IpAddr::V4(address) => v4.next().map(|place| place.copy_from_slice(&address.octets())),
                IpAddr::V6(address) => v6.next().map(|place| place.copy_from_slice(&address.octets())),
            };
        }
        hold
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// A guest's part in service 7.
    pub(super) fn part(is_ovm: bool, allow: Vec<Allowed>) -> Part {
        Part {
            service: 7,
            is_ovm,
            addresses: vec!["10.77.0.11".parse().unwrap(), "fd77::11".parse().unwrap()],
            ports: vec![6379, 80],
            psc: vec!["10.77.0.100".parse().unwrap(), "fd77::100".parse().unwrap()],
            psc_mac: [2, 0, 0, 0, 0, 1],
            allow,
            direct: false,
        }
    }

    #[test]
    fn tc_holds_whoever_is_no_ovm_but_for_what_is_allowed() {
        let mut set = RuleSet::default();
        for (index, is_ovm) in [(3, true), (4, false)] {
            let parts = vec![part(is_ovm, vec![Allowed::Udp(123), Allowed::Dhcp, Allowed::Tcp(443)])];
            let vif = VifRules { index: Some(index), parts, ..VifRules::default() };
            set.vifs.insert(format!("vif{index}.0"), vif);
        }
        let holds = set.holds();
        let ovm = &holds[&3];
        assert_eq!((ovm.is_ovm, ovm.found, ovm.dhcp, &ovm.tcp[..3]), (1, 0, 0, &[6379, 80, 0][..]));
        let hold = &holds[&4];
        assert_eq!((hold.is_ovm, hold.v4[3], ovm.v4[3]), (0, 11, 11));
        assert_eq!((hold.udp[0], hold.udp[1], hold.tcp[0], hold.dhcp, hold.found), (123, 0, 443, 1, 1));
        assert_eq!(hold.v4[..5], [10, 77, 0, 11, 0]);
        assert_eq!((hold.v6[0], hold.v6[15], hold.v6[16]), (0xfd, 0x11, 0));
    }

    #[test]
    fn a_counter_is_known_by_its_name() {
        for refusal in Refusal::ALL {
            assert_eq!(Refusal::of_counter(&refusal.counter(12)), Some((12, refusal)));
        }
        assert_eq!(Refusal::of_counter("claims_refused"), None);
    }
}
