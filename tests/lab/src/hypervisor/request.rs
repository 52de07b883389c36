//! What is asked of the lab's hypervisor over `hypervisor.sock`: JSON, one request or reply per line.
//!
//! dom0d uses `pause`, `unpause` and `destroy`; the rest is the lab's own.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::host::{Fault, Link, Service};

/// The socket's name in the lab's directory.
pub(crate) const SOCKET: &str = "hypervisor.sock";
/// Longest request.
pub(super) const REQUEST_MAX: u64 = 64 << 10;
/// How long a creation with all services may take on a slow machine, and so any request.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);

/// A request.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub(crate) enum Request {
    Pause { domid: u32 },
    Unpause { domid: u32 },
    Destroy { domid: u32 },
    List,
    Create { name: String },
    Rename { domain: String, new_name: String },
    Fault { fault: Fault, domain: String, service: Option<Service> },
    Thaw { domain: String },
    StartService { domain: String, service: Service },
    StopService { domain: String, service: Service },
    Link { host: String, link: Link },
    RestartXenstored { down_for: Duration },
}

/// The answer to a request.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Reply {
    pub(crate) ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// When a fault took effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) monotonic_ns: Option<u64>,
    /// All domains, or the one that was created.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) domains: Vec<Record>,
}

/// Why a domain's shutdown code says that it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Shutdown {
    Poweroff,
    Reboot,
    Crash,
}

/// A domain, as the hypervisor tells it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) place: usize,
    pub(crate) name: String,
    pub(crate) domid: u32,
    pub(crate) uuid: Uuid,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) mac: String,
    pub(crate) vif: String,
    pub(crate) paused: bool,
    pub(crate) spinning: bool,
    /// Services whose processes are stopped.
    pub(crate) hung: Vec<Service>,
    pub(crate) shutdown: Option<Shutdown>,
}

/// Asks the hypervisor of the lab in `directory`, and turns a refusal into an error.
pub(crate) fn ask(directory: &Path, request: &Request) -> Result<Reply> {
    let socket = directory.join(SOCKET);
    let mut stream = UnixStream::connect(&socket).with_context(|| {
        format!("no lab is up here (nobody answers on {}); `cargo lab up` starts one", socket.display())
    })?;
    stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).context("asking the lab's hypervisor")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("the lab's hypervisor does not answer")?;
    if answer.is_empty() {
        bail!("the lab's hypervisor ended; see {}", directory.join("log/hypervisor.log").display());
    }
    let reply: Reply = serde_json::from_str(&answer).context("the lab's hypervisor answers nonsense")?;
    if reply.ok {
        return Ok(reply);
    }
    Err(anyhow!("{}", reply.error.unwrap_or_else(|| "the lab's hypervisor refused".to_owned())))
}
