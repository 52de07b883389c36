//! Reads TCP segments from IP packets, and writes them back (RFC 791, RFC 8200, RFC 9293 §3.1).
//!
//! Every byte may be hostile: parsing names the fault and never panics.
//!
//! [`read_ip`], [`tcp_header`] and [`options`] are the grammar of rule 10. It is written here once, for the engine and
//! for [`crate::Flow`], and so for the programs in the kernel (`parse.h`, `translate.h`), which pass nothing else. A
//! packet that a receiver's kernel would drop must not match the grammar: the engine would believe it, and no server
//! would have it.

mod checksum;
mod icmp;
pub(crate) mod options;

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use checksum::Sum;
pub(crate) use icmp::{Icmp, IcmpError};
pub(crate) use options::{Options, SackBlocks};

pub(crate) const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
/// Hops given to packets that the daemon makes or rebuilds.
const HOP_LIMIT: u8 = 64;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;

/// TCP's control bits (RFC 9293 §3.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Flags(pub(crate) u8);

impl Flags {
    pub(crate) const FIN: Self = Self(0x01);
    pub(crate) const SYN: Self = Self(0x02);
    pub(crate) const RST: Self = Self(0x04);
    pub(crate) const PSH: Self = Self(0x08);
    pub(crate) const ACK: Self = Self(0x10);
    pub(crate) const URG: Self = Self(0x20);

    pub(crate) const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// One TCP segment with its addresses. `payload` borrows the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment<'a> {
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: Flags,
    pub(crate) window: u16,
    pub(crate) urgent: u16,
    pub(crate) options: Options,
    /// The two ECN bits of the IP header (RFC 3168 §5).
    pub(crate) ecn: u8,
    pub(crate) payload: &'a [u8],
}

/// The content of an IP packet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed<'a> {
    Tcp(Segment<'a>),
    Icmp(Icmp<'a>),
    /// Neither TCP nor an ICMP error.
    Other {
        src: IpAddr,
        dst: IpAddr,
    },
}

/// Why a packet could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Malformed {
    /// Shorter than its headers say.
    Truncated,
    /// Neither IPv4 nor IPv6, or a header with impossible fields or a wrong checksum.
    Header,
    /// IPv4 options or IPv6 extension headers. The daemon writes new headers, so it can't keep a route or a security
    /// label that these ask for. And no kernel program finds the segment after all of them, so the segment would leave
    /// its order.
    IpOptions,
    /// An IP fragment: the positions of its bytes in the stream are unknown.
    Fragment,
    /// The checksum is neither right nor partial.
    Checksum,
    /// TCP options with impossible lengths.
    Options,
}

/// What the checksum field of a TCP segment must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// The checksum, or the partial checksum of a local guest: the sum of the pseudo-header, which the guest leaves for
    /// a device to complete that the frame never reaches (`CHECKSUM_PARTIAL` in Linux).
    RightOrPartial,
    /// The checksum, because the receiver checks it.
    Right,
    /// Anything, because the receiver does not check it.
    Trusted,
}

/// Reads one IP packet. Ignores bytes beyond the IP length (Ethernet padding).
pub(crate) fn parse(packet: &[u8]) -> Result<Parsed<'_>, Malformed> {
    parse_with(packet, Checksum::RightOrPartial)
}

/// Like [`parse`], with a choice of what the checksum must be.
pub(crate) fn parse_with(packet: &[u8], checksum: Checksum) -> Result<Parsed<'_>, Malformed> {
    let ip = read_ip(packet)?;
    match ip.protocol {
        TCP => parse_tcp(&ip, checksum).map(Parsed::Tcp),
        ICMP | ICMP_V6 => Ok(icmp::parse(ip.src, ip.dst, ip.protocol, ip.payload)
            .map_or(Parsed::Other { src: ip.src, dst: ip.dst }, Parsed::Icmp)),
        _ => Ok(Parsed::Other { src: ip.src, dst: ip.dst }),
    }
}

/// The header of an IP packet, and its payload.
pub(crate) struct Ip<'a> {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    /// Bytes of the header.
    pub(crate) header: usize,
    ecn: u8,
    pub(crate) payload: &'a [u8],
}

/// Reads the IP header at the beginning of a packet. Refuses IPv4 options and IPv6 extension headers (RFC 791 §3.1, RFC
/// 8200 §4). Accepts a TTL or hop limit of 0, as a receiver does (RFC 1122 §3.2.1.7).
pub(crate) fn read_ip(packet: &[u8]) -> Result<Ip<'_>, Malformed> {
    match packet.first().ok_or(Malformed::Truncated)? >> 4 {
        4 => read_ipv4(packet),
        6 => read_ipv6(packet),
        _ => Err(Malformed::Header),
    }
}

fn read_ipv4(packet: &[u8]) -> Result<Ip<'_>, Malformed> {
    let header = packet.get(..IPV4_HEADER).ok_or(Malformed::Truncated)?;
    let header_length = usize::from(header[0] & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header_length < IPV4_HEADER || total < header_length {
        return Err(Malformed::Header);
    }
    if header_length > IPV4_HEADER {
        return Err(Malformed::IpOptions);
    }
    // RFC 1122 §3.2.1.2: a receiver silently drops a packet whose header checksum is wrong.
    if Sum::default().add(header).finish() != 0 {
        return Err(Malformed::Header);
    }
    // More Fragments, or a fragment offset (RFC 791 §3.1).
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(Malformed::Fragment);
    }
    Ok(Ip {
        src: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
        dst: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
        protocol: header[9],
        header: IPV4_HEADER,
        ecn: header[1] & 0x03,
        payload: packet.get(IPV4_HEADER..total).ok_or(Malformed::Truncated)?,
    })
}

fn read_ipv6(packet: &[u8]) -> Result<Ip<'_>, Malformed> {
    let header = packet.get(..IPV6_HEADER).ok_or(Malformed::Truncated)?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let payload = packet.get(IPV6_HEADER..IPV6_HEADER + length).ok_or(Malformed::Truncated)?;
    match header[6] {
        // Hop-by-hop options, routing, destination options (RFC 8200 §4.1).
        0 | 43 | 60 => return Err(Malformed::IpOptions),
        44 => return Err(Malformed::Fragment),
        _ => {}
    }
    Ok(Ip {
        src: ipv6_at(header, 8).into(),
        dst: ipv6_at(header, 24).into(),
        protocol: header[6],
        header: IPV6_HEADER,
        ecn: (header[1] >> 4) & 0x03,
        payload,
    })
}

/// Length in bytes of the TCP header at the beginning of `segment`, options included.
pub(crate) fn tcp_header(segment: &[u8]) -> Result<usize, Malformed> {
    let header = segment.get(..TCP_HEADER).ok_or(Malformed::Truncated)?;
    let data_offset = usize::from(header[12] >> 4) * 4;
    if data_offset < TCP_HEADER {
        return Err(Malformed::Header);
    }
    if data_offset > segment.len() { Err(Malformed::Truncated) } else { Ok(data_offset) }
}

fn ipv6_at(header: &[u8], at: usize) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&header[at..at + 16]);
    octets.into()
}

fn parse_tcp<'a>(ip: &Ip<'a>, checksum: Checksum) -> Result<Segment<'a>, Malformed> {
    let bytes = ip.payload;
    let (header, payload) = bytes.split_at(tcp_header(bytes)?);
    if !checksum.accepts(ip, header) {
        return Err(Malformed::Checksum);
    }
    Ok(Segment {
        src: SocketAddr::new(ip.src, u16::from_be_bytes([header[0], header[1]])),
        dst: SocketAddr::new(ip.dst, u16::from_be_bytes([header[2], header[3]])),
        seq: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
        ack: u32::from_be_bytes([header[8], header[9], header[10], header[11]]),
        flags: Flags(header[13]),
        window: u16::from_be_bytes([header[14], header[15]]),
        urgent: u16::from_be_bytes([header[18], header[19]]),
        options: Options::parse(&header[TCP_HEADER..]).ok_or(Malformed::Options)?,
        ecn: ip.ecn,
        payload,
    })
}

impl Checksum {
    fn accepts(self, ip: &Ip<'_>, header: &[u8]) -> bool {
        let pseudo = Sum::default().pseudo_header(ip.src, ip.dst, TCP, ip.payload.len());
        let field = u16::from_be_bytes([header[16], header[17]]);
        match self {
            Self::Trusted => true,
            Self::RightOrPartial if field == pseudo.folded() => true,
            _ => pseudo.add(ip.payload).finish() == 0,
        }
    }
}

impl Segment<'_> {
    /// Bytes of the TCP options as they will be written.
    fn options_bytes(&self) -> Vec<u8> {
        let mut options = Vec::with_capacity(40);
        self.options.write(&mut options);
        options
    }

    /// Sequence space that the segment takes: its payload, SYN and FIN (RFC 9293 §3.4).
    pub(crate) fn sequence_length(&self) -> u64 {
        self.payload.len() as u64
            + u64::from(self.flags.has(Flags::SYN))
            + u64::from(self.flags.has(Flags::FIN))
    }

    /// The whole IP packet, checksums filled in.
    pub(crate) fn emit(&self) -> Vec<u8> {
        let options = self.options_bytes();
        self.emit_with(&options, self.seq, self.flags, self.urgent, self.payload)
    }

    /// Gives `send` one packet, and the bytes of payload per segment into which its sender must cut it, so that each
    /// segment has at most `mss` bytes of options and payload (RFC 6691); 0 if the packet is one segment. A packet to
    /// be cut has a partial checksum.
    pub(crate) fn emit_large(&self, mss: u16, mut send: impl FnMut(Vec<u8>, u16)) {
        let options = self.options_bytes();
        let room = usize::from(mss).saturating_sub(options.len()).max(1);
        if self.payload.len() <= room {
            send(self.emit_with(&options, self.seq, self.flags, self.urgent, self.payload), 0);
        } else if self.flags.has(Flags::URG) {
            // The kernel would cut it with the same urgent pointer in each segment.
            self.emit_split(room, |packet| send(packet, 0));
        } else {
            let (mut packet, tcp) =
                self.emit_unsummed(&options, self.seq, self.flags, self.urgent, self.payload);
            let sum = Sum::default().pseudo_header(self.src.ip(), self.dst.ip(), TCP, packet.len() - tcp);
            packet[tcp + 16..tcp + 18].copy_from_slice(&sum.folded().to_be_bytes());
            send(packet, room as u16);
        }
    }

    /// Gives `send` packets with at most `room` bytes of payload each, in order. PSH and FIN go with the last; a
    /// segment without payload gives one packet.
    pub(crate) fn emit_split(&self, room: usize, mut send: impl FnMut(Vec<u8>)) {
        let options = self.options_bytes();
        if self.payload.len() <= room {
            return send(self.emit_with(&options, self.seq, self.flags, self.urgent, self.payload));
        }
        let pieces = self.payload.len().div_ceil(room);
        for (index, piece) in self.payload.chunks(room).enumerate() {
            let offset = index * room;
            let mut flags = self.flags;
            if index + 1 < pieces {
                flags = flags.without(Flags::PSH.with(Flags::FIN));
            }
            // The urgent pointer is relative to the segment (RFC 9293 §3.8.5).
            let urgent = usize::from(self.urgent).saturating_sub(offset);
            if urgent == 0 {
                flags = flags.without(Flags::URG);
            }
            let seq = self.seq.wrapping_add(offset as u32);
            send(self.emit_with(&options, seq, flags, urgent as u16, piece));
        }
    }

    fn emit_with(&self, options: &[u8], seq: u32, flags: Flags, urgent: u16, payload: &[u8]) -> Vec<u8> {
        let (mut packet, tcp) = self.emit_unsummed(options, seq, flags, urgent, payload);
        let sum = Sum::default()
            .pseudo_header(self.src.ip(), self.dst.ip(), TCP, packet.len() - tcp)
            .add(&packet[tcp..])
            .finish();
        packet[tcp + 16..tcp + 18].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    /// A packet with a TCP checksum field of 0, and the offset of its TCP header.
    fn emit_unsummed(
        &self,
        options: &[u8],
        seq: u32,
        flags: Flags,
        urgent: u16,
        payload: &[u8],
    ) -> (Vec<u8>, usize) {
        let tcp_length = TCP_HEADER + options.len() + payload.len();
        let mut packet = Vec::with_capacity(40 + tcp_length);
        write_ip_header(&mut packet, self.src.ip(), self.dst.ip(), TCP, self.ecn, tcp_length);
        let tcp = packet.len();
        packet.extend_from_slice(&self.src.port().to_be_bytes());
        packet.extend_from_slice(&self.dst.port().to_be_bytes());
        packet.extend_from_slice(&seq.to_be_bytes());
        packet.extend_from_slice(&self.ack.to_be_bytes());
        packet.push((((TCP_HEADER + options.len()) / 4) << 4) as u8);
        packet.push(flags.0);
        packet.extend_from_slice(&self.window.to_be_bytes());
        packet.extend_from_slice(&[0, 0]);
        packet.extend_from_slice(&urgent.to_be_bytes());
        packet.extend_from_slice(options);
        packet.extend_from_slice(payload);
        (packet, tcp)
    }
}

fn write_ip_header(packet: &mut Vec<u8>, src: IpAddr, dst: IpAddr, protocol: u8, ecn: u8, length: usize) {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let total = (20 + length) as u16;
            packet.extend_from_slice(&[0x45, ecn]);
            packet.extend_from_slice(&total.to_be_bytes());
            // With Don't Fragment, any Identification will do (RFC 6864 §4.1): 0.
            packet.extend_from_slice(&[0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0]);
            packet.extend_from_slice(&src.octets());
            packet.extend_from_slice(&dst.octets());
            let sum = Sum::default().add(packet).finish();
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (src, dst) => {
            packet.extend_from_slice(&[0x60, ecn << 4, 0, 0]);
            packet.extend_from_slice(&(length as u16).to_be_bytes());
            packet.extend_from_slice(&[protocol, HOP_LIMIT]);
            for address in [src, dst] {
                match address {
                    IpAddr::V4(v4) => packet.extend_from_slice(&v4.to_ipv6_mapped().octets()),
                    IpAddr::V6(v6) => packet.extend_from_slice(&v6.octets()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(payload: &[u8]) -> Segment<'_> {
        Segment {
            src: "10.0.0.1:1000".parse().unwrap(),
            dst: "10.0.0.2:80".parse().unwrap(),
            seq: u32::MAX - 1,
            ack: 7,
            flags: Flags::ACK.with(Flags::PSH).with(Flags::FIN),
            window: 512,
            urgent: 0,
            options: Options { timestamps: Some((1, 2)), ..Options::default() },
            ecn: 2,
            payload,
        }
    }

    #[test]
    fn emitted_packets_parse_back() {
        let v4 = segment(b"odd");
        assert_eq!(parse(&v4.emit()), Ok(Parsed::Tcp(v4)));
        let v6 = Segment { src: "[fd00::1]:1".parse().unwrap(), dst: "[fd00::2]:2".parse().unwrap(), ..v4 };
        assert_eq!(parse(&v6.emit()), Ok(Parsed::Tcp(v6)));
    }

    #[test]
    fn a_partial_checksum_is_not_corrupt_and_a_wrong_one_is() {
        let mut packet = segment(b"hello").emit();
        let pseudo = Sum::default()
            .pseudo_header([10, 0, 0, 1].into(), [10, 0, 0, 2].into(), TCP, packet.len() - 20)
            .folded();
        packet[36..38].copy_from_slice(&pseudo.to_be_bytes());
        assert!(parse(&packet).is_ok());
        packet[37] ^= 1;
        assert_eq!(parse(&packet), Err(Malformed::Checksum));
    }

    #[test]
    fn what_a_receivers_kernel_drops_is_not_read() {
        let sound = segment(b"hello").emit();
        let mut broken = sound.clone();
        broken[10] ^= 0x5a;
        assert_eq!(parse(&broken), Err(Malformed::Header));
        // Loose source route, record route, padding: well-formed options, which a receiver may act on.
        for option in [[131, 3, 4, 0], [7, 3, 4, 0], [1, 1, 1, 0]] {
            let mut routed = [&sound[..20], &option, &sound[20..]].concat();
            routed[0] = 0x46;
            routed[3] += 4;
            routed[10..12].fill(0);
            let sum = Sum::default().add(&routed[..24]).finish();
            routed[10..12].copy_from_slice(&sum.to_be_bytes());
            assert_eq!(parse(&routed), Err(Malformed::IpOptions));
        }
        let v6 = Segment {
            src: "[fd00::1]:1".parse().unwrap(),
            dst: "[fd00::2]:2".parse().unwrap(),
            ..segment(b"hello")
        };
        let sound = v6.emit();
        for extension in [0, 43, 60] {
            let mut extended = [&sound[..40], &[TCP, 0, 1, 4, 0, 0, 0, 0], &sound[40..]].concat();
            extended[5] += 8;
            extended[6] = extension;
            assert_eq!(parse(&extended), Err(Malformed::IpOptions));
        }
    }

    #[test]
    fn a_super_packet_splits_into_segments_that_wrap() {
        let payload = [9; 25];
        let mut packets = Vec::new();
        segment(&payload).emit_split(10, |packet| packets.push(packet));
        let pieces: Vec<_> = packets
            .iter()
            .map(|packet| match parse(packet) {
                Ok(Parsed::Tcp(piece)) => (piece.seq, piece.payload.len(), piece.flags.has(Flags::FIN)),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(pieces, [(u32::MAX - 1, 10, false), (8, 10, false), (18, 5, true)]);
    }

    #[test]
    fn truncation_anywhere_is_an_error() {
        let packet = segment(b"payload").emit();
        for length in 0..packet.len() {
            assert!(parse(&packet[..length]).is_err(), "{length}");
        }
    }
}
