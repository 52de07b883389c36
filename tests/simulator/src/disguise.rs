//! Makes one smoltcp stack look like many kinds of host: initial sequence numbers that wrap in mid-transfer,
//! options left out of the SYN, checksums left to the device.
//!
//! Sits between a stack and its device and is invisible to both ends.

use core::net::IpAddr;
use std::collections::BTreeMap;

use smoltcp::wire::{IpAddress, IpProtocol, IpVersion, Ipv4Packet, Ipv6Packet, TcpPacket, TcpSeqNumber};

use crate::prng::Prng;

/// What a host does differently from plain smoltcp.
#[derive(Clone, Debug, Default)]
pub(crate) struct DisguiseKnobs {
    /// Percentage of connections whose ISS lies just below 2^32.
    pub(crate) wrap_percent: u32,
    /// Never offer or accept selective acknowledgements.
    pub(crate) no_sack: bool,
    /// Never offer or accept window scaling.
    pub(crate) no_window_scale: bool,
    /// Leave the TCP checksum field with only the pseudo-header's sum, as a paravirtual guest does.
    pub(crate) partial_checksums: bool,
    /// Offer this MSS in SYNs, if smaller than the stack's own.
    pub(crate) mss: Option<u16>,
}

#[derive(Clone, Debug)]
pub(crate) struct Disguise {
    knobs: DisguiseKnobs,
    rng: Prng,
    /// By (peer, peer port, own port): what to add to the stack's own sequence numbers.
    shifts: BTreeMap<(IpAddress, u16, u16), u32>,
    /// By the same key: the ISN of the peer that opened the connection.
    openers: BTreeMap<(IpAddress, u16, u16), u32>,
    /// By the same key, as the stack counts: the highest number sent and the highest acknowledged.
    progress: BTreeMap<(IpAddress, u16, u16), (u32, u32)>,
}

struct Layout {
    src: IpAddress,
    dst: IpAddress,
    tcp: usize,
}

fn layout(packet: &[u8]) -> Option<Layout> {
    packet.first()?;
    let layout = match IpVersion::of_packet(packet).ok()? {
        IpVersion::Ipv4 => {
            let ip = Ipv4Packet::new_checked(packet).ok()?;
            if ip.next_header() != IpProtocol::Tcp {
                return None;
            }
            Layout { src: ip.src_addr().into(), dst: ip.dst_addr().into(), tcp: usize::from(ip.header_len()) }
        }
        IpVersion::Ipv6 => {
            let ip = Ipv6Packet::new_checked(packet).ok()?;
            if ip.next_header() != IpProtocol::Tcp {
                return None;
            }
            Layout { src: ip.src_addr().into(), dst: ip.dst_addr().into(), tcp: 40 }
        }
    };
    TcpPacket::new_checked(&packet[layout.tcp..]).ok()?;
    Some(layout)
}

/// Calls `each` with the kind and the bytes of every TCP option.
fn for_each_option(options: &mut [u8], mut each: impl FnMut(u8, &mut [u8])) {
    let mut at = 0;
    while at < options.len() {
        match options[at] {
            0 => return,
            1 => at += 1,
            kind => {
                let Some(&length) = options.get(at + 1) else {
                    return;
                };
                let length = usize::from(length);
                if length < 2 || at + length > options.len() {
                    return;
                }
                each(kind, &mut options[at..at + length]);
                at += length;
            }
        }
    }
}

/// Reads options as Linux does (tcp_parse_options): ignores an option whose length is wrong for its kind, and everything
/// behind an option that exceeds the header. smoltcp would drop the segment.
fn overlook_odd_options(options: &mut [u8]) {
    let mut at = 0;
    while at < options.len() {
        match options[at] {
            0 => return,
            1 => at += 1,
            kind => {
                let length = options.get(at + 1).map_or(0, |&length| usize::from(length));
                if length < 2 || at + length > options.len() {
                    return options[at..].fill(1);
                }
                let fits = match kind {
                    2 => length == 4,
                    3 => length == 3,
                    4 => length == 2,
                    5 => length >= 10 && (length - 2).is_multiple_of(8),
                    8 => length == 10,
                    _ => true,
                };
                if !fits {
                    options[at..at + length].fill(1);
                }
                at += length;
            }
        }
    }
}

/// Takes the last payload byte away; the TCP checksum is filled in later.
fn shorten(packet: &mut Vec<u8>) {
    packet.pop();
    let length = packet.len() as u16;
    match IpVersion::of_packet(packet) {
        Ok(IpVersion::Ipv4) => {
            let mut ip = Ipv4Packet::new_unchecked(&mut packet[..]);
            ip.set_total_len(length);
            ip.fill_checksum();
        }
        Ok(IpVersion::Ipv6) => Ipv6Packet::new_unchecked(&mut packet[..]).set_payload_len(length - 40),
        Err(_) => {}
    }
}

fn shift_sacks(options: &mut [u8], by: u32) {
    for_each_option(options, |kind, option| {
        if kind == 5 {
            for edge in option[2..].as_chunks_mut::<4>().0 {
                *edge = u32::from_be_bytes(*edge).wrapping_add(by).to_be_bytes();
            }
        }
    });
}

impl Disguise {
    pub(crate) fn new(knobs: DisguiseKnobs, rng: Prng) -> Self {
        Self { knobs, rng, shifts: BTreeMap::new(), openers: BTreeMap::new(), progress: BTreeMap::new() }
    }

    /// Rewrites a packet that the stack sends.
    pub(crate) fn outgoing(&mut self, packet: &mut Vec<u8>) {
        let Some(at) = layout(packet) else { return };
        let (src, dst) = (at.src, at.dst);
        if self.is_false_keepalive(packet, &at) {
            shorten(packet);
        }
        let mut tcp = TcpPacket::new_unchecked(&mut packet[at.tcp..]);
        let key = (dst, tcp.dst_port(), tcp.src_port());
        if tcp.syn() {
            let iss = tcp.seq_number().0 as u32;
            let wraps = self.rng.percent(self.knobs.wrap_percent);
            let below = self.rng.log_between(1, 200_000) as u32;
            // A retransmitted SYN keeps its number.
            self.shifts
                .entry(key)
                .or_insert_with(|| if wraps { 0u32.wrapping_sub(below).wrapping_sub(iss) } else { 0 });
            let knobs = &self.knobs;
            for_each_option(tcp.options_mut(), |kind, option| match kind {
                2 => {
                    if let Some(mss) = knobs.mss {
                        let own = u16::from_be_bytes([option[2], option[3]]);
                        option[2..4].copy_from_slice(&own.min(mss).to_be_bytes());
                    }
                }
                3 if knobs.no_window_scale => option.fill(1),
                4 if knobs.no_sack => option.fill(1),
                _ => {}
            });
        }
        let shift = self.shifts.get(&key).copied().unwrap_or(0);
        // An RST that answers a segment of no connection takes its number from that segment, which
        // `incoming` left untouched.
        let seq = tcp.seq_number();
        tcp.set_seq_number(TcpSeqNumber((seq.0 as u32).wrapping_add(shift) as i32));
        tcp.fill_checksum(&src, &dst);
        if self.knobs.partial_checksums {
            let sum = pseudo_header_sum(src, dst, packet.len() - at.tcp);
            TcpPacket::new_unchecked(&mut packet[at.tcp..]).set_checksum(sum);
        }
    }

    /// smoltcp may consider a connection idle that has bytes in flight, and send a keepalive whose byte
    /// contradicts the last of them. No other stack does: that byte is removed.
    fn is_false_keepalive(&mut self, packet: &[u8], at: &Layout) -> bool {
        let tcp = TcpPacket::new_unchecked(&packet[at.tcp..]);
        let key = (at.dst, tcp.dst_port(), tcp.src_port());
        let seq = tcp.seq_number().0 as u32;
        let end = seq.wrapping_add(tcp.segment_len() as u32);
        let (sent, acknowledged) = self.progress.entry(key).or_insert((end, seq));
        if tcp.syn() {
            (*sent, *acknowledged) = (end, seq);
        }
        // The application's writes never end in a zero byte.
        let keepalive = tcp.payload() == [0] && *sent == end && !tcp.fin();
        if (end.wrapping_sub(*sent) as i32) > 0 {
            *sent = end;
        }
        keepalive && *acknowledged != end
    }

    /// Rewrites a packet before the stack sees it.
    pub(crate) fn incoming(&mut self, packet: &mut [u8]) {
        let Some(at) = layout(packet) else { return };
        let mut tcp = TcpPacket::new_unchecked(&mut packet[at.tcp..]);
        if !tcp.verify_checksum(&at.src, &at.dst) {
            return;
        }
        overlook_odd_options(tcp.options_mut());
        let key = (at.src, tcp.src_port(), tcp.dst_port());
        if tcp.syn() {
            let knobs = &self.knobs;
            let isn = tcp.seq_number().0 as u32;
            if !tcp.ack() && self.openers.insert(key, isn) != Some(isn) {
                // A new connection from the same place draws a new shift.
                self.shifts.remove(&key);
            }
            for_each_option(tcp.options_mut(), |kind, option| match kind {
                3 if knobs.no_window_scale => option.fill(1),
                4 if knobs.no_sack => option.fill(1),
                _ => {}
            });
        }
        let shift = self.shifts.get(&key).copied().unwrap_or(0);
        if tcp.ack() {
            let ack = tcp.ack_number();
            if let Some((_, acknowledged)) = self.progress.get_mut(&key) {
                let ack = (ack.0 as u32).wrapping_sub(shift);
                if (ack.wrapping_sub(*acknowledged) as i32) > 0 {
                    *acknowledged = ack;
                }
            }
            tcp.set_ack_number(TcpSeqNumber((ack.0 as u32).wrapping_sub(shift) as i32));
            shift_sacks(tcp.options_mut(), 0u32.wrapping_sub(shift));
        }
        tcp.fill_checksum(&at.src, &at.dst);
    }
}

/// What a guest leaves in the checksum field for the device to complete (not inverted).
fn pseudo_header_sum(src: IpAddress, dst: IpAddress, tcp_len: usize) -> u16 {
    let mut sum = 6 + tcp_len as u32;
    let mut add = |bytes: &[u8]| {
        for pair in bytes.as_chunks::<2>().0 {
            sum += u32::from(u16::from_be_bytes(*pair));
        }
    };
    match (src, dst) {
        (IpAddress::Ipv4(s), IpAddress::Ipv4(d)) => {
            add(&s.octets());
            add(&d.octets());
        }
        (IpAddress::Ipv6(s), IpAddress::Ipv6(d)) => {
            add(&s.octets());
            add(&d.octets());
        }
        _ => {}
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Does what the device does for a guest that left its checksum partial.
pub(crate) fn complete_checksum(packet: &mut [u8]) {
    if let Some(at) = layout(packet) {
        let expected = pseudo_header_sum(at.src, at.dst, packet.len() - at.tcp);
        let mut tcp = TcpPacket::new_unchecked(&mut packet[at.tcp..]);
        if tcp.checksum() == expected {
            tcp.fill_checksum(&at.src, &at.dst);
        }
    }
}

/// Replaces the addresses of a packet by those of the same family.
pub(crate) fn readdress(packet: &mut [u8], src: Option<&[IpAddr]>, dst: Option<&[IpAddr]>) {
    let Some(at) = layout(packet) else { return };
    let replace = |old: IpAddress, list: Option<&[IpAddr]>| {
        list.and_then(|list| list.iter().map(|&a| IpAddress::from(a)).find(|a| a.version() == old.version()))
            .unwrap_or(old)
    };
    let (src, dst) = (replace(at.src, src), replace(at.dst, dst));
    match (src, dst) {
        (IpAddress::Ipv4(src), IpAddress::Ipv4(dst)) => {
            let mut ip = Ipv4Packet::new_unchecked(&mut *packet);
            ip.set_src_addr(src);
            ip.set_dst_addr(dst);
            ip.fill_checksum();
        }
        (IpAddress::Ipv6(src), IpAddress::Ipv6(dst)) => {
            let mut ip = Ipv6Packet::new_unchecked(&mut *packet);
            ip.set_src_addr(src);
            ip.set_dst_addr(dst);
        }
        _ => return,
    }
    TcpPacket::new_unchecked(&mut packet[at.tcp..]).fill_checksum(&src, &dst);
}
