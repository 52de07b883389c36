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
    /// How often the daemon sent the OVM that segment again.
    pub(crate) reminders: u32,
    /// How often the daemon asked the OVM, in (d), with the client's acknowledgment and window.
    pub(crate) nudges: u32,
    /// (d) RVMs agree on an answer that the OVM does not begin.
    pub(crate) silent_since: Option<Instant>,
    /// Position at which that answer begins.
    pub(crate) silent_at: u64,
    /// (d) The OVM's window is closed, though RVMs that have acknowledged as much have theirs open.
    pub(crate) shut_since: Option<Instant>,
    /// The right edge of that window.
    pub(crate) shut_at: u64,
    /// (e) RVMs disputed the OVM's close of this conversation.
    pub(crate) close_disputed: bool,
}

/// How often the daemon sends an unacknowledged segment to the OVM again before it accuses the OVM: the vif may have
/// lost a frame while the client's own timer is long. With the default limit the first reminder comes after 50 ms.
/// Linux delays an acknowledgment by 40 ms; an earlier reminder could meet that delay, and its acknowledgment would
/// begin the wait for an answer anew.
pub(crate) const REMINDERS: u32 = 4;

impl Suspicion {
    pub(crate) fn note_answer(&mut self) {
        self.silent_since = None;
    }

    pub(crate) fn is_pending(&self) -> bool {
        self.unacked_since.is_some() || self.silent_since.is_some() || self.shut_since.is_some()
    }

    /// When the conversation must be judged again; `measured_from` leaves out the time in which no server is at fault.
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

/// Time from the beginning of a suspicion to the reminder with the number `times`. Beyond [`REMINDERS`] it is `limit`,
/// at which the suspicion ends.
pub(crate) fn reminder(limit: Duration, times: u32) -> Duration {
    if times > REMINDERS { limit } else { limit / (REMINDERS + 1) * times }
}
