//! What is read of an IP packet before the engine has it. Packets come from guests and clients: nothing here panics.

use std::net::{IpAddr, SocketAddr};

/// Who sent it.
pub(super) fn source_address(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?.into()),
        6 => Some(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?.into()),
        _ => None,
    }
}

/// Where a connection is opened to, if this is its first segment.
pub(super) fn opens(packet: &[u8]) -> Option<SocketAddr> {
    let header = match packet.first()? >> 4 {
        4 if packet.get(9) == Some(&6) => usize::from(packet[0] & 0xf) * 4,
        6 if packet.get(6) == Some(&6) => 40,
        _ => return None,
    };
    let tcp = packet.get(header..header + 14)?;
    let is_syn = tcp[13] & 0x12 == 0x02;
    is_syn
        .then(|| Some(SocketAddr::new(destination_address(packet)?, u16::from_be_bytes([tcp[2], tcp[3]]))))?
}

/// Whom it is for.
pub(super) fn destination_address(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?.into()),
        6 => Some(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?.into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_syn_opens_a_connection_and_nothing_else_does() {
        let v4 = |flags: u8| {
            let mut packet = [0; 40];
            (packet[0], packet[9], packet[33]) = (0x45, 6, flags);
            packet[16..20].copy_from_slice(&[10, 0, 0, 5]);
            packet[22..24].copy_from_slice(&5432_u16.to_be_bytes());
            packet
        };
        assert_eq!(opens(&v4(0x02)), Some("10.0.0.5:5432".parse().unwrap()));
        // With ECN on offer (RFC 3168 §6.1.1).
        assert_eq!(opens(&v4(0xc2)), Some("10.0.0.5:5432".parse().unwrap()));
        for flags in [0x12, 0x10, 0x18, 0x04, 0x14, 0x11] {
            assert_eq!(opens(&v4(flags)), None, "{flags:#x}");
        }
        let mut udp = v4(0x02);
        udp[9] = 17;
        assert_eq!(opens(&udp), None);
        let mut v6 = [0; 60];
        (v6[0], v6[6], v6[53], v6[39], v6[43]) = (0x60, 6, 0x02, 1, 80);
        assert_eq!(opens(&v6), Some("[::1]:80".parse().unwrap()));
        for length in 0..33 {
            assert_eq!(opens(&v4(0x02)[..length]), None);
        }
    }
}
