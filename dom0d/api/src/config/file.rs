//! The file's keys as written, unchecked.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use understudy_protocol::{CandidatePolicy, LagPolicy, Limits};

use super::{AttachAs, Direct, Fence, OnDaemonLoss, OnShutdownRequest, OwnConnections, Plane};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawConfig {
    pub(super) control_socket: Option<PathBuf>,
    pub(super) liveness_poll_ms: Option<u64>,
    pub(super) capture_buffer_mib: Option<u32>,
    #[serde(default, rename = "service")]
    pub(super) services: Vec<RawService>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawService {
    pub(super) name: String,
    pub(super) psc: OneOrMany,
    pub(super) ports: Vec<u16>,
    pub(super) bridge: Option<String>,
    pub(super) vlan: Option<u16>,
    pub(super) ovm: String,
    #[serde(default)]
    pub(super) rvms: OneOrMany,
    pub(super) psc_mac: Option<String>,
    #[serde(default)]
    pub(super) plane: Plane,
    pub(super) daemon_grace_ms: Option<u64>,
    #[serde(default)]
    pub(super) on_daemon_loss: OnDaemonLoss,
    #[serde(default)]
    pub(super) fence: Fence,
    #[serde(default)]
    pub(super) candidate: CandidatePolicy,
    #[serde(default)]
    pub(super) on_lag: LagPolicy,
    #[serde(default)]
    pub(super) masks: Vec<RawMask>,
    #[serde(default)]
    pub(super) attach: AttachAs,
    pub(super) pause_grace_ms: Option<u64>,
    pub(super) maintenance_limit_ms: Option<u64>,
    #[serde(default)]
    pub(super) on_shutdown_request: OnShutdownRequest,
    #[serde(default)]
    pub(super) allow: Vec<String>,
    #[serde(default)]
    pub(super) own_connections: OwnConnections,
    #[serde(default)]
    pub(super) direct: Direct,
    #[serde(default)]
    pub(super) limits: Limits,
    #[serde(default)]
    pub(super) timing: RawTiming,
    #[serde(default)]
    pub(super) addresses: BTreeMap<String, OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl OneOrMany {
    pub(super) fn as_slice(&self) -> &[String] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "expected \"http-date\", \"postgresql-backend-key\" or { prefix = \"...\", length = N }"
)]
pub(super) enum RawMask {
    Preset(MaskPreset),
    Pattern(RawPattern),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum MaskPreset {
    HttpDate,
    PostgresqlBackendKey,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPattern {
    pub(super) prefix: RawPrefix,
    pub(super) length: u16,
}

/// Text, or byte values for bytes that are no text.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of byte values")]
pub(super) enum RawPrefix {
    Text(String),
    Bytes(Vec<u8>),
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTiming {
    pub(super) unacked_limit_ms: Option<u64>,
    pub(super) progress_limit_ms: Option<u64>,
    pub(super) close_hold_ms: Option<u64>,
    pub(super) lag_limit_ms: Option<u64>,
    pub(super) recover_limit_ms: Option<u64>,
    pub(super) promotion_window_ms: Option<u64>,
    pub(super) linger_ms: Option<u64>,
    pub(super) idle_probe_ms: Option<u64>,
    pub(super) starvation_ms: Option<u64>,
}
