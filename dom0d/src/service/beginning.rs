//! The beginning of a service: anew, or where a killed dom0d has left it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use serde::{Deserialize, Serialize};
use understudy_api::config;
use understudy_bpf::{Programs, is_pinned, unpin};
use understudy_driver::Engine as _;
use understudy_protocol::{Command, Input, Instant, ServerId};
use uuid::Uuid;

use super::{Place, Server, Service, Surroundings};
use crate::clock;
use crate::link::vif::Arrival;
use crate::plane::{self, FastPath, Left};
use crate::report::DaemonEvent;
use crate::store::memory::ServiceMemory;
use crate::store::succession::{Engine, Lost, digest, remove};

/// Where maps are pinned. Every dom0 under systemd has it.
const BPFFS: &str = "/sys/fs/bpf";

/// How long a successor waits until its interfaces are open again; some may be gone.
const OPENING: Duration = Duration::from_secs(1);

/// What a successor must know beside the engine's state.
#[derive(Default, Serialize, Deserialize)]
struct Known<S = BTreeMap<ServerId, Server>> {
    servers: S,
    plane: Left,
    /// The daemon's next server id.
    next_server: u32,
}

/// Where a service keeps what outlives the process.
struct Places {
    pins: PathBuf,
    journal: PathBuf,
}

impl Places {
    fn of(service: &config::Service, directory: &Path) -> Self {
        Self::named(&mac_name(service), directory)
    }

    fn named(mac: &str, directory: &Path) -> Self {
        Self { pins: Path::new(BPFFS).join(format!("understudy-{mac}")), journal: directory.join(mac) }
    }

    /// The engine that a predecessor left, and what it knew. Removes everything else that it left.
    fn left(&self, service: &config::Service) -> Option<(Engine, Known)> {
        let name = &service.engine.name;
        let found = Engine::left(&self.journal, digest(service), service.engine.clone()).and_then(|left| {
            let known = match left.engine.surroundings() {
                [] => Known::default(),
                bytes => postcard::from_bytes(bytes).map_err(|_| Lost::Damaged)?,
            };
            match service.plane {
                config::Plane::Pcap => Err(Lost::Differs),
                config::Plane::Bpf if is_pinned(&self.pins) => Ok((left, known)),
                config::Plane::Bpf => Err(Lost::Damaged),
            }
        });
        match found {
            Ok((left, known)) => {
                let (conversations, repeated) = (left.engine.status().conversations, left.repeated);
                tracing::info!(
                    service = name,
                    conversations,
                    repeated,
                    "goes on where a dom0d was that did not end in order"
                );
                return Some((left.engine, known));
            }
            Err(Lost::Nothing) => {}
            Err(error) => {
                tracing::error!(service = name, %error, "a dom0d did not end in order, and its conversations go on without replicas; seed the replicas anew");
            }
        }
        self.remove(name);
        None
    }

    fn remove(&self, service: &str) {
        let removed = remove(&self.journal).map_err(|error| error.to_string());
        if let Err(error) = removed.and_then(|()| unpin(&self.pins).map_err(|error| error.to_string())) {
            tracing::error!(service, error, "what an earlier dom0d left can't be removed");
        }
    }
}

/// Removes what killed dom0ds left of services that are no longer configured: these have no successor.
pub(crate) fn remove_strays(services: &[config::Service], directory: &Path) {
    let names: Vec<String> = services.iter().map(mac_name).collect();
    for (place, prefix) in [(Path::new(BPFFS), "understudy-"), (directory, "")] {
        let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
        for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
            let Some(mac) = name.strip_prefix(prefix).and_then(|rest| rest.split('.').next()) else {
                continue;
            };
            let is_mac = mac.len() == 12 && mac.bytes().all(|byte| byte.is_ascii_hexdigit());
            if is_mac && !names.iter().any(|name| name == mac) {
                tracing::info!(mac, "removing what was left of a service that is not configured any more");
                Places::named(mac, directory).remove(mac);
            }
        }
    }
}

/// A clean end leaves nothing for a successor.
pub(crate) fn leave_nothing(service: &config::Service, directory: &Path) {
    Places::of(service, directory).remove(&service.engine.name);
}

/// The PSC's MAC, by which what belongs to a service is named.
fn mac_name(service: &config::Service) -> String {
    service.psc_mac.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Service {
    /// Resumes the service where a killed dom0d has left it; without one, it has no place and no servers yet. Also gives the
    /// plane's programs for its interfaces, if it has any. May take a moment.
    pub(crate) fn begin(
        index: usize,
        mut config: config::Service,
        memory: ServiceMemory,
        directory: &Path,
    ) -> (Self, Option<Programs>) {
        let name = config.engine.name.clone();
        let places = Places::of(&config, directory);
        let mut left = places.left(&config);
        let has_bpffs = statfs(BPFFS).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
        if config.plane == config::Plane::Bpf && !has_bpffs {
            tracing::warn!(
                service = name,
                "nothing is mounted at {BPFFS} (mount -t bpf bpf {BPFFS}): should dom0d be killed, replicas must be seeded anew"
            );
        }
        let nothing = Left::default();
        let before = left.as_ref().map_or((&nothing, None), |(engine, known)| (&known.plane, engine.ovm()));
        let choice = plane::choose(&config, has_bpffs.then_some(places.pins.as_path()), before);
        if let Some(reason) = &choice.reason {
            tracing::warn!(service = name, "{reason}");
            left = None;
        }
        let passes = choice.plane.fast.is_some();
        config.engine.seed = Uuid::new_v4().as_u64_pair().0;
        let (engine, known) = left.unwrap_or_else(|| {
            let mut engine = Engine::new(config.engine.clone());
            if passes {
                engine.tell(clock::now(), Input::PlanePasses);
            }
            if passes && has_bpffs && let Err(error) = engine.begin_journal(&places.journal, digest(&config)) {
                tracing::error!(service = name, %error, "should dom0d be killed, replicas must be seeded anew; is there room in {}?", directory.display());
            }
            (engine, Known::default())
        });
        let mut service = Self::new(index, config, engine, memory, choice.plane);
        let succeeds = !known.servers.is_empty();
        service.opening = succeeds.then(clock::now);
        service.rules_changed = succeeds;
        service.clients_seen = succeeds;
        service.first_server = known.next_server;
        for (id, mut server) in known.servers {
            // A copy that was under way is lost.
            if matches!(server.place, Place::Waiting | Place::Preparing(_) | Place::Copying) {
                server.place = Place::Preparing(0);
            }
            service.remember_name(id, &server.domain);
            service.servers.insert(id, server);
        }
        (service, choice.programs)
    }

    /// The servers that it begins with, as placement knew them.
    pub(crate) fn arrivals(&self) -> Vec<Arrival> {
        self.servers.values().map(Server::arrival).collect()
    }

    /// Whether the service still waits for its interfaces, without which everything sent would be lost. Once they are open, or
    /// after [`OPENING`], finishes what a predecessor may have left undone.
    pub(crate) fn is_opening(&mut self, now: Instant, around: &mut Surroundings<'_>) -> bool {
        let Some(begun) = self.opening else { return false };
        let mut queued = self.servers.iter().filter(|(_, server)| server.place == Place::Queued);
        let is_open =
            self.plane.ports.is_anchored() && queued.all(|(&id, _)| self.plane.ports.has_server(id));
        if !is_open && now.since(begun) < OPENING {
            return true;
        }
        self.opening = None;
        self.succeed(now, around);
        false
    }

    fn succeed(&mut self, now: Instant, around: &mut Surroundings<'_>) {
        // A server that the engine does not know must join again; one that only the engine knows is gone.
        let known: Vec<ServerId> = self.engine.status().servers.iter().map(|server| server.server).collect();
        for (id, server) in &mut self.servers {
            if server.place == Place::Queued && !known.contains(id) {
                server.place = Place::Preparing(0);
            }
        }
        // A release is never refused.
        let _ = self.engine.command(now, Command::Release);
        self.drain(now, around);
        let ovm = self.engine.ovm();
        if self.plane.fast.as_ref().is_some_and(|fast| !fast.lets_speak(ovm)) {
            // It was about to cut over.
            let _ = self.cut_over(now, around, None);
        }
        let unknown = known.into_iter().filter(|id| !self.servers.contains_key(id));
        for id in unknown.collect::<Vec<_>>() {
            self.accuse(now, id, understudy_protocol::Evidence::DomainGone, around);
        }
        let fenced: Vec<_> =
            self.servers.iter().filter(|(_, server)| server.fenced).map(|(&id, s)| (id, s.life())).collect();
        for (id, life) in fenced {
            self.fence_domain(id, life, around);
        }
        let conversations = self.engine.status().conversations;
        self.daemon_event(now, DaemonEvent::TakenOver { conversations }, around);
    }

    /// Writes down for a successor what changed around the engine.
    pub(crate) fn note_surroundings(&mut self, next_server: u32) {
        let known = Known {
            servers: &self.servers,
            plane: self.plane.fast.as_ref().map(FastPath::left).unwrap_or_default(),
            next_server,
        };
        if let Ok(bytes) = postcard::to_stdvec(&known) {
            self.engine.set_surroundings(bytes);
        }
    }
}
