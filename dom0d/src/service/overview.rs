//! A service as operators see it, and the names by which they find its domains.

use std::collections::BTreeSet;

use understudy_api::config::OwnConnections;
use understudy_protocol::ServerId;

use super::Service;
use super::containing::Hold;
use crate::command::ServiceReport;
use crate::domain::KnownDomain;
use crate::link::device::mac_text;

impl Service {
    /// The server with this name or UUID: the newest life of it.
    pub(crate) fn find(&self, domain: &str) -> Option<ServerId> {
        let matching = self
            .servers
            .iter()
            .filter(|(_, server)| server.domain.name == domain || server.domain.uuid.to_string() == domain);
        matching
            .max_by_key(|(id, server)| (self.plane.ports.has_server(**id), server.domain.domid))
            .map(|(&id, _)| id)
    }

    /// The domain with this name or UUID that matches and can't be used.
    pub(crate) fn find_unusable(&self, domain: &str) -> Option<&KnownDomain> {
        self.unusable
            .values()
            .find(|known| known.domain.name == domain || known.domain.uuid.to_string() == domain)
    }

    /// Names of all domains that match.
    pub(crate) fn domain_names(&self) -> Vec<String> {
        let servers = self.servers.values().map(|server| &server.domain.name);
        let unusable = self.unusable.values().map(|known| &known.domain.name);
        let names: BTreeSet<&String> = servers.chain(unusable).collect();
        names.into_iter().cloned().collect()
    }

    /// What hinders the service right now, as far as the data path can tell.
    fn hindrances(&self) -> Vec<String> {
        let mut found = Vec::new();
        let name = self.name();
        if self.opening.is_some() {
            found.push(
                "dom0d resumes where its predecessor was killed, and has yet to read what was said meanwhile"
                    .to_owned(),
            );
        }
        if !self.plane.ports.is_anchored() {
            found.push("the PSC has no place on a bridge yet, so clients can't find it".to_owned());
        }
        match self.engine.ovm().map(|id| (id, self.servers.get(&id))) {
            None => found.push(self.question().unwrap_or_else(|| {
                format!("waits for the OVM {}; start that domain (xl create)", self.config.ovm)
            })),
            Some((id, server)) => {
                let who = server.map_or("the OVM", |server| &server.domain.name);
                let runs = server.is_some_and(|server| server.running);
                if let Some(server) = server.filter(|server| server.moving) {
                    found.push(format!(
                        "the OVM {who} is being migrated: its vif {} is not connected yet",
                        server.vif.name
                    ));
                } else if !self.plane.ports.has_server(id) {
                    found.push(format!(
                        "the OVM {who} is gone and nothing was promotable; serve from another domain: understudy failover {name} --to DOMAIN --force"
                    ));
                } else if !runs {
                    found.push(format!("the OVM {who} does not run (paused, suspended or down): understudy resume {name} {who}, or understudy failover {name}"));
                }
            }
        }
        found
    }

    /// Replicas that open connections of their own, and to whom.
    fn own_connections(&self) -> impl Iterator<Item = String> {
        let refused = self.config.own_connections == OwnConnections::Refuse;
        let all = self.own_connections.iter().filter(move |(id, _)| refused && self.is_queued(**id));
        all.filter_map(|(id, destinations)| {
            let who = &self.servers.get(id)?.domain.name;
            let to: Vec<_> = destinations.iter().map(|(to, times)| format!("{to} ({times} times)")).collect();
            Some(format!(
                "the replica {who} opens connections of its own, which are dropped: to {}; a service that does can't be protected as configured. Let them pass (allow), or state that they do no harm (own_connections = \"tolerate\")",
                to.join(", ")
            ))
        })
    }

    /// Says how to open the network of a domain that can't be used.
    fn with_remedy(&self, known: &KnownDomain) -> KnownDomain {
        let KnownDomain { domain, reason } = known;
        let mut own = self.vifs.values().filter(|vif| vif.domain.domid == domain.domid);
        let is_held = own.any(|vif| matches!(self.hold(vif), Hold::NoServer { is_ovm: false }));
        let reason = match is_held {
            true => format!(
                "{reason}. Meanwhile nothing passes from its vifs but what `allow` names (understudy detach {} {} opens them)",
                self.name(),
                domain.name
            ),
            false => reason.clone(),
        };
        KnownDomain { domain: domain.clone(), reason }
    }

    /// Everything an operator may want to see.
    pub(crate) fn status(&mut self, mut problems: Vec<String>) -> ServiceReport {
        let hindrances = self.hindrances();
        let status = self.engine.status();
        let in_queue = |id: &ServerId| status.servers.iter().any(|server| server.server == *id);
        let servers = self
            .servers
            .iter()
            .filter(|(id, _)| in_queue(id))
            .map(|(id, server)| (id.0, server.domain.clone()))
            .collect();
        let absent = self.servers.iter().filter(|(id, _)| !in_queue(id));
        let known = absent
            .map(|(_, server)| KnownDomain {
                domain: server.domain.clone(),
                reason: server.absence().unwrap_or_default(),
            })
            .chain(self.unusable.values().map(|known| self.with_remedy(known)))
            .collect();
        let serving = hindrances.is_empty();
        let contained = self.contained();
        let mut plane_counters = self.plane.counters();
        if let Some((last_ns, slowest_ns)) = self.evictions_ns {
            plane_counters.extend([("eviction_last_ns", last_ns), ("eviction_max_ns", slowest_ns)]);
        }
        problems.extend(self.own_connections());
        plane_counters.extend(&self.refused);
        problems.splice(0..0, hindrances);
        ServiceReport {
            name: self.name().to_owned(),
            psc: self.config.engine.psc.clone(),
            psc_mac: mac_text(self.config.psc_mac),
            ports: self.config.engine.ports.clone(),
            plane: if self.plane.fast.is_some() { "bpf" } else { "pcap" },
            bridge: self.bridge.clone(),
            serving,
            problems,
            status,
            servers,
            known,
            contained,
            plane_counters,
        }
    }
}
