//! `cargo lab xen test`: stories that must be true on a real hypervisor.

mod daemon;
mod discovery;
mod failover;
mod hooks;
mod maintenance;
mod replicas;

use crate::scenarios::Scenario;

/// Every story, in the order in which they are played: those of one guest type together, as guests
/// are kept from one story to the next where they can be.
pub(in crate::xen) fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(failover::of_pv_guests());
    all.extend(replicas::scenarios());
    all.extend(maintenance::of_pv_guests());
    all.extend(daemon::scenarios());
    all.extend(discovery::scenarios());
    all.extend(hooks::scenarios());
    all.extend(maintenance::of_pvh_guests());
    all.extend(failover::of_pvh_guests());
    all
}
