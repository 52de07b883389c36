//! Domains that were migrated within this host.

use std::collections::BTreeSet;

use tokio::time::Instant;

use super::{GivenState, Placement};
use crate::discovery::{Domain, Snapshot, is_incoming, sent_away};
use crate::domain::DomainId;
use crate::message::Message;

impl Placement {
    /// A domain that was migrated within this host has the same UUID and memory under another number. Before the old
    /// domain ends, placement transfers to the new number everything that it gave the data path of the old one, so that
    /// the old domain's end does not count as the server's. It also transfers it back: a migration that fails at its
    /// very end leaves the domain what and where it was.
    ///
    /// A rebooted domain has the same UUID and another number too, but was not received.
    pub(super) fn follow_moves(&mut self, snapshot: &Snapshot) {
        let mut seen = BTreeSet::new();
        let lives = snapshot.domains.iter().map(|domain| domain.uuid);
        self.in_transit = lives.filter(|uuid| !seen.insert(*uuid)).collect();
        let moves: Vec<_> = self
            .given
            .iter()
            .filter_map(|(&(service, life), given)| {
                let GivenState::Open { arrival, .. } = &given.state else {
                    return None;
                };
                let is_listed = snapshot.domains.iter().any(|domain| domain.id() == life);
                let new = snapshot.domains.iter().find(|new| {
                    let is_other = new.uuid == life.uuid && new.domid != life.domid;
                    let is_back = given.came_from == Some(new.domid);
                    let lives_on = if is_back { !is_listed } else { new.received };
                    is_other && lives_on && !is_incoming(&new.name) && sent_away(&new.name).is_none()
                })?;
                let vif = new.vifs.iter().find(|vif| vif.mac == arrival.vif.mac)?;
                Some(((service, life), new.reference(), vif.name.clone()))
            })
            .collect();
        for ((service, from), to, vif) in moves {
            let Some(mut given) = self.given.remove(&(service, from)) else {
                continue;
            };
            if let GivenState::Open { arrival, index } = &mut given.state {
                arrival.domain = to.clone();
                // No interface has this number, so it is opened once it is connected.
                *index = 0;
            }
            given.name.clone_from(&to.name);
            given.came_from = Some(from.domid);
            given.moving_since = Some(Instant::now());
            self.given.insert((service, DomainId::from(&to)), given);
            self.tell(Message::Moved { service, from, to, vif });
        }
    }

    /// Whether a domain's memory has been moved elsewhere, so that what is left here is about to end.
    pub(super) fn is_left_behind(&self, index: usize, domain: &Domain) -> bool {
        let is_given = self.given.contains_key(&(index, domain.id()));
        let mut given = self.given.iter();
        let lives_on = given.any(|((service, life), given)| {
            *service == index && life.uuid == domain.uuid && given.came_from == Some(domain.domid)
        });
        !is_given && (lives_on || sent_away(&domain.name).is_some())
    }
}
