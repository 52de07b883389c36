//! What must dom0d still know when it starts again? Which domain it promoted last, and which ones it has
//! seen or was told to leave out. Kept in a file in a directory that a reboot of dom0 empties, as it ends
//! all domains.
//!
//! Without this, a daemon that restarts after a failover would take the deposed OVM for the OVM.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::command::DomainRef;
use crate::hypervisor::DomainId;

/// Domains remembered per service and list; the oldest are forgotten first.
const DOMAINS: usize = 256;

/// Everything remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Memory {
    /// By the service's name.
    pub(crate) services: BTreeMap<String, ServiceMemory>,
}

/// What is remembered of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ServiceMemory {
    /// The domain promoted last; `None` while the configured OVM has always served.
    promoted: Option<Promoted>,
    /// Domains that have been in the queue: they need a new statement on their state.
    seen: Vec<Uuid>,
    /// Domains that an operator detached.
    detached: Vec<Uuid>,
    /// A client has been served: a domain that appears now has missed something.
    pub(crate) served: bool,
    /// Left by a clean end: who was promotable and had everything. The PSC is gone while no dom0d runs
    /// (on the `pcap` plane), so nothing can be missed meanwhile. Good for the next start only.
    in_step: Option<InStep>,
}

/// RVMs that had everything that their OVM had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InStep {
    /// The OVM.
    pub(crate) ovm: DomainId,
    /// The RVMs.
    pub(crate) rvms: Vec<DomainId>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Promoted {
    uuid: Uuid,
    /// For a domain that is created anew with another UUID: xl makes one up unless told.
    name: String,
}

impl ServiceMemory {
    /// Whether `domain` is the one promoted last; `None` if nothing was ever promoted.
    pub(crate) fn is_promoted(&self, domain: &DomainRef) -> Option<bool> {
        let promoted = self.promoted.as_ref()?;
        Some(promoted.uuid == domain.uuid || promoted.name == domain.name)
    }

    /// The name of the domain promoted last.
    pub(crate) fn promoted(&self) -> Option<&str> {
        self.promoted.as_ref().map(|promoted| promoted.name.as_str())
    }

    /// `domain` was promoted.
    pub(crate) fn promote(&mut self, domain: &DomainRef) {
        self.promoted = Some(Promoted { uuid: domain.uuid, name: domain.name.clone() });
    }

    /// Whether a domain has been in the queue.
    pub(crate) fn has_seen(&self, uuid: Uuid) -> bool {
        self.seen.contains(&uuid)
    }

    /// A clean end: what the next start may rely on.
    pub(crate) fn set_in_step(&mut self, in_step: InStep) {
        self.in_step = Some(in_step);
    }

    /// What a clean end left, for once.
    pub(crate) fn take_in_step(&mut self) -> Option<InStep> {
        self.in_step.take()
    }

    /// Notes that a domain has been in the queue; `true` if it never was before.
    pub(crate) fn see(&mut self, uuid: Uuid) -> bool {
        let new = !self.seen.contains(&uuid);
        if new {
            push(&mut self.seen, uuid);
        }
        new
    }

    /// Whether an operator detached the domain.
    pub(crate) fn is_detached(&self, uuid: Uuid) -> bool {
        self.detached.contains(&uuid)
    }

    /// An operator detached the domain, or attached it again.
    pub(crate) fn set_detached(&mut self, uuid: Uuid, detached: bool) {
        self.detached.retain(|other| *other != uuid);
        if detached {
            push(&mut self.detached, uuid);
        }
    }
}

fn push(list: &mut Vec<Uuid>, uuid: Uuid) {
    if list.len() >= DOMAINS {
        list.remove(0);
    }
    list.push(uuid);
}

/// Reads what an earlier dom0d left; nothing if there is no file.
pub(crate) fn load(path: &Path) -> io::Result<Memory> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Memory::default()),
        Err(error) => Err(error),
    }
}

/// A thread that writes what it is sent, so that no packet waits for a file system. It ends when the
/// sender is dropped.
pub(crate) fn spawn_writer(path: PathBuf) -> io::Result<(mpsc::Sender<Memory>, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel::<Memory>();
    let thread = std::thread::Builder::new()
        .name("memory".to_owned())
        .spawn(move || {
            while let Ok(first) = receiver.recv() {
                let last = receiver.try_iter().last().unwrap_or(first);
                if let Err(error) = store(&path, &last) {
                    tracing::error!(path = %path.display(), %error, "can't write down which domain serves; if dom0d restarts now it may take another one for the OVM");
                }
            }
        })?;
    Ok((sender, thread))
}

fn store(path: &Path, memory: &Memory) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = fs::File::create(&new)?;
    file.write_all(&serde_json::to_vec_pretty(memory)?)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn domain(identity: u128, name: &str) -> DomainRef {
        DomainRef { name: name.to_owned(), uuid: Uuid::from_u128(identity), domid: 1 }
    }

    #[test]
    fn the_promoted_domain_is_known_by_uuid_or_name() {
        let mut memory = ServiceMemory::default();
        assert_eq!(memory.is_promoted(&domain(1, "a")), None);
        memory.promote(&domain(2, "b"));
        assert_eq!(memory.is_promoted(&domain(1, "a")), Some(false));
        assert_eq!(memory.is_promoted(&domain(2, "renamed")), Some(true));
        assert_eq!(memory.is_promoted(&domain(3, "b")), Some(true));
    }

    #[test]
    fn lists_are_bounded_and_the_oldest_are_forgotten() {
        let mut memory = ServiceMemory::default();
        for n in 0..1_000 {
            assert!(memory.see(Uuid::from_u128(n)));
            assert!(!memory.see(Uuid::from_u128(n)));
            memory.set_detached(Uuid::from_u128(n), true);
        }
        assert!(memory.seen.len() <= DOMAINS && memory.detached.len() <= DOMAINS);
        assert!(memory.is_detached(Uuid::from_u128(999)));
        memory.set_detached(Uuid::from_u128(999), false);
        assert!(!memory.is_detached(Uuid::from_u128(999)));
    }

    #[test]
    fn what_is_written_reads_back_and_a_missing_file_is_nothing() {
        let path = std::env::temp_dir().join(format!("dom0d-memory-{}", std::process::id()));
        assert_eq!(load(&path).unwrap(), Memory::default());
        let mut memory = Memory::default();
        let service = memory.services.entry("redis".to_owned()).or_default();
        service.promote(&domain(2, "b"));
        service.see(Uuid::from_u128(2));
        let (sender, thread) = spawn_writer(path.clone()).unwrap();
        sender.send(memory.clone()).unwrap();
        drop(sender);
        thread.join().unwrap();
        assert_eq!(load(&path).unwrap(), memory);
        fs::write(&path, "{").unwrap();
        assert!(load(&path).is_err());
        fs::remove_file(&path).unwrap();
    }
}
