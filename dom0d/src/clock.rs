//! The daemon's clocks: CLOCK_MONOTONIC for the engine, so that its times compare with those of other processes of this
//! host; the wall clock for events.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};
use understudy_protocol::Instant;

/// Now, in microseconds of CLOCK_MONOTONIC.
pub(crate) fn now() -> Instant {
    // The call fails only for a clock id that the kernel does not know.
    let since_boot = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    Instant::from_micros(u64::try_from(since_boot.as_micros()).unwrap_or(u64::MAX))
}

/// Now, in microseconds since the Unix epoch.
pub(crate) fn unix_us() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX)
}
