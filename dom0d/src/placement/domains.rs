//! What the data path is given of each domain: its open vif, or why it can't be used, and its news.

use understudy_api::config;

use super::eligibility::usable;
use super::{Given, GivenState, Placement, blocking};
use crate::discovery::Domain;
use crate::domain::{DomainId, KnownDomain};
use crate::link::anchor::Link;
use crate::link::device::{Device, odd_server_filter, server_filter};
use crate::link::vif::{Arrival, Interface};
use crate::message::Message;

impl Placement {
    /// Takes back what is not there any more, or does not belong to the service any more.
    pub(super) fn take_back(&mut self, index: usize, domains: &[&Domain]) {
        let has = |uuid, domid| domains.iter().any(|domain| domain.uuid == uuid && domain.domid == domid);
        let gone: Vec<DomainId> = self
            .given
            .iter()
            .filter(|((service, life), given)| {
                // Where it came from, it may go on yet: then its end is for its hypervisor to say.
                let may_be_back = given.moving_since.is_some()
                    && given.came_from.is_some_and(|domid| has(life.uuid, domid));
                *service == index && !has(life.uuid, life.domid) && !may_be_back
            })
            .map(|((_, life), _)| *life)
            .collect();
        for domain in gone {
            let given = self.given.remove(&(index, domain));
            if let Some(Given { state: GivenState::Open { arrival, .. }, .. }) = given {
                self.detach(index, &arrival.vif.name);
            }
            self.tell(Message::Departed { service: index, domain });
        }
    }

    /// Brings one domain up to date; whether it is usable.
    pub(super) async fn domain(
        &mut self,
        index: usize,
        service: &config::Service,
        domain: &Domain,
        bridge: &Link,
        links: &[Link],
    ) -> bool {
        let key = (index, domain.id());
        let decided = usable(service, domain, bridge, links, |vif| self.contained.contains_key(vif))
            .and_then(|arrival| self.unshared(index, arrival));
        let opened = match decided {
            Ok(arrival) => self.open(key, service, arrival, links).await,
            Err(reason) => Err(reason),
        };
        let is_usable = opened.is_ok();
        if let Err(reason) = opened {
            self.refuse(key, domain, reason);
        }
        self.news(key, domain);
        is_usable
    }

    /// Two servers with one address, or two services on one server's port, can't be told apart.
    pub(super) fn unshared(&self, index: usize, arrival: Arrival) -> Result<Arrival, String> {
        let ports = &self.config.services[index].engine.ports;
        let life = (arrival.domain.uuid, arrival.domain.domid);
        for ((other, id), given) in &self.given {
            let GivenState::Open { arrival: open, .. } = &given.state else {
                continue;
            };
            let mut addresses = open.vif.addresses.iter();
            let Some(shared) = addresses.find(|address| arrival.vif.addresses.contains(address)) else {
                continue;
            };
            let other_service = &self.config.services[*other].engine;
            if (id.uuid, id.domid) != life {
                return Err(format!(
                    "its address {shared} is that of {} too; give each domain its own",
                    open.domain.name
                ));
            }
            let port = ports.iter().find(|port| other_service.ports.contains(port));
            if let Some(port) = port.filter(|_| *other != index) {
                return Err(format!(
                    "its port {port} serves in service {} already; one port of a domain can serve behind one PSC",
                    other_service.name
                ));
            }
        }
        Ok(arrival)
    }

    /// Opens a usable domain's vif and gives it to the data path, unless that has it already.
    pub(super) async fn open(
        &mut self,
        key: (usize, DomainId),
        service: &config::Service,
        arrival: Arrival,
        links: &[Link],
    ) -> Result<(), String> {
        let link = links.iter().find(|link| link.name == arrival.vif.name);
        let link_index = link.map_or(0, |link| link.index);
        if let Some(Given { state: GivenState::Open { arrival: open, index }, .. }) = self.given.get(&key) {
            let (open, new) = (&open.vif, &arrival.vif);
            let is_same = (&open.name, open.mac, &open.addresses) == (&new.name, new.mac, &new.addresses);
            if is_same && *index == link_index {
                return Ok(());
            }
            let left = (open.name != new.name).then(|| open.name.clone());
            if open.addresses != new.addresses {
                // It is no longer the same server: the old one leaves, and a new one comes.
                self.tell(Message::Departed { service: key.0, domain: key.1 });
            }
            if let Some(vif) = left {
                self.detach(key.0, &vif);
            }
        }
        let filter = match &mut self.programs[key.0] {
            None => server_filter(&arrival.vif.addresses, &service.engine.ports),
            Some(programs) => {
                let attached = tokio::task::block_in_place(|| programs.attach_vif(&arrival.vif.name));
                attached.map_err(|error| error.to_string())?;
                odd_server_filter(&arrival.vif.addresses)
            }
        };
        let (vif, vlan, buffer) = (arrival.vif.name.clone(), service.vlan, self.config.capture_buffer);
        let opened = blocking(move || Device::open(&vif, vlan, &filter, buffer)).await?;
        let device = opened.map_err(|error| format!("its vif can't be captured: {error}"))?;
        let came_from = self.given.get(&key).and_then(|given| given.came_from);
        self.given.insert(key, Given { came_from, ..Given::open(arrival.clone(), link_index) });
        let vif = Interface { index: link_index, device };
        self.tell(Message::Arrived { service: key.0, arrival, vif });
        Ok(())
    }

    /// Takes the kernel's part of the plane from a vif that is not used any more.
    pub(super) fn detach(&mut self, service: usize, vif: &str) {
        if let Some(programs) = &mut self.programs[service] {
            tokio::task::block_in_place(|| programs.leave(vif));
        }
    }

    pub(super) fn refuse(&mut self, key: (usize, DomainId), domain: &Domain, reason: String) {
        let limit = self.config.services[key.0].maintenance_limit;
        if let Some(given) = self.given.get(&key)
            && matches!(given.state, GivenState::Open { .. })
            && (self.in_transit.contains(&domain.uuid)
                || given.moving_since.is_some_and(|since| since.elapsed() < limit))
        {
            // Where its life ends is for its hypervisor to say, and for the list.
            return;
        }
        match self.given.get(&key).map(|given| &given.state) {
            Some(GivenState::Unusable(before)) if *before == reason => return,
            Some(GivenState::Open { .. }) => self.tell(Message::Departed { service: key.0, domain: key.1 }),
            _ => {}
        }
        self.given.insert(
            key,
            Given {
                name: domain.name.clone(),
                shutdown_request: None,
                came_from: None,
                moving_since: None,
                state: GivenState::Unusable(reason.clone()),
            },
        );
        self.tell(Message::Unusable {
            service: key.0,
            known: KnownDomain { domain: domain.reference(), reason },
        });
    }

    /// Passes on a new name, and a new request to shut down.
    pub(super) fn news(&mut self, key: (usize, DomainId), domain: &Domain) {
        let (service, life) = key;
        let Some(given) = self.given.get_mut(&key) else {
            return;
        };
        let renamed = given.name != domain.name;
        given.name.clone_from(&domain.name);
        let request = domain
            .shutdown_request
            .clone()
            .filter(|request| given.shutdown_request.as_ref() != Some(request));
        given.shutdown_request.clone_from(&domain.shutdown_request);
        if renamed {
            self.tell(Message::Renamed { service, domain: life, name: domain.name.clone() });
        }
        if let Some(request) = request {
            self.tell(Message::ShutdownRequested { service, domain: life, request });
        }
    }
}
