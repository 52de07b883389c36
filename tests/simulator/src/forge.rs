//! Forges packets that no honest stack sends: noise, mutations of real segments, resets.

use core::net::SocketAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpAddress, IpProtocol, IpRepr, IpVersion, Ipv4Packet, Ipv6Packet, TcpControl, TcpPacket, TcpRepr,
    TcpSeqNumber,
};

use crate::disguise::complete_checksum;
use crate::prng::Prng;

/// How a segment is twisted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Twist {
    /// Changes some bytes of its TCP header.
    Header,
    /// Adds an option whose length is wrong for its kind, or exceeds the header.
    Option,
    /// Changes the checksum of the IPv4 header, if there is one.
    BadIpChecksum,
    /// Changes the checksum of the segment.
    BadChecksum,
    /// Acknowledges bytes that nobody sent.
    AckAhead,
    /// Acknowledges less than was received.
    AckBehind,
    /// Changes the flags.
    Flags,
    /// Changes the window, perhaps to 0.
    Window,
    /// Changes the sequence number.
    Sequence,
    /// Changes the payload.
    Contradiction,
    /// Sets the hop limit to 0.
    HopLimit,
    /// Cuts the packet off.
    Truncated,
    /// Makes it a RST.
    Reset,
}

impl Twist {
    pub(crate) const ALL: [Self; 13] = [
        Self::Header,
        Self::Option,
        Self::BadIpChecksum,
        Self::BadChecksum,
        Self::AckAhead,
        Self::AckBehind,
        Self::Flags,
        Self::Window,
        Self::Sequence,
        Self::Contradiction,
        Self::HopLimit,
        Self::Truncated,
        Self::Reset,
    ];
}

/// A reset with exactly this sequence number.
pub(crate) fn reset(src: SocketAddr, dst: SocketAddr, seq: u32, ack: Option<u32>) -> Vec<u8> {
    emit(src, dst, &TcpRepr { ack_number: ack.map(|a| TcpSeqNumber(a as i32)), ..bare(TcpControl::Rst, seq) })
}

/// A SYN as many stacks send it.
pub(crate) fn syn(rng: &mut Prng, src: SocketAddr, dst: SocketAddr) -> Vec<u8> {
    let tcp = TcpRepr {
        window_len: 64_240,
        window_scale: rng.percent(80).then_some(7),
        max_seg_size: Some(1_460),
        sack_permitted: true,
        ..bare(TcpControl::Syn, rng.next() as u32)
    };
    emit(src, dst, &tcp)
}

/// A segment with an acknowledgment, and perhaps some bytes, of no conversation.
pub(crate) fn acknowledgment(rng: &mut Prng, src: SocketAddr, dst: SocketAddr) -> Vec<u8> {
    let tcp = TcpRepr {
        window_len: 1_000,
        ack_number: Some(TcpSeqNumber(rng.next() as i32)),
        payload: if rng.percent(50) { b"E" } else { b"" },
        ..bare(TcpControl::Psh, rng.next() as u32)
    };
    emit(src, dst, &tcp)
}

fn bare(control: TcpControl, seq: u32) -> TcpRepr<'static> {
    TcpRepr {
        src_port: 0,
        dst_port: 0,
        control,
        seq_number: TcpSeqNumber(seq as i32),
        ack_number: None,
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    }
}

fn emit(src: SocketAddr, dst: SocketAddr, tcp: &TcpRepr<'_>) -> Vec<u8> {
    let tcp = TcpRepr { src_port: src.port(), dst_port: dst.port(), ..*tcp };
    let (from, to) = (IpAddress::from(src.ip()), IpAddress::from(dst.ip()));
    let ip = IpRepr::new(from, to, IpProtocol::Tcp, tcp.buffer_len(), 64);
    let caps = ChecksumCapabilities::default();
    let mut packet = vec![0; ip.buffer_len()];
    ip.emit(&mut packet, &caps);
    let header = ip.header_len();
    tcp.emit(&mut TcpPacket::new_unchecked(&mut packet[header..]), &from, &to, &caps);
    packet
}

/// Random bytes, some of which begin like an IP packet.
pub(crate) fn noise(rng: &mut Prng) -> Vec<u8> {
    let length = rng.between(0, 200) as usize;
    let mut packet: Vec<u8> = (0..length).map(|_| rng.next() as u8).collect();
    if let Some(first) = packet.first_mut() {
        *first = *rng.pick(&[0x45, 0x45, 0x60, 0x4f, *first]);
    }
    packet
}

/// A real packet with some of its TCP header's bytes changed, its checksum mostly right again.
pub(crate) fn mutated(rng: &mut Prng, packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let Ok(version) = IpVersion::of_packet(&packet) else {
        return packet;
    };
    let (header, src, dst): (usize, IpAddress, IpAddress) = match version {
        IpVersion::Ipv4 => match Ipv4Packet::new_checked(&packet[..]) {
            Ok(ip) => (ip.header_len().into(), ip.src_addr().into(), ip.dst_addr().into()),
            Err(_) => return packet,
        },
        IpVersion::Ipv6 => match Ipv6Packet::new_checked(&packet[..]) {
            Ok(ip) => (40, ip.src_addr().into(), ip.dst_addr().into()),
            Err(_) => return packet,
        },
    };
    for _ in 0..rng.between(1, 3) {
        // Behind the ports: a segment of some conversation of this server it shall remain.
        let at = header + rng.between(4, (packet.len() - header - 1).min(60) as u64) as usize;
        packet[at] = match rng.between(0, 2) {
            0 => packet[at].wrapping_add(1),
            1 => packet[at] ^ (1 << rng.between(0, 7)),
            _ => rng.next() as u8,
        };
    }
    if rng.percent(10) {
        packet.truncate(rng.between(1, packet.len() as u64) as usize);
    }
    if let Some(segment) = packet.get_mut(header..)
        && let Ok(mut tcp) = TcpPacket::new_checked(segment)
        && rng.percent(90)
    {
        tcp.fill_checksum(&src, &dst);
    }
    packet
}

/// The twisted segment; unchanged if the packet is no segment.
pub(crate) fn twisted(rng: &mut Prng, packet: &[u8], twist: Twist) -> Vec<u8> {
    let mut packet = packet.to_vec();
    // A device fills in what the stack left to it.
    complete_checksum(&mut packet);
    let Some((header, src, dst)) = ends(&packet) else { return packet };
    let Ok(tcp) = TcpPacket::new_checked(&packet[header..]) else { return packet };
    let (seq, ack, payload) = (tcp.seq_number().0 as u32, tcp.ack_number().0 as u32, tcp.payload().len());
    match twist {
        Twist::Header => return mutated(rng, &packet),
        Twist::Reset => {
            let at = |address: IpAddress, port| SocketAddr::new(address.into(), port);
            let near = if rng.percent(50) { 0 } else { rng.log_between(1, 100_000) as u32 };
            let (src, dst) = (at(src, tcp.src_port()), at(dst, tcp.dst_port()));
            return reset(src, dst, seq.wrapping_add(near), rng.percent(50).then_some(ack));
        }
        Twist::BadIpChecksum if header == 20 => {
            packet[10] ^= 1 + rng.between(0, 254) as u8;
            return packet;
        }
        Twist::BadIpChecksum | Twist::BadChecksum => {
            packet[header + 16] ^= 1 + rng.between(0, 254) as u8;
            return packet;
        }
        Twist::HopLimit => {
            packet[if header == 20 { 8 } else { 7 }] = 0;
            refill(&mut packet);
            return packet;
        }
        Twist::Truncated => {
            let least = packet.len() - payload;
            packet.truncate(rng.between(least as u64, packet.len() as u64) as usize);
            refill(&mut packet);
            return packet;
        }
        Twist::Option => add_option(rng, &mut packet, header),
        _ => {}
    }
    let mut tcp = TcpPacket::new_unchecked(&mut packet[header..]);
    let away = rng.log_between(1, 1 << 20) as u32;
    match twist {
        Twist::AckAhead => tcp.set_ack_number(TcpSeqNumber(ack.wrapping_add(away) as i32)),
        Twist::AckBehind => tcp.set_ack_number(TcpSeqNumber(ack.wrapping_sub(away) as i32)),
        Twist::Sequence if rng.percent(50) => tcp.set_seq_number(TcpSeqNumber(seq.wrapping_add(away) as i32)),
        Twist::Sequence => tcp.set_seq_number(TcpSeqNumber(seq.wrapping_sub(away) as i32)),
        Twist::Window => tcp.set_window_len(*rng.pick(&[0, 0, 1, 65_535])),
        Twist::Contradiction => tcp.payload_mut().iter_mut().for_each(|byte| *byte ^= 0x55),
        _ => {}
    }
    if twist == Twist::Flags {
        packet[header + 13] = rng.next() as u8;
        packet[header + 12] ^= if rng.percent(20) { rng.between(0, 15) as u8 } else { 0 };
    }
    refill(&mut packet);
    packet
}

/// An option that Linux ignores, with those behind it.
fn add_option(rng: &mut Prng, packet: &mut Vec<u8>, header: usize) {
    let odd: [&[u8]; 14] = [
        &[2, 3, 0],
        &[2, 4, 0, 0],
        &[3, 2],
        &[3, 3, 14],
        &[4, 3, 0],
        &[4, 2],
        &[5, 3, 0],
        &[5, 10, 0, 0, 0, 0, 0, 0, 0, 1],
        &[8, 2],
        &[8, 10, 0, 0, 0, 0, 0, 0, 0, 0],
        &[253, 0],
        &[253, 1],
        &[253, 40],
        &[34, 6, 1, 2, 3, 4],
    ];
    let mut option = rng.pick(&odd).to_vec();
    option.resize(option.len().next_multiple_of(4), 1);
    let length = usize::from(packet[header + 12] >> 4) * 4;
    if length + option.len() > 60 {
        return;
    }
    let at = if rng.percent(50) { 20 } else { length };
    packet.splice(header + at..header + at, option.iter().copied());
    packet[header + 12] = packet[header + 12] & 0x0f | (((length + option.len()) / 4) as u8) << 4;
}

/// Where the TCP header begins, and the ends.
fn ends(packet: &[u8]) -> Option<(usize, IpAddress, IpAddress)> {
    packet.first()?;
    match IpVersion::of_packet(packet).ok()? {
        IpVersion::Ipv4 => {
            let ip = Ipv4Packet::new_checked(packet).ok().filter(|ip| ip.next_header() == IpProtocol::Tcp)?;
            Some((ip.header_len().into(), ip.src_addr().into(), ip.dst_addr().into()))
        }
        IpVersion::Ipv6 => {
            let ip = Ipv6Packet::new_checked(packet).ok().filter(|ip| ip.next_header() == IpProtocol::Tcp)?;
            Some((40, ip.src_addr().into(), ip.dst_addr().into()))
        }
    }
}

/// Sets lengths and checksums right.
fn refill(packet: &mut [u8]) {
    let length = packet.len() as u16;
    match packet.first().map(|first| first >> 4) {
        Some(4) => {
            let mut ip = Ipv4Packet::new_unchecked(&mut *packet);
            ip.set_total_len(length);
            ip.fill_checksum();
        }
        Some(6) => Ipv6Packet::new_unchecked(&mut *packet).set_payload_len(length.saturating_sub(40)),
        _ => return,
    }
    if let Some((header, src, dst)) = ends(packet)
        && let Ok(mut tcp) = TcpPacket::new_checked(&mut packet[header..])
    {
        tcp.fill_checksum(&src, &dst);
    }
}
