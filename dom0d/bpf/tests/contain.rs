//! Which frames pass from a held domain: one frame of each kind through the program, by BPF test-run. Needs root.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use understudy_bpf::layout::Hold;
use understudy_bpf::load_containment;

/// Test-runs come from here.
const LOOPBACK: u32 = 1;

const OWN4: [u8; 4] = [10, 77, 0, 12];
const OTHER4: [u8; 4] = [10, 77, 0, 100];
const OWN6: [u8; 16] = [0xfd, 0x77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x12];

fn ethernet(kind: u16, content: &[u8]) -> Vec<u8> {
    let mut frame = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
    frame.extend(kind.to_be_bytes());
    frame.extend(content);
    frame.resize(frame.len().max(60), 0);
    frame
}

fn arp(operation: u8, sender: [u8; 4]) -> Vec<u8> {
    let mut message = vec![0, 1, 8, 0, 6, 4, 0, operation, 2, 0, 0, 0, 0, 1];
    message.extend(sender);
    message.resize(28, 0);
    ethernet(0x0806, &message)
}

/// A packet with its ports behind a header of this many bytes, at this place among fragments.
fn ipv4(protocol: u8, header: u8, fragment: u16, ports: (u16, u16)) -> Vec<u8> {
    let mut packet = vec![0x40 | (header / 4), 0, 0, 48, 0, 0];
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend([OWN4, [10, 77, 0, 1]].concat());
    packet.resize(usize::from(header), 0);
    packet.extend(ports.0.to_be_bytes());
    packet.extend(ports.1.to_be_bytes());
    ethernet(0x0800, &packet)
}

fn ipv6(next: u8, content: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, content.len() as u8, next, 255];
    packet.extend([OWN6, OWN6].concat());
    packet.extend(content);
    ethernet(0x86dd, &packet)
}

fn advertisement(kind: u8, target: [u8; 16]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(target);
    ipv6(58, &message)
}

fn ports(to: u16) -> Vec<u8> {
    [5_000u16.to_be_bytes(), to.to_be_bytes()].concat()
}

#[test]
fn what_is_allowed_goes_on_and_nothing_else() {
    let (mut program, mut holds) = load_containment().unwrap();
    let mut hold = Hold { dhcp: 1, found: 1, ..Hold::default() };
    hold.udp[0] = 123;
    hold.tcp[15] = 443;
    hold.v4[4..].copy_from_slice(&OWN4);
    hold.v6[..16].copy_from_slice(&OWN6);
    let zero = [0; 16];
    let cases = [
        ("DNS, UDP", ipv4(17, 20, 0, (5_000, 53)), false),
        ("NTP", ipv4(17, 20, 0, (5_000, 123)), true),
        ("NTP behind IP options", ipv4(17, 28, 0, (5_000, 123)), true),
        ("a fragment behind the first", ipv4(17, 20, 1, (5_000, 123)), false),
        ("a first fragment", ipv4(17, 20, 0x2000, (5_000, 123)), true),
        ("HTTPS", ipv4(6, 20, 0, (5_000, 443)), true),
        ("NTP's port, TCP", ipv4(6, 20, 0, (5_000, 123)), false),
        ("port 0", ipv4(17, 20, 0, (5_000, 0)), false),
        ("DHCP", ipv4(17, 20, 0, (68, 67)), true),
        ("a DHCP server", ipv4(17, 20, 0, (67, 68)), false),
        ("an ICMP message", ipv4(1, 20, 0, (0, 123)), false),
        ("a header that is none", ipv4(17, 16, 0, (5_000, 123)), false),
        ("NTP over IPv6", ipv6(17, &ports(123)), true),
        ("behind options", ipv6(0, &ports(123)), false),
        ("an ARP answer of its own address", arp(2, OWN4), true),
        ("an ARP answer of another", arp(2, OTHER4), false),
        ("an ARP answer of none", arp(2, [0; 4]), false),
        ("an ARP question", arp(1, OWN4), false),
        ("an advertisement of its own address", advertisement(136, OWN6), true),
        ("an advertisement of none", advertisement(136, zero), false),
        ("a solicitation", advertisement(135, OWN6), false),
        ("a redirect", advertisement(137, OWN6), false),
        ("a second tag", ethernet(0x8100, &[0, 0, 8, 0]), false),
        ("some other protocol", ethernet(0x88b5, &[]), false),
    ];
    for (what, frame, _) in &cases {
        assert!(!program.rehearse(frame).unwrap(), "{what} is held though nobody is");
    }
    holds.set(&BTreeMap::from([(LOOPBACK, hold)])).unwrap();
    for (what, frame, goes_on) in &cases {
        assert_eq!(!program.rehearse(frame).unwrap(), *goes_on, "{what}");
    }
    let dropped = cases.iter().filter(|(.., goes_on)| !goes_on).count() as u64;
    assert_eq!(holds.dropped(), BTreeMap::from([(LOOPBACK, dropped)]));
    // If nothing is allowed, it can't be found either; the count continues.
    holds.set(&BTreeMap::from([(LOOPBACK, Hold { v4: hold.v4, v6: hold.v6, ..Hold::default() })])).unwrap();
    for (what, frame, _) in &cases {
        assert!(program.rehearse(frame).unwrap(), "{what} goes on though nothing is allowed");
    }
    assert_eq!(holds.dropped()[&LOOPBACK], dropped + cases.len() as u64);
    holds.set(&BTreeMap::new()).unwrap();
    assert!(!program.rehearse(&cases[0].1).unwrap() && holds.dropped().is_empty());
    // The OVM may send everything but segments under its own address from a port of a service.
    let mut ovm = Hold { is_ovm: 1, v4: hold.v4, v6: hold.v6, ..Hold::default() };
    ovm.tcp[1] = 6379;
    holds.set(&BTreeMap::from([(LOOPBACK, ovm)])).unwrap();
    let from = |port: u16| [port.to_be_bytes(), 40_000u16.to_be_bytes()].concat();
    for frame in [ipv4(6, 20, 0, (6379, 40_000)), ipv4(6, 24, 0x2000, (6379, 40_000)), ipv6(6, &from(6379))] {
        assert!(program.rehearse(&frame).unwrap(), "{frame:02x?}");
    }
    let mut of_other = ipv4(6, 20, 0, (6379, 40_000));
    of_other[26..30].copy_from_slice(&OTHER4);
    let others =
        [ipv4(17, 20, 0, (6379, 40_000)), ipv4(6, 20, 0, (80, 40_000)), ipv6(6, &from(80)), of_other];
    for frame in cases.iter().map(|(_, frame, _)| frame).chain(&others) {
        assert!(!program.rehearse(frame).unwrap(), "{frame:02x?}");
    }
    assert_eq!(holds.dropped()[&LOOPBACK], 0);
    holds.set(&BTreeMap::new()).unwrap();
    // An interface without rules yet.
    program.hold(LOOPBACK).unwrap();
    assert!(program.rehearse(&cases[1].1).unwrap());
    holds.set(&BTreeMap::from([(LOOPBACK, hold)])).unwrap();
    program.hold(LOOPBACK).unwrap();
    assert!(!program.rehearse(&cases[1].1).unwrap(), "what was said is forgotten");
}
