//! What dom0d remembers across reboots of dom0 (rule 14): which domain served last, which were equal to it and until when,
//! which have been in the queue, and which an operator detached.
//!
//! Without it, dom0d would take a replica that missed what came after a promotion for the OVM. If the memory is lost or
//! contradicts the domains that are there, nobody serves until an operator says who.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::{DomainId, DomainRef};

/// Version of the file's format.
pub(super) const VERSION: u32 = 1;

/// Domains remembered per service and list; the oldest are forgotten first.
const DOMAINS: usize = 256;

/// Everything remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Memory {
    version: u32,
    /// By the service's name.
    pub(crate) services: BTreeMap<String, ServiceMemory>,
}

/// The memory of one service (rule 14).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ServiceMemory {
    /// How often another domain began to serve.
    generation: u64,
    /// The domain that serves, or served last.
    last: Option<Last>,
    /// RVMs that had everything that the OVM of their time had.
    equals: Vec<Equal>,
    /// Why it is unknown which domain served last; an operator's statement ends the doubt.
    doubt: Option<String>,
    /// Domains that have been in the queue: they need a new statement on their state.
    seen: Vec<Uuid>,
    /// Domains that an operator detached.
    detached: Vec<Uuid>,
    /// Whether a client has been served: a domain that appears now has missed something.
    pub(crate) served: bool,
    /// Left by a clean end: the RVMs that were promotable and had everything. On the plane `pcap` the PSC is gone while
    /// no dom0d runs, so they can miss nothing meanwhile. Valid for the next start only.
    in_step: Option<InStep>,
    /// The boot of dom0 in which this memory was last used.
    boot: String,
}

/// RVMs that had everything that their OVM had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct InStep {
    /// The OVM.
    pub(crate) ovm: DomainId,
    /// The RVMs.
    pub(crate) rvms: Vec<DomainId>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Last {
    uuid: Uuid,
    /// For a domain that is created anew with another UUID: xl makes one up unless told.
    name: String,
    /// The boot of dom0 in which it served.
    boot: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Equal {
    uuid: Uuid,
    name: String,
    /// The generation of that OVM.
    generation: u64,
    /// When it ceased to equal that OVM, in seconds since the Unix epoch; `None` while it does, 0 if the time is
    /// unknown.
    until: Option<u64>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { version: VERSION, services: BTreeMap::new() }
    }
}

impl Memory {
    /// The memory of a service, in this boot of dom0.
    pub(crate) fn of(&self, service: &str, boot: &str) -> ServiceMemory {
        let mut memory = self.services.get(service).cloned().unwrap_or_default();
        for equal in memory.equals.iter_mut().filter(|equal| equal.until.is_none()) {
            equal.until = Some(0);
        }
        if memory.boot != boot {
            // All domains have rebooted: none is as it was left, and if no client was served, none has missed anything.
            memory.in_step = None;
            if !memory.served {
                memory.seen.clear();
            }
            boot.clone_into(&mut memory.boot);
        }
        memory
    }

    /// The memory is lost, for this reason: for these services it is unknown which domain served last.
    pub(crate) fn lost<'a>(services: impl Iterator<Item = &'a str>, reason: &str) -> Self {
        let doubt = || ServiceMemory { doubt: Some(reason.to_owned()), served: true, ..Default::default() };
        Self { services: services.map(|name| (name.to_owned(), doubt())).collect(), ..Self::default() }
    }
}

impl ServiceMemory {
    /// Whether `domain` is to serve; `None` if no client was served yet, so that the configuration decides.
    pub(crate) fn serves(&self, domain: &DomainRef) -> Option<bool> {
        if self.doubt.is_some() {
            return Some(false);
        }
        let last = self.last.as_ref().filter(|_| self.served || self.generation > 1)?;
        // By name after a reboot of dom0, which ends all domains, and for which xl makes up new UUIDs. At any other
        // time an operator has created that domain, and must state what state it has.
        Some(last.uuid == domain.uuid || (last.name == domain.name && last.boot != self.boot))
    }

    /// If a service has no domain that may serve: what it waits for and what the operator can do, as far as the memory
    /// knows. `domains` are the present ones.
    pub(crate) fn question<'a>(
        &self,
        service: &str,
        mut domains: impl Iterator<Item = &'a DomainRef>,
    ) -> Option<String> {
        let answer = format!("understudy failover {service} --to DOMAIN --force");
        if let Some(doubt) = &self.doubt {
            return Some(format!(
                "nobody serves, for nobody knows who served last: {doubt}; say whose state is right: {answer}"
            ));
        }
        let Last { name, uuid, .. } = self.last.as_ref().filter(|_| self.served || self.generation > 1)?;
        let equals: Vec<_> = self.equals.iter().filter(|equal| equal.generation == self.generation).collect();
        let equals = match equals.as_slice() {
            [] => "no other is known to hold the same".to_owned(),
            all => all.iter().map(|equal| equal.text()).collect::<Vec<_>>().join(", "),
        };
        let wants = match domains.find(|domain| domain.name == *name && domain.uuid != *uuid) {
            Some(domain) => format!(
                "{name} (UUID {uuid}) served last, and the {name} that is there was created anew (UUID {}): if it holds the same data, or another domain does",
                domain.uuid
            ),
            None => format!(
                "waits for {name} (UUID {uuid}), which served last ({equals}); start it (xl create), or, to serve from another domain whatever its state"
            ),
        };
        Some(format!("{wants}: {answer}"))
    }

    /// Whether the configuration names another domain, which then does not count.
    pub(crate) fn overrules(&self, configured: impl Fn(&str, Uuid) -> bool) -> Option<&str> {
        let last = self.last.as_ref().filter(|last| !configured(&last.name, last.uuid))?;
        (self.served && self.generation == 1).then_some(last.name.as_str())
    }

    /// `domain` serves from now on.
    pub(crate) fn begin(&mut self, domain: &DomainRef) {
        let (uuid, name) = (domain.uuid, domain.name.clone());
        if self.doubt.take().is_some() || self.last.as_ref().is_none_or(|last| last.uuid != uuid) {
            self.generation += 1;
        }
        self.last = Some(Last { uuid, name, boot: self.boot.clone() });
    }

    /// A domain has another name.
    pub(crate) fn rename(&mut self, uuid: Uuid, name: &str) {
        let last = self.last.as_mut().filter(|last| last.uuid == uuid).map(|last| &mut last.name);
        let equal = self.equals.iter_mut().filter(|equal| equal.uuid == uuid).map(|equal| &mut equal.name);
        equal.chain(last).for_each(|known| name.clone_into(known));
    }

    /// These RVMs have everything that the OVM has, and no others; whether that is news.
    pub(crate) fn set_equals(&mut self, now: &[&DomainRef]) -> bool {
        let before = self.equals.clone();
        let (generation, time) = (self.generation, SystemTime::now().duration_since(UNIX_EPOCH));
        for equal in self.equals.iter_mut().filter(|equal| equal.until.is_none()) {
            let lasts = now.iter().any(|domain| domain.uuid == equal.uuid) && equal.generation == generation;
            equal.until = (!lasts).then(|| time.as_ref().map_or(0, |time| time.as_secs()));
        }
        for domain in now {
            let lasts = |equal: &Equal| equal.uuid == domain.uuid && equal.until.is_none();
            if !self.equals.iter().any(lasts) {
                self.equals.retain(|equal| equal.uuid != domain.uuid);
                let (uuid, name) = (domain.uuid, domain.name.clone());
                push(&mut self.equals, Equal { uuid, name, generation, until: None });
            }
        }
        self.equals != before
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

impl Equal {
    fn text(&self) -> String {
        let when = match self.until {
            None | Some(0) => "when last heard of".to_owned(),
            Some(until) => {
                format!("until {}", understudy_api::time::rfc3339(until.saturating_mul(1_000_000)))
            }
        };
        format!("{} held the same {when}", self.name)
    }
}

fn push<T>(list: &mut Vec<T>, entry: T) {
    if list.len() >= DOMAINS {
        list.remove(0);
    }
    list.push(entry);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn domain(identity: u128, name: &str) -> DomainRef {
        DomainRef { name: name.to_owned(), uuid: Uuid::from_u128(identity), domid: 1 }
    }

    fn served(boot: &str) -> ServiceMemory {
        let mut memory = Memory::default().of("redis", boot);
        memory.begin(&domain(1, "a"));
        memory.served = true;
        memory
    }

    fn rebooted(memory: &ServiceMemory) -> ServiceMemory {
        let services = [("redis".to_owned(), memory.clone())].into();
        Memory { services, ..Memory::default() }.of("redis", "another boot")
    }

    #[test]
    fn before_anybody_was_served_the_configuration_decides() {
        let mut memory = Memory::default().of("redis", "boot");
        assert_eq!(memory.serves(&domain(1, "a")), None);
        memory.begin(&domain(1, "a"));
        memory.see(Uuid::from_u128(1));
        assert_eq!(memory.serves(&domain(2, "b")), None);
        assert!(
            !rebooted(&memory).has_seen(Uuid::from_u128(1)),
            "no client was served, so nothing was missed"
        );
        memory.served = true;
        assert_eq!(memory.serves(&domain(2, "b")), Some(false));
        assert_eq!(memory.serves(&domain(1, "a")), Some(true));
        assert!(rebooted(&memory).has_seen(Uuid::from_u128(1)));
    }

    #[test]
    fn who_was_promoted_serves_after_a_reboot_too() {
        let mut memory = served("boot");
        memory.begin(&domain(2, "b"));
        for memory in [memory.clone(), rebooted(&memory)] {
            assert_eq!(memory.serves(&domain(1, "a")), Some(false));
            assert_eq!(memory.serves(&domain(2, "renamed")), Some(true));
        }
        // xl makes up another UUID at each boot.
        assert_eq!(rebooted(&memory).serves(&domain(3, "b")), Some(true));
        // Who creates a domain while dom0 runs knows what it holds; nobody else does.
        assert_eq!(memory.serves(&domain(3, "b")), Some(false));
        let said = memory.question("redis", [&domain(3, "b")].into_iter()).unwrap();
        assert!(said.contains("created anew") && said.contains("failover redis --to"), "{said}");
        // A second start after the reboot, before it is there, knows no less.
        assert_eq!(rebooted(&rebooted(&memory)).serves(&domain(3, "b")), Some(true));
    }

    #[test]
    fn a_memory_that_is_lost_lets_nobody_serve_until_an_operator_says_so() {
        let memory = Memory::lost(["redis"].into_iter(), "it is damaged");
        let mut memory = memory.of("redis", "boot");
        assert_eq!(memory.serves(&domain(1, "a")), Some(false));
        assert_eq!(rebooted(&memory).serves(&domain(1, "a")), Some(false));
        assert!(memory.served, "no domain is identical");
        assert!(memory.question("redis", std::iter::empty()).unwrap().contains("it is damaged"));
        memory.begin(&domain(1, "a"));
        assert_eq!(memory.serves(&domain(1, "a")), Some(true));
    }

    #[test]
    fn who_held_the_same_is_said_when_it_matters() {
        let mut memory = served("boot");
        let (b, c) = (domain(2, "b"), domain(3, "c"));
        assert!(memory.set_equals(&[&b, &c]));
        assert!(!memory.set_equals(&[&b, &c]));
        assert!(memory.set_equals(&[&c]));
        let said = memory.question("redis", std::iter::empty()).unwrap();
        assert!(
            said.contains("b held the same until 2") && said.contains("c held the same when last"),
            "{said}"
        );
        memory.begin(&c);
        memory.set_equals(&[]);
        let said = memory.question("redis", std::iter::empty()).unwrap();
        assert!(said.contains("no other"), "{said}");
        for n in 0..1_000 {
            memory.set_equals(&[&domain(n, "x")]);
        }
        assert!(memory.equals.len() <= DOMAINS);
    }

    #[test]
    fn what_was_in_step_is_not_after_a_reboot() {
        let mut memory = served("boot");
        let life = DomainId { uuid: Uuid::from_u128(1), domid: 1 };
        memory.set_in_step(InStep { ovm: life, rvms: vec![life] });
        assert!(rebooted(&memory).take_in_step().is_none());
        assert!(memory.take_in_step().is_some());
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
}
