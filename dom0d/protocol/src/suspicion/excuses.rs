//! Why a server may be without fault: from when on what it leaves undone speaks against it.

use serde::{Deserialize, Serialize};

use crate::time::Instant;

/// When there was last a reason not to blame servers.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Excuses {
    /// The caller was found to have been starved of CPU.
    starved_at: Instant,
    /// What speaks against the OVM begins anew.
    excused_at: Instant,
    /// The caller was late enough that an RVM's FIN or RST may be unprocessed.
    late_at: Instant,
}

impl Excuses {
    /// The caller was starved of CPU until now.
    pub(crate) fn note_starved(&mut self, now: Instant) {
        self.starved_at = now;
    }

    /// The caller is late.
    pub(crate) fn note_late(&mut self, now: Instant) {
        self.late_at = now;
    }

    /// What stood against the OVM until now counts no more.
    pub(crate) fn excuse_ovm(&mut self, now: Instant) {
        self.excused_at = now;
    }

    /// From when on evidence that began at `since` speaks against the OVM.
    pub(crate) fn measured_from(&self, since: Instant) -> Instant {
        self.unstarved(since).max(self.excused_at)
    }

    /// From when on what has stood since `since` is not the daemon's own fault.
    pub(crate) fn unstarved(&self, since: Instant) -> Instant {
        since.max(self.starved_at)
    }

    /// Since when the daemon has heard whatever RVMs said about a close.
    pub(crate) fn heard_since(&self) -> Instant {
        self.starved_at.max(self.late_at)
    }
}
