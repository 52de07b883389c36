//! One direction of a network link: delay, loss, reordering, duplication, corruption, cut-off.

use crate::disguise::complete_checksum;
use crate::prng::Prng;

/// What a link does to packets; the rates are per million.
#[derive(Clone, Debug, Default)]
pub(crate) struct LinkKnobs {
    pub(crate) delay_us: u64,
    pub(crate) jitter_us: u64,
    pub(crate) loss: u32,
    pub(crate) duplication: u32,
    pub(crate) reordering: u32,
    pub(crate) corruption: u32,
}

impl LinkKnobs {
    /// Everything arrives, once, in order.
    pub(crate) fn faithful(&self) -> bool {
        self.loss == 0 && self.duplication == 0 && self.reordering == 0 && self.corruption == 0
    }
}

pub(crate) struct Link {
    knobs: LinkKnobs,
    rng: Prng,
    last_arrival: u64,
    cut_until: u64,
    pub(crate) was_cut: bool,
}

impl Link {
    pub(crate) fn new(knobs: LinkKnobs, rng: Prng) -> Self {
        Self { knobs, rng, last_arrival: 0, cut_until: 0, was_cut: false }
    }

    pub(crate) fn cut(&mut self, until: u64) {
        self.cut_until = self.cut_until.max(until);
        self.was_cut = true;
    }

    /// Nothing passes until then.
    pub(crate) fn cut_until(&self) -> u64 {
        self.cut_until
    }

    /// Sends a packet; calls `arrive` with the time and bytes of each copy that gets through.
    pub(crate) fn carry(&mut self, now: u64, packet: Vec<u8>, mut arrive: impl FnMut(u64, Vec<u8>)) {
        if now < self.cut_until || self.rng.chance(self.knobs.loss) {
            return;
        }
        let knobs = &self.knobs;
        let arrival = now + knobs.delay_us + self.rng.between(0, knobs.jitter_us);
        if self.rng.chance(knobs.duplication) {
            let later = arrival + self.rng.between(0, knobs.delay_us + knobs.jitter_us + 1000);
            arrive(later, packet.clone());
        }
        if self.rng.chance(knobs.reordering) {
            let later = arrival + self.rng.between(1, knobs.delay_us * 2 + knobs.jitter_us + 3000);
            arrive(later, packet);
            return;
        }
        // Jitter alone keeps the order.
        self.last_arrival = self.last_arrival.max(arrival);
        if self.rng.chance(knobs.corruption) {
            arrive(self.last_arrival, self.corrupt(packet));
        } else {
            arrive(self.last_arrival, packet);
        }
    }

    /// Flips one bit that a checksum covers: anywhere behind the network header.
    fn corrupt(&mut self, mut packet: Vec<u8>) -> Vec<u8> {
        // A device that fills checksums in does so before anything can happen to the packet.
        if packet.is_empty() {
            return packet;
        }
        complete_checksum(&mut packet);
        let header = if packet.first().is_some_and(|b| b >> 4 == 6) { 40 } else { 20 };
        let mut corrupted = packet.clone();
        if packet.len() > header {
            let bit = self.rng.between(0, (packet.len() - header) as u64 * 8 - 1) as usize;
            corrupted[header + bit / 8] ^= 1 << (bit % 8);
        }
        // One in 65,536 checksums looks like a partial one, and then covers nothing.
        let mut completed = corrupted.clone();
        complete_checksum(&mut completed);
        if completed == corrupted { corrupted } else { packet }
    }
}
