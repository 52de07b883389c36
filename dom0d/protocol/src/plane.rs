//! What the engine knows of a data plane that passes conversations by itself.

use serde::{Deserialize, Serialize};

use crate::input::Passage;
use crate::wire::Checksum;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Plane {
    /// It can pass conversations; how often it was stopped.
    stops: Option<u32>,
    /// What it did with the packet at hand.
    passage: Passage,
    /// It has passed the packet at hand, and nothing shows yet that its bytes are recorded.
    #[serde(skip)]
    untaken: bool,
}

impl Plane {
    /// How often it was stopped; `None` if it passes nothing by itself.
    pub(crate) fn stops(&self) -> Option<u32> {
        self.stops
    }

    pub(crate) fn set_passes(&mut self) {
        self.stops.get_or_insert(0);
    }

    /// It passes nothing any more of all that it passed.
    pub(crate) fn note_stopped(&mut self) {
        self.stops = self.stops.map(|times| times.wrapping_add(1));
    }

    /// What it did with the packet at hand.
    pub(crate) fn passage(&self) -> Passage {
        self.passage
    }

    /// A packet comes, with which it did this.
    pub(crate) fn begin(&mut self, passage: Passage) {
        self.passage = passage;
        self.untaken = self.passed();
    }

    /// The packet was handled. True if it is with its receiver and no conversation has accounted for its bytes.
    pub(crate) fn end(&mut self) -> bool {
        self.passage = Passage::Kept;
        core::mem::take(&mut self.untaken)
    }

    /// The packet at hand is with its receiver already.
    pub(crate) fn passed(&self) -> bool {
        matches!(self.passage, Passage::Passed { .. })
    }

    /// The bytes of the packet at hand, if it has any, are accounted for: its receiver drops them, or a conversation has
    /// looked at them.
    pub(crate) fn note_accounted(&mut self) {
        self.untaken = false;
    }

    /// What the checksum of the packet at hand must be: as its receiver sees it, if it is with that one already.
    pub(crate) fn checksum(&self) -> Checksum {
        match self.passage {
            Passage::Passed { trusted: true, .. } => Checksum::Trusted,
            Passage::Passed { trusted: false, .. } => Checksum::Right,
            _ => Checksum::RightOrPartial,
        }
    }
}
