//! What the engine knows of a data plane that passes conversations by itself (rule 10).

use serde::{Deserialize, Serialize};

use crate::input::Passage;
use crate::wire::Checksum;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Plane {
    /// How often the plane was stopped; `None` if it can't pass conversations.
    stops: Option<u32>,
    /// What it did with the packet at hand.
    passage: Passage,
    /// The plane has passed the packet at hand, and no conversation has recorded or accounted for its bytes yet.
    #[serde(skip)]
    untaken: bool,
}

impl Plane {
    /// How often the plane was stopped; `None` if it passes nothing by itself.
    pub(crate) fn stops(&self) -> Option<u32> {
        self.stops
    }

    pub(crate) fn set_passes(&mut self) {
        self.stops.get_or_insert(0);
    }

    /// The plane was stopped, and passes no conversation any more.
    pub(crate) fn note_stopped(&mut self) {
        self.stops = self.stops.map(|times| times.wrapping_add(1));
    }

    /// What it did with the packet at hand.
    pub(crate) fn passage(&self) -> Passage {
        self.passage
    }

    /// A packet begins, with which the plane did `passage`.
    pub(crate) fn begin(&mut self, passage: Passage) {
        self.passage = passage;
        self.untaken = self.passed();
    }

    /// The packet was handled. True if the plane passed it and no conversation has accounted for its bytes.
    pub(crate) fn end(&mut self) -> bool {
        self.passage = Passage::Kept;
        core::mem::take(&mut self.untaken)
    }

    /// The plane has already passed the packet at hand to its receiver.
    pub(crate) fn passed(&self) -> bool {
        matches!(self.passage, Passage::Passed { .. })
    }

    /// The bytes of the packet at hand, if it has any, are accounted for: the receiver drops them, or a conversation
    /// has processed them.
    pub(crate) fn note_accounted(&mut self) {
        self.untaken = false;
    }

    /// What the checksum of the packet at hand must be. For a passed packet: what its receiver's kernel accepts.
    pub(crate) fn checksum(&self) -> Checksum {
        match self.passage {
            Passage::Passed { trusted: true, .. } => Checksum::Trusted,
            Passage::Passed { trusted: false, .. } => Checksum::Right,
            _ => Checksum::RightOrPartial,
        }
    }
}
