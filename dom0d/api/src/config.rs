//! The configuration file `/etc/understudy/dom0d.toml`: its keys, their defaults, and what makes it invalid.
//!
//! dom0d and `understudy check-config` read it with the same code: what the check accepts, the daemon
//! accepts. Names of domains are not looked up here: a domain may be created later.

mod check;
mod file;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_protocol::{MAX_SERVERS, ServiceConfig};
use uuid::Uuid;

use check::Problems;
use file::RawConfig;

/// Where the configuration is, unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/understudy/dom0d.toml";

/// Where the control socket is, unless the configuration says otherwise.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/understudy/control.sock";

/// Most replicas of a service: with its OVM, a queue holds [`MAX_SERVERS`] servers.
pub const MAX_REPLICAS: usize = MAX_SERVERS - 1;

/// A configuration that has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where the control API listens.
    pub control_socket: PathBuf,
    /// How often the domains' states are read from the hypervisor.
    pub liveness_poll: Duration,
    /// Memory for captured frames per device, in bytes.
    pub capture_buffer: u32,
    /// The services, in the file's order; at least one.
    pub services: Vec<Service>,
}

/// One service: a PSC and the domains behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The protocol engine's part: name, addresses, ports, policies, limits.
    pub engine: ServiceConfig,
    /// The MAC that answers for the PSC: unicast.
    pub psc_mac: [u8; 6],
    /// How packets get to and from the engine.
    pub plane: Plane,
    /// On the `bpf` plane: how long the daemon may be silent before `on_daemon_loss` applies.
    pub daemon_grace: Duration,
    /// On the `bpf` plane: what happens to conversations once the daemon is gone and nothing can be recorded.
    pub on_daemon_loss: OnDaemonLoss,
    /// The PSC's bridge; if not given, that of the domains' vifs.
    pub bridge: Option<String>,
    /// The VLAN (IEEE 802.1Q) that the service's frames are tagged with at the bridge's ports: 1 to 4094; `None` if
    /// they have no tag.
    pub vlan: Option<u16>,
    /// The domain that serves first.
    pub ovm: Selector,
    /// The domains that replicate it: at most [`MAX_REPLICAS`] at a time.
    pub rvms: Vec<Selector>,
    /// How a deposed OVM is silenced, beyond the data path's own fence.
    pub fence: Fence,
    /// What dom0d assumes of a matching domain that appears for the first time.
    pub attach: AttachAs,
    /// How long a pause that nobody announced is excused.
    pub pause_grace: Duration,
    /// How long an announced pause, a save or a migration is excused.
    pub maintenance_limit: Duration,
    /// What a toolstack's request to shut the OVM down triggers.
    pub on_shutdown_request: OnShutdownRequest,
    /// Traffic that an RVM may send by itself.
    pub allow: Vec<Allowed>,
    /// What follows if an RVM opens a TCP connection of its own that `allow` does not name.
    pub own_connections: OwnConnections,
    /// What happens to frames for a server's own address at a port of the service.
    pub direct: Direct,
    /// The guests' own addresses, if the toolstack's `ip=` does not give them; the first match counts.
    pub addresses: Vec<(Selector, Vec<IpAddr>)>,
}

/// Names domains: by UUID, by name, or by a pattern in which `*` stands for any text and `?` for one character.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Selector {
    /// The domain with this UUID.
    Uuid(Uuid),
    /// Every domain with a name like this.
    Name(String),
}

impl Selector {
    /// Reads a selector; anything that is not a UUID in the usual form with hyphens is a name.
    pub fn new(text: &str) -> Self {
        match Uuid::try_parse(text) {
            Ok(uuid) if text.len() == 36 => Self::Uuid(uuid),
            _ => Self::Name(text.to_owned()),
        }
    }

    /// Whether it means the domain of that name and UUID.
    pub fn matches(&self, name: &str, uuid: Uuid) -> bool {
        match self {
            Self::Uuid(wanted) => *wanted == uuid,
            Self::Name(pattern) => name_matches(pattern.as_bytes(), name.as_bytes()),
        }
    }

    /// Whether it can mean more than one domain.
    pub fn is_pattern(&self) -> bool {
        matches!(self, Self::Name(name) if name.contains(['*', '?']))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uuid(uuid) => uuid.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Matches greedily and returns to the last `*` only, so that no pattern costs more than |pattern| × |name|.
fn name_matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, eaten)) => {
                    star = Some((at, eaten + 1));
                    p = at + 1;
                    n = eaten + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

/// How a deposed OVM is silenced, beyond the data path's fence, which holds from the cutover on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fence {
    /// Its domain is paused, and can be examined and resumed.
    #[default]
    Pause,
    /// Its domain is destroyed.
    Destroy,
    /// Its domain continues to run; everything that it sends is dropped at its vif.
    Isolate,
}

impl Fence {
    /// Its name in the configuration and in events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Destroy => "destroy",
            Self::Isolate => "isolate",
        }
    }
}

/// A data plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Plane {
    /// Every packet goes through the daemon, by libpcap.
    Pcap,
    /// The kernel passes what it can between clients and OVM, by tc programs. Kernels before 6.1 can't; dom0d then takes
    /// [`Plane::Pcap`].
    #[default]
    Bpf,
}

/// What happens to conversations once the daemon is gone and nothing can be recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDaemonLoss {
    /// They continue, and RVMs become stale.
    #[default]
    Serve,
    /// They stop until the daemon is back.
    Protect,
}

/// What dom0d assumes of a matching domain that appears for the first time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachAs {
    /// It is a replica of unknown state: fed, and promotable once an operator attaches it.
    #[default]
    Known,
    /// It is a replica whose state equals the OVM's, as the operator states here. This holds at a domain's
    /// first appearance and until the service has served its first client. A domain that comes later,
    /// rebooted, was evicted or deposed has missed something, and must be attached.
    AssumeIdentical,
}

/// What a toolstack's request to shut the OVM down triggers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnShutdownRequest {
    /// Nothing.
    #[default]
    None,
    /// A switchover to the best promotable RVM, if there is one.
    Switchover,
}

/// What follows if an RVM opens a TCP connection of its own, which is dropped. A service that opens connections (a proxy,
/// a pool of database connections) answers differently without them, and repeats its requests once it is promoted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnConnections {
    /// dom0d does not promote the RVM unasked.
    #[default]
    Refuse,
    /// Nothing: the operator states that these connections have nothing to do with the service.
    Tolerate,
}

/// What happens to frames for a server's own address at a port of the service: by these a client could change one server
/// without the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direct {
    /// They are dropped on every bridge of dom0 and counted, frames of dom0 itself included.
    #[default]
    Drop,
    /// They pass, unprotected, and may make replicas stale.
    Allow,
}

/// Traffic that an RVM may send by itself, in the file `"dhcp"`, `"udp/PORT"` or `"tcp/PORT"` (of the destination).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// DHCP and DHCPv6 of a client.
    Dhcp,
    /// UDP to this port.
    Udp(u16),
    /// TCP to this port.
    Tcp(u16),
}

impl FromStr for Allowed {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let port = |text: &str| text.parse().ok().filter(|&port: &u16| port != 0).ok_or(());
        match text.split_once('/') {
            None if text == "dhcp" => Ok(Self::Dhcp),
            Some(("udp", number)) => Ok(Self::Udp(port(number)?)),
            Some(("tcp", number)) => Ok(Self::Tcp(port(number)?)),
            _ => Err(()),
        }
    }
}

/// Why a configuration is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read the configuration {}: {error}; name another file with --config", .path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// It is not TOML, or has an unknown key or a wrong type; the message has the line.
    #[error("{0}")]
    Syntax(Box<toml::de::Error>),
    /// Values are out of range, or contradict each other.
    #[error("{}", join(.0))]
    Invalid(Vec<Problem>),
}

fn join(problems: &[Problem]) -> String {
    let lines: Vec<_> = problems.iter().map(Problem::to_string).collect();
    lines.join("\n")
}

/// One mistake in a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The service, by name or, if it has none, by its number in the file (`#2`); `None` for the file as a whole.
    pub service: Option<String>,
    /// The key.
    pub key: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.service {
            Some(service) => write!(f, "service {service}: {}: {}", self.key, self.message),
            None => write!(f, "{}: {}", self.key, self.message),
        }
    }
}

/// Default of `capture_buffer_mib`. libpcap keeps room for the longest frame (64 KiB) for each frame, so
/// this holds 512 frames.
const DEFAULT_CAPTURE_BUFFER_MIB: u32 = 32;

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| ConfigError::Unreadable { path: path.to_owned(), error })?;
        text.parse()
    }
}

impl FromStr for Config {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let raw: RawConfig = toml::from_str(text).map_err(|error| ConfigError::Syntax(Box::new(error)))?;
        let mut problems = Problems::default();

        let liveness_poll_ms = raw.liveness_poll_ms.unwrap_or(1);
        if !(1..=1_000).contains(&liveness_poll_ms) {
            problems.file("liveness_poll_ms", "must lie between 1 and 1000");
        }
        let capture_buffer_mib = raw.capture_buffer_mib.unwrap_or(DEFAULT_CAPTURE_BUFFER_MIB);
        if !(1..=1_024).contains(&capture_buffer_mib) {
            problems.file("capture_buffer_mib", "must lie between 1 and 1024");
        }
        if raw.services.is_empty() {
            problems.file("service", "there is none; describe each service in a [[service]] table");
        }

        let mut services = Vec::with_capacity(raw.services.len());
        for (index, raw) in raw.services.into_iter().enumerate() {
            services.push(problems.service(index, raw));
        }
        problems.between(&services);

        if !problems.found.is_empty() {
            return Err(ConfigError::Invalid(problems.found));
        }
        Ok(Self {
            control_socket: raw.control_socket.unwrap_or_else(|| DEFAULT_CONTROL_SOCKET.into()),
            liveness_poll: Duration::from_millis(liveness_poll_ms),
            capture_buffer: capture_buffer_mib << 20,
            services,
        })
    }
}

/// The MAC of a PSC whose configuration names none: locally administered, and the same in every run, so
/// that clients' ARP caches stay valid over a restart.
pub fn psc_mac(address: IpAddr) -> [u8; 6] {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, d] = v4.octets();
            [0x0a, 0x75, a, b, c, d]
        }
        IpAddr::V6(v6) => {
            // FNV-1a: stable over releases, which std's hasher is not.
            let hash = v6
                .octets()
                .iter()
                .fold(0x811c_9dc5_u32, |hash, &byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
            let [a, b, c, d] = hash.to_be_bytes();
            [0x0e, 0x75, a, b, c, d]
        }
    }
}

#[cfg(test)]
mod tests;
