//! What placement tells a service: its PSC has a place, its domains come and go.

use std::collections::BTreeMap;

use understudy_api::config::OnShutdownRequest;
use understudy_protocol::{Command, Evidence, Input, Instant, ServerId};

use super::{Place, Server, Service, Surroundings};
use crate::domain::{DomainId, DomainRef, KnownDomain};
use crate::link::device::{Device, mac_text};
use crate::link::vif::{Arrival, GuestVif, Interface};
use crate::plane::Change;
use crate::report::DaemonEvent;

impl Service {
    /// The PSC has its place.
    pub(crate) fn anchored(
        &mut self,
        now: Instant,
        bridge: String,
        far_end: Device,
        around: &mut Surroundings<'_>,
    ) {
        self.plane.ports.set_anchor(far_end);
        let mac = mac_text(self.config.psc_mac);
        self.daemon_event(now, DaemonEvent::PscReady { bridge: bridge.clone(), mac }, around);
        self.bridge = Some(bridge);
    }

    /// A domain can be used from now on, or its lost interface is open again. `rules_version` is that
    /// of the rules that will hold its vif.
    pub(crate) fn arrived(
        &mut self,
        now: Instant,
        arrival: &Arrival,
        vif: Interface,
        rules_version: u64,
        around: &mut Surroundings<'_>,
    ) {
        let life = DomainId::from(&arrival.domain);
        self.unusable.remove(&life);
        if let Some(id) = self.find_life(life) {
            self.plane.change(Change::Opened { server: id, interface: vif, vif: &arrival.vif });
            self.server_mut(id, |server| server.vif_opened(arrival));
            self.rules_changed = true;
            return;
        }
        let id = ServerId(*around.next_server);
        *around.next_server += 1;
        let place = if self.memory.is_detached(arrival.domain.uuid) {
            Place::Detached
        } else {
            Place::Preparing(rules_version)
        };
        self.plane.change(Change::Opened { server: id, interface: vif, vif: &arrival.vif });
        self.remember_name(id, &arrival.domain);
        self.servers.insert(id, Server::new(arrival, place));
        self.rules_changed = true;
        self.daemon_event(now, DaemonEvent::DomainAppeared { domain: arrival.domain.clone() }, around);
    }

    /// A domain lives on under another number, behind another vif, which is opened once it is connected.
    pub(crate) fn moved(
        &mut self,
        now: Instant,
        from: DomainId,
        to: &DomainRef,
        vif: &str,
        around: &mut Surroundings<'_>,
    ) {
        let Some(id) = self.find_life(from) else {
            return;
        };
        let now_at = DomainId::from(to);
        self.unusable.remove(&now_at);
        self.server_mut(id, |server| server.move_to(to.clone(), vif.to_owned()));
        self.remember_name(id, to);
        self.rules_changed = true;
        if self.servers[&id].fenced {
            // The toolstack lets it run there.
            self.fence_domain(id, now_at, around);
        }
        self.daemon_event(now, DaemonEvent::DomainMoved { server: id, from_domid: from.domid }, around);
    }

    /// A domain, or the vif it served through, is gone.
    pub(crate) fn departed(&mut self, now: Instant, life: DomainId, around: &mut Surroundings<'_>) {
        self.unusable.remove(&life);
        let Some(id) = self.find_life(life) else {
            return;
        };
        if self.is_queued(id) {
            self.accuse(now, id, Evidence::DomainGone, around);
        }
        self.copying_lost(now, id, around);
        self.plane.change(Change::Gone(id));
        self.rules_changed = true;
        let event = DaemonEvent::DomainGone { domain: self.servers[&id].domain.clone() };
        // An OVM that nobody could replace stays in the engine's books, and so here.
        if self.is_queued(id) {
            self.server_mut(id, |server| (server.running, server.gone) = (false, true));
        } else {
            self.servers.remove(&id);
        }
        self.daemon_event(now, event, around);
    }

    /// A domain has another name.
    pub(crate) fn renamed(&mut self, life: DomainId, name: &str) {
        if let Some(id) = self.find_life(life) {
            self.server_mut(id, |server| name.clone_into(&mut server.domain.name));
            self.surroundings_changed = true;
            self.memory.rename(life.uuid, name);
            self.memory_changed = true;
            let domain = self.servers[&id].domain.clone();
            self.remember_name(id, &domain);
        }
    }

    /// A domain matches, and can't be used for a reason.
    pub(crate) fn unusable(&mut self, now: Instant, known: KnownDomain, around: &mut Surroundings<'_>) {
        let life = DomainId::from(&known.domain);
        self.daemon_event(
            now,
            DaemonEvent::NotAttached { domain: known.domain.clone(), reason: known.reason.clone() },
            around,
        );
        self.unusable.insert(life, known);
    }

    /// The toolstack asks a domain to shut down.
    pub(crate) fn shutdown_requested(
        &mut self,
        now: Instant,
        life: DomainId,
        request: String,
        around: &mut Surroundings<'_>,
    ) {
        let Some(id) = self.find_life(life).filter(|&id| self.is_queued(id)) else {
            return;
        };
        let is_ovm = self.engine.ovm() == Some(id);
        // A save asks the guest to suspend, and brings it back.
        let ends = request != "suspend";
        self.daemon_event(now, DaemonEvent::ShutdownRequested { server: id, request }, around);
        if is_ovm
            && ends
            && self.config.on_shutdown_request == OnShutdownRequest::Switchover
            && let Err(error) =
                self.cut_over(now, around, Some(Input::Command(Command::Switchover { to: None })))
        {
            tracing::warn!(service = self.name(), %error, "the OVM is being shut down and nothing can take over");
        }
    }

    /// All vifs of the service's domains.
    pub(crate) fn set_vifs(&mut self, vifs: BTreeMap<String, GuestVif>) {
        self.vifs = vifs;
        self.rules_changed = true;
    }
}
