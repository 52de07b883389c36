//! Since when a conversation has something against the OVM.

pub(crate) mod closes;
pub(crate) mod excuses;
pub(crate) mod signs;

use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::Timing;
use crate::time::Instant;

/// Since when a conversation has something against the OVM.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Suspicion {
    /// (c) A segment stays unacknowledged by the OVM though an RVM acknowledged it.
    pub(crate) unacked_since: Option<Instant>,
    /// The OVM's acknowledgment when that began.
    pub(crate) unacked_at: u64,
    /// Times the OVM was sent the segment again.
    pub(crate) reminders: u32,
    /// Times the OVM was asked whether it waits for something, in (d).
    pub(crate) nudges: u32,
    /// (d) RVMs agree on an answer that the OVM does not begin.
    pub(crate) silent_since: Option<Instant>,
    /// Where that answer begins.
    pub(crate) silent_at: u64,
    /// (d) The OVM's window is shut though RVMs that have no more bytes have theirs open.
    pub(crate) shut_since: Option<Instant>,
    /// The right edge of that window.
    pub(crate) shut_at: u64,
    /// (e) RVMs disputed the OVM's close of this conversation.
    pub(crate) close_disputed: bool,
}

/// The OVM is sent an unacknowledged segment again this often before it is accused: a frame may have
/// been lost on its vif while the client's own timer is long. With the default limit the first comes after 50 ms,
/// later than Linux delays an acknowledgment (40 ms): one that met that would begin the wait for an answer anew.
pub(crate) const REMINDERS: u32 = 4;

impl Suspicion {
    pub(crate) fn note_answer(&mut self) {
        self.silent_since = None;
    }

    pub(crate) fn is_pending(&self) -> bool {
        self.unacked_since.is_some() || self.silent_since.is_some() || self.shut_since.is_some()
    }

    /// When the wait that began must be looked at again; `measured_from` leaves out the time in which nobody is at fault.
    pub(crate) fn deadline(
        &self,
        timing: &Timing,
        now: Instant,
        measured_from: impl Fn(Instant) -> Instant,
    ) -> Option<Instant> {
        let due = |since: Instant, limit: Duration, times: u32| {
            let times = if times < REMINDERS { times + 1 } else { REMINDERS + 1 };
            measured_from(since) + reminder(limit, times)
        };
        let unacked = self.unacked_since.map(|since| due(since, timing.unacked_limit, self.reminders));
        let silent = self.silent_since.into_iter().chain(self.shut_since);
        let silent = silent.map(|since| due(since, timing.progress_limit, self.nudges));
        unacked.into_iter().chain(silent).min().map(|deadline| deadline.max(now + Duration::from_millis(1)))
    }
}

/// When the OVM is reminded or asked for so manieth a time, from the beginning of a suspicion that ends with `limit`.
pub(crate) fn reminder(limit: Duration, times: u32) -> Duration {
    if times > REMINDERS { limit } else { limit / (REMINDERS + 1) * times }
}
