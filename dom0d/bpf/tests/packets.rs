//! One packet per feature through the programs, by BPF test-run: the bytes as they leave, the verdict, the record, and every
//! counter that moved. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use understudy_bpf::layout::{Bounds, Conversation, Key};
use understudy_bpf::{Copied, Source, Tap};
use understudy_protocol::Flow;

use common::{
    Bench, CLIENT_MAC, Daemon, GUEST_MAC, PORT, PSC_MAC, SLOT, TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT,
    TC_ACT_UNSPEC, addresses, fold, frame, sum,
};

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const ACK: u8 = 0x10;
const URG: u8 = 0x20;

/// The conversation that most tests begin with: the client calls the server's 2,000,000 its 3,000,000.
const FLOW: Flow = Flow {
    seq_delta: 1_000_000,
    ts_delta: 0,
    ts_floor: 0,
    server_tsval: 0,
    told_tsval: 0,
    ts_recent: 0,
    up_nxt: 2_000,
    told_acked: 2_000,
    server_edge: 2_500,
    down_nxt: 3_000_000,
    client_acked: 3_000_000,
    client_edge: 3_000_500,
    client_shift: 0,
    server_shift: 0,
    told_shift: 0,
    timestamps: false,
    bounds: understudy_protocol::Bounds { up: 1_000_000, down: 4_000_000 },
};

/// With timestamps, after a promotion at which the server's clock read 5,000.
const STAMPED: Flow = Flow {
    ts_delta: 100_000,
    ts_floor: 5_000,
    server_tsval: 6_000,
    told_tsval: 106_000,
    ts_recent: 700,
    timestamps: true,
    ..FLOW
};

/// One TCP segment of the conversation, or nearly.
#[derive(Clone, Debug)]
struct Segment {
    from_client: bool,
    v6: bool,
    client_port: u16,
    seq: u32,
    ack: u32,
    flags: u8,
    window: u16,
    options: Vec<u8>,
    payload: Vec<u8>,
}

/// The client's next one.
fn from_client() -> Segment {
    Segment {
        from_client: true,
        v6: false,
        client_port: 40_000,
        seq: 2_000,
        ack: 3_000_000,
        flags: ACK | PSH,
        window: 500,
        options: Vec::new(),
        payload: b"PING\r\n".to_vec(),
    }
}

/// The server's next one, in its own numbers.
fn from_server() -> Segment {
    Segment {
        from_client: false,
        seq: 2_000_000,
        ack: 2_000,
        payload: b"+PONG\r\n".to_vec(),
        ..from_client()
    }
}

/// RFC 7323, as Linux lays it out.
fn stamps(tsval: u32, tsecr: u32) -> Vec<u8> {
    [&[1, 1, 8, 10], tsval.to_be_bytes().as_slice(), &tsecr.to_be_bytes()].concat()
}

/// RFC 2018, of one block.
fn sack(left: u32, right: u32) -> Vec<u8> {
    [&[1, 1, 5, 10], left.to_be_bytes().as_slice(), &right.to_be_bytes()].concat()
}

/// With lengths and checksums computed anew: incremental rewriting must give the same.
fn packet(source: SocketAddr, destination: SocketAddr, segment: &Segment) -> Vec<u8> {
    let Segment { seq, ack, flags, window, options, payload, .. } = segment;
    let mut tcp = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    tcp.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
    tcp.extend([(((20 + options.len()) / 4) << 4) as u8, *flags]);
    tcp.extend(window.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(options);
    tcp.extend(payload);
    let (mut ip, octets) = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let octets = [source.octets(), destination.octets()].concat();
            let mut ip = vec![0x45, 0];
            ip.extend(((20 + tcp.len()) as u16).to_be_bytes());
            ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0]);
            ip.extend(&octets);
            let check = !fold(sum(&ip));
            ip[10..12].copy_from_slice(&check.to_be_bytes());
            (ip, octets)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let octets = [source.octets(), destination.octets()].concat();
            let mut ip = vec![0x60, 0, 0, 0];
            ip.extend((tcp.len() as u16).to_be_bytes());
            ip.extend([6, 64]);
            ip.extend(&octets);
            (ip, octets)
        }
        _ => unreachable!(),
    };
    let check = !fold(sum(&octets) + 6 + tcp.len() as u64 + sum(&tcp));
    tcp[16..18].copy_from_slice(&check.to_be_bytes());
    ip.extend(tcp);
    ip
}

impl Segment {
    fn client(&self) -> SocketAddr {
        SocketAddr::new(addresses(self.v6).2.ip(), self.client_port)
    }

    /// As it comes to the programs.
    fn before(&self) -> Vec<u8> {
        let (psc, guest, _) = addresses(self.v6);
        match self.from_client {
            true => packet(self.client(), SocketAddr::new(psc, PORT), self),
            false => packet(SocketAddr::new(guest, PORT), self.client(), self),
        }
    }

    /// As it would leave them with the numbers it has.
    fn after(&self) -> Vec<u8> {
        let (psc, guest, _) = addresses(self.v6);
        match self.from_client {
            true => packet(self.client(), SocketAddr::new(guest, PORT), self),
            false => packet(SocketAddr::new(psc, PORT), self.client(), self),
        }
    }

    fn frame_before(&self) -> Vec<u8> {
        let (source, destination) =
            if self.from_client { (CLIENT_MAC, PSC_MAC) } else { (GUEST_MAC, CLIENT_MAC) };
        frame(&self.before(), source, destination, self.v6)
    }

    fn frame_after(&self) -> Vec<u8> {
        let destination = if self.from_client { GUEST_MAC } else { CLIENT_MAC };
        frame(&self.after(), PSC_MAC, destination, self.v6)
    }
}

/// With the checksum of its IPv4 header made anew.
fn summed(mut frame: Vec<u8>) -> Vec<u8> {
    frame[24..26].fill(0);
    let check = !fold(sum(&frame[14..14 + usize::from(frame[14] & 15) * 4]));
    frame[24..26].copy_from_slice(&check.to_be_bytes());
    frame
}

/// The programs with one conversation per family.
struct Fixture {
    bench: Bench,
    before: BTreeMap<&'static str, u64>,
}

impl Fixture {
    fn new(flow: Flow) -> Self {
        Self::with(Daemon::Present, flow)
    }

    fn with(daemon: Daemon, flow: Flow) -> Self {
        let mut bench = common::bench(daemon);
        for (v6, place) in [(false, 0), (true, 1)] {
            let bounds = Bounds { up: flow.bounds.up, down: flow.bounds.down };
            let conversation = Conversation::new(&flow, CLIENT_MAC, place);
            bench.tap.install(&Key::new(addresses(v6).2, PORT), conversation, bounds).unwrap();
        }
        let before = bench.tap.counters();
        Self { bench, before }
    }

    fn tap(&mut self) -> &mut Tap {
        &mut self.bench.tap
    }

    /// Verdict, and the frame as it is then.
    fn rehearse(&mut self, from_client: bool, frame: &[u8], times: u32) -> (i32, Vec<u8>) {
        let mut out = Vec::new();
        let (verdict, _) = self.bench.programs.rehearse(from_client, frame, &mut out, times).unwrap();
        (verdict, out)
    }

    /// Counters that moved since this was last asked.
    fn counted(&mut self) -> Vec<(&'static str, u64)> {
        let now = self.bench.tap.counters();
        let before = std::mem::replace(&mut self.before, now.clone());
        now.into_iter().map(|(name, n)| (name, n - before[name])).filter(|(_, n)| *n > 0).collect()
    }

    fn record_of(&mut self, source: Source) -> Option<(Copied, Vec<u8>)> {
        let copied = self.bench.tap.next(source)?;
        let packet = self.bench.tap.packet(source).to_vec();
        assert_eq!(copied.length, packet.len());
        Some((copied, packet))
    }

    fn record(&mut self) -> Option<(Copied, Vec<u8>)> {
        self.record_of(Source::Service)
    }

    /// It is recorded as it came, and leaves as `after` says, with nothing else counted than that.
    #[track_caller]
    fn passes(&mut self, came: &Segment, after: &Segment) {
        let (verdict, out) = self.rehearse(came.from_client, &came.frame_before(), 1);
        let (passes, counter) = match came.from_client {
            true => (TC_ACT_REDIRECT, "client_forwarded"),
            false => (TC_ACT_OK, "server_forwarded"),
        };
        assert_eq!(out, after.frame_after());
        assert_eq!(verdict, passes);
        let (record, packet) = self.record().expect("no record of what was forwarded");
        assert!(record.forwarded && !record.handed_over && !record.unattended, "{record:?}");
        assert_eq!(record.slot, (!came.from_client).then_some(SLOT));
        assert_eq!(packet, came.before());
        assert_eq!(self.counted(), [(counter, 1)]);
    }

    /// It is recorded and stays; with those that follow it if it was `handed_over`. These are counted besides.
    #[track_caller]
    fn goes_to_the_daemon(&mut self, came: &Segment, handed_over: bool, besides: &[&'static str]) {
        let (verdict, out) = self.rehearse(came.from_client, &came.frame_before(), 1);
        assert_eq!(verdict, TC_ACT_SHOT);
        assert_eq!(out, came.frame_before());
        let (record, packet) = self.record().expect("no record for the daemon");
        assert_eq!((record.forwarded, record.handed_over), (false, handed_over));
        assert_eq!(packet, came.before());
        let own = if came.from_client { "client_to_daemon" } else { "server_to_daemon" };
        let mut expected: Vec<_> = besides.iter().chain([&own]).map(|name| (*name, 1)).collect();
        expected.extend(handed_over.then_some(("handed_over", 1)));
        expected.sort_unstable();
        assert_eq!(self.counted(), expected);
    }

    /// Nobody's: not touched, not recorded; counted so, if at all.
    #[track_caller]
    fn is_left_alone(&mut self, from_client: bool, frame: &[u8], counter: Option<&'static str>) {
        let (verdict, out) = self.rehearse(from_client, frame, 1);
        assert_eq!(verdict, TC_ACT_UNSPEC);
        assert_eq!(out, frame);
        assert_eq!(self.record(), None);
        assert_eq!(self.counted(), counter.map(|name| (name, 1)).into_iter().collect::<Vec<_>>());
    }

    /// Leaves no room in the ring of clients and OVM, which nobody reads: by segments of the OVM's, which have no share
    /// to keep to. They repeat, so that none moves the conversation on; the last ones are small.
    fn fill(&mut self) {
        for length in [BULK, 0] {
            let old = Segment { seq: 1_000_000, payload: vec![0; length], ..from_server() };
            while !self.counted().iter().any(|(name, _)| *name == "ring_full") {
                self.rehearse(false, &old.frame_before(), 10);
            }
        }
        self.counted();
    }
}

/// Payload of a segment whose record is `BULK_RECORD` bytes long, what heads it included.
const BULK: usize = 3_000;
const BULK_RECORD: u32 = 16_384 + 24 + 8;
/// So many of them are in a full ring of 32 MiB.
const RECORDS: u32 = (32 << 20) / BULK_RECORD;
/// And in one of a server that is not the OVM, of 1 MiB; there its record is larger.
const RVM_RECORDS: u32 = (1 << 20) / (65_536 + 24 + 8);

#[test]
fn an_ipv4_segment_gets_the_servers_address_number_and_checksums() {
    let mut fixture = Fixture::new(FLOW);
    #[rustfmt::skip]
    let before = [
        2, 0, 0, 0, 0, 1,  2, 0, 0, 0, 0, 3,  8, 0,
        0x45, 0, 0, 46,  0, 1, 0x40, 0,  64, 6, 0x25, 0xcb,  10, 77, 0, 1,  10, 77, 0, 100,
        0x9c, 0x40, 0x18, 0xeb,  0, 0, 0x07, 0xd0,  0x00, 0x2d, 0xc6, 0xc0,
        0x50, 0x18, 0x01, 0xf4,  0x69, 0x50, 0, 0,
        b'P', b'I', b'N', b'G', b'\r', b'\n',
    ];
    #[rustfmt::skip]
    let after = [
        2, 0, 0, 0, 0, 2,  2, 0, 0, 0, 0, 1,  8, 0,
        0x45, 0, 0, 46,  0, 1, 0x40, 0,  64, 6, 0x26, 0x24,  10, 77, 0, 1,  10, 77, 0, 11,
        0x9c, 0x40, 0x18, 0xeb,  0, 0, 0x07, 0xd0,  0x00, 0x1e, 0x84, 0x80,
        0x50, 0x18, 0x01, 0xf4,  0xab, 0xf8, 0, 0,
        b'P', b'I', b'N', b'G', b'\r', b'\n',
    ];
    let (verdict, out) = fixture.rehearse(true, &before, 1);
    assert_eq!(out, after);
    assert_eq!(verdict, TC_ACT_REDIRECT);
    let (record, packet) = fixture.record().unwrap();
    assert!(record.forwarded);
    assert_eq!(packet, before[14..]);
    assert_eq!(fixture.counted(), [("client_forwarded", 1)]);
    // So the other tests' packets are what they should be, too.
    assert_eq!(from_client().frame_before(), before);
}

#[test]
fn an_ipv6_segment_gets_the_servers_address_number_and_checksum() {
    let mut fixture = Fixture::new(FLOW);
    let came = Segment { v6: true, ..from_client() };
    fixture.passes(&came, &Segment { ack: 2_000_000, ..came.clone() });
    let answer = Segment { v6: true, ack: 2_006, ..from_server() };
    fixture.passes(&answer, &Segment { seq: 3_000_000, window: 500, ..answer.clone() });
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    let mut fixture = Fixture::new(FLOW);
    let came = from_client();
    let (mut before, mut after) = (came.frame_before(), Segment { ack: 2_000_000, ..came }.frame_after());
    // By as much: its receiver must see that the segment is broken.
    let check = |frame: &mut [u8]| {
        let wrong = u16::from_be_bytes([frame[50], frame[51]]) - 1;
        frame[50..52].copy_from_slice(&wrong.to_be_bytes());
    };
    check(&mut before);
    check(&mut after);
    let (_, out) = fixture.rehearse(true, &before, 1);
    assert_eq!(out, after);
    // No device has verified it: who reads the record must not believe it either.
    let (record, packet) = fixture.record().unwrap();
    assert!(record.forwarded && !record.trusted);
    assert_eq!(packet, before[14..]);
}

#[test]
fn the_servers_sequence_numbers_are_the_ones_that_the_client_knows() {
    let mut fixture = Fixture::new(FLOW);
    let came = from_server();
    fixture.passes(&came, &Segment { seq: 3_000_000, ..came.clone() });
    let next = Segment { seq: 2_000_007, ..from_server() };
    fixture.passes(&next, &Segment { seq: 3_000_007, ..next.clone() });
}

#[test]
fn numbers_wrap_around() {
    let flow = Flow {
        seq_delta: 10,
        down_nxt: 4,
        client_acked: 4,
        client_edge: 504,
        bounds: understudy_protocol::Bounds { up: 1_000_000, down: 1_000_000 },
        ..FLOW
    };
    let mut fixture = Fixture::new(flow);
    let came = Segment { ack: 4, ..from_client() };
    fixture.passes(&came, &Segment { ack: u32::MAX - 5, ..came.clone() });
    let answer = Segment { seq: u32::MAX - 5, ack: 2_006, ..from_server() };
    fixture.passes(&answer, &Segment { seq: 4, window: 500, ..answer.clone() });
}

/// To a checksum all ones are none, and so no change.
#[test]
fn all_ones_that_become_none_are_written() {
    let flow = Flow {
        seq_delta: 1,
        down_nxt: 0,
        client_acked: 0,
        client_edge: 500,
        bounds: understudy_protocol::Bounds { up: 1_000_000, down: 1_000_000 },
        ..FLOW
    };
    let mut fixture = Fixture::new(flow);
    let answer = Segment { seq: u32::MAX, window: 500, ..from_server() };
    fixture.passes(&answer, &Segment { seq: 0, ..answer.clone() });
}

#[test]
fn sack_edges_move_to_the_servers_numbers() {
    let mut fixture = Fixture::new(FLOW);
    let came = Segment { options: sack(3_000_100, 3_000_200), ..from_client() };
    let after = Segment { ack: 2_000_000, options: sack(2_000_100, 2_000_200), ..came.clone() };
    fixture.passes(&came, &after);
}

#[test]
fn a_tsval_is_never_earlier_than_the_client_was_told() {
    let mut fixture = Fixture::new(STAMPED);
    let came = Segment { options: stamps(5_900, 700), ..from_server() };
    fixture.passes(&came, &Segment { seq: 3_000_000, options: stamps(106_000, 700), ..came.clone() });
    let next = Segment { seq: 2_000_007, options: stamps(6_001, 700), ..from_server() };
    fixture.passes(&next, &Segment { seq: 3_000_007, options: stamps(106_001, 700), ..next.clone() });
}

#[test]
fn an_echo_lies_between_the_servers_promotion_and_its_latest_tsval() {
    for (echo, told) in [(105_500, 5_500), (106_001, 6_000), (104_999, 5_000)] {
        let mut fixture = Fixture::new(STAMPED);
        let came = Segment { options: stamps(700, echo), ..from_client() };
        let after = Segment { ack: 2_000_000, options: stamps(700, told), ..came.clone() };
        fixture.passes(&came, &after);
    }
}

#[test]
fn a_timestamp_from_before_goes_to_the_daemon() {
    let mut fixture = Fixture::new(STAMPED);
    // PAWS (RFC 7323 section 5) is the daemon's: the segment says that the conversation goes on all the same.
    let came = Segment { options: stamps(600, 106_000), ..from_client() };
    fixture.goes_to_the_daemon(&came, true, &[]);
}

#[test]
fn a_clients_window_ends_where_the_daemon_has_room() {
    let bounds = understudy_protocol::Bounds { up: 1_000_000, down: 3_000_200 };
    let mut fixture = Fixture::new(Flow { bounds, ..FLOW });
    let came = from_client();
    fixture.passes(&came, &Segment { ack: 2_000_000, window: 200, ..came.clone() });
    // The client's own window, once it is the smaller one.
    let smaller = Segment { seq: 2_006, window: 100, ..from_client() };
    fixture.passes(&smaller, &Segment { ack: 2_000_000, ..smaller.clone() });
}

#[test]
fn a_servers_window_ends_where_the_daemon_has_room() {
    let bounds = understudy_protocol::Bounds { up: 2_300, down: 4_000_000 };
    let mut fixture = Fixture::new(Flow { bounds, ..FLOW });
    let came = from_server();
    fixture.passes(&came, &Segment { seq: 3_000_000, window: 300, ..came.clone() });
    // What a client sends beyond it is not the kernel's to pass.
    let beyond = Segment { ack: 3_000_007, payload: vec![b'x'; 301], ..from_client() };
    fixture.goes_to_the_daemon(&beyond, true, &[]);
}

#[test]
fn a_servers_window_has_the_scale_that_the_client_was_told() {
    let flow = Flow { server_shift: 7, told_shift: 4, server_edge: 2_000, ..FLOW };
    let mut fixture = Fixture::new(flow);
    let came = from_server();
    fixture.passes(&came, &Segment { seq: 3_000_000, window: 4_000, ..came.clone() });
}

#[test]
fn a_window_that_its_scale_cannot_tell_is_the_largest() {
    let flow = Flow { server_shift: 10, told_shift: 0, server_edge: 2_000, ..FLOW };
    let mut fixture = Fixture::new(flow);
    let came = from_server();
    fixture.passes(&came, &Segment { seq: 3_000_000, window: 65_535, ..came.clone() });
}

#[test]
fn an_unknown_option_becomes_nops() {
    let mut fixture = Fixture::new(STAMPED);
    let experiment = [253, 6, 1, 2, 3, 4, 1, 1];
    let came = Segment { options: [stamps(700, 106_000), experiment.to_vec()].concat(), ..from_client() };
    let options = [stamps(700, 6_000), vec![1; 8]].concat();
    fixture.passes(&came, &Segment { ack: 2_000_000, options, ..came.clone() });
    let came =
        Segment { ack: 2_006, options: [experiment.to_vec(), stamps(6_000, 700)].concat(), ..from_server() };
    let options = [vec![1; 8], stamps(106_000, 700)].concat();
    fixture.passes(&came, &Segment { seq: 3_000_000, options, ..came.clone() });
}

#[test]
fn an_authenticated_segment_goes_to_the_daemon() {
    // RFC 2385, RFC 5925: signed, so it can't be rewritten.
    for kind in [19, 29] {
        let mut fixture = Fixture::new(FLOW);
        let options = [&[1, 1, kind, 18], [0x5a; 16].as_slice()].concat();
        let came = Segment { options, ..from_client() };
        fixture.goes_to_the_daemon(&came, true, &["malformed_options"]);
    }
}

#[test]
fn what_may_be_read_in_more_than_one_way_goes_to_the_daemon() {
    // Options of a handshake, of a wrong length or not; without a sensible length; twice.
    let twice = [stamps(700, 106_000), stamps(700, 106_000)].concat();
    let ambiguous: [&[u8]; 12] = [
        &[2, 3, 0, 1],
        &[3, 2, 1, 1],
        &[4, 3, 0, 1],
        &[2, 4, 5, 0xb4],
        &[3, 3, 7, 1],
        &[4, 2, 1, 1],
        &[5, 2, 1, 1],
        &[8, 4, 1, 1],
        &[253, 0, 1, 1],
        &[253, 1, 1, 1],
        &[1, 1, 253, 3],
        &twice,
    ];
    for options in ambiguous {
        for came in [from_client(), from_server()] {
            let mut fixture = Fixture::new(FLOW);
            let came = Segment { options: options.to_vec(), ..came };
            fixture.goes_to_the_daemon(&came, true, &["malformed_options"]);
        }
    }
}

#[test]
fn an_acknowledgment_outside_of_the_window_goes_to_the_daemon() {
    let flow = Flow { server_edge: 2_500, client_edge: 3_000_500, ..FLOW };
    for (inside, outside) in [
        (Segment { seq: 2_500, ..from_client() }, Segment { seq: 2_501, ..from_client() }),
        (Segment { seq: 2_000_501, ..from_server() }, Segment { seq: 2_000_502, ..from_server() }),
    ] {
        let mut fixture = Fixture::new(flow);
        fixture.goes_to_the_daemon(&Segment { payload: Vec::new(), ..outside }, false, &[]);
        let (verdict, _) = fixture.rehearse(
            inside.from_client,
            &Segment { payload: Vec::new(), ..inside }.frame_before(),
            1,
        );
        assert_ne!(verdict, TC_ACT_SHOT);
    }
}

#[test]
fn an_end_goes_to_the_daemon_with_all_that_follows() {
    for flags in [FIN | ACK, RST | ACK, RST, URG | ACK] {
        for first in [from_client(), from_server()] {
            let mut fixture = Fixture::new(FLOW);
            fixture.goes_to_the_daemon(&Segment { flags, ..first.clone() }, true, &[]);
            fixture.goes_to_the_daemon(&first, false, &[]);
        }
    }
}

#[test]
fn what_repeats_goes_to_the_daemon_alone() {
    let mut fixture = Fixture::new(FLOW);
    let old = Segment { seq: 1_994, ..from_client() };
    fixture.goes_to_the_daemon(&old, false, &[]);
    fixture.passes(&from_client(), &Segment { ack: 2_000_000, ..from_client() });
}

#[test]
fn an_older_epoch_forwards_nothing() {
    let mut fixture = Fixture::new(FLOW);
    // A promotion, though of the same server.
    fixture.tap().activate(Some(SLOT));
    fixture.goes_to_the_daemon(&from_client(), false, &["wrong_epoch"]);
    fixture.goes_to_the_daemon(&from_server(), false, &["wrong_epoch"]);
}

#[test]
fn while_nobody_is_the_ovm_nothing_is_forwarded() {
    let mut fixture = Fixture::new(FLOW);
    fixture.tap().activate(None);
    fixture.goes_to_the_daemon(&from_client(), false, &["wrong_epoch"]);
    let (verdict, _) = fixture.rehearse(false, &from_server().frame_before(), 1);
    assert_eq!(verdict, TC_ACT_SHOT);
    assert_eq!(fixture.counted(), [("rvm_to_daemon", 1)]);
}

#[test]
fn a_stranger_goes_to_the_daemon() {
    let mut fixture = Fixture::new(FLOW);
    let came = Segment { client_port: 40_001, flags: SYN, payload: Vec::new(), ..from_client() };
    fixture.goes_to_the_daemon(&came, false, &["no_conversation"]);
}

#[test]
fn a_replicas_segment_goes_to_its_own_ring_only() {
    let mut fixture = Fixture::new(FLOW);
    fixture.tap().activate(Some(SLOT + 1));
    let came = from_server();
    let (verdict, out) = fixture.rehearse(false, &came.frame_before(), 1);
    assert_eq!(verdict, TC_ACT_SHOT);
    assert_eq!(out, came.frame_before());
    assert_eq!(fixture.record(), None);
    for slot in 0..understudy_bpf::layout::SLOTS {
        let record = fixture.record_of(Source::Rvm(slot));
        assert_eq!(record.is_some(), slot == SLOT, "ring of slot {slot}");
        if let Some((record, packet)) = record {
            assert_eq!((record.slot, record.forwarded), (Some(SLOT), false));
            assert_eq!(packet, came.before());
        }
    }
    assert_eq!(fixture.counted(), [("rvm_to_daemon", 1)]);
}

#[test]
fn a_replica_fills_its_own_ring_only() {
    let mut fixture = Fixture::new(FLOW);
    fixture.tap().activate(Some(SLOT + 1));
    let came = Segment { payload: vec![0; BULK], ..from_server() };
    let (verdict, _) = fixture.rehearse(false, &came.frame_before(), RVM_RECORDS + 2);
    assert_eq!(verdict, TC_ACT_SHOT);
    let counted = fixture.counted();
    assert_eq!(counted, [("rvm_ring_full", 2), ("rvm_to_daemon", u64::from(RVM_RECORDS))]);
    fixture.goes_to_the_daemon(&from_client(), false, &["wrong_epoch"]);
}

#[test]
fn what_is_not_a_whole_tcp_segment_is_left_alone() {
    let mut fixture = Fixture::new(FLOW);
    for (segment, counter) in [(from_client(), "foreign_client"), (from_server(), "foreign_server")] {
        let whole = segment.frame_before();
        let changed = |at: usize, byte: u8| {
            let mut frame = whole.clone();
            frame[at] = byte;
            summed(frame)
        };
        let broken = {
            let mut frame = whole.clone();
            frame[14 + 10] ^= 0x5a;
            frame
        };
        // RFC 791: a record of the route.
        let with_options = {
            let mut frame = [&whole[..34], &[7, 3, 4, 0], &whole[34..]].concat();
            (frame[14], frame[14 + 3]) = (0x46, frame[14 + 3] + 4);
            summed(frame)
        };
        let v6 = Segment { v6: true, ..segment.clone() }.frame_before();
        let extended = {
            let mut frame = v6.clone();
            // Hop-by-hop options in front of it.
            frame[14 + 6] = 0;
            frame
        };
        let cut = whole[..14 + 40].to_vec();
        let frames = [
            ("first fragment", changed(14 + 6, 0x20)),
            ("later fragment", changed(14 + 7, 0x05)),
            ("broken IPv4 header", broken),
            ("IPv4 options", with_options),
            ("UDP", changed(14 + 9, 17)),
            ("IPv4 in name only", changed(14, 0x65)),
            ("header too short", changed(34 + 12, 0x40)),
            ("header beyond the end", changed(34 + 12, 0xf0)),
            ("extension header", extended),
            ("cut off", cut),
        ];
        for (what, frame) in frames {
            println!("{what}, {counter}");
            fixture.is_left_alone(segment.from_client, &frame, Some(counter));
        }
    }
}

#[test]
fn what_is_for_or_from_somebody_else_is_left_alone() {
    let mut fixture = Fixture::new(FLOW);
    let [client, server] = [from_client().frame_before(), from_server().frame_before()];
    let mut other_port = client.clone();
    other_port[34 + 2..34 + 4].copy_from_slice(&22_u16.to_be_bytes());
    fixture.is_left_alone(true, &other_port, Some("not_service_port"));
    let mut other_address = client;
    other_address[14 + 19] = 101;
    fixture.is_left_alone(true, &summed(other_address), None);
    let mut other_port = server.clone();
    other_port[34..34 + 2].copy_from_slice(&22_u16.to_be_bytes());
    fixture.is_left_alone(false, &other_port, None);
    let mut other_address = server;
    other_address[14 + 15] = 12;
    fixture.is_left_alone(false, &summed(other_address), None);
}

#[test]
fn strangers_fill_half_of_the_ring_and_clients_go_on() {
    let mut fixture = Fixture::new(FLOW);
    let stranger = Segment { client_port: 40_001, flags: SYN, payload: vec![0; BULK], ..from_client() };
    let (verdict, out) = fixture.rehearse(true, &stranger.frame_before(), RECORDS);
    assert_eq!(verdict, TC_ACT_SHOT);
    assert_eq!(out, stranger.frame_before());
    let counted: BTreeMap<_, _> = fixture.counted().into_iter().collect();
    // The record that goes beyond the half is the last.
    assert_eq!(counted["client_to_daemon"], u64::from(RECORDS / 2 + 1));
    assert_eq!(counted["ring_share_full"], u64::from(RECORDS - RECORDS / 2 - 1));
    assert_eq!(counted.get("ring_full"), None);
    let came = from_client();
    let (verdict, out) = fixture.rehearse(true, &came.frame_before(), 1);
    assert_eq!((verdict, out), (TC_ACT_REDIRECT, Segment { ack: 2_000_000, ..came }.frame_after()));
    let answer = Segment { ack: 2_006, ..from_server() };
    let (verdict, out) = fixture.rehearse(false, &answer.frame_before(), 1);
    assert_eq!((verdict, out), (TC_ACT_OK, Segment { seq: 3_000_000, window: 500, ..answer }.frame_after()));
    assert_eq!(fixture.counted(), [("client_forwarded", 1), ("server_forwarded", 1)]);
}

#[test]
fn what_comes_after_a_cutover_is_no_part_of_what_it_must_hear() {
    let mut fixture = Fixture::new(FLOW);
    let came = from_client();
    let stranger = Segment { client_port: 40_001, flags: SYN, ..from_client() };
    fixture.rehearse(true, &came.frame_before(), 1);
    fixture.rehearse(true, &stranger.frame_before(), 2);
    fixture.tap().activate(None);
    let end = fixture.tap().end();
    let mut heard = Vec::new();
    fixture.rehearse(true, &stranger.frame_before(), 5);
    while let Some(copied) = fixture.tap().next_before(end) {
        heard.push(copied.forwarded);
        // They go on as fast as they are heard.
        fixture.rehearse(true, &stranger.frame_before(), 2);
    }
    assert_eq!(heard, [true, false, false]);
    assert_eq!(fixture.tap().next_before(end), None);
    let mut after = 0;
    while let Some(copied) = fixture.tap().next(Source::Service) {
        assert!(!copied.forwarded);
        after += 1;
    }
    assert_eq!(after, 5 + 3 * 2);
}

#[test]
fn without_room_for_its_record_nothing_is_forwarded() {
    let mut fixture = Fixture::new(FLOW);
    fixture.fill();
    for came in [from_client(), from_server()] {
        let (verdict, out) = fixture.rehearse(came.from_client, &came.frame_before(), 1);
        assert_eq!((verdict, out), (TC_ACT_SHOT, came.frame_before()));
        assert_eq!(fixture.counted(), [("ring_full", 1)]);
    }
    // Read by the daemon, there is room again.
    while fixture.record().is_some() {}
    let next = Segment { seq: 2_006, ..from_client() };
    fixture.passes(&next, &Segment { ack: 2_000_000, ..next.clone() });
}

#[test]
fn without_room_and_daemon_conversations_go_on_where_the_operator_wants_to_serve() {
    let mut fixture = Fixture::with(Daemon::AwayServe, FLOW);
    fixture.fill();
    let untold = fixture.tap().unrecorded();
    let came = from_client();
    let (verdict, out) = fixture.rehearse(true, &came.frame_before(), 1);
    assert_eq!(out, Segment { ack: 2_000_000, ..came }.frame_after());
    assert_eq!(verdict, TC_ACT_REDIRECT);
    let counted = fixture.counted();
    for name in ["client_forwarded", "ring_full", "unrecorded"] {
        assert!(counted.contains(&(name, 1)), "{name}: {counted:?}");
    }
    assert_eq!(fixture.tap().unrecorded(), untold + 1);
}

#[test]
fn without_room_and_daemon_conversations_wait_where_the_operator_wants_to_protect() {
    let mut fixture = Fixture::with(Daemon::AwayProtect, FLOW);
    fixture.fill();
    for came in [from_client(), from_server()] {
        let (verdict, out) = fixture.rehearse(came.from_client, &came.frame_before(), 1);
        assert_eq!((verdict, out), (TC_ACT_SHOT, came.frame_before()));
        assert_eq!(fixture.counted(), [("ring_full", 1)]);
    }
    assert_eq!(fixture.tap().unrecorded(), 0);
}

#[test]
fn without_the_daemon_an_end_passes_where_the_operator_wants_to_serve() {
    let mut fixture = Fixture::with(Daemon::AwayServe, FLOW);
    let came = Segment { flags: FIN | ACK, ..from_client() };
    let (verdict, out) = fixture.rehearse(true, &came.frame_before(), 1);
    assert_eq!((verdict, out), (TC_ACT_REDIRECT, Segment { ack: 2_000_000, ..came.clone() }.frame_after()));
    let (record, packet) = fixture.record().unwrap();
    assert!(record.forwarded && record.unattended && !record.handed_over, "{record:?}");
    assert_eq!(packet, came.before());
    assert_eq!(fixture.counted(), [("client_forwarded", 1), ("handed_over", 1), ("unattended", 1)]);
}

#[test]
fn without_the_daemon_an_end_waits_where_the_operator_wants_to_protect() {
    let mut fixture = Fixture::with(Daemon::AwayProtect, FLOW);
    let came = Segment { flags: FIN | ACK, ..from_client() };
    fixture.goes_to_the_daemon(&came, true, &[]);
}
