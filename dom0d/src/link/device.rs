//! One interface: libpcap captures from it, a packet socket injects into it.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};

use pcap::{Active, Capture, Direction, Linktype};
use understudy_bpf::{Cut, Injector, ignore_outgoing};

use super::frame::Mac;

/// Longest frame taken whole. libpcap's slots are this long and a header, in blocks of a power of two:
/// a few bytes more, and each would take 128 KiB instead of 64. Linux fills a GSO super-packet to 65,536
/// bytes less room for all headers (321 bytes), and GRO to whole segments, so none is longer in practice;
/// one that is would be counted and dropped.
const SNAPLEN: i32 = 65_450;

/// An open interface. Injected frames are not captured.
pub(crate) struct Device {
    name: String,
    capture: Capture<Active>,
    injector: Injector,
    /// Frames that were cut off, which the capture can't do with what libpcap was told.
    truncated: u64,
}

/// Why an interface can't be used (any more).
#[derive(Debug, thiserror::Error)]
#[error("{interface}: {error}")]
pub(crate) struct DeviceError {
    interface: String,
    error: String,
}

/// Why a frame was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SendError {
    /// The interface's queue is full (ENOBUFS, EAGAIN).
    QueueFull,
    /// Longer than the interface takes (EMSGSIZE).
    TooLong,
    /// The interface is down or gone (ENETDOWN, ENXIO, ENODEV).
    Down,
    /// Something else.
    Other,
}

impl Device {
    /// Opens an interface for what passes `filter` (in pcap's language) and comes from outside. What is sent is tagged
    /// with the VLAN, if one is given; captured frames are as they are on the wire.
    pub(crate) fn open(
        name: &str,
        vlan: Option<u16>,
        filter: &str,
        buffer: u32,
    ) -> Result<Self, DeviceError> {
        let failed = |error: String| DeviceError { interface: name.to_owned(), error };
        let capture = Capture::from_device(name)
            .map_err(|error| failed(error.to_string()))?
            // A frame is handed over as it comes; without this libpcap collects them in blocks.
            .immediate_mode(true)
            .snaplen(SNAPLEN)
            .buffer_size(i32::try_from(buffer).unwrap_or(i32::MAX))
            .open()
            .and_then(Capture::setnonblock)
            .map_err(|error| failed(error.to_string()))?;
        if capture.get_datalink() != Linktype::ETHERNET {
            return Err(failed("is no Ethernet interface".to_owned()));
        }
        let injector = Injector::open(name, vlan);
        let injector = injector.map_err(|error| failed(format!("can't be sent to: {error}")))?;
        // Else a copy of each frame that is injected would be captured, and dropped only then; as it is where the
        // kernel (before 4.20) does not know this.
        let _ = ignore_outgoing(&capture);
        let mut device = Self { name: name.to_owned(), capture, injector, truncated: 0 };
        device
            .capture
            .filter(filter, true)
            .map_err(|error| failed(format!("the filter {filter:?} is refused: {error}")))?;
        // Not `inbound` in the filter: libpcap runs a new filter over the first frame by itself, where that
        // word matches nothing, and an ARP question lost costs its asker a second.
        device
            .capture
            .direction(Direction::In)
            .map_err(|error| failed(format!("the direction can't be set: {error}")))?;
        Ok(device)
    }

    /// What to poll for reading.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.capture.as_fd()
    }

    /// Puts the next frame into `frame`; `false` if there is none at the moment.
    pub(crate) fn receive(&mut self, frame: &mut Vec<u8>) -> Result<bool, DeviceError> {
        loop {
            match self.capture.next_packet() {
                Ok(packet) if packet.header.caplen < packet.header.len => self.truncated += 1,
                Ok(packet) => {
                    frame.clear();
                    frame.extend_from_slice(packet.data);
                    return Ok(true);
                }
                Err(pcap::Error::TimeoutExpired | pcap::Error::NoMorePackets) => return Ok(false),
                Err(error) => {
                    return Err(DeviceError { interface: self.name.clone(), error: error.to_string() });
                }
            }
        }
    }

    /// Sends a frame, given without a tag, out of the interface; a large one in segments.
    pub(crate) fn send(&mut self, frame: &[u8], cut: Option<Cut>) -> Result<(), SendError> {
        // It does not wait: the full queue of a frozen guest would stop everybody.
        self.injector.send(frame, cut).map_err(|error| match error {
            nix::Error::ENOBUFS | nix::Error::EAGAIN => SendError::QueueFull,
            nix::Error::EMSGSIZE => SendError::TooLong,
            nix::Error::ENETDOWN | nix::Error::ENXIO | nix::Error::ENODEV => SendError::Down,
            _ => SendError::Other,
        })
    }

    /// Frames lost since it was opened: for want of room in the capture buffer, and cut off.
    pub(crate) fn lost(&mut self) -> Lost {
        let dropped = self.capture.stats().map_or(0, |stats| stats.dropped);
        Lost { dropped: u64::from(dropped), truncated: self.truncated }
    }
}

/// Frames that never reached the daemon whole.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lost {
    /// For want of room in the capture buffer.
    pub(crate) dropped: u64,
    /// Cut off.
    pub(crate) truncated: u64,
}

/// What the anchor's far end must give: frames for the PSC, and neighbours' questions and answers.
pub(crate) fn anchor_filter(psc_mac: Mac) -> String {
    in_any_vlan(&format!("arp or icmp6 or ether dst {}", mac_text(psc_mac)))
}

/// With a tag or without. Which it must be is not for a filter to say: what has another is counted.
fn in_any_vlan(filter: &str) -> String {
    // `vlan` moves the offsets of all that follows it, so it must come last.
    format!("({filter}) or (vlan and ({filter}))")
}

/// A SYN, and no answer to one: a connection of the server's own. (`tcp` looks into IPv4 only.)
const OPENS: &str = "tcp[13] & 0x12 = 2 or (ip6[6] = 6 and ip6[53] & 0x12 = 2)";

/// What a server's vif must give: the service's segments, and neighbours' questions.
pub(crate) fn server_filter(addresses: &[IpAddr], ports: &[u16]) -> String {
    let hosts: Vec<String> = addresses.iter().map(|address| format!("src host {address}")).collect();
    let ports: Vec<String> = ports.iter().map(|port| format!("tcp src port {port}")).collect();
    // Beside plain segments: IPv4 fragments behind the first, and IPv6 with extension headers
    // (hop-by-hop, routing, fragment, destination), of which `tcp` sees nothing.
    in_any_vlan(&format!(
        "arp or icmp6 or (({}) and ({} or {OPENS} or ip[6:2] & 0x1fff != 0 or ip6[6] = 0 or ip6[6] = 43 or ip6[6] = 44 or ip6[6] = 60))",
        hosts.join(" or "),
        ports.join(" or ")
    ))
}

/// What is left to capture at a server's vif where the kernel takes the service's plain segments itself.
pub(crate) fn odd_server_filter(addresses: &[IpAddr]) -> String {
    let hosts: Vec<String> = addresses.iter().map(|address| format!("src host {address}")).collect();
    in_any_vlan(&format!(
        "arp or icmp6 or (({}) and ({OPENS} or ip[6:2] & 0x3fff != 0 or ip6[6] = 0 or ip6[6] = 43 or ip6[6] = 44 or ip6[6] = 60))",
        hosts.join(" or ")
    ))
}

/// A MAC as people write it.
pub(crate) fn mac_text(mac: Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}
