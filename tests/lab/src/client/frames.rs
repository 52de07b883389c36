//! Ethernet frames with IP and TCP inside, built field by field so that each can be wrong on purpose.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// TCP flag bits.
pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const PSH: u8 = 0x08;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const URG: u8 = 0x20;

/// A MAC address.
pub(crate) type Mac = [u8; 6];

/// To everybody.
pub(crate) const BROADCAST: Mac = [0xff; 6];

/// A frame that says nothing but who it is from and for: of a type that is free for experiments (IEEE 802).
pub(crate) fn bare(source: Mac, destination: Mac) -> Vec<u8> {
    let mut frame = [destination, source].concat();
    frame.extend_from_slice(&[0x88, 0xb5]);
    frame.resize(60, 0);
    frame
}

/// An ARP announcement (RFC 5227 section 3) that `address` is at `mac`, to everybody.
pub(crate) fn arp_announcement(mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    arp(2, (mac, address), (BROADCAST, address), BROADCAST)
}

/// An ARP message of this operation from the sender to the target, in a frame to `destination`.
pub(crate) fn arp(
    operation: u8,
    sender: (Mac, Ipv4Addr),
    target: (Mac, Ipv4Addr),
    destination: Mac,
) -> Vec<u8> {
    let mut frame = [destination, sender.0].concat();
    frame.extend_from_slice(&[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, operation]);
    for (mac, address) in [sender, target] {
        frame.extend_from_slice(&mac);
        frame.extend_from_slice(&address.octets());
    }
    frame.resize(60, 0);
    frame
}

/// The answer of whoever has `address` at `mac` to an ARP question for it; `None` to any other frame.
pub(crate) fn arp_answer(frame: &[u8], mac: Mac, address: Ipv4Addr) -> Option<Vec<u8>> {
    let question = frame.get(12..42).filter(|question| question[..2] == [0x08, 0x06] && question[9] == 1)?;
    if question[26..30] != address.octets() {
        return None;
    }
    let (asker_mac, asker) = (&question[10..16], &question[16..20]);
    let mut answer = [asker_mac, &mac, &[0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2], &mac].concat();
    answer.extend_from_slice(&address.octets());
    answer.extend_from_slice(asker_mac);
    answer.extend_from_slice(asker);
    answer.resize(60, 0);
    Some(answer)
}

/// An unsolicited neighbour advertisement (RFC 4861 section 4.4) that `address` is at `mac`, to all nodes, with the
/// override flag.
pub(crate) fn advertisement(mac: Mac, address: Ipv6Addr) -> Vec<u8> {
    discovery(136, mac, address, address)
}

/// A neighbour solicitation (RFC 4861 section 4.3) of `source` at `mac` for `target`, to all nodes.
pub(crate) fn solicitation(mac: Mac, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    discovery(135, mac, source, target)
}

/// A message of neighbour discovery of this type, to all nodes, with `mac` as the link-layer address that it is about.
pub(crate) fn discovery(kind: u8, mac: Mac, source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let (flags, option) = if kind == 136 { (0x20, 2) } else { (0, 1) };
    let mut icmp = vec![kind, 0, 0, 0, flags, 0, 0, 0];
    icmp.extend_from_slice(&target.octets());
    icmp.extend_from_slice(&[option, 1]);
    icmp.extend_from_slice(&mac);
    let length = (icmp.len() as u32).to_be_bytes();
    let sum = checksum(&[&source.octets(), &all_nodes.octets(), &length, &[0, 0, 0, 58], &icmp]);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = [[0x33, 0x33, 0, 0, 0, 1], mac].concat();
    frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend_from_slice(&(icmp.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[58, 255]);
    frame.extend_from_slice(&source.octets());
    frame.extend_from_slice(&all_nodes.octets());
    frame.extend_from_slice(&icmp);
    frame
}

/// An IPv6 frame with a hop-by-hop header (RFC 8200 section 4.3) that holds padding only before what it has.
pub(crate) fn behind_options(frame: &[u8]) -> Vec<u8> {
    let mut longer = frame[..54].to_vec();
    longer.extend_from_slice(&[frame[20], 0, 1, 4, 0, 0, 0, 0]);
    longer.extend_from_slice(&frame[54..]);
    longer[20] = 0;
    let length = u16::from_be_bytes([frame[18], frame[19]]) + 8;
    longer[18..20].copy_from_slice(&length.to_be_bytes());
    longer
}

/// A frame with these tags.
pub(crate) fn tagged(frame: &[u8], tags: &[u8]) -> Vec<u8> {
    [&frame[..12], tags, &frame[12..]].concat()
}

/// One TCP segment in one frame; [`Segment::frame`] gives its bytes, correct unless changed after.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) sequence: u32,
    pub(crate) acknowledgment: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// Raw options; padded to a multiple of four.
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Segment {
    pub(crate) fn new(from: SocketAddr, to: SocketAddr, flags: u8) -> Self {
        Self {
            from,
            to,
            sequence: 0,
            acknowledgment: 0,
            flags,
            window: 64_240,
            options: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// The whole frame with right lengths and checksums.
    pub(crate) fn frame(&self, source: Mac, destination: Mac) -> Vec<u8> {
        let tcp = self.tcp();
        let mut frame = Vec::new();
        frame.extend_from_slice(&destination);
        frame.extend_from_slice(&source);
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                frame.extend_from_slice(&[0x08, 0x00]);
                let mut ip = vec![0x45, 0];
                ip.extend_from_slice(&((20 + tcp.len()) as u16).to_be_bytes());
                ip.extend_from_slice(&[0, 0, 0x40, 0, 64, 6, 0, 0]);
                ip.extend_from_slice(&from.octets());
                ip.extend_from_slice(&to.octets());
                let sum = checksum(&[&ip]);
                ip[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend_from_slice(&ip);
            }
            (from, to) => {
                frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend_from_slice(&(tcp.len() as u16).to_be_bytes());
                frame.extend_from_slice(&[6, 64]);
                frame.extend_from_slice(&octets(from));
                frame.extend_from_slice(&octets(to));
            }
        }
        frame.extend_from_slice(&tcp);
        frame
    }

    fn tcp(&self) -> Vec<u8> {
        let mut options = self.options.clone();
        options.resize(options.len().div_ceil(4) * 4, 0);
        let mut tcp = Vec::new();
        tcp.extend_from_slice(&self.from.port().to_be_bytes());
        tcp.extend_from_slice(&self.to.port().to_be_bytes());
        tcp.extend_from_slice(&self.sequence.to_be_bytes());
        tcp.extend_from_slice(&self.acknowledgment.to_be_bytes());
        tcp.push((((20 + options.len()) / 4) as u8) << 4);
        tcp.push(self.flags);
        tcp.extend_from_slice(&self.window.to_be_bytes());
        tcp.extend_from_slice(&[0; 4]);
        tcp.extend_from_slice(&options);
        tcp.extend_from_slice(&self.payload);
        let mut pseudo = Vec::new();
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                pseudo.extend_from_slice(&from.octets());
                pseudo.extend_from_slice(&to.octets());
            }
            (from, to) => {
                pseudo.extend_from_slice(&octets(from));
                pseudo.extend_from_slice(&octets(to));
            }
        }
        pseudo.extend_from_slice(&(tcp.len() as u32).to_be_bytes());
        pseudo.extend_from_slice(&[0, 0, 0, 6]);
        let sum = checksum(&[&pseudo, &tcp]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }
}

/// What is needed of a captured TCP segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    pub(crate) source: Mac,
    pub(crate) destination: Mac,
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) sequence: u32,
    pub(crate) acknowledgment: u32,
    pub(crate) flags: u8,
    /// 0 if it has no timestamps where Linux lays them out.
    pub(crate) tsval: u32,
    pub(crate) payload: usize,
}

/// Reads a frame's TCP segment; `None` for anything else, and for what is cut short.
pub(crate) fn parse(frame: &[u8]) -> Option<Seen> {
    let destination: Mac = frame.get(0..6)?.try_into().ok()?;
    let source: Mac = frame.get(6..12)?.try_into().ok()?;
    let (from, to, tcp) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let ip = frame.get(14..)?;
            let header = usize::from(ip.first()? & 0x0f) * 4;
            let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
            if *ip.get(9)? != 6 {
                return None;
            }
            let from: [u8; 4] = ip.get(12..16)?.try_into().ok()?;
            let to: [u8; 4] = ip.get(16..20)?.try_into().ok()?;
            (IpAddr::from(from), IpAddr::from(to), ip.get(header..total)?)
        }
        [0x86, 0xdd] => {
            let ip = frame.get(14..)?;
            let length = usize::from(u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?));
            if *ip.get(6)? != 6 {
                return None;
            }
            let from: [u8; 16] = ip.get(8..24)?.try_into().ok()?;
            let to: [u8; 16] = ip.get(24..40)?.try_into().ok()?;
            (IpAddr::from(from), IpAddr::from(to), ip.get(40..40 + length)?)
        }
        _ => return None,
    };
    let word = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
    let long = |at: usize| Some(u32::from_be_bytes(tcp.get(at..at + 4)?.try_into().ok()?));
    let header = usize::from(*tcp.get(12)? >> 4) * 4;
    Some(Seen {
        source,
        destination,
        from: SocketAddr::new(from, word(0)?),
        to: SocketAddr::new(to, word(2)?),
        sequence: long(4)?,
        acknowledgment: long(8)?,
        flags: *tcp.get(13)?,
        tsval: if tcp.get(20..24) == Some(&[1, 1, 8, 10]) { long(24)? } else { 0 },
        payload: tcp.len().saturating_sub(header),
    })
}

fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The Internet checksum (RFC 1071) over parts of even length, the last one excepted.
pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
