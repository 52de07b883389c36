//! Packets that no honest stack would send: noise, mutations of real segments, resets out of
//! nothing.

use core::net::SocketAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IpAddress, IpProtocol, IpRepr, IpVersion, Ipv4Packet, Ipv6Packet, TcpControl, TcpPacket, TcpRepr,
    TcpSeqNumber,
};

use crate::prng::Prng;

/// A reset with exactly this sequence number.
pub(crate) fn reset(src: SocketAddr, dst: SocketAddr, seq: u32, ack: Option<u32>) -> Vec<u8> {
    let tcp = TcpRepr {
        src_port: src.port(),
        dst_port: dst.port(),
        control: TcpControl::Rst,
        seq_number: TcpSeqNumber(seq as i32),
        ack_number: ack.map(|a| TcpSeqNumber(a as i32)),
        window_len: 0,
        window_scale: None,
        max_seg_size: None,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: &[],
    };
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
