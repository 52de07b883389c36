//! What does an Ethernet frame hold, and how is one built? Ethernet II, ARP (RFC 826, 5227) and IPv6
//! neighbour discovery (RFC 4861). What is built here has no VLAN tag: that is added where it is sent.
//!
//! Everything here comes from guests and from the network: no input may panic.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use pnet_packet::arp::{ArpHardwareTypes, ArpOperation, ArpOperations, ArpPacket, MutableArpPacket};
use pnet_packet::ethernet::{EtherType, EtherTypes, EthernetPacket, MutableEthernetPacket};
use pnet_packet::icmpv6::ndp::{
    MutableNeighborAdvertPacket, MutableNeighborSolicitPacket, NdpOptionTypes, NeighborAdvertFlags,
    NeighborAdvertPacket, NeighborSolicitPacket,
};
use pnet_packet::icmpv6::{Icmpv6Packet, Icmpv6Types, MutableIcmpv6Packet, checksum};
use pnet_packet::ip::IpNextHeaderProtocols;
use pnet_packet::ipv4::Ipv4Packet;
use pnet_packet::ipv6::{Ipv6Packet, MutableIpv6Packet};
use pnet_packet::vlan::VlanPacket;
use understudy_bpf::Cut;

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

/// The address of every station.
pub(crate) const BROADCAST: Mac = [0xff; 6];

/// Length of an Ethernet II header.
pub(crate) const ETHERNET_HEADER: usize = 14;

/// Length of a VLAN tag (IEEE 802.1Q).
const TAG: usize = 4;

const IPV6_HEADER: usize = 40;
const ARP_LENGTH: usize = 28;
/// Neighbour solicitation and advertisement without options.
const ND_LENGTH: usize = 24;
/// A link-layer address option for Ethernet: type, length in units of 8 bytes, address.
const ND_LINK_OPTION: usize = 8;

/// A frame's addresses and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// The receiver.
    pub(crate) destination: Mac,
    /// The sender.
    pub(crate) source: Mac,
    /// The VLAN that it is tagged with; `None` if it has no tag, or one that names a priority only.
    pub(crate) vlan: Option<u16>,
    /// What is inside.
    pub(crate) content: Content,
}

/// What a frame holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// An IP packet, in this part of the frame (padding excluded).
    Ip(Range<usize>),
    /// An ARP request or reply for IPv4 over Ethernet.
    Arp(Arp),
    /// A neighbour solicitation.
    Solicitation(Solicitation),
    /// A neighbour advertisement.
    Advertisement(Advertisement),
    /// A provider's tag, or a tag within a tag (IEEE 802.1ad), whatever is behind it.
    ManyTags,
    /// Some other protocol.
    Other,
    /// Cut off, or contradictory.
    Malformed,
}

/// An ARP message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arp {
    /// A request; otherwise a reply.
    pub(crate) request: bool,
    /// Who sent it.
    pub(crate) sender_mac: Mac,
    /// Who sent it; unspecified in a probe for a free address.
    pub(crate) sender: Ipv4Addr,
    /// Whose address is asked for.
    pub(crate) target: Ipv4Addr,
}

/// A neighbour solicitation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Solicitation {
    /// Who asks; unspecified in a probe for a free address.
    pub(crate) source: Ipv6Addr,
    /// Whose address is asked for.
    pub(crate) target: Ipv6Addr,
    /// The asker's link-layer address, if it said so.
    pub(crate) link: Option<Mac>,
}

/// A neighbour advertisement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Advertisement {
    /// Whose address it is about.
    pub(crate) target: Ipv6Addr,
    /// The target's link-layer address, if it said so.
    pub(crate) link: Option<Mac>,
    /// The target is a router.
    pub(crate) router: bool,
}

/// Takes a frame apart.
pub(crate) fn parse(bytes: &[u8]) -> Option<Frame> {
    let ethernet = EthernetPacket::new(bytes)?;
    let (mut at, mut kind, mut vlan) = (ETHERNET_HEADER, ethernet.get_ethertype(), None);
    if kind == EtherTypes::Vlan {
        let tag = VlanPacket::new(bytes.get(at..)?)?;
        vlan = Some(tag.get_vlan_identifier()).filter(|vlan| *vlan != 0);
        kind = tag.get_ethertype();
        at += TAG;
    }
    let inside = bytes.get(at..)?;
    let content = match kind {
        EtherTypes::Ipv4 => ipv4(inside),
        EtherTypes::Ipv6 => ipv6(inside),
        EtherTypes::Arp => arp(inside),
        EtherTypes::Vlan | EtherTypes::QinQ | EtherTypes::PBridge => Content::ManyTags,
        _ => Content::Other,
    };
    let content = match content {
        Content::Ip(range) => Content::Ip(at + range.start..at + range.end),
        other => other,
    };
    Some(Frame {
        destination: ethernet.get_destination().octets(),
        source: ethernet.get_source().octets(),
        vlan,
        content,
    })
}

/// Whether an address names one station.
pub(crate) fn is_unicast(mac: Mac) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

/// With the packet's place inside.
fn ipv4(inside: &[u8]) -> Content {
    let length = Ipv4Packet::new(inside).map(|ip| usize::from(ip.get_total_length()));
    match length {
        // A super-packet of 64 KiB and more says 0 (BIG TCP); then all of the frame is packet.
        Some(0) => Content::Ip(0..inside.len()),
        Some(length) if (Ipv4Packet::minimum_packet_size()..=inside.len()).contains(&length) => {
            Content::Ip(0..length)
        }
        _ => Content::Malformed,
    }
}

/// With the packet's place inside.
fn ipv6(inside: &[u8]) -> Content {
    let Some(ip) = Ipv6Packet::new(inside) else {
        return Content::Malformed;
    };
    let length = match usize::from(ip.get_payload_length()) {
        0 => inside.len(),
        payload => IPV6_HEADER + payload,
    };
    let Some(packet) = inside.get(..length) else {
        return Content::Malformed;
    };
    if ip.get_next_header() == IpNextHeaderProtocols::Icmpv6
        && let Some(content) = neighbour_discovery(&ip, &packet[IPV6_HEADER..])
    {
        return content;
    }
    Content::Ip(0..length)
}

/// `None` if the message is no solicitation or advertisement.
fn neighbour_discovery(ip: &Ipv6Packet<'_>, message: &[u8]) -> Option<Content> {
    let icmp = Icmpv6Packet::new(message)?;
    let kind = icmp.get_icmpv6_type();
    if kind != Icmpv6Types::NeighborSolicit && kind != Icmpv6Types::NeighborAdvert {
        return None;
    }
    // RFC 4861 §7.1: what crossed a router, or is corrupt, must not be believed.
    let sound = ip.get_hop_limit() == 255
        && icmp.get_icmpv6_code().0 == 0
        && icmp.get_checksum() == checksum(&icmp, &ip.get_source(), &ip.get_destination());
    if !sound {
        return Some(Content::Malformed);
    }
    let options = message.get(ND_LENGTH..)?;
    if kind == Icmpv6Types::NeighborSolicit {
        let solicit = NeighborSolicitPacket::new(message)?;
        return Some(Content::Solicitation(Solicitation {
            source: ip.get_source(),
            target: solicit.get_target_addr(),
            link: link_option(options, NdpOptionTypes::SourceLLAddr.0),
        }));
    }
    let advert = NeighborAdvertPacket::new(message)?;
    Some(Content::Advertisement(Advertisement {
        target: advert.get_target_addr(),
        link: link_option(options, NdpOptionTypes::TargetLLAddr.0),
        router: advert.get_flags() & NeighborAdvertFlags::Router != 0,
    }))
}

/// pnet's own view of options overflows on lengths that only a hostile sender uses.
fn link_option(mut options: &[u8], wanted: u8) -> Option<Mac> {
    while let [kind, units, ..] = *options {
        let length = usize::from(units) * 8;
        let option = options.get(..length)?;
        if length == 0 {
            return None;
        }
        if kind == wanted && length == ND_LINK_OPTION {
            return option.get(2..8)?.try_into().ok();
        }
        options = options.get(length..)?;
    }
    None
}

fn arp(inside: &[u8]) -> Content {
    let Some(arp) = ArpPacket::new(inside) else {
        return Content::Malformed;
    };
    let ours = arp.get_hardware_type() == ArpHardwareTypes::Ethernet
        && arp.get_protocol_type() == EtherTypes::Ipv4
        && arp.get_hw_addr_len() == 6
        && arp.get_proto_addr_len() == 4;
    let request = match arp.get_operation() {
        ArpOperations::Request => true,
        ArpOperations::Reply => false,
        _ => return Content::Other,
    };
    let sender_mac = arp.get_sender_hw_addr().octets();
    if !ours || !is_unicast(sender_mac) {
        return Content::Malformed;
    }
    Content::Arp(Arp {
        request,
        sender_mac,
        sender: arp.get_sender_proto_addr(),
        target: arp.get_target_proto_addr(),
    })
}

/// How the frame around an engine's packet is to be cut into segments of this size; `None` if it is one.
pub(crate) fn cut(packet: &[u8], segment: u16) -> Option<Cut> {
    let is_ipv6 = packet.first()? >> 4 == 6;
    // The engine writes no IP options.
    let ip = if is_ipv6 { 40 } else { 20 };
    let tcp = u16::from(packet.get(ip + 12)? >> 4) * 4;
    let begin = (ETHERNET_HEADER + ip) as u16;
    (segment > 0).then_some(Cut { segment, tcp: begin, payload: begin + tcp, is_ipv6 })
}

/// Writes an IP packet's frame into `frame`.
pub(crate) fn wrap_ip(frame: &mut Vec<u8>, destination: Mac, source: Mac, packet: &[u8]) {
    let kind: u16 = match packet.first().map(|first| first >> 4) {
        Some(6) => EtherTypes::Ipv6.0,
        _ => EtherTypes::Ipv4.0,
    };
    frame.clear();
    frame.extend_from_slice(&destination);
    frame.extend_from_slice(&source);
    frame.extend_from_slice(&kind.to_be_bytes());
    frame.extend_from_slice(packet);
}

/// An ARP message: `mac` has `address`, told to `to_mac` and `to`.
pub(crate) fn arp_reply(mac: Mac, address: Ipv4Addr, to_mac: Mac, to: Ipv4Addr) -> Vec<u8> {
    arp_frame(ArpOperations::Reply, (mac, address), (to_mac, to), to_mac)
}

/// An ARP question to everybody: who has `target`? With `sender` unspecified it is a probe (RFC 5227).
pub(crate) fn arp_request(mac: Mac, sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    arp_frame(ArpOperations::Request, (mac, sender), ([0; 6], target), BROADCAST)
}

/// The news that `mac` has `address` (gratuitous ARP, RFC 5227 §3: as a request).
pub(crate) fn arp_announcement(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    arp_request(mac, address, address)
}

fn arp_frame(
    operation: ArpOperation,
    sender: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
    destination: Mac,
) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET_HEADER + ARP_LENGTH];
    ethernet_header(&mut frame, destination, sender.0, EtherTypes::Arp);
    if let Some(mut arp) = MutableArpPacket::new(&mut frame[ETHERNET_HEADER..]) {
        arp.set_hardware_type(ArpHardwareTypes::Ethernet);
        arp.set_protocol_type(EtherTypes::Ipv4);
        arp.set_hw_addr_len(6);
        arp.set_proto_addr_len(4);
        arp.set_operation(operation);
        arp.set_sender_hw_addr(sender.0.into());
        arp.set_sender_proto_addr(sender.1);
        arp.set_target_hw_addr(target.0.into());
        arp.set_target_proto_addr(target.1);
    }
    frame
}

/// A neighbour advertisement: `mac` has `address`. With `to` it answers that asker, else it tells all nodes.
pub(crate) fn advertisement(
    mac: Mac,
    address: Ipv6Addr,
    router: bool,
    to: Option<(Mac, Ipv6Addr)>,
) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let (to_mac, to) = to.unwrap_or((multicast_mac(all_nodes), all_nodes));
    let mut flags = NeighborAdvertFlags::Override;
    if !to.is_multicast() {
        flags |= NeighborAdvertFlags::Solicited;
    }
    if router {
        flags |= NeighborAdvertFlags::Router;
    }
    let mut frame = vec![0; ETHERNET_HEADER + IPV6_HEADER + ND_LENGTH + ND_LINK_OPTION];
    let message = &mut frame[ETHERNET_HEADER + IPV6_HEADER..];
    if let Some(mut advert) = MutableNeighborAdvertPacket::new(message) {
        advert.set_icmpv6_type(Icmpv6Types::NeighborAdvert);
        advert.set_flags(flags);
        advert.set_target_addr(address);
    }
    write_link_option(message, NdpOptionTypes::TargetLLAddr.0, mac);
    neighbour_headers(&mut frame, (mac, address), (to_mac, to));
    frame
}

/// A neighbour solicitation for `target`. With `source` unspecified it is a probe (RFC 4862 §5.4).
pub(crate) fn solicitation(mac: Mac, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let to = solicited_node(target);
    // RFC 4861 §4.3: no source link-layer option without a source.
    let option = if source.is_unspecified() { 0 } else { ND_LINK_OPTION };
    let mut frame = vec![0; ETHERNET_HEADER + IPV6_HEADER + ND_LENGTH + option];
    let message = &mut frame[ETHERNET_HEADER + IPV6_HEADER..];
    if let Some(mut solicit) = MutableNeighborSolicitPacket::new(message) {
        solicit.set_icmpv6_type(Icmpv6Types::NeighborSolicit);
        solicit.set_target_addr(target);
    }
    write_link_option(message, NdpOptionTypes::SourceLLAddr.0, mac);
    neighbour_headers(&mut frame, (mac, source), (multicast_mac(to), to));
    frame
}

/// The link-local address that belongs to a MAC (RFC 4291 §2.5.6, appendix A).
pub(crate) fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

/// Does nothing if the message has no room for an option.
fn write_link_option(message: &mut [u8], kind: u8, mac: Mac) {
    if let Some(option) = message.get_mut(ND_LENGTH..ND_LENGTH + ND_LINK_OPTION) {
        option[0] = kind;
        option[1] = 1;
        option[2..].copy_from_slice(&mac);
    }
}

fn neighbour_headers(frame: &mut [u8], source: (Mac, Ipv6Addr), destination: (Mac, Ipv6Addr)) {
    let payload = frame.len() - ETHERNET_HEADER - IPV6_HEADER;
    ethernet_header(frame, destination.0, source.0, EtherTypes::Ipv6);
    if let Some(mut ip) = MutableIpv6Packet::new(&mut frame[ETHERNET_HEADER..]) {
        ip.set_version(6);
        ip.set_payload_length(u16::try_from(payload).unwrap_or(u16::MAX));
        ip.set_next_header(IpNextHeaderProtocols::Icmpv6);
        ip.set_hop_limit(255);
        ip.set_source(source.1);
        ip.set_destination(destination.1);
    }
    let message = &mut frame[ETHERNET_HEADER + IPV6_HEADER..];
    let sum = Icmpv6Packet::new(message).map(|icmp| checksum(&icmp, &source.1, &destination.1));
    if let (Some(mut icmp), Some(sum)) = (MutableIcmpv6Packet::new(message), sum) {
        icmp.set_checksum(sum);
    }
}

fn ethernet_header(frame: &mut [u8], destination: Mac, source: Mac, kind: EtherType) {
    if let Some(mut ethernet) = MutableEthernetPacket::new(frame) {
        ethernet.set_destination(destination.into());
        ethernet.set_source(source.into());
        ethernet.set_ethertype(kind);
    }
}

/// RFC 4291 §2.7.1.
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from_be_bytes([b, c]))
}

/// RFC 2464 §7.
fn multicast_mac(address: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = address.octets();
    [0x33, 0x33, a, b, c, d]
}

#[cfg(test)]
mod tests;
