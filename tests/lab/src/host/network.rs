//! Namespaces, the bridge, and the veth pairs that stand for uplink and vifs.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::plan::{CLIENT_LAST, DOM0_LAST, LabConfig, lab_addresses};
use super::{Host, Vlan};

/// The bridge in dom0.
pub(crate) const BRIDGE: &str = "xenbr0";
/// The bridge's port to the client.
pub(crate) const UPLINK: &str = "uplink";
/// What every interface of a host but dom0 is called.
pub(crate) const GUEST_INTERFACE: &str = "eth0";

/// Makes dom0 with its bridge, and the client on it.
pub(crate) fn make_dom0_and_client(config: &LabConfig, dom0: &Host, client: &Host) -> Result<()> {
    make_namespace(dom0)?;
    make_namespace(client)?;
    dom0.enter(keep_bridge_from_netfilter)??;
    let filtering = if config.vlan.is_some_and(|vlan| vlan.filtered) { " vlan_filtering 1" } else { "" };
    ip(&format!(
        "link add {BRIDGE} netns {dom0} type bridge stp_state 0 forward_delay 0{filtering}\n\
         link add {UPLINK} netns {dom0} type veth peer name {GUEST_INTERFACE} netns {client}\n",
        dom0 = dom0.netns,
        client = client.netns,
    ))?;
    let mut script = format!(
        "link set {UPLINK} address 00:16:3e:77:00:fe\n\
         link set {UPLINK} master {BRIDGE}\nlink set {UPLINK} up\nlink set {BRIDGE} up\n"
    );
    script.push_str(&addresses(BRIDGE, &lab_addresses(DOM0_LAST, config.ipv6)));
    ip_inside(dom0, &script)?;
    let mut script =
        format!("link set {GUEST_INTERFACE} address 00:16:3e:77:00:01\nlink set {GUEST_INTERFACE} up\n");
    script.push_str(&addresses(GUEST_INTERFACE, &lab_addresses(CLIENT_LAST, config.ipv6)));
    ip_inside(client, &script)?;
    if let Some(vlan) = config.vlan {
        vlan.admit(dom0, UPLINK)?;
        vlan.put_on(client, &config.directory())?;
    }
    Ok(())
}

/// Makes a domU's namespace and interface, and its vif in dom0, not yet on the bridge.
pub(crate) fn make_guest(
    config: &LabConfig,
    dom0: &Host,
    guest: &Host,
    vif: &str,
    mac: &str,
    own_addresses: &[IpAddr],
) -> Result<()> {
    make_namespace(guest)?;
    ip(&format!(
        "link add {vif} netns {dom0} type veth peer name {GUEST_INTERFACE} netns {guest}\n",
        dom0 = dom0.netns,
        guest = guest.netns,
    ))?;
    let mut script = format!("link set {GUEST_INTERFACE} address {mac}\nlink set {GUEST_INTERFACE} up\n");
    script.push_str(&addresses(GUEST_INTERFACE, own_addresses));
    ip_inside(guest, &script)?;
    if let Some(vlan) = config.vlan {
        vlan.put_on(guest, &config.directory())?;
    }
    // As Xen's vif-bridge script does it.
    dom0.enter(|| set("net/ipv6/conf", vif, "disable_ipv6", "1"))??;
    ip_inside(dom0, &format!("link set {vif} address fe:ff:ff:ff:ff:ff arp off\n"))
}

/// Makes a vif a port of the bridge, and up.
pub(crate) fn plug(dom0: &Host, vif: &str, vlan: Option<Vlan>) -> Result<()> {
    ip_inside(dom0, &format!("link set {vif} master {BRIDGE}\nlink set {vif} up\n"))?;
    vlan.map_or(Ok(()), |vlan| vlan.admit(dom0, vif))
}

/// Removes a vif, and with it the guest's interface. Nothing there is no error.
pub(crate) fn unplug(dom0: &Host, vif: &str) -> Result<()> {
    let present = dom0.enter(|| Path::new("/proc/sys/net/ipv4/conf").join(vif).exists())?;
    if present { ip_inside(dom0, &format!("link del {vif}\n")) } else { Ok(()) }
}

/// Removes a host's namespace. Nothing there is no error.
pub(crate) fn remove_namespace(netns: &str) -> Result<()> {
    if !Path::new("/run/netns").join(netns).exists() {
        return Ok(());
    }
    ip(&format!("netns del {netns}\n"))
}

fn make_namespace(host: &Host) -> Result<()> {
    ip(&format!("netns add {}\n", host.netns))?;
    // Addresses are usable at once, and nobody asks for routers that do not exist.
    host.enter(|| {
        for device in ["all", "default"] {
            set("net/ipv6/conf", device, "accept_dad", "0")?;
            set("net/ipv6/conf", device, "dad_transmits", "0")?;
            set("net/ipv6/conf", device, "router_solicitations", "0")?;
        }
        Ok::<_, anyhow::Error>(())
    })??;
    ip_inside(host, "link set lo up\n")
}

/// Debian's dom0 has br_netfilter as a module that nothing loads; where the kernel has it built in,
/// a new namespace starts with it on.
fn keep_bridge_from_netfilter() -> Result<()> {
    for tables in ["arptables", "iptables", "ip6tables"] {
        let path = Path::new("/proc/sys/net/bridge").join(format!("bridge-nf-call-{tables}"));
        if path.exists() {
            fs::write(&path, "0").with_context(|| format!("writing {}", path.display()))?;
        }
    }
    Ok(())
}

fn set(tree: &str, device: &str, key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys").join(tree).join(device).join(key);
    fs::write(&path, value).with_context(|| format!("writing {}", path.display()))
}

fn addresses(device: &str, addresses: &[IpAddr]) -> String {
    addresses
        .iter()
        .map(|address| match address {
            IpAddr::V4(v4) => format!("addr add {v4}/24 dev {device}\n"),
            IpAddr::V6(v6) => format!("addr add {v6}/64 dev {device} nodad\n"),
        })
        .collect()
}

fn ip(script: &str) -> Result<()> {
    ip_batch(&[], script)
}

fn ip_inside(host: &Host, script: &str) -> Result<()> {
    ip_batch(&["-n", &host.netns], script)
}

/// `ip -batch`: one process for many steps, which stops at the first that fails.
fn ip_batch(options: &[&str], script: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting ip (package iproute2)")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).context("writing to ip")?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "ip {} failed: {}\nin:\n{script}",
            options.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
