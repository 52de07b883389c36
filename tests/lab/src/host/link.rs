//! How a link is impaired.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// Longest delay that can be asked for; bounds what a relay holds.
const DELAY_MAX: Duration = Duration::from_secs(10);

/// Impairment of one host's link, each direction alike. The default impairs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Link {
    /// Part of the frames that is lost, 0.0 to 1.0.
    pub(crate) loss: f64,
    /// Part of the frames that arrives twice.
    pub(crate) duplicate: f64,
    /// Part of the frames that is overtaken by later ones (held for 2 ms beyond `delay`).
    pub(crate) reorder: f64,
    /// One-way delay of every frame.
    pub(crate) delay: Duration,
    /// Bits per second, each direction.
    pub(crate) rate_bits: Option<u64>,
}

impl Link {
    /// Refuses what makes no sense.
    pub(crate) fn check(&self) -> Result<()> {
        for (name, part) in [("loss", self.loss), ("duplicate", self.duplicate), ("reorder", self.reorder)] {
            ensure!((0.0..=1.0).contains(&part), "{name} must lie between 0 and 100 %");
        }
        ensure!(self.delay <= DELAY_MAX, "delay must be at most {DELAY_MAX:?}");
        ensure!(self.rate_bits != Some(0), "a rate of 0 lets nothing pass: use --loss 100");
        Ok(())
    }
}
