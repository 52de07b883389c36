//! How a link is impaired.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};

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

pub(crate) fn set(_directory: &Path, _host: &str, _link: Link) -> Result<()> {
    Ok(())
}
