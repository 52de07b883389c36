//! Reads one IP packet as a TCP segment, by smoltcp's wire views: the checkers must not share the
//! parser of the engine that they check.

use core::fmt;
use core::net::{IpAddr, SocketAddr};

use smoltcp::wire::{IpAddress, IpProtocol, IpVersion, Ipv4Packet, Ipv6Packet, TcpOption, TcpPacket};

/// A TCP segment and what an observer must know of its packet.
#[derive(Clone, Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) seq: u32,
    pub(crate) ack: Option<u32>,
    pub(crate) syn: bool,
    pub(crate) fin: bool,
    pub(crate) rst: bool,
    pub(crate) window: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) window_scale: Option<u8>,
    pub(crate) sacks: [Option<(u32, u32)>; 3],
    pub(crate) timestamps: Option<(u32, u32)>,
    pub(crate) payload: &'a [u8],
}

impl<'a> Segment<'a> {
    /// Parses and verifies lengths and checksums.
    pub(crate) fn parse(packet: &'a [u8]) -> Result<Self, &'static str> {
        let (mut segment, options) = Self::overlooking_options(packet)?;
        segment.read(options)?;
        Ok(segment)
    }

    /// As a host takes it that does not mind odd options, which Linux is.
    pub(crate) fn taken(packet: &'a [u8]) -> Result<Self, &'static str> {
        let (mut segment, options) = Self::overlooking_options(packet)?;
        let _ = segment.read(options);
        Ok(segment)
    }

    fn overlooking_options(packet: &'a [u8]) -> Result<(Self, &'a [u8]), &'static str> {
        // smoltcp's view reads the first byte unasked.
        if packet.is_empty() {
            return Err("no bytes");
        }
        let (src, dst, tcp_bytes): (IpAddr, IpAddr, &[u8]) =
            match IpVersion::of_packet(packet).map_err(|_| "no IP packet")? {
                IpVersion::Ipv4 => {
                    let ip = Ipv4Packet::new_checked(packet).map_err(|_| "bad IPv4 header")?;
                    if !ip.verify_checksum() {
                        return Err("bad IPv4 header checksum");
                    }
                    if ip.next_header() != IpProtocol::Tcp {
                        return Err("not TCP");
                    }
                    if usize::from(ip.total_len()) != packet.len() {
                        return Err("IPv4 length differs from the packet's");
                    }
                    if ip.more_frags() || ip.frag_offset() != 0 {
                        return Err("IPv4 fragment");
                    }
                    let header = usize::from(ip.header_len());
                    (ip.src_addr().into(), ip.dst_addr().into(), &packet[header..])
                }
                IpVersion::Ipv6 => {
                    let ip = Ipv6Packet::new_checked(packet).map_err(|_| "bad IPv6 header")?;
                    if ip.next_header() != IpProtocol::Tcp {
                        return Err("not TCP");
                    }
                    if ip.total_len() != packet.len() {
                        return Err("IPv6 length differs from the packet's");
                    }
                    (ip.src_addr().into(), ip.dst_addr().into(), &packet[40..])
                }
            };
        let tcp = TcpPacket::new_checked(tcp_bytes).map_err(|_| "bad TCP header")?;
        if !tcp.verify_checksum(&IpAddress::from(src), &IpAddress::from(dst)) {
            return Err("bad TCP checksum");
        }
        let segment = Segment {
            src: SocketAddr::new(src, tcp.src_port()),
            dst: SocketAddr::new(dst, tcp.dst_port()),
            seq: tcp.seq_number().0 as u32,
            ack: tcp.ack().then(|| tcp.ack_number().0 as u32),
            syn: tcp.syn(),
            fin: tcp.fin(),
            rst: tcp.rst(),
            window: tcp.window_len(),
            mss: None,
            window_scale: None,
            sacks: [None; 3],
            timestamps: None,
            payload: &tcp_bytes[usize::from(tcp.header_len())..],
        };
        Ok((segment, &tcp_bytes[20..usize::from(tcp.header_len())]))
    }

    fn read(&mut self, mut options: &[u8]) -> Result<(), &'static str> {
        while !options.is_empty() {
            let (rest, option) = TcpOption::parse(options).map_err(|_| "bad TCP option")?;
            match option {
                TcpOption::EndOfList => break,
                TcpOption::MaxSegmentSize(mss) => self.mss = Some(mss),
                TcpOption::WindowScale(scale) => self.window_scale = Some(scale),
                TcpOption::SackRange(ranges) => self.sacks = ranges,
                TcpOption::TimeStamp { tsval, tsecr } => self.timestamps = Some((tsval, tsecr)),
                _ => {}
            }
            options = rest;
        }
        Ok(())
    }
}

impl fmt::Display for Segment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {} ", self.src, self.dst)?;
        for (set, letter) in [(self.syn, 'S'), (self.fin, 'F'), (self.rst, 'R')] {
            if set {
                write!(f, "{letter}")?;
            }
        }
        write!(f, " seq {}", self.seq)?;
        if !self.payload.is_empty() {
            write!(f, "+{}", self.payload.len())?;
        }
        if let Some(ack) = self.ack {
            write!(f, " ack {ack}")?;
        }
        write!(f, " win {}", self.window)?;
        if let Some(mss) = self.mss {
            write!(f, " mss {mss}")?;
        }
        if let Some(scale) = self.window_scale {
            write!(f, " ws {scale}")?;
        }
        for (left, right) in self.sacks.iter().flatten() {
            write!(f, " sack {left}-{right}")?;
        }
        if let Some((val, ecr)) = self.timestamps {
            write!(f, " ts {val}/{ecr}")?;
        }
        Ok(())
    }
}
