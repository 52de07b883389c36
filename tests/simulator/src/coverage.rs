//! Counts how often each feature and fault was exercised, so that a run that exercises nothing is
//! noticed.

use core::fmt;
use std::collections::BTreeMap;

/// Counters by name, summed over runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    counts: BTreeMap<String, u64>,
}

/// Names that a few hundred seeds must have hit.
const EXPECTED: &[&str] = &[
    "action.attach",
    "action.attach refused",
    "action.detach",
    "action.failover",
    "action.switchover",
    "connection.aborted",
    "connection.completed",
    "connection.completed over a promotion",
    "engine.repetition recalled",
    "engine.restored",
    "evidence.DomainGone",
    "evidence.DomainPaused",
    "evidence.NoProgress",
    "evidence.UnacknowledgedSegment",
    "evidence.UnsharedClose",
    "event.diverged",
    "event.evicted",
    "event.no candidate",
    "event.recuperated",
    "event.seeded",
    "event.stale",
    "fault.crash",
    "fault.cut client",
    "fault.cut server",
    "fault.freeze",
    "fault.garbage",
    "fault.hang",
    "fault.kill",
    "fault.mutated",
    "fault.reset all",
    "fault.slow",
    "fault.spin",
    "fault.starve dom0",
    "fault.thaw deposed",
    "fault.wrong answer",
    "promotion.first",
    "promotion.second",
    "promotion.third",
    "wrap.client",
    "wrap.server",
];

/// The same with hostile clients.
const EXPECTED_HOSTILE: &[&str] = &[
    "connection.completed",
    "connection.completed over a promotion",
    "fault.garbage",
    "fault.mutated",
    "fault.reset all",
    "fault.twisted",
    "guest.asked in vain",
    "shot.AckOfNobody",
    "shot.Noise",
    "shot.Reset",
    "shot.Syn",
    "shot.SynOfNobody",
];

impl Coverage {
    pub(crate) fn hit(&mut self, name: &str) {
        self.add(name, 1);
    }

    pub(crate) fn add(&mut self, name: &str, count: u64) {
        match self.counts.get_mut(name) {
            Some(total) => *total += count,
            None => {
                self.counts.insert(name.to_owned(), count);
            }
        }
    }

    /// Adds the counters of another run.
    pub fn merge(&mut self, other: &Coverage) {
        for (name, count) in &other.counts {
            self.add(name, *count);
        }
    }

    /// How often something was exercised.
    pub fn count(&self, name: &str) -> u64 {
        self.counts.get(name).copied().unwrap_or(0)
    }

    /// Names that should have been exercised and were not.
    pub fn missing(&self, hostile: bool) -> Vec<&'static str> {
        let expected = if hostile { EXPECTED_HOSTILE } else { EXPECTED };
        expected.iter().copied().filter(|name| !self.counts.contains_key(*name)).collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in &self.counts {
            writeln!(f, "{count:>10}  {name}")?;
        }
        Ok(())
    }
}
