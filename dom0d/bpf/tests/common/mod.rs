//! Programs in the kernel with one server, whose vif is the loopback interface as a test-run has it, and frames
//! for them.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use understudy_bpf::layout::Server;
use understudy_bpf::{Programs, Settings, Tap, load};

/// linux/pkt_cls.h
pub(crate) const TC_ACT_UNSPEC: i32 = -1;
pub(crate) const TC_ACT_OK: i32 = 0;
pub(crate) const TC_ACT_SHOT: i32 = 2;
pub(crate) const TC_ACT_REDIRECT: i32 = 7;

pub(crate) const PSC_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(crate) const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
pub(crate) const PORT: u16 = 6379;
pub(crate) const CONVERSATIONS: u32 = 16;
/// The server's, which is the OVM until another slot is activated.
pub(crate) const SLOT: usize = 3;
const LOOPBACK: u32 = 1;

pub(crate) struct Bench {
    pub(crate) programs: Programs,
    pub(crate) tap: Tap,
}

/// Whether there is one, and what the policy is while there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Daemon {
    /// It has written its heartbeat while the segment was under way: the kernel read the time before.
    Present,
    /// No heartbeat ever came; `serve`.
    AwayServe,
    /// No heartbeat ever came; `protect`.
    #[allow(dead_code)] // Of one of the two tests that this is compiled for.
    AwayProtect,
}

/// Of the PSC, the server, and a client.
pub(crate) fn addresses(v6: bool) -> (IpAddr, IpAddr, SocketAddr) {
    if v6 {
        ("fd77::100".parse().unwrap(), "fd77::11".parse().unwrap(), "[fd77::1]:40000".parse().unwrap())
    } else {
        ("10.77.0.100".parse().unwrap(), "10.77.0.11".parse().unwrap(), "10.77.0.1:40000".parse().unwrap())
    }
}

pub(crate) fn bench(daemon: Daemon) -> Bench {
    bench_in_vlan(daemon, None)
}

pub(crate) fn bench_in_vlan(daemon: Daemon, vlan: Option<u16>) -> Bench {
    let settings = Settings {
        psc: vec![addresses(false).0, addresses(true).0],
        psc_mac: PSC_MAC,
        vlan,
        ports: vec![80, PORT],
        conversations: CONVERSATIONS,
        daemon_grace: Duration::from_secs(1),
        serve: daemon != Daemon::AwayProtect,
        pins: None,
    };
    let (programs, mut tap) = load(&settings).expect("the programs load (root, CONFIG_BPF_SYSCALL)");
    let (IpAddr::V4(v4), IpAddr::V6(v6)) = (addresses(false).1, addresses(true).1) else { unreachable!() };
    let guest =
        Server { ifindex: LOOPBACK, has_v4: 1, has_v6: 1, mac: GUEST_MAC, v4: v4.octets(), v6: v6.octets() };
    tap.set_server(SLOT, guest);
    if daemon == Daemon::Present {
        tap.beat(u64::MAX >> 1);
    }
    tap.activate(Some(SLOT));
    Bench { programs, tap }
}

/// Of 16-bit words (RFC 1071).
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0))).sum()
}

pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

pub(crate) fn frame(packet: &[u8], source: [u8; 6], destination: [u8; 6], v6: bool) -> Vec<u8> {
    let mut frame = [destination, source].concat();
    frame.extend(if v6 { [0x86, 0xdd] } else { [8, 0] });
    frame.extend(packet);
    frame
}
