//! What the engine has to say, until its caller polls it.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::event::{Destination, Effect, Event, Transmit};

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outbox {
    transmits: VecDeque<Transmit>,
    effects: VecDeque<Effect>,
    /// The caller has not polled the latest [`Effect::Cutover`]: until then nothing of the new epoch leaves.
    cutover_untold: bool,
}

impl Outbox {
    /// A packet; if `segment` is not 0, as [`crate::wire::Segment::emit_large`] made it.
    pub(crate) fn send(&mut self, to: Destination, packet: Vec<u8>, segment: u16) {
        self.transmits.push_back(Transmit { to, packet, segment });
    }

    pub(crate) fn effect(&mut self, effect: Effect) {
        self.cutover_untold |= matches!(effect, Effect::Cutover { .. });
        self.effects.push_back(effect);
    }

    /// An event; false if so many wait already that it is dropped.
    pub(crate) fn event(&mut self, event: Event, limit: u32) -> bool {
        let has_room = self.effects.len() < limit as usize;
        if has_room {
            self.effects.push_back(Effect::Event(event));
        }
        has_room
    }

    /// Drops what was about to be sent on behalf of a deposed server.
    pub(crate) fn drop_transmits_to_clients(&mut self) {
        self.transmits.retain(|transmit| !matches!(transmit.to, Destination::Client(_)));
    }

    pub(crate) fn next_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    pub(crate) fn next_effect(&mut self) -> Option<Effect> {
        let effect = self.effects.pop_front();
        self.cutover_untold &= !matches!(effect, Some(Effect::Cutover { .. }));
        effect
    }

    /// The caller has yet to poll a cutover.
    pub(crate) fn is_cutover_untold(&self) -> bool {
        self.cutover_untold
    }
}
