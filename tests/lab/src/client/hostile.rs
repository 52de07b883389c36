//! What a hostile or broken peer sends: half-open handshakes by the thousand, and segments that are
//! malformed, cut short or contradict each other. Bounded in number, and repeatable by seed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::frames::{ACK, FIN, Mac, PSH, RST, SYN, Seen, Segment, URG};
use super::random::Random;
use super::sniff::Wire;

/// Sends `count` SYNs with this many bytes behind each, from addresses that nobody has, so that no handshake
/// is ever completed; as fast as the interface takes them, but no longer than `limit`. Returns how many were sent.
pub(crate) fn syn_flood(
    wire: &Wire,
    psc_mac: Mac,
    target: SocketAddr,
    (count, payload): (usize, usize),
    limit: Duration,
) -> Result<usize> {
    let deadline = Instant::now() + limit;
    let mut random = Random::new(99);
    let mut sent = 0;
    while sent < count && Instant::now() < deadline {
        // 10.77.0.128 to .254 belong to nobody in the lab, and are on its own subnet.
        let host = 128 + (random.below(126) as u8);
        let port = 1_024 + (random.below(64_000) as u16);
        let from = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 77, 0, host)), port);
        let mut syn = Segment::new(from, target, SYN);
        syn.sequence = random.next() as u32;
        syn.options = syn_options(random.next() as u32);
        syn.payload = vec![b'x'; payload];
        if wire.send(&syn.frame(wire.mac, psc_mac))? {
            sent += 1;
        } else {
            std::thread::yield_now();
        }
    }
    Ok(sent)
}

/// Sends one SYN; false if the interface had no room for it.
pub(crate) fn lone_syn(wire: &Wire, psc_mac: Mac, from: SocketAddr, target: SocketAddr) -> Result<bool> {
    let mut syn = Segment::new(from, target, SYN);
    syn.sequence = 1_000_000;
    syn.options = syn_options(12_345);
    wire.send(&syn.frame(wire.mac, psc_mac))
}

/// MSS, SACK permitted, timestamps, window scale, as Linux sends them.
fn syn_options(tsval: u32) -> Vec<u8> {
    let mut options = vec![2, 4, 0x05, 0xb4, 4, 2, 8, 10];
    options.extend_from_slice(&tsval.to_be_bytes());
    options.extend_from_slice(&[0, 0, 0, 0, 1, 3, 3, 7]);
    options
}

/// Sends `count` broken or contradictory frames that look as if they belonged to the connection of
/// which `seen` is a segment. None of them is one that the connection's owner would send, so none
/// may have any effect on it.
pub(crate) fn malformed(wire: &Wire, seen: &Seen, count: usize, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    for n in 0..count {
        let frame = broken(seen, n, &mut random);
        // An interface without room loses the frame, as a wire may.
        wire.send(&frame)?;
    }
    Ok(())
}

/// One frame of the kind `n`, modulo the number of kinds.
fn broken(seen: &Seen, n: usize, random: &mut Random) -> Vec<u8> {
    let mut segment = Segment::new(seen.from, seen.to, ACK | PSH);
    segment.sequence = seen.sequence.wrapping_add(seen.payload as u32);
    segment.acknowledgment = seen.acknowledgment;
    segment.payload = b"*1\r\n$8\r\nFLUSHALL\r\n".to_vec();
    let ip = 14;
    let tcp = if seen.from.is_ipv4() { 34 } else { 54 };
    let build = |segment: &Segment| segment.frame(seen.source, seen.destination);
    match n % 17 {
        0 => {
            // A checksum that is wrong.
            let mut frame = build(&segment);
            frame[tcp + 16] ^= 0x5a;
            frame
        }
        1 => {
            // Cut in the TCP header.
            let mut frame = build(&segment);
            frame.truncate(tcp + 7);
            frame
        }
        2 => {
            // Cut in the IP header.
            let mut frame = build(&segment);
            frame.truncate(ip + 9);
            frame
        }
        3 => {
            // A data offset beyond the segment's end.
            let mut frame = build(&segment);
            frame[tcp + 12] = 0xf0;
            frame.truncate(tcp + 24);
            frame
        }
        4 => {
            // A data offset below the header's length.
            let mut frame = build(&segment);
            frame[tcp + 12] = 0x10;
            frame
        }
        5 => {
            // An IP length longer than the frame.
            let mut frame = build(&segment);
            let at = if seen.from.is_ipv4() { ip + 2 } else { ip + 4 };
            frame[at] = 0x7f;
            frame
        }
        6 => {
            // Far outside the window.
            segment.sequence = segment.sequence.wrapping_add(0x4000_0000);
            build(&segment)
        }
        7 => {
            // RST that is not at RCV.NXT (RFC 5961 section 3.2): a challenge at most.
            segment.flags = RST;
            segment.sequence = segment.sequence.wrapping_add(1_000 + random.below(10_000) as u32);
            segment.payload.clear();
            build(&segment)
        }
        8 => {
            // SYN in an open connection (RFC 5961 section 4).
            segment.flags = SYN;
            segment.sequence = random.next() as u32;
            segment.payload.clear();
            segment.options = syn_options(random.next() as u32);
            build(&segment)
        }
        9 => {
            // Acknowledges what was never sent (RFC 5961 section 5).
            segment.acknowledgment = segment.acknowledgment.wrapping_add(0x2000_0000);
            build(&segment)
        }
        10 => {
            // All flags, no sense.
            segment.flags = FIN | SYN | RST | PSH | ACK | URG;
            segment.sequence = random.next() as u32;
            build(&segment)
        }
        11 => {
            // No flags at all.
            segment.flags = 0;
            build(&segment)
        }
        12 => {
            // Options whose lengths run out of the header, and zero; PAWS would fail as well.
            segment.options = vec![8, 200, 1, 1, 5, 0, 2, 1];
            segment.sequence = segment.sequence.wrapping_add(0x4000_0000);
            build(&segment)
        }
        13 => {
            // A timestamp from long ago (PAWS, RFC 7323 section 5).
            let tsval = seen.tsval.wrapping_sub(100_000_000);
            segment.options = vec![1, 1, 8, 10];
            segment.options.extend_from_slice(&tsval.to_be_bytes());
            segment.options.extend_from_slice(&[0, 0, 0, 1]);
            build(&segment)
        }
        14 => {
            // Nothing but noise behind the Ethernet header.
            let mut frame = build(&segment);
            let length = 14 + random.below(100) as usize;
            frame.truncate(14);
            frame.resize(length, 0);
            random.fill(&mut frame[14..]);
            frame
        }
        15 => {
            // Other contents for bytes that were acknowledged long ago.
            segment.sequence = seen.sequence.wrapping_sub(40);
            build(&segment)
        }
        _ => {
            // An IP header length of zero (IPv4), a hop-by-hop header that never ends (IPv6).
            let mut frame = build(&segment);
            if seen.from.is_ipv4() {
                frame[ip] = 0x40;
            } else {
                frame[ip + 6] = 0;
            }
            frame
        }
    }
}
