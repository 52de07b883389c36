//! Sends frames to an interface through a packet socket. The kernel cuts large ones into segments and fills in their
//! checksums (packet(7), PACKET_VNET_HDR).
#![allow(unsafe_code)]

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::uio::writev;

/// How the kernel cuts a large frame (linux/virtio_net.h: IPv4 or IPv6 with TCP behind its header).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Bytes of payload in each segment.
    pub segment: u16,
    /// Where the TCP header begins in the frame.
    pub tcp: u16,
    /// Where the payload begins.
    pub payload: u16,
    /// It is IPv6.
    pub is_ipv6: bool,
}

/// See the module. Captures for which [`ignore_outgoing`] was called do not see what it sends.
pub struct Injector {
    socket: OwnedFd,
    /// The tag behind each frame's addresses, if it is sent into a VLAN.
    tag: Option<[u8; TAG]>,
}

/// Both addresses of an Ethernet frame; the tag is behind them.
const ADDRESSES: usize = 12;
/// A tag of IEEE 802.1Q.
const TAG: usize = 4;
const TAG_TYPE: u16 = 0x8100;

/// struct virtio_net_hdr
const HEADER: usize = 10;
/// linux/if_packet.h
const PACKET_VNET_HDR: libc::c_int = 15;
const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
/// linux/virtio_net.h
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
/// Of the checksum in a TCP header.
const CHECKSUM: u16 = 16;

impl Injector {
    /// Opens an interface. Its frames are tagged with this VLAN, if there is one.
    pub fn open(interface: &str, vlan: Option<u16>) -> nix::Result<Self> {
        // Of no protocol: it receives nothing.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        set(&socket, PACKET_VNET_HDR)?;
        let index = if_nametoindex(interface)?.cast_signed();
        // SAFETY: all zeros is a value of this C struct of integers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address is of the length given, and the kernel only reads it.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        nix::errno::Errno::result(result)?;
        let tag = vlan.map(|vlan| {
            let ([a, b], [c, d]) = (TAG_TYPE.to_be_bytes(), vlan.to_be_bytes());
            [a, b, c, d]
        });
        Ok(Self { socket, tag })
    }

    /// Sends a frame, given without a tag. The kernel cuts a large one and completes its TCP checksum, in which only the
    /// pseudo-header counts so far.
    pub fn send(&self, frame: &[u8], cut: Option<Cut>) -> nix::Result<()> {
        let tag = self.tag.as_ref().map_or(&[][..], |tag| tag);
        let further = tag.len() as u16;
        let mut header = [0; HEADER];
        if let Some(cut) = cut {
            header[0] = NEEDS_CSUM;
            header[1] = if cut.is_ipv6 { GSO_TCPV6 } else { GSO_TCPV4 };
            header[2..4].copy_from_slice(&(cut.payload + further).to_ne_bytes());
            header[4..6].copy_from_slice(&cut.segment.to_ne_bytes());
            header[6..8].copy_from_slice(&(cut.tcp + further).to_ne_bytes());
            header[8..10].copy_from_slice(&CHECKSUM.to_ne_bytes());
        }
        let (addresses, rest) = frame.split_at_checked(ADDRESSES).ok_or(nix::Error::EINVAL)?;
        let parts = [&header[..], addresses, tag, rest].map(IoSlice::new);
        writev(&self.socket, &parts).map(|_| ())
    }
}

/// Makes a capturing packet socket ignore what this host sends out of its interface: the kernel makes no copy of it.
pub fn ignore_outgoing(capture: impl AsFd) -> nix::Result<()> {
    set(&capture, PACKET_IGNORE_OUTGOING)
}

fn set(socket: &impl AsFd, option: libc::c_int) -> nix::Result<()> {
    let on: libc::c_int = 1;
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the value is an int, of the length given, and the kernel only reads it.
    let result =
        unsafe { libc::setsockopt(socket, libc::SOL_PACKET, option, (&raw const on).cast(), length) };
    nix::errno::Errno::result(result).map(|_| ())
}
