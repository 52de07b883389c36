//! The demo's report for programs. Fields are only ever added.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::host::Fault;

/// Everything the demo measured. Times are in microseconds, all on CLOCK_MONOTONIC.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) plane: String,
    pub(crate) replicas: usize,
    pub(crate) client: Client,
    pub(crate) failover: Failover,
    pub(crate) rtt: Vec<Rtt>,
    pub(crate) eviction: Eviction,
    /// How processes were pinned while round trips were measured.
    pub(crate) pinning: String,
}

impl Report {
    /// As JSON.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, serde_json::to_string_pretty(self)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// What the clients saw over the failover.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Client {
    pub(crate) connections: usize,
    pub(crate) requests: u64,
    /// Wrong answers, missing answers, and connections that the server closed.
    pub(crate) errors: u64,
    pub(crate) resets: u64,
    pub(crate) reconnects: u64,
    pub(crate) acknowledged_writes: u64,
    /// Acknowledged writes whose effect the promoted server lacks.
    pub(crate) lost_writes: u64,
}

/// The failover, from the fault itself.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Failover {
    pub(crate) fault: Fault,
    pub(crate) detected_by: String,
    pub(crate) fault_to_detection_us: u64,
    pub(crate) detection_to_cutover_us: u64,
    /// To the first new in-order byte that a client with a request outstanding read.
    pub(crate) fault_to_first_byte_us: u64,
    /// The same for the connection that waited longest, of those that had a request outstanding.
    pub(crate) longest_stall_us: u64,
    /// `None` if the domain was gone, so that there was nothing to fence.
    pub(crate) fault_to_fenced_us: Option<u64>,
    pub(crate) fault_to_recuperated_us: u64,
    pub(crate) conversations: u64,
    pub(crate) recuperated: u64,
    pub(crate) reset: u64,
}

/// Round trips of one transaction through the PSC.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Rtt {
    pub(crate) replicas: usize,
    pub(crate) samples: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) ratio_to_plain_p50: f64,
    pub(crate) plain_p50_us: f64,
}

/// An RVM taken out of the queue under load.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Eviction {
    /// How long it held up the packet path.
    pub(crate) packet_path_us: f64,
    pub(crate) client_errors: u64,
}
