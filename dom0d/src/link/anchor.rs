//! The PSC's place on its bridge: a veth pair that dom0d makes. The anchor is a port of the bridge; at its far end dom0d
//! captures and injects.
//!
//! The far end has no addresses and another MAC than the PSC, so dom0's own kernel takes none of the
//! PSC's frames (and can't answer them with a RST). Also: what netlink says of the interfaces that vifs
//! are, since `bridge` in xenstore is only intent.

use std::io;
use std::time::Duration;

use futures_util::TryStreamExt;
use nix::errno::Errno;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::link::{
    BridgeMulticastRouterType, BridgeVlanInfoFlags, InfoKind, LinkAttribute, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{Handle, LinkBridgePort, LinkBridgeVlan, LinkUnspec, LinkVeth};

use super::device::Device;
use super::frame::{self, Content, Mac};
use super::psc::Psc;

/// Marks the interfaces that dom0d made, so that it recognises them after a crash.
const ALIAS: &str = "understudy PSC anchor";

/// Probes for the PSC's addresses before it is taken, and the wait after each (RFC 5227 asks for more;
/// this is a service's start or the return after a crash, and clients wait).
const PROBES: u32 = 3;
const PROBE_WAIT: Duration = Duration::from_millis(100);

/// An interface of dom0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// Its number.
    pub(crate) index: u32,
    /// Its name.
    pub(crate) name: String,
    /// What kind of interface it is.
    pub(crate) kind: LinkKind,
    /// The number of the interface that it is a port of.
    pub(crate) master: Option<u32>,
    /// In bytes.
    pub(crate) mtu: u32,
    /// Its alias says that dom0d made it.
    pub(crate) ours: bool,
}

/// What matters of an interface's kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LinkKind {
    /// A Linux bridge.
    Bridge,
    /// Part of Open vSwitch.
    OpenVswitch,
    /// Anything else.
    Other,
}

/// Why an anchor could not be made or an interface not be looked at.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnchorError {
    /// The kernel refused.
    #[error("can't {what}: {error}")]
    Netlink {
        /// The step that failed.
        what: String,
        /// The kernel's answer.
        error: rtnetlink::Error,
    },
    /// A setting of an interface can't be written.
    #[error("can't write {path}: {error}; mount /proc read-write for dom0d")]
    Setting {
        /// Which.
        path: String,
        /// Why.
        error: io::Error,
    },
    /// The interface vanished while it was set up.
    #[error("interface {0} vanished while it was set up; is another program removing interfaces?")]
    Vanished(String),
}

/// The two names of a PSC's veth pair: the bridge's port, and the end that dom0d captures on.
pub(crate) fn names(psc_mac: Mac) -> (String, String) {
    let hex: String = psc_mac.iter().map(|byte| format!("{byte:02x}")).collect();
    (format!("usa{hex}"), format!("usp{hex}"))
}

/// All interfaces of dom0.
pub(crate) async fn links(netlink: &Handle) -> Result<Vec<Link>, AnchorError> {
    let messages: Vec<LinkMessage> =
        refused("list the interfaces", netlink.link().get().execute().try_collect().await)?;
    Ok(messages.iter().map(link).collect())
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: LinkKind::Other,
        master: None,
        mtu: 0,
        ours: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Controller(index) if *index != 0 => link.master = Some(*index),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::IfAlias(alias) => link.ours = alias == ALIAS,
            LinkAttribute::LinkInfo(parts) => {
                for part in parts {
                    match part {
                        LinkInfo::Kind(InfoKind::Bridge) => link.kind = LinkKind::Bridge,
                        LinkInfo::Kind(InfoKind::Other(kind)) if kind == "openvswitch" => {
                            link.kind = LinkKind::OpenVswitch;
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link
}

/// Makes a PSC's veth pair with its anchor on `bridge`. Replaces a pair that a crash left.
pub(crate) async fn create(
    netlink: &Handle,
    psc_mac: Mac,
    vlan: Option<u16>,
    bridge: &Link,
) -> Result<String, AnchorError> {
    let (anchor, far) = names(psc_mac);
    remove(netlink, psc_mac).await?;
    let veth = LinkVeth::new(&anchor, &far).build();
    refused(format!("create the veth pair {anchor}"), netlink.link().add(veth).execute().await)?;
    let result = set_up(netlink, (&anchor, &far), psc_mac, vlan, bridge).await;
    if result.is_err() {
        // A half-made pair must not stay. Report the error of setting it up, not that of removing it.
        let _ = remove(netlink, psc_mac).await;
    }
    result.map(|()| far)
}

async fn set_up(
    netlink: &Handle,
    (anchor, far): (&str, &str),
    psc_mac: Mac,
    vlan: Option<u16>,
    bridge: &Link,
) -> Result<(), AnchorError> {
    // Before they are up: an interface that comes up with IPv6 sends packets at once.
    for name in [anchor, far] {
        disable_ipv6(name)?;
        let message = LinkUnspec::new_with_name(name)
            .alias(ALIAS)
            // A port with a smaller MTU would shrink its bridge's.
            .mtu(bridge.mtu)
            .arp(false)
            .build();
        refused(format!("set up {name}"), netlink.link().set(message).execute().await)?;
    }
    let message = LinkUnspec::new_with_name(anchor).controller(bridge.index).up().build();
    refused(format!("make {anchor} a port of {}", bridge.name), netlink.link().set(message).execute().await)?;
    let index = index_of(netlink, anchor).await?;
    // With a multicast querier about, a snooping bridge would keep neighbour solicitations from a port
    // that reports no groups.
    let port = LinkBridgePort::new(index).mcast_router(BridgeMulticastRouterType::Permanent).build();
    if let Err(error) = netlink.link().set_port(port).execute().await {
        tracing::warn!(port = anchor, %error, "can't make the anchor a multicast router port; where a multicast querier runs, IPv6 clients may not find the PSC");
    }
    let message = LinkUnspec::new_with_name(far).up().build();
    refused(format!("set {far} up"), netlink.link().set(message).execute().await)?;
    tie(netlink, psc_mac, vlan, index).await
}

/// Makes the bridge send frames for the PSC's MAC to its anchor, the interface with this number, in the service's VLAN.
pub(crate) async fn tie(
    netlink: &Handle,
    psc_mac: Mac,
    vlan: Option<u16>,
    index: u32,
) -> Result<(), AnchorError> {
    // The MAC is tied in the VLANs that the port is in by then.
    if let Some(vlan) = vlan {
        join(netlink, (&names(psc_mac).0, index), vlan).await?;
    }
    // Not learned: a merely static entry, too, would be moved by one frame of a guest with the PSC's MAC.
    let entry = netlink.neighbours().add_bridge(index, &psc_mac).state(NeighbourState::Noarp);
    let entry = entry.flags(NeighbourFlags::Controller | NeighbourFlags::Sticky).replace();
    refused(format!("tie the PSC's MAC to {}", names(psc_mac).0), entry.execute().await)
}

/// Makes a port a tagged member of a VLAN: a bridge that filters by VLAN requires it.
async fn join(netlink: &Handle, (port, index): (&str, u32), vlan: u16) -> Result<(), AnchorError> {
    let message = LinkBridgeVlan::new(index).vlan(vlan, BridgeVlanInfoFlags::empty()).build();
    match netlink.link().set(message).execute().await {
        // The kernel has no such bridges.
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -(Errno::EOPNOTSUPP as i32) => {
            Ok(())
        }
        result => refused(format!("make {port} a member of VLAN {vlan}"), result),
    }
}

async fn index_of(netlink: &Handle, name: &str) -> Result<u32, AnchorError> {
    let links = links(netlink).await?;
    let found = links.into_iter().find(|link| link.name == name);
    Ok(found.ok_or_else(|| AnchorError::Vanished(name.to_owned()))?.index)
}

fn disable_ipv6(interface: &str) -> Result<(), AnchorError> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match std::fs::write(&path, "1") {
        // A kernel without IPv6 has nothing to disable.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(AnchorError::Setting { path, error }),
        _ => Ok(()),
    }
}

/// Removes a PSC's veth pair; done if there is none.
pub(crate) async fn remove(netlink: &Handle, psc_mac: Mac) -> Result<(), AnchorError> {
    let (anchor, far) = names(psc_mac);
    let links = links(netlink).await?;
    // Deleting either end deletes both.
    match links.iter().find(|link| link.name == anchor || link.name == far) {
        Some(link) => delete(netlink, link).await,
        None => Ok(()),
    }
}

/// Removes from all interfaces the programs that any dom0d attached, except those of the services with these MACs.
/// Returns the interfaces that had any.
pub(crate) async fn remove_programs(netlink: &Handle, kept: &[Mac]) -> Result<Vec<String>, AnchorError> {
    let kept: Vec<u32> = kept.iter().map(|&mac| understudy_bpf::number(mac)).collect();
    let mut found = Vec::new();
    for link in links(netlink).await? {
        for is_ingress in [true, false] {
            for (priority, number) in filters(netlink, &link, is_ingress).await?.iter().filter_map(program) {
                // Each dom0d attaches its own containment program.
                if priority != understudy_bpf::PRIORITY || !kept.contains(&number) {
                    understudy_bpf::take_off(&link.name, is_ingress, priority, number);
                    found.push(link.name.clone());
                }
            }
        }
    }
    found.dedup();
    Ok(found)
}

/// Priority and number of a program that a dom0d attached to an interface; `None` if the filter is not dom0d's.
fn program(filter: &TcMessage) -> Option<(u16, u32)> {
    let number = (u32::from(filter.header.handle.major) << 16) | u32::from(filter.header.handle.minor);
    let is_bpf = filter.attributes.iter().any(|part| *part == TcAttribute::Kind("bpf".to_owned()));
    let priority = u16::try_from(filter.header.info >> 16).ok()?;
    let is_ours = [understudy_bpf::PRIORITY, understudy_bpf::CONTAIN_PRIORITY].contains(&priority);
    // The kernel lists the place of a filter, too, under number 0.
    (is_bpf && is_ours && number != 0).then_some((priority, number))
}

/// Whether the program of this priority and number is where it was put.
pub(crate) async fn has_program(
    netlink: &Handle,
    link: &Link,
    is_ingress: bool,
    (priority, number): (u16, u32),
) -> Result<bool, AnchorError> {
    let wanted = Some((priority, number));
    Ok(filters(netlink, link, is_ingress).await?.iter().any(|filter| program(filter) == wanted))
}

/// The filters on one side of an interface; none if it has no place for them.
async fn filters(netlink: &Handle, link: &Link, is_ingress: bool) -> Result<Vec<TcMessage>, AnchorError> {
    let mut filters = netlink.traffic_filter(link.index.cast_signed());
    let request = if is_ingress { filters.get().ingress() } else { filters.get().egress() };
    let found = request.execute().try_collect().await;
    refused(format!("list the filters of {}", link.name), found)
}

/// Removes the place for programs (the clsact qdisc) from interfaces, unless it holds programs that are not dom0d's. An
/// interface that is gone has none any more.
pub(crate) async fn remove_clsact(netlink: &Handle, interfaces: &[String]) -> Result<(), AnchorError> {
    for link in links(netlink).await?.iter().filter(|link| interfaces.contains(&link.name)) {
        let mut others = filters(netlink, link, true).await?;
        others.extend(filters(netlink, link, false).await?);
        if !others.is_empty() {
            continue;
        }
        let mut request = netlink.qdisc().del(link.index.cast_signed());
        let header = &mut request.message_mut().header;
        header.parent = TcHandle::CLSACT;
        header.handle = TcHandle { major: 0xffff, minor: 0 };
        refused(format!("remove clsact from {}", link.name), request.execute().await)?;
    }
    Ok(())
}

/// Removes every anchor that dom0d once made and this configuration does not have.
pub(crate) async fn remove_leftovers(netlink: &Handle, psc_macs: &[Mac]) -> Result<(), AnchorError> {
    let wanted: Vec<(String, String)> = psc_macs.iter().map(|&mac| names(mac)).collect();
    for link in links(netlink).await? {
        let is_wanted = wanted.iter().any(|(anchor, far)| link.name == *anchor || link.name == *far);
        // Deleting one end of a pair deletes both.
        if link.ours && !is_wanted && link.name.starts_with("usa") {
            tracing::info!(interface = link.name, "removing an anchor that was left behind");
            delete(netlink, &link).await?;
        }
    }
    Ok(())
}

async fn delete(netlink: &Handle, link: &Link) -> Result<(), AnchorError> {
    refused(format!("remove {}", link.name), netlink.link().del(link.index).execute().await)
}

/// Whether dom0 itself has one of the addresses.
pub(crate) async fn addresses_of_dom0(netlink: &Handle) -> Result<Vec<std::net::IpAddr>, AnchorError> {
    use rtnetlink::packet_route::address::AddressAttribute;

    let request = netlink.address().get();
    let messages: Vec<_> = refused("list dom0's addresses", request.execute().try_collect().await)?;
    let families = [AddressFamily::Inet, AddressFamily::Inet6];
    Ok(messages
        .iter()
        .filter(|message| families.contains(&message.header.family))
        .flat_map(|message| &message.attributes)
        .filter_map(|attribute| match attribute {
            AddressAttribute::Address(address) | AddressAttribute::Local(address) => Some(*address),
            _ => None,
        })
        .collect())
}

fn refused<T>(what: impl Into<String>, result: Result<T, rtnetlink::Error>) -> Result<T, AnchorError> {
    result.map_err(|error| AnchorError::Netlink { what: what.into(), error })
}

/// Asks the network whether a host already has one of the PSC's addresses; returns the first that answers. Takes a
/// fraction of a second. Frames of clients that come meanwhile are lost.
pub(crate) fn probe(device: &mut Device, psc: &Psc) -> Option<(std::net::IpAddr, Mac)> {
    let mut frame = Vec::new();
    for _ in 0..PROBES {
        if let Some(v4) = psc.v4 {
            let probe = frame::arp_request(psc.mac, std::net::Ipv4Addr::UNSPECIFIED, v4);
            // A lost probe does no harm: more follow.
            let _ = device.send(&probe, None);
        }
        if let Some(v6) = psc.v6 {
            let probe = frame::solicitation(psc.mac, std::net::Ipv6Addr::UNSPECIFIED, v6);
            let _ = device.send(&probe, None);
        }
        std::thread::sleep(PROBE_WAIT);
        while let Ok(true) = device.receive(&mut frame) {
            let frame = frame::parse(&frame).filter(|frame| frame.vlan == psc.vlan);
            match frame.map(|frame| (frame.source, frame.content)) {
                Some((_, Content::Arp(arp))) if psc.v4 == Some(arp.sender) => {
                    return Some((arp.sender.into(), arp.sender_mac));
                }
                Some((source, Content::Advertisement(advertisement)))
                    if psc.v6 == Some(advertisement.target) =>
                {
                    return Some((advertisement.target.into(), advertisement.link.unwrap_or(source)));
                }
                _ => {}
            }
        }
    }
    None
}
