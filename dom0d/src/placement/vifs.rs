//! All vifs of the services' domains, and the tc programs on them: those that contain domains, and each service's own.

use std::collections::{BTreeMap, BTreeSet};

use understudy_api::config;

use super::eligibility::is_of;
use super::{Anchor, GivenState, Placement};
use crate::discovery::{Snapshot, is_incoming};
use crate::domain::DomainRef;
use crate::link::anchor::{self, Link};
use crate::link::vif::GuestVif;
use crate::message::Message;

impl Placement {
    /// Notes all vifs that the service's domains have, whatever their state is. A vif whose domain or backend is no
    /// longer listed counts as long as its interface exists. True if the vifs have changed.
    pub(super) fn note_vifs(&mut self, index: usize, snapshot: &Snapshot, links: &[Link]) -> bool {
        let service = &self.config.services[index];
        let number = |name: &str| links.iter().find(|link| link.name == name).map(|link| link.index);
        let mut vifs = self.vifs[index].clone();
        // A vif that got another name no longer belongs to a server here.
        let is_still_of = |was: &DomainRef| {
            let mut listed = snapshot.domains.iter();
            let now = listed.find(|domain| (domain.uuid, domain.domid) == (was.uuid, was.domid));
            now.is_none_or(|domain| is_of(service, domain))
        };
        vifs.retain(|name, vif| vif.index.is_some() && vif.index == number(name) && is_still_of(&vif.domain));
        for domain in snapshot.domains.iter().filter(|domain| is_of(service, domain)) {
            let is_incoming = is_incoming(&domain.name);
            for vif in &domain.vifs {
                let index = number(&vif.name);
                let guest = GuestVif { domain: domain.reference(), is_incoming, mac: vif.mac, index };
                vifs.insert(vif.name.clone(), guest);
            }
        }
        let before = std::mem::replace(&mut self.vifs[index], vifs);
        before != self.vifs[index]
    }

    /// Puts containment on all vifs of the domains, and puts it back where it was removed (rule 13). A new vif is
    /// contained as a whole if the data path is about to learn of it; the data path then says what may pass from it.
    pub(super) async fn contain(&mut self, links: &[Link], is_told: bool) {
        let Some(containment) = &mut self.containment else { return };
        let own: BTreeSet<&String> = self.vifs.iter().flat_map(BTreeMap::keys).collect();
        for vif in containment.vifs().iter().filter(|vif| !own.contains(vif)) {
            tokio::task::block_in_place(|| containment.leave(vif));
            self.contained.remove(vif);
        }
        let mut restored = Vec::new();
        for link in links.iter().filter(|link| own.contains(&link.name)) {
            let is_new = self.contained.get(&link.name) != Some(&link.index);
            let place = (understudy_bpf::CONTAIN_PRIORITY, understudy_bpf::CONTAIN_NUMBER);
            // A vif that can't be queried is gone, or answers next time.
            if !is_new && anchor::has_program(&self.netlink, link, true, place).await.unwrap_or(true) {
                continue;
            }
            let put = tokio::task::block_in_place(|| {
                if is_new && is_told {
                    containment.hold(link.index)?;
                }
                containment.attach(&link.name)
            });
            match put {
                Ok(()) => {
                    self.contained.insert(link.name.clone(), link.index);
                    if !is_new {
                        restored.push(link.name.clone());
                    }
                }
                Err(error) => {
                    tracing::warn!(interface = link.name, %error, "nft alone holds back what a replica sends there");
                }
            }
        }
        for vif in restored {
            let services = (0..self.vifs.len()).filter(|&index| self.vifs[index].contains_key(&vif));
            for service in services.collect::<Vec<_>>() {
                let what = format!("the tc program that contains {vif}");
                self.tell(Message::Restored { service, what });
            }
        }
    }

    /// Puts the service's programs back where they were removed.
    pub(super) async fn mend_programs(&mut self, index: usize, service: &config::Service, links: &[Link]) {
        let Some(programs) = &mut self.programs[index] else { return };
        let mut again = Vec::new();
        for (interface, is_ingress) in programs.places() {
            // An interface that is gone or was replaced is opened again in any case.
            let Some(link) = links.iter().find(|link| link.name == interface) else { continue };
            let is_as_opened = !is_ingress
                || self.given.iter().any(|((service, _), given)| {
                    matches!(&given.state, GivenState::Open { arrival, index: number }
                        if *service == index && arrival.vif.name == interface && *number == link.index)
                });
            if !is_as_opened {
                continue;
            }
            let place = (understudy_bpf::PRIORITY, understudy_bpf::number(service.psc_mac));
            match anchor::has_program(&self.netlink, link, is_ingress, place).await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    tracing::debug!(interface, %error, "can't be looked at");
                    continue;
                }
            }
            let put = tokio::task::block_in_place(|| match is_ingress {
                true => programs.attach_vif(&interface),
                false => programs.attach_anchor(&interface),
            });
            match put {
                Ok(()) => {
                    let what = format!("the tc program on {interface}");
                    let _ = self.messages.send(Message::Restored { service: index, what });
                    self.waker.wake();
                }
                Err(error) => {
                    tracing::error!(interface, %error, "a tc program was taken away by somebody else, and can't be put back yet");
                    again.push((interface, is_ingress));
                }
            }
        }
        for (interface, is_ingress) in again {
            if is_ingress {
                let given = self.given.iter_mut().filter(|((service, _), _)| *service == index);
                for (_, given) in given {
                    if let GivenState::Open { arrival, index } = &mut given.state
                        && arrival.vif.name == interface
                    {
                        // No interface has this number, so it is opened again.
                        *index = 0;
                    }
                }
            } else {
                self.anchors[index] = Anchor::default();
            }
        }
    }
}
