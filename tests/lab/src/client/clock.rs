//! CLOCK_MONOTONIC, the one clock of faults, events and receipts.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of CLOCK_MONOTONIC; the same in every namespace and process of this machine.
pub(crate) fn now_ns() -> u64 {
    // The call fails only for an unknown clock, and this one has existed since Linux 2.6.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
        .unwrap_or_default()
}
