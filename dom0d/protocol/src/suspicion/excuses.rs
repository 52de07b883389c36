//! Excuses for servers: the time from which a server's silence counts against it (rule 11).

use serde::{Deserialize, Serialize};

use crate::time::Instant;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Excuses {
    /// Until when the daemon was starved of CPU.
    starved_at: Instant,
    /// Evidence against the OVM from before this time does not count.
    excused_at: Instant,
    /// When the daemon was last late enough that an RVM's FIN or RST may be unprocessed.
    late_at: Instant,
}

impl Excuses {
    /// The daemon was starved of CPU until now.
    pub(crate) fn note_starved(&mut self, now: Instant) {
        self.starved_at = now;
    }

    /// The daemon was late until now.
    pub(crate) fn note_late(&mut self, now: Instant) {
        self.late_at = now;
    }

    /// Evidence against the OVM until now no longer counts.
    pub(crate) fn excuse_ovm(&mut self, now: Instant) {
        self.excused_at = now;
    }

    /// The time from which evidence that began at `since` counts against the OVM.
    pub(crate) fn measured_from(&self, since: Instant) -> Instant {
        self.unstarved(since).max(self.excused_at)
    }

    /// The time from which a delay that began at `since` is not the daemon's own fault.
    pub(crate) fn unstarved(&self, since: Instant) -> Instant {
        since.max(self.starved_at)
    }

    /// The time since which the daemon has processed every FIN and RST of RVMs without delay.
    pub(crate) fn heard_since(&self) -> Instant {
        self.starved_at.max(self.late_at)
    }
}
