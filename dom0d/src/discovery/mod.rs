//! The domains of this host, with their names, addresses and vifs, as xenstore has them.
//!
//! [`xenstore`] keeps a connection and publishes a [`Snapshot`] after each change; what changed is found
//! by comparing snapshots, since watches only say that something did.

mod listing;
mod xenstore;

use std::net::IpAddr;

use uuid::Uuid;

use crate::domain::{DomainId, DomainRef};

pub(crate) use xenstore::{Found, Relist, watch_domains};

/// All domains but dom0 at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Snapshot {
    /// By ascending domid.
    pub(crate) domains: Vec<Domain>,
    /// Nodes that made no sense and were skipped.
    pub(crate) garbage: u64,
}

/// One domain, as dom0-owned nodes describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Domain {
    /// The number of this life of it.
    pub(crate) domid: u16,
    /// Its identity, from `vm`.
    pub(crate) uuid: Uuid,
    /// The toolstack's handle.
    pub(crate) name: String,
    /// Its network interfaces, by ascending devid.
    pub(crate) vifs: Vec<Vif>,
    /// Numbers of those whose backend is in another domain.
    pub(crate) foreign_vifs: Vec<u32>,
    /// It was received by a migration: this life was listed under a name for that before.
    pub(crate) received: bool,
    /// What the toolstack asks of it in `control/shutdown`: `poweroff`, `reboot`, ...
    pub(crate) shutdown_request: Option<String>,
}

impl Domain {
    /// This life of it.
    pub(crate) fn id(&self) -> DomainId {
        DomainId { uuid: self.uuid, domid: self.domid }
    }

    /// As operators know it.
    pub(crate) fn reference(&self) -> DomainRef {
        DomainRef { name: self.name.clone(), uuid: self.uuid, domid: self.domid }
    }
}

/// Suffix that xl gives to a domain that it is receiving by a migration; it is not that domain yet.
pub(crate) const INCOMING: &str = "--incoming";

/// Suffix that xl gives to a domain that has been sent away; it is that domain until it is gone.
const MIGRATED_AWAY: &str = "--migratedaway";

/// Whether a domain is being received under this name.
pub(crate) fn is_incoming(name: &str) -> bool {
    name.ends_with(INCOMING)
}

/// The name of a domain before it was sent away; `None` if it was not.
pub(crate) fn sent_away(name: &str) -> Option<&str> {
    name.strip_suffix(MIGRATED_AWAY)
}

/// One network interface of a domain, as its backend in dom0 describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vif {
    /// Its number within the domain.
    pub(crate) devid: u32,
    /// The backend's interface in dom0.
    pub(crate) name: String,
    /// The guest's MAC.
    pub(crate) mac: [u8; 6],
    /// The bridge that the toolstack meant it for; netlink tells where it is.
    pub(crate) bridge: Option<String>,
    /// The backend's xenbus state.
    pub(crate) state: u32,
    /// The guest's addresses, as the toolstack's `ip=` gives them.
    pub(crate) ips: Vec<IpAddr>,
}

/// Xenbus state of a backend whose frontend is connected (`XenbusStateConnected`).
pub(crate) const XENBUS_CONNECTED: u32 = 4;

impl Snapshot {
    /// Notes which domains were received by a migration, given what was listed before.
    fn note_received(&mut self, before: Option<&Snapshot>) {
        for domain in &mut self.domains {
            let old = before.and_then(|before| before.domains.iter().find(|old| old.id() == domain.id()));
            domain.received = is_incoming(&domain.name) || old.is_some_and(|old| old.received);
        }
    }
}

/// What came and went between two snapshots.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes<'a> {
    /// Lives that were not there before.
    pub(crate) appeared: Vec<&'a Domain>,
    /// Lives that are not there any more.
    pub(crate) gone: Vec<&'a Domain>,
    /// Lives that were there and are described differently now.
    pub(crate) changed: Vec<&'a Domain>,
}

/// Compares two snapshots. A rebooted domain has a new domid, so it is gone and appeared.
pub(crate) fn changes<'a>(before: &'a Snapshot, after: &'a Snapshot) -> Changes<'a> {
    let find = |snapshot: &'a Snapshot, domain: &Domain| {
        let id = domain.id();
        snapshot.domains.iter().find(|other| other.id() == id)
    };
    let mut changes = Changes::default();
    for domain in &after.domains {
        match find(before, domain) {
            None => changes.appeared.push(domain),
            Some(old) if old != domain => changes.changed.push(domain),
            Some(_) => {}
        }
    }
    changes.gone = before.domains.iter().filter(|domain| find(after, domain).is_none()).collect();
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(domid: u16, identity: u128, name: &str) -> Domain {
        Domain {
            domid,
            uuid: Uuid::from_u128(identity),
            name: name.to_owned(),
            vifs: Vec::new(),
            foreign_vifs: Vec::new(),
            received: false,
            shutdown_request: None,
        }
    }

    fn snapshot(domains: Vec<Domain>) -> Snapshot {
        Snapshot { domains, garbage: 0 }
    }

    #[test]
    fn equal_snapshots_have_no_changes() {
        let one = snapshot(vec![domain(1, 1, "a"), domain(2, 2, "b")]);
        assert_eq!(changes(&one, &one.clone()), Changes::default());
    }

    #[test]
    fn a_reboot_is_the_end_of_one_life_and_the_start_of_another() {
        let before = snapshot(vec![domain(1, 7, "a")]);
        let after = snapshot(vec![domain(2, 7, "a")]);
        let changes = changes(&before, &after);
        assert_eq!(changes.gone, [&before.domains[0]]);
        assert_eq!(changes.appeared, [&after.domains[0]]);
        assert!(changes.changed.is_empty());
    }

    #[test]
    fn a_domain_that_was_incoming_stays_a_received_one() {
        let mut before = snapshot(vec![domain(1, 7, "a"), domain(2, 7, "a--incoming")]);
        before.note_received(None);
        let mut after = snapshot(vec![domain(2, 7, "a"), domain(3, 7, "a")]);
        after.note_received(Some(&before));
        assert_eq!(after.domains.iter().map(|d| d.received).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn a_reused_domid_is_another_domain() {
        let before = snapshot(vec![domain(1, 7, "a")]);
        let after = snapshot(vec![domain(1, 8, "a")]);
        let changes = changes(&before, &after);
        assert_eq!((changes.gone.len(), changes.appeared.len()), (1, 1));
    }

    #[test]
    fn a_renamed_domain_is_a_changed_one() {
        let before = snapshot(vec![domain(1, 7, "a--incoming")]);
        let after = snapshot(vec![domain(1, 7, "a")]);
        let changes = changes(&before, &after);
        assert_eq!(changes.changed, [&after.domains[0]]);
        assert!(changes.gone.is_empty() && changes.appeared.is_empty());
    }
}
