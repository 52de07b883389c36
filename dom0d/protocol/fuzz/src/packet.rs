//! IP packets with TCP inside, written and read without the engine's own code, so that neither code hides the other's
//! faults.

use std::net::{IpAddr, SocketAddr};

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// A segment as the world sees it.
#[derive(Clone, Debug)]
pub(crate) struct Tcp {
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) urgent: u16,
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

fn sum(mut sum: u64, bytes: &[u8]) -> u64 {
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    }
    sum
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An IP header of 20 or 40 bytes before `inside`.
pub(crate) fn ip(src: IpAddr, dst: IpAddr, protocol: u8, inside: &[u8]) -> Vec<u8> {
    let mut packet = match src {
        IpAddr::V4(_) => {
            let [high, low] = ((20 + inside.len()) as u16).to_be_bytes();
            vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0]
        }
        IpAddr::V6(_) => {
            let [high, low] = (inside.len() as u16).to_be_bytes();
            vec![0x60, 0, 0, 0, high, low, protocol, 64]
        }
    };
    packet.extend(octets(src));
    packet.extend(octets(dst));
    packet.extend_from_slice(inside);
    packet
}

impl Tcp {
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(60 + self.payload.len());
        tcp.extend(self.src.port().to_be_bytes());
        tcp.extend(self.dst.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        let mut options = self.options.clone();
        options.truncate(40);
        options.resize(options.len().next_multiple_of(4), 0);
        tcp.push((((20 + options.len()) / 4) << 4) as u8);
        tcp.push(self.flags);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(self.urgent.to_be_bytes());
        tcp.extend(options);
        tcp.extend(&self.payload);
        let mut packet = ip(self.src.ip(), self.dst.ip(), 6, &tcp);
        repair(&mut packet);
        packet
    }

    /// Reads a packet that the engine sent; panics if it is no sound TCP packet.
    pub(crate) fn read(packet: &[u8]) -> Self {
        let (header, src, dst): (usize, IpAddr, IpAddr) = if packet[0] >> 4 == 4 {
            assert_eq!(packet.len(), usize::from(u16::from_be_bytes([packet[2], packet[3]])));
            assert_eq!(fold(sum(0, &packet[..20])), 0, "IP checksum");
            let at = |at: usize| <[u8; 4]>::try_from(&packet[at..at + 4]).map(IpAddr::from);
            (20, at(12).unwrap(), at(16).unwrap())
        } else {
            assert_eq!(packet.len(), 40 + usize::from(u16::from_be_bytes([packet[4], packet[5]])));
            let at = |at: usize| <[u8; 16]>::try_from(&packet[at..at + 16]).map(IpAddr::from);
            (40, at(8).unwrap(), at(24).unwrap())
        };
        let tcp = &packet[header..];
        assert_eq!(checksum(src, dst, 6, tcp), 0, "TCP checksum");
        let word = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
        let half = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let offset = usize::from(tcp[12] >> 4) * 4;
        assert!((20..=tcp.len()).contains(&offset), "data offset {offset}");
        Self {
            src: SocketAddr::new(src, half(0)),
            dst: SocketAddr::new(dst, half(2)),
            seq: word(4),
            ack: word(8),
            flags: tcp[13],
            window: half(14),
            urgent: half(18),
            options: tcp[20..offset].to_vec(),
            payload: tcp[offset..].to_vec(),
        }
    }

    /// The sequence space that the segment occupies: its SEG.LEN.
    pub(crate) fn length(&self) -> u32 {
        self.payload.len() as u32 + u32::from(self.flags & SYN != 0) + u32::from(self.flags & FIN != 0)
    }

    /// TSval, if it has one.
    pub(crate) fn tsval(&self) -> Option<u32> {
        let at = self.options.windows(2).position(|pair| pair == [8, 10])?;
        Some(u32::from_be_bytes(self.options.get(at + 2..at + 6)?.try_into().ok()?))
    }
}

/// Source and destination of a plain TCP packet.
pub(crate) fn parties(packet: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let ports = |at: usize| packet.get(at..at + 2).map(|port| u16::from_be_bytes([port[0], port[1]]));
    let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
    let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
    let (src, dst, tcp) = match packet.first()? >> 4 {
        4 => (v4(12)?, v4(16)?, 20),
        6 => (v6(8)?, v6(24)?, 40),
        _ => return None,
    };
    Some((SocketAddr::new(src, ports(tcp)?), SocketAddr::new(dst, ports(tcp + 2)?)))
}

/// Whether the checksum of a plain TCP packet is right. If not, its receiver drops it.
pub(crate) fn is_right(packet: &[u8]) -> bool {
    let (Some((src, dst)), v4) = (parties(packet), packet[0] >> 4 == 4) else { return false };
    let (header, at) = if v4 { (20, 2) } else { (40, 4) };
    let length = usize::from(u16::from_be_bytes([packet[at], packet[at + 1]])) + if v4 { 0 } else { 40 };
    packet.get(header..length).is_some_and(|tcp| checksum(src.ip(), dst.ip(), 6, tcp) == 0)
}

fn checksum(src: IpAddr, dst: IpAddr, protocol: u8, message: &[u8]) -> u16 {
    let pseudo = sum(sum(0, &octets(src)), &octets(dst)) + u64::from(protocol) + message.len() as u64;
    fold(sum(pseudo, message))
}

/// Corrects the checksums of an IP packet, as far as they can be found.
pub(crate) fn repair(packet: &mut [u8]) {
    let Some(first) = packet.first() else { return };
    let (header, protocol, addresses) = match first >> 4 {
        4 if packet.len() >= 20 => {
            packet[10..12].fill(0);
            let length = usize::from(packet[0] & 15) * 4;
            let sum = fold(sum(0, &packet[..length.clamp(20, packet.len())]));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            (length, packet[9], 12..20)
        }
        6 if packet.len() >= 40 => (40, packet[6], 8..40),
        _ => return,
    };
    let pseudo = sum(u64::from(protocol), &packet[addresses]);
    let Some(message) = packet.get_mut(header..) else { return };
    let (at, pseudo) = match protocol {
        6 => (16, pseudo + message.len() as u64),
        58 => (2, pseudo + message.len() as u64),
        1 => (2, 0),
        _ => return,
    };
    if let Some(field) = message.get_mut(at..at + 2) {
        field.fill(0);
        let sum = fold(sum(pseudo, message));
        message[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
}
