//! Frames that are built read back, and whatever else comes is taken apart without a panic.

#![allow(clippy::unwrap_used)]

use super::*;

const A: Mac = [2, 0, 0, 0, 0, 0xa];
const B: Mac = [2, 0, 0, 0, 0, 0xb];

fn v4(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, last)
}

fn v6(last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, last)
}

#[test]
fn an_arp_request_reads_back() {
    let frame = parse(&arp_request(A, v4(1), v4(2))).unwrap();
    assert_eq!((frame.source, frame.destination), (A, BROADCAST));
    assert_eq!(
        frame.content,
        Content::Arp(Arp { request: true, sender_mac: A, sender: v4(1), target: v4(2) })
    );
}

#[test]
fn an_arp_reply_goes_to_the_asker_alone() {
    let frame = parse(&arp_reply(A, v4(1), B, v4(2))).unwrap();
    assert_eq!((frame.source, frame.destination), (A, B));
    let Content::Arp(arp) = frame.content else {
        unreachable!("{frame:?}");
    };
    assert!(!arp.request);
    assert_eq!((arp.sender_mac, arp.sender), (A, v4(1)));
}

#[test]
fn a_solicitation_and_its_answer_read_back() {
    let frame = parse(&solicitation(A, v6(1), v6(0x1234))).unwrap();
    assert_eq!(frame.destination, [0x33, 0x33, 0xff, 0, 0x12, 0x34]);
    assert_eq!(
        frame.content,
        Content::Solicitation(Solicitation { source: v6(1), target: v6(0x1234), link: Some(A) })
    );
    let frame = parse(&advertisement(B, v6(0x1234), true, Some((A, v6(1))))).unwrap();
    assert_eq!((frame.source, frame.destination), (B, A));
    assert_eq!(
        frame.content,
        Content::Advertisement(Advertisement { target: v6(0x1234), link: Some(B), router: true })
    );
}

#[test]
fn a_probe_for_a_free_address_names_no_link_address() {
    let frame = parse(&solicitation(A, Ipv6Addr::UNSPECIFIED, v6(9))).unwrap();
    let Content::Solicitation(solicitation) = frame.content else {
        unreachable!("{frame:?}");
    };
    assert_eq!(solicitation.link, None);
    assert!(solicitation.source.is_unspecified());
}

#[test]
fn neighbour_discovery_that_crossed_a_router_or_is_corrupt_is_malformed() {
    let good = advertisement(A, v6(1), false, None);
    let mut routed = good.clone();
    routed[ETHERNET_HEADER + 7] = 254;
    assert_eq!(parse(&routed).unwrap().content, Content::Malformed);
    for byte in ETHERNET_HEADER + IPV6_HEADER + 1..good.len() {
        let mut corrupt = good.clone();
        corrupt[byte] ^= 1;
        assert_eq!(parse(&corrupt).unwrap().content, Content::Malformed, "byte {byte}");
    }
}

#[test]
fn ethernet_padding_is_no_part_of_the_packet() {
    let mut packet = vec![0x45, 0, 0, 20];
    packet.resize(20, 0);
    let mut frame = Vec::new();
    wrap_ip(&mut frame, A, B, &packet);
    frame.resize(60, 0);
    assert_eq!(parse(&frame).unwrap().content, Content::Ip(14..34));
}

#[test]
fn a_packet_longer_than_its_frame_is_malformed() {
    let mut packet = vec![0x45, 0, 0, 21];
    packet.resize(20, 0);
    let mut frame = Vec::new();
    wrap_ip(&mut frame, A, B, &packet);
    assert_eq!(parse(&frame).unwrap().content, Content::Malformed);
    let mut packet = vec![0x60, 0, 0, 0, 0, 9];
    packet.resize(48, 0);
    wrap_ip(&mut frame, A, B, &packet);
    assert_eq!(parse(&frame).unwrap().content, Content::Malformed);
}

/// With these bytes as its tag.
fn tagged(frame: &[u8], tag: [u8; 4]) -> Vec<u8> {
    [&frame[..12], &tag, &frame[12..]].concat()
}

#[test]
fn a_tag_names_the_vlan_or_a_priority_only() {
    let plain = arp_request(A, v4(1), v4(2));
    let content = parse(&plain).unwrap().content;
    for (tag, vlan) in
        [([0x81, 0, 0, 5], Some(5)), ([0x81, 0, 0xef, 0xfe], Some(0xffe)), ([0x81, 0, 0xe0, 0], None)]
    {
        let frame = parse(&tagged(&plain, tag)).unwrap();
        assert_eq!((frame.source, frame.destination), (A, BROADCAST));
        assert_eq!((frame.vlan, &frame.content), (vlan, &content), "{tag:02x?}");
    }
    let mut packet = vec![0x45, 0, 0, 20];
    packet.resize(20, 0);
    let mut frame = Vec::new();
    wrap_ip(&mut frame, A, B, &packet);
    assert_eq!(parse(&tagged(&frame, [0x81, 0, 0, 5])).unwrap().content, Content::Ip(18..38));
}

#[test]
fn a_tag_within_a_tag_is_seen_whatever_it_hides() {
    let plain = arp_request(A, v4(1), v4(2));
    for outer in [[0x81, 0, 0, 5], [0x88, 0xa8, 0, 5], [0x91, 0, 0, 5]] {
        let frame = tagged(&tagged(&plain, [0x81, 0, 0, 5]), outer);
        assert_eq!(parse(&frame).unwrap().content, Content::ManyTags, "{outer:02x?}");
    }
    let provider = parse(&tagged(&plain, [0x88, 0xa8, 0, 5])).unwrap();
    assert_eq!(provider.content, Content::ManyTags);
}

#[test]
fn hostile_option_lengths_end_the_search() {
    assert_eq!(link_option(&[1, 0, 1, 1], 1), None);
    assert_eq!(link_option(&[1, 255], 1), None);
    let mut long = vec![9, 32];
    long.resize(256, 0);
    long.extend([1, 1, 2, 0, 0, 0, 0, 0xa]);
    assert_eq!(link_option(&long, 1), Some(A));
}

#[test]
fn no_prefix_of_a_frame_panics() {
    for frame in [
        arp_request(A, v4(1), v4(2)),
        advertisement(A, v6(1), false, None),
        solicitation(A, v6(1), v6(2)),
        tagged(&advertisement(A, v6(1), false, None), [0x81, 0, 0, 5]),
    ] {
        for length in 0..frame.len() {
            let _ = parse(&frame[..length]);
            for byte in 0..length {
                for value in [0, 0xff] {
                    let mut changed = frame[..length].to_vec();
                    changed[byte] = value;
                    let _ = parse(&changed);
                }
            }
        }
    }
}
