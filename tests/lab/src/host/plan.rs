//! Who is in a lab, and which names and addresses they have.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Service, Vlan};

/// The file that [`LabConfig::save`] writes.
const SAVED: &str = "lab.json";

/// Says which plane is meant; a lab is made by several processes.
const PLANE: &str = "LAB_PLANE";

/// dom0d's data plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Plane {
    Pcap,
    Bpf,
}

impl Plane {
    /// Its name in dom0d's configuration and on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Plane::Pcap => "pcap",
            Plane::Bpf => "bpf",
        }
    }

    /// The one meant; without a word dom0d's own default.
    pub(crate) fn chosen() -> Option<Self> {
        let name = std::env::var(PLANE).ok()?;
        [Plane::Pcap, Plane::Bpf].into_iter().find(|plane| plane.name() == name)
    }

    /// Makes this the plane of all labs of this process and of those that it starts. A process sets its
    /// environment safely only for its successor: if it must be set, this returns only with an error.
    pub(crate) fn choose(self) -> Option<std::io::Error> {
        if Self::chosen() == Some(self) {
            return None;
        }
        let own = match std::env::current_exe() {
            Ok(own) => own,
            Err(error) => return Some(error),
        };
        let mut again = std::process::Command::new(own);
        again.args(std::env::args_os().skip(1)).env(PLANE, self.name());
        Some(std::os::unix::process::CommandExt::exec(&mut again))
    }
}

/// What a lab is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LabConfig {
    /// The instance's name, at most 4 letters or digits, prefix of everything it makes.
    pub(crate) name: String,
    /// Number of replicas, 0 to 3.
    pub(crate) replicas: usize,
    /// What runs in each domU.
    pub(crate) services: Vec<Service>,
    /// Gives hosts and PSCs IPv6 addresses besides IPv4.
    pub(crate) ipv6: bool,
    /// The VLAN that client and guests are in; else their frames have no tag.
    pub(crate) vlan: Option<Vlan>,
    /// Size of `/large.bin`, which every domU's HTTP server offers with the same contents.
    pub(crate) large_file_bytes: u64,
    /// Whether to build `dom0d` and `understudy` first (off when the caller just did).
    pub(crate) build: bool,
}

impl LabConfig {
    /// The defaults: two replicas, all services, IPv6, a 300 MB file.
    pub(crate) fn new(name: String) -> Self {
        LabConfig {
            name,
            replicas: 2,
            services: Service::ALL.to_vec(),
            ipv6: true,
            vlan: None,
            large_file_bytes: 300_000_000,
            build: true,
        }
    }

    /// What the running lab of this name was made from.
    pub(crate) fn saved(name: &str) -> Result<Self> {
        let path = directory(name).join(SAVED);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("no lab \"{name}\" is up ({} can't be read)", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))
    }

    /// Keeps it for [`LabConfig::saved`].
    pub(crate) fn save(&self) -> Result<()> {
        let path = self.directory().join(SAVED);
        fs::write(&path, serde_json::to_string_pretty(self)?)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// The lab's run-time directory.
    pub(crate) fn directory(&self) -> PathBuf {
        directory(&self.name)
    }
}

/// The run-time directory of the lab of this name.
pub(crate) fn directory(name: &str) -> PathBuf {
    PathBuf::from("/run/understudy-lab").join(name)
}

/// Where a lab's bpffs is, which its hosts see where every host has it: what is pinned there ends with the lab.
pub(super) fn bpffs(name: &str) -> PathBuf {
    directory(name).join("bpf")
}

/// The instance that the environment variable `LAB_NAME` names, or `us`.
pub(crate) fn instance_name() -> Result<String> {
    let name = std::env::var("LAB_NAME").unwrap_or_else(|_| "us".to_owned());
    ensure!(
        (1..=4).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_alphanumeric()),
        "LAB_NAME is \"{name}\": it must be 1 to 4 letters or digits, since interfaces are named after it"
    );
    Ok(name)
}

/// Last part of the client's addresses.
pub(crate) const CLIENT_LAST: u8 = 1;
/// Last part of the addresses of dom0's own kernel on the bridge.
pub(crate) const DOM0_LAST: u8 = 2;
/// Most replicas of a lab.
pub(crate) const REPLICAS_MAX: usize = 3;

/// Addresses of the domU at a place, counted from 1.
pub(crate) fn guest_addresses(place: usize, ipv6: bool) -> Vec<IpAddr> {
    let last = u8::try_from(10 + place).unwrap_or(u8::MAX);
    lab_addresses(last, ipv6)
}

/// Virtual addresses of a service: 10.77.0.100 + n and fd77::100 + n.
pub(crate) fn psc_addresses(service: Service, ipv6: bool) -> Vec<IpAddr> {
    let offset = service.psc_offset();
    let mut all = vec![IpAddr::V4(Ipv4Addr::new(10, 77, 0, 100 + offset))];
    if ipv6 {
        all.push(IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x100 + u16::from(offset))));
    }
    all
}

/// 10.77.0.N and, read as decimal digits, fd77::N.
pub(crate) fn lab_addresses(last: u8, ipv6: bool) -> Vec<IpAddr> {
    let mut all = vec![IpAddr::V4(Ipv4Addr::new(10, 77, 0, last))];
    if ipv6 && let Ok(digits) = u16::from_str_radix(&last.to_string(), 16) {
        all.push(IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, digits)));
    }
    all
}

/// The frontend's MAC of the domain at a place, in Xen's range.
pub(crate) fn guest_mac(place: usize) -> String {
    format!("00:16:3e:77:01:{:02x}", place & 0xff)
}

/// Name of the domain at a place, counted from 1.
pub(crate) fn domain_name(place: usize) -> String {
    format!("guest-{place}")
}

/// One `[[service]]` per service, `guest-1` as OVM, the others as RVMs that are given as identical.
pub(crate) fn default_config(config: &LabConfig) -> String {
    use std::fmt::Write as _;

    let mut toml = String::new();
    let rvms: Vec<String> = (2..=config.replicas + 1).map(domain_name).collect();
    for &service in &config.services {
        let psc: Vec<String> = psc_addresses(service, config.ipv6).iter().map(IpAddr::to_string).collect();
        // Writing to a String does not fail.
        let _ = writeln!(
            toml,
            "[[service]]\nname = \"{}\"\npsc = {psc:?}\nports = [{}]\nbridge = \"xenbr0\"\n\
             ovm = \"{}\"\nrvms = {rvms:?}\nattach = \"assume-identical\"",
            service.name(),
            service.port(),
            domain_name(1),
        );
        if let Some(plane) = Plane::chosen() {
            let _ = writeln!(toml, "plane = \"{}\"", plane.name());
        }
        if let Some(vlan) = config.vlan {
            let _ = writeln!(toml, "vlan = {}", vlan.id);
        }
        match service {
            Service::Redis => {}
            Service::Http => toml.push_str("masks = [\"http-date\"]\n"),
            Service::Postgresql => toml.push_str("masks = [\"postgresql-backend-key\"]\n"),
        }
        toml.push('\n');
    }
    toml
}
