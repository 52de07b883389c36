//! ICMP errors that quote a TCP segment of the service (RFC 792, RFC 4443, RFC 1191, RFC 8201).
//!
//! A guest that never learns of a small path MTU sends into a black hole for ever. So the daemon passes such an error
//! on, with the quoted header translated as the segment itself was.

use core::net::{IpAddr, SocketAddr};

use super::checksum::Sum;
use super::{ICMP_V6, write_ip_header};

/// What an ICMP error says about the quoted segment's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IcmpError {
    /// "Fragmentation needed" or "packet too big", with the MTU of the next hop in bytes.
    TooBig(u32),
    /// Another "destination unreachable".
    Unreachable,
}

/// An ICMP error and the TCP segment it quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Icmp<'a> {
    pub(crate) from: IpAddr,
    pub(crate) to: IpAddr,
    pub(crate) error: IcmpError,
    /// Source of the quoted segment.
    pub(crate) quoted_src: SocketAddr,
    /// Destination of the quoted segment.
    pub(crate) quoted_dst: SocketAddr,
    /// Sequence number of the quoted segment.
    pub(crate) quoted_seq: u32,
    message: &'a [u8],
    quoted_tcp: usize,
}

/// The error in an ICMP message; `None` if the message is no error, or quotes less than 8 bytes of TCP.
pub(super) fn parse(from: IpAddr, to: IpAddr, protocol: u8, message: &[u8]) -> Option<Icmp<'_>> {
    let header = message.get(..8)?;
    let word = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    let v6 = protocol == ICMP_V6;
    let error = match (v6, header[0], header[1]) {
        (false, 3, 4) => IcmpError::TooBig(word & 0xffff),
        (true, 2, _) => IcmpError::TooBig(word),
        (false, 3, _) | (true, 1, _) => IcmpError::Unreachable,
        _ => return None,
    };
    let sum =
        if v6 { Sum::default().pseudo_header(from, to, ICMP_V6, message.len()) } else { Sum::default() };
    if sum.add(message).finish() != 0 {
        return None;
    }
    let quoted = &message[8..];
    let (src, dst, tcp): (IpAddr, IpAddr, usize) = if v6 {
        let header = quoted.get(..40).filter(|header| header[0] >> 4 == 6 && header[6] == 6)?;
        (super::ipv6_at(header, 8).into(), super::ipv6_at(header, 24).into(), 40)
    } else {
        let header = quoted.get(..20).filter(|header| header[0] >> 4 == 4 && header[9] == 6)?;
        let src: [u8; 4] = header[12..16].try_into().ok()?;
        let dst: [u8; 4] = header[16..20].try_into().ok()?;
        (src.into(), dst.into(), usize::from(header[0] & 0x0f) * 4)
    };
    let ports = quoted.get(tcp..tcp + 8)?;
    Some(Icmp {
        from,
        to,
        error,
        quoted_src: SocketAddr::new(src, u16::from_be_bytes([ports[0], ports[1]])),
        quoted_dst: SocketAddr::new(dst, u16::from_be_bytes([ports[2], ports[3]])),
        quoted_seq: u32::from_be_bytes([ports[4], ports[5], ports[6], ports[7]]),
        message,
        quoted_tcp: 8 + tcp,
    })
}

impl Icmp<'_> {
    /// The error as the server `guest` must see it: addressed to that server, and quoting the segment as the server
    /// sent it, with the sequence number `seq`.
    pub(crate) fn translated(&self, guest: IpAddr, seq: u32) -> Vec<u8> {
        let mut message = self.message.to_vec();
        let protocol = match guest {
            IpAddr::V4(v4) => {
                message[20..24].copy_from_slice(&v4.octets());
                super::ICMP
            }
            IpAddr::V6(v6) => {
                message[16..32].copy_from_slice(&v6.octets());
                ICMP_V6
            }
        };
        message[self.quoted_tcp + 4..self.quoted_tcp + 8].copy_from_slice(&seq.to_be_bytes());
        if guest.is_ipv4() {
            // The quoted IP header's checksum changes, because its source address changed.
            message[18..20].fill(0);
            let sum = Sum::default().add(&message[8..self.quoted_tcp]).finish();
            message[18..20].copy_from_slice(&sum.to_be_bytes());
        }
        message[2..4].fill(0);
        let sum = if guest.is_ipv6() {
            Sum::default().pseudo_header(self.from, guest, ICMP_V6, message.len())
        } else {
            Sum::default()
        };
        let sum = sum.add(&message).finish();
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut packet = Vec::with_capacity(40 + message.len());
        write_ip_header(&mut packet, self.from, guest, protocol, 0, message.len());
        packet.extend_from_slice(&message);
        packet
    }
}
