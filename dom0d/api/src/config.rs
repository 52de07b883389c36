//! The configuration file `/etc/understudy/dom0d.toml`: its keys, their defaults, and what makes one wrong.
//!
//! dom0d and `understudy check-config` read it through the same code, so that what the check passes
//! the daemon takes. Names of domains are not looked up here: a domain may be created later.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use understudy_protocol::{CandidatePolicy, LagPolicy, Limits, Mask, ServiceConfig, Timing};
use uuid::Uuid;

/// Where the configuration is looked for when nothing else is said.
pub const DEFAULT_PATH: &str = "/etc/understudy/dom0d.toml";

/// Where the control socket is when the configuration does not say.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/understudy/control.sock";

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
    /// What the protocol engine must know: name, addresses, ports, policies, limits.
    pub engine: ServiceConfig,
    /// The MAC that answers for the PSC: unicast.
    pub psc_mac: [u8; 6],
    /// How packets get to and from the engine.
    pub plane: Plane,
    /// On the `bpf` plane: how long the daemon may be silent before `on_daemon_loss` counts.
    pub daemon_grace: Duration,
    /// On the `bpf` plane: what becomes of open conversations when the daemon is gone and nothing can be recorded
    /// any more.
    pub on_daemon_loss: OnDaemonLoss,
    /// The bridge that the PSC lives on; the OVM's vif tells when it is not given.
    pub bridge: Option<String>,
    /// The domain that serves first.
    pub ovm: Selector,
    /// The domains that replicate it.
    pub rvms: Vec<Selector>,
    /// How a deposed OVM is silenced beyond the data path's own fence.
    pub fence: Fence,
    /// What a matching domain that appears for the first time is taken for.
    pub attach: AttachAs,
    /// How long a pause that nobody announced is excused.
    pub pause_grace: Duration,
    /// How long an announced pause, a save or a migration is excused.
    pub maintenance_limit: Duration,
    /// What a toolstack's request to shut the OVM down triggers.
    pub on_shutdown_request: OnShutdownRequest,
    /// Traffic that an RVM may send by itself.
    pub allow: Vec<Allowed>,
    /// Guest addresses, where the toolstack's `ip=` does not give them; the first match counts.
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

    /// Whether the domain of that name and UUID is meant.
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

/// Matches greedily with one point of return, so that no pattern costs more than |pattern| × |name|.
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

/// How a deposed OVM is silenced, beyond the fence that the data path is from the cutover on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fence {
    /// Its domain is paused, and can be examined and resumed.
    #[default]
    Pause,
    /// Its domain is destroyed.
    Destroy,
    /// Its domain goes on; everything it sends is dropped at its vif.
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
    /// Everything goes through the daemon, by libpcap.
    #[default]
    Pcap,
    /// The kernel passes what it can between clients and OVM, by tc programs; needs kernel 6.1.
    Bpf,
}

/// What becomes of open conversations when the daemon is gone and nothing can be recorded any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnDaemonLoss {
    /// They go on, and RVMs become stale.
    #[default]
    Serve,
    /// They stop until the daemon is back.
    Protect,
}

/// What a matching domain is taken for when it appears for the first time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachAs {
    /// A replica of unknown state: fed, and promotable once an operator states that it is identical.
    #[default]
    Known,
    /// A replica whose state equals the OVM's, by the operator's standing word. Only at a domain's
    /// first appearance, and only until the service has served its first client; one that comes later,
    /// rebooted, was evicted or deposed has missed something and needs a statement of its own.
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
    /// It is not TOML, or has keys or types that do not belong there; says the line.
    #[error("{0}")]
    Syntax(Box<toml::de::Error>),
    /// It contradicts itself.
    #[error("{}", join(.0))]
    Invalid(Vec<Problem>),
}

fn join(problems: &[Problem]) -> String {
    let lines: Vec<_> = problems.iter().map(Problem::to_string).collect();
    lines.join("\n")
}

/// One thing that is wrong in a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The service, by name or, if it has none, by its place (`#2`); `None` for the file as a whole.
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    control_socket: Option<PathBuf>,
    liveness_poll_ms: Option<u64>,
    capture_buffer_mib: Option<u32>,
    #[serde(default, rename = "service")]
    services: Vec<RawService>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawService {
    name: String,
    psc: OneOrMany,
    ports: Vec<u16>,
    bridge: Option<String>,
    ovm: String,
    #[serde(default)]
    rvms: OneOrMany,
    psc_mac: Option<String>,
    #[serde(default)]
    plane: Plane,
    daemon_grace_ms: Option<u64>,
    #[serde(default)]
    on_daemon_loss: OnDaemonLoss,
    #[serde(default)]
    fence: Fence,
    #[serde(default)]
    candidate: CandidatePolicy,
    #[serde(default)]
    on_lag: LagPolicy,
    #[serde(default)]
    masks: Vec<RawMask>,
    #[serde(default)]
    attach: AttachAs,
    pause_grace_ms: Option<u64>,
    maintenance_limit_ms: Option<u64>,
    #[serde(default)]
    on_shutdown_request: OnShutdownRequest,
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    timing: RawTiming,
    #[serde(default)]
    addresses: BTreeMap<String, OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl OneOrMany {
    fn as_slice(&self) -> &[String] {
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
enum RawMask {
    Preset(MaskPreset),
    Pattern(RawPattern),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum MaskPreset {
    HttpDate,
    PostgresqlBackendKey,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPattern {
    prefix: RawPrefix,
    length: u16,
}

/// Text, or bytes where text can't say it.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of byte values")]
enum RawPrefix {
    Text(String),
    Bytes(Vec<u8>),
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct RawTiming {
    unacked_limit_ms: Option<u64>,
    progress_limit_ms: Option<u64>,
    close_hold_ms: Option<u64>,
    lag_limit_ms: Option<u64>,
    promotion_window_ms: Option<u64>,
    linger_ms: Option<u64>,
    idle_probe_ms: Option<u64>,
    starvation_ms: Option<u64>,
}

/// Longest wait that a configuration may name: a day.
const LONGEST_WAIT_MS: u64 = 86_400_000;

/// Default of `maintenance_limit_ms`: a live save of a small guest with some reserve.
const DEFAULT_MAINTENANCE_LIMIT: Duration = Duration::from_secs(30);
const DEFAULT_DAEMON_GRACE: Duration = Duration::from_secs(5);

/// Default of `capture_buffer_mib`. libpcap gives every frame a slot for the longest frame (64 KiB), so
/// this is 512 frames.
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

/// Collects what is wrong, so that an operator sees all of it at once.
#[derive(Default)]
struct Problems {
    found: Vec<Problem>,
    service: Option<String>,
}

impl Problems {
    fn file(&mut self, key: &'static str, message: impl Into<String>) {
        self.found.push(Problem { service: None, key, message: message.into() });
    }

    fn at(&mut self, key: &'static str, message: impl Into<String>) {
        self.found.push(Problem { service: self.service.clone(), key, message: message.into() });
    }

    fn service(&mut self, index: usize, raw: RawService) -> Service {
        let named = is_service_name(&raw.name);
        self.service = Some(if named { raw.name.clone() } else { format!("#{}", index + 1) });
        if !named {
            self.at(
                "name",
                format!(
                    "{:?} is no service name; use 1 to 40 of letters, digits, '.', '_' and '-'",
                    raw.name
                ),
            );
        }

        let psc = self.psc(raw.psc.as_slice());
        self.ports(&raw.ports);
        let psc_mac = match &raw.psc_mac {
            Some(text) => self.mac(text),
            None => psc.first().map_or([0; 6], |&address| psc_mac(address)),
        };
        if let Some(bridge) = &raw.bridge
            && !is_interface_name(bridge)
        {
            self.at(
                "bridge",
                format!("{bridge:?} is no interface name (1 to 15 characters, no '/' or space)"),
            );
        }
        let ovm = self.selector("ovm", &raw.ovm);
        let rvms = self.rvms(&ovm, raw.rvms.as_slice());
        let addresses = self.addresses(&psc, raw.addresses);
        let allow = raw.allow.iter().filter_map(|text| {
            let allowed = text.parse().ok();
            if allowed.is_none() {
                self.at("allow", format!("{text:?} is none of \"dhcp\", \"udp/PORT\", \"tcp/PORT\""));
            }
            allowed
        });
        let allow = allow.collect();
        let masks = raw.masks.into_iter().map(|mask| self.mask(mask)).collect();
        self.limits(&raw.limits);
        let service = Service {
            psc_mac,
            plane: raw.plane,
            daemon_grace: self.wait("daemon_grace_ms", raw.daemon_grace_ms, DEFAULT_DAEMON_GRACE, 1),
            on_daemon_loss: raw.on_daemon_loss,
            bridge: raw.bridge,
            ovm,
            rvms,
            fence: raw.fence,
            attach: raw.attach,
            pause_grace: self.wait("pause_grace_ms", raw.pause_grace_ms, Duration::ZERO, 0),
            maintenance_limit: self.wait(
                "maintenance_limit_ms",
                raw.maintenance_limit_ms,
                DEFAULT_MAINTENANCE_LIMIT,
                0,
            ),
            on_shutdown_request: raw.on_shutdown_request,
            allow,
            addresses,
            engine: ServiceConfig {
                limits: raw.limits,
                timing: self.timing(&raw.timing),
                candidate: raw.candidate,
                on_lag: raw.on_lag,
                masks,
                ..ServiceConfig::new(raw.name, psc, raw.ports)
            },
        };
        self.service = None;
        service
    }

    fn psc(&mut self, texts: &[String]) -> Vec<IpAddr> {
        let psc = self.parse_addresses("psc", texts);
        if texts.is_empty() {
            self.at("psc", "names no address; give an IPv4 address, an IPv6 address or one of each");
        }
        for (family, v4) in [("IPv4", true), ("IPv6", false)] {
            if psc.iter().filter(|address| address.is_ipv4() == v4).count() > 1 {
                self.at("psc", format!("has two {family} addresses; a service has at most one per family, make two services of it"));
            }
        }
        psc
    }

    fn parse_addresses(&mut self, key: &'static str, texts: &[String]) -> Vec<IpAddr> {
        let mut addresses = Vec::with_capacity(texts.len());
        for text in texts {
            match text.parse::<IpAddr>() {
                Ok(address) if is_host(address) => addresses.push(address),
                Ok(_) => self.at(
                    key,
                    format!("{text} is not the address of a host (unspecified, loopback, link-local, multicast or broadcast)"),
                ),
                Err(_) => self.at(key, format!("{text:?} is no IP address (without a prefix length)")),
            }
        }
        addresses
    }

    fn ports(&mut self, ports: &[u16]) {
        if ports.is_empty() {
            self.at("ports", "is empty; name the service's TCP ports");
        }
        if ports.contains(&0) {
            self.at("ports", "0 is no TCP port");
        }
        let distinct: BTreeSet<_> = ports.iter().collect();
        if distinct.len() < ports.len() {
            self.at("ports", "names a port twice");
        }
    }

    fn mac(&mut self, text: &str) -> [u8; 6] {
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        let complete = mac.iter_mut().all(|byte| {
            let part = parts.next().filter(|part| part.len() == 2);
            match part.and_then(|part| u8::from_str_radix(part, 16).ok()) {
                Some(value) => {
                    *byte = value;
                    true
                }
                None => false,
            }
        });
        if !complete || parts.next().is_some() || mac[0] & 1 == 1 || mac == [0; 6] {
            self.at("psc_mac", format!("{text:?} is no unicast MAC address, as 02:00:00:00:00:01 is"));
        }
        mac
    }

    fn selector(&mut self, key: &'static str, text: &str) -> Selector {
        if text.trim().is_empty() {
            self.at(key, "is empty; give a domain's name, UUID or a name pattern");
        }
        Selector::new(text)
    }

    fn rvms(&mut self, ovm: &Selector, texts: &[String]) -> Vec<Selector> {
        let mut rvms: Vec<Selector> = Vec::with_capacity(texts.len());
        for text in texts {
            let selector = self.selector("rvms", text);
            if !selector.is_pattern() && selector == *ovm {
                self.at(
                    "rvms",
                    format!("{text} is the service's `ovm` too; a domain can't replicate itself"),
                );
            }
            if rvms.contains(&selector) {
                self.at("rvms", format!("{text} is named twice"));
            }
            rvms.push(selector);
        }
        rvms
    }

    fn addresses(
        &mut self,
        psc: &[IpAddr],
        raw: BTreeMap<String, OneOrMany>,
    ) -> Vec<(Selector, Vec<IpAddr>)> {
        let mut all = Vec::with_capacity(raw.len());
        let mut seen = BTreeMap::new();
        for (domain, texts) in raw {
            let selector = self.selector("addresses", &domain);
            let addresses = self.parse_addresses("addresses", texts.as_slice());
            if texts.as_slice().is_empty() {
                self.at("addresses", format!("{domain} is given none"));
            }
            if selector.is_pattern() {
                self.at(
                    "addresses",
                    format!("{domain} is a pattern; domains can't share an address, name each"),
                );
            }
            for &address in &addresses {
                if psc.contains(&address) {
                    self.at("addresses", format!("{address} of {domain} is the service's PSC; the PSC is dom0d's alone, give the guest an address of its own"));
                }
                if let Some(other) = seen.insert(address, domain.clone()) {
                    self.at("addresses", format!("{address} is given to {other} and to {domain}"));
                }
            }
            for (family, v4) in [("IPv4", true), ("IPv6", false)] {
                if addresses.iter().filter(|a| a.is_ipv4() == v4).count() > 1 {
                    self.at(
                        "addresses",
                        format!(
                            "{domain} has two {family} addresses; name the one that the service listens on"
                        ),
                    );
                }
            }
            all.push((selector, addresses));
        }
        all
    }

    fn mask(&mut self, raw: RawMask) -> Mask {
        match raw {
            RawMask::Preset(MaskPreset::HttpDate) => Mask::http_date(),
            RawMask::Preset(MaskPreset::PostgresqlBackendKey) => Mask::postgresql_backend_key(),
            RawMask::Pattern(pattern) => {
                let prefix = match pattern.prefix {
                    RawPrefix::Text(text) => text.into_bytes(),
                    RawPrefix::Bytes(bytes) => bytes,
                };
                if !(1..=64).contains(&prefix.len()) {
                    self.at("masks", format!("a prefix has {} bytes; it must have 1 to 64", prefix.len()));
                }
                if !(1..=256).contains(&pattern.length) {
                    self.at(
                        "masks",
                        format!("a length is {}; it must lie between 1 and 256", pattern.length),
                    );
                }
                Mask { prefix, length: pattern.length }
            }
        }
    }

    fn limits(&mut self, limits: &Limits) {
        let named = [
            ("conversations", u64::from(limits.conversations)),
            ("embryonic", u64::from(limits.embryonic)),
            ("conversation_bytes", u64::from(limits.conversation_bytes)),
            ("retained_bytes", limits.retained_bytes),
            ("lag_bytes", limits.lag_bytes),
            ("inflight_bytes", u64::from(limits.inflight_bytes)),
            ("order_entries", u64::from(limits.order_entries)),
            ("resets_per_ms", u64::from(limits.resets_per_ms)),
            ("promotions", u64::from(limits.promotions)),
            ("events", u64::from(limits.events)),
        ];
        for (name, value) in named {
            if value == 0 {
                self.at("limits", format!("{name} is 0, which lets nothing through"));
            }
        }
    }

    fn wait(&mut self, key: &'static str, ms: Option<u64>, default: Duration, least: u64) -> Duration {
        match ms {
            None => default,
            Some(ms) => {
                if !(least..=LONGEST_WAIT_MS).contains(&ms) {
                    self.at(key, format!("is {ms}; it must lie between {least} and {LONGEST_WAIT_MS} ms"));
                }
                Duration::from_millis(ms)
            }
        }
    }

    fn timing(&mut self, raw: &RawTiming) -> Timing {
        let default = Timing::default();
        Timing {
            unacked_limit: self.wait(
                "timing.unacked_limit_ms",
                raw.unacked_limit_ms,
                default.unacked_limit,
                1,
            ),
            progress_limit: self.wait(
                "timing.progress_limit_ms",
                raw.progress_limit_ms,
                default.progress_limit,
                1,
            ),
            close_hold: self.wait("timing.close_hold_ms", raw.close_hold_ms, default.close_hold, 0),
            lag_limit: self.wait("timing.lag_limit_ms", raw.lag_limit_ms, default.lag_limit, 1),
            promotion_window: self.wait(
                "timing.promotion_window_ms",
                raw.promotion_window_ms,
                default.promotion_window,
                0,
            ),
            linger: self.wait("timing.linger_ms", raw.linger_ms, default.linger, 1),
            idle_probe: self.wait("timing.idle_probe_ms", raw.idle_probe_ms, default.idle_probe, 1_000),
            starvation: self.wait("timing.starvation_ms", raw.starvation_ms, default.starvation, 5),
        }
    }

    /// What is wrong between services.
    fn between(&mut self, services: &[Service]) {
        let mut names = BTreeSet::new();
        let mut pscs: BTreeMap<IpAddr, &str> = BTreeMap::new();
        let mut macs: BTreeMap<[u8; 6], &str> = BTreeMap::new();
        for service in services {
            let name = service.engine.name.as_str();
            self.service = Some(name.to_owned());
            if !names.insert(name) {
                self.at("name", "two services have this name");
            }
            for &address in &service.engine.psc {
                if let Some(other) = pscs.insert(address, name) {
                    self.at("psc", format!("{address} is the PSC of service {other} too; one PSC has one service, put the ports into one or use two addresses"));
                }
            }
            if let Some(other) = macs.insert(service.psc_mac, name)
                && !service.engine.psc.is_empty()
            {
                self.at("psc_mac", format!("service {other} has the same MAC"));
            }
        }
        for service in services {
            self.service = Some(service.engine.name.clone());
            for (domain, addresses) in &service.addresses {
                for address in addresses {
                    // Within one service the clash has been named already.
                    if let Some(other) = pscs.get(address)
                        && *other != service.engine.name
                    {
                        self.at("addresses", format!("{address} of {domain} is the PSC of service {other}"));
                    }
                }
            }
        }
        self.service = None;
    }
}

/// The MAC of a PSC whose configuration names none: locally administered, and the same in every run, so
/// that clients' ARP caches stay true over a restart.
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

fn is_service_name(name: &str) -> bool {
    (1..=40).contains(&name.len())
        && name.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-'))
}

/// The kernel's rule (dev_valid_name).
fn is_interface_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
}

fn is_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            !(v4.is_unspecified()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_broadcast())
        }
        IpAddr::V6(v6) => {
            !(v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unicast_link_local()
                || v6.to_ipv4_mapped().is_some())
        }
    }
}

#[cfg(test)]
mod tests;
