//! The faults that the lab can make happen to a domain.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A fault of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Fault {
    /// Everything of the domain stops and domain info says paused, as after `xl pause`. Can be thawed.
    Freeze,
    /// The same, but domain info says running: a guest that spins with interrupts off. Can be thawed.
    Spin,
    /// The guest's kernel panics: all stops, shutdown code crash; soon gone (on_crash = destroy).
    Crash,
    /// `xl destroy`: the domain and its vif disappear.
    Destroy,
    /// The services' processes stop, the kernel still acknowledges. Can be thawed.
    Hang,
    /// The services' processes are killed; the kernel sends FIN or RST.
    Kill,
    /// The guest ends its services and shuts down, unplanned.
    Poweroff,
    /// The guest reboots: same UUID, new domid, services in their initial state.
    Reboot,
}

/// When a fault took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FaultInstant {
    /// CLOCK_MONOTONIC, nanoseconds, read right before.
    pub(crate) monotonic_ns: u64,
}
