//! The Internet checksum (RFC 1071) over TCP and its pseudo-header.

use core::net::IpAddr;

/// A running one's-complement sum.
#[derive(Clone, Copy, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// Adds bytes that begin at an even offset of the summed data.
    pub(super) fn add(self, bytes: &[u8]) -> Self {
        // Sum in the host's byte order, which compilers vectorise, and swap the folded sum (RFC 1071 §2 (B)).
        let mut sum = 0;
        let mut words = bytes.chunks_exact(4);
        for word in &mut words {
            sum += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
        }
        let rest = words.remainder();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        sum += u64::from(u32::from_ne_bytes(last));
        Self(self.0 + u64::from(u16::from_be(Self(sum).folded())))
    }

    /// Adds the pseudo-header of RFC 9293 §3.1 (RFC 8200 §8.1 for IPv6).
    pub(super) fn pseudo_header(self, src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> Self {
        let sum = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.add(&src.octets()).add(&dst.octets()),
            (src, dst) => self.add(&v6_octets(src)).add(&v6_octets(dst)),
        };
        Self(sum.0 + u64::from(protocol) + length as u64)
    }

    /// The folded sum, not complemented: the value of a partial checksum field.
    pub(super) fn folded(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        sum as u16
    }

    /// The checksum field's value.
    pub(super) fn finish(self) -> u16 {
        !self.folded()
    }
}

fn v6_octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}
