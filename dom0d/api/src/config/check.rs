//! Checks a configuration, and collects every mistake in it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use understudy_protocol::{Limits, Mask, ServiceConfig, Timing};
use uuid::Uuid;

use super::file::{MaskPreset, OneOrMany, RawMask, RawPrefix, RawService, RawTiming};
use super::{MAX_REPLICAS, Problem, Selector, Service, psc_mac};

/// Longest wait that a configuration may name: a day.
const LONGEST_WAIT_MS: u64 = 86_400_000;

/// RFC 7323 §2.3.
const WIDEST_WINDOW: u32 = 1 << 30;

/// Default of `maintenance_limit_ms`: a live save of a small guest with some reserve.
const DEFAULT_MAINTENANCE_LIMIT: Duration = Duration::from_secs(30);
const DEFAULT_DAEMON_GRACE: Duration = Duration::from_secs(5);

/// Collects the mistakes, so that an operator sees all of them at once.
#[derive(Default)]
pub(super) struct Problems {
    pub(super) found: Vec<Problem>,
    service: Option<String>,
}

impl Problems {
    pub(super) fn file(&mut self, key: &'static str, message: impl Into<String>) {
        self.found.push(Problem { service: None, key, message: message.into() });
    }

    fn at(&mut self, key: &'static str, message: impl Into<String>) {
        self.found.push(Problem { service: self.service.clone(), key, message: message.into() });
    }

    pub(super) fn service(&mut self, index: usize, raw: RawService) -> Service {
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
        if let Some(vlan) = raw.vlan
            && !(1..=4_094).contains(&vlan)
        {
            self.at("vlan", format!("is {vlan}; it must lie between 1 and 4094 (no `vlan`: no tag)"));
        }
        let ovm = self.selector("ovm", &raw.ovm);
        let rvms = self.rvms(&ovm, raw.rvms.as_slice());
        let addresses = self.addresses(&psc, raw.addresses);
        for (domain, _) in &addresses {
            if !rvms.iter().chain([&ovm]).any(|selector| may_mean(selector, domain)) {
                self.at("addresses", format!("{domain} is neither `ovm` nor among the `rvms`"));
            }
        }
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
            vlan: raw.vlan,
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
            own_connections: raw.own_connections,
            direct: raw.direct,
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
        let named = rvms.iter().filter(|selector| !selector.is_pattern()).count();
        if named > MAX_REPLICAS {
            self.at("rvms", format!("names {named} domains; a service has at most {MAX_REPLICAS} replicas"));
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
            ("ahead_bytes", u64::from(limits.ahead_bytes)),
            ("retained_bytes", limits.retained_bytes),
            ("out_of_order_bytes", limits.out_of_order_bytes),
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
        if limits.ahead_bytes > WIDEST_WINDOW {
            let problem = format!("ahead_bytes is more than {WIDEST_WINDOW}, the widest window that TCP has");
            self.at("limits", problem);
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
            recover_limit: self.wait(
                "timing.recover_limit_ms",
                raw.recover_limit_ms,
                default.recover_limit,
                0,
            ),
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

    /// Checks services against each other.
    pub(super) fn between(&mut self, services: &[Service]) {
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

/// Whether a server's selector can mean a domain that is named by itself. Which name a UUID has is not known.
fn may_mean(selector: &Selector, domain: &Selector) -> bool {
    match domain {
        Selector::Uuid(_) => matches!(selector, Selector::Name(_)) || selector == domain,
        Selector::Name(name) => matches!(selector, Selector::Uuid(_)) || selector.matches(name, Uuid::nil()),
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
