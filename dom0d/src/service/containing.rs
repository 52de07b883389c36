//! A service's part in the kernel's rules: which vifs of its domains are held, and as what (rule 13).

use understudy_api::config::{Direct, Fence};
use understudy_protocol::{Instant, ServerId};

use super::{Place, Server, Service, Surroundings};
use crate::containment::{Part, RuleSet};
use crate::domain::DomainId;
use crate::link::vif::GuestVif;
use crate::report::DaemonEvent;

/// How a vif is held.
pub(super) enum Hold<'a> {
    /// Not at all.
    Free,
    /// As the vif of this server, which is the OVM or not.
    Server(&'a Server, bool),
    /// As that of a domain that is no server, but may be the OVM soon.
    NoServer { is_ovm: bool },
}

impl Service {
    /// Rules of a version are in force: whoever waited for them may join.
    pub(crate) fn rules_applied(&mut self, now: Instant, version: u64, around: &mut Surroundings<'_>) {
        for server in self.servers.values_mut() {
            if matches!(server.place, Place::Preparing(needs) if needs <= version) {
                server.place = Place::Waiting;
            }
        }
        self.join(now, around);
        self.copying_rules_applied(version);
        let isolated: Vec<ServerId> = self
            .isolating
            .extract_if(.., |(_, needs)| needs.is_some_and(|needs| needs <= version))
            .map(|(server, _)| server)
            .collect();
        for server in isolated {
            let by = Fence::Isolate.name();
            self.daemon_event(now, DaemonEvent::Fenced { server, by }, around);
        }
    }

    /// The rules of this version were sent; they have everything that was asked for so far.
    pub(crate) fn rules_sent(&mut self, version: u64) {
        for (_, needs) in &mut self.isolating {
            needs.get_or_insert(version);
        }
        if let Some(copying) = &mut self.copying {
            copying.needs.get_or_insert(version);
        }
    }

    /// Adds this service's part to the rules.
    pub(crate) fn add_rules(&self, rules: &mut RuleSet) {
        let mut add = |name: &str, (mac, index), server: Option<&Server>, is_ovm| {
            let vif = rules.vifs.entry(name.to_owned()).or_default();
            (vif.mac, vif.index) = (mac, index);
            vif.parts.push(Part {
                service: self.index,
                is_ovm,
                addresses: server.map(|server| server.vif.addresses.clone()).unwrap_or_default(),
                ports: self.config.engine.ports.clone(),
                psc: self.config.engine.psc.clone(),
                psc_mac: self.config.psc_mac,
                allow: self.config.allow.clone(),
                direct: self.config.direct == Direct::Allow,
            });
        };
        for (name, vif) in &self.vifs {
            match self.hold(vif) {
                Hold::Free => {}
                Hold::Server(server, is_ovm) => add(name, (vif.mac, vif.index), Some(server), is_ovm),
                Hold::NoServer { is_ovm } => add(name, (vif.mac, vif.index), None, is_ovm),
            }
        }
        // Servers of a predecessor, and one that was moved: their vifs may not be listed yet.
        let ovm = self.engine.ovm();
        for (&id, server) in &self.servers {
            if server.is_contained() && !server.gone && !self.vifs.contains_key(&server.vif.name) {
                add(&server.vif.name, (server.vif.mac, None), Some(server), ovm == Some(id));
            }
        }
    }

    /// How a vif is held. By default as a replica's: a domain that is starting, that can't be used, or that was a server until
    /// a moment ago must not be heard either.
    pub(super) fn hold(&self, vif: &GuestVif) -> Hold<'_> {
        let life = DomainId::from(&vif.domain);
        let former =
            || self.servers.iter().find(|(_, server)| server.domain.uuid == life.uuid).map(|(&id, _)| id);
        let id = self.find_life(life).or_else(|| if vif.is_incoming { former() } else { None });
        let ovm = self.engine.ovm();
        match id.and_then(|id| Some((id, self.servers.get(&id)?))) {
            Some((_, server)) if !server.is_contained() => Hold::Free,
            Some((id, server)) => Hold::Server(server, ovm == Some(id)),
            None if self.memory.is_detached(life.uuid) => Hold::Free,
            None => Hold::NoServer { is_ovm: ovm.is_none() && self.may_serve_first(&vif.domain) },
        }
    }

    /// Interfaces from which nothing passes but what the operator allows.
    pub(super) fn contained(&self) -> Vec<String> {
        let mut rules = RuleSet::default();
        self.add_rules(&mut rules);
        let vifs = rules.vifs.into_iter().filter(|(_, vif)| !vif.parts.iter().any(|part| part.is_ovm));
        vifs.map(|(name, _)| name).collect()
    }
}
