//! The programs in the kernel translate as the protocol crate specifies: random and hostile segments through both, compared
//! byte for byte. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::net::{IpAddr, SocketAddr};

use understudy_bpf::layout::{ALONE, Bounds, Conversation, Key};
use understudy_bpf::{Copied, Source};
use understudy_protocol::{
    Aside, Command, Flow, Handover, Input, Instant, LinkAddress, Output, Passage, Rule, Seeding, ServerId,
    ServerSpec, Service, ServiceConfig,
};

use common::{
    Bench, CLIENT_MAC, CONVERSATIONS, Daemon, GUEST_MAC, PORT, PSC_MAC, SLOT, TC_ACT_OK, TC_ACT_REDIRECT,
    TC_ACT_SHOT, TC_ACT_UNSPEC, addresses, fold, frame, sum,
};

/// Cases, unless BPF_CASES gives another number: in an emulated machine each takes long.
const CASES: u32 = 1_000_000;

const OTHER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 4];

/// SplitMix64.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u32) -> u32 {
        (((self.next() >> 32) * u64::from(bound)) >> 32) as u32
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    /// Near `value` mostly, and most often at it.
    fn near(&mut self, value: u32) -> u32 {
        match self.below(16) {
            0 => self.next() as u32,
            1 => value.wrapping_add(self.below(3000)),
            2 => value.wrapping_sub(self.below(3000)),
            3 => value.wrapping_add(1),
            4 => value.wrapping_sub(1),
            5 => value.wrapping_add(1 << 31),
            _ => value,
        }
    }
}

fn flow(chance: &mut Chance) -> Flow {
    let up_nxt = chance.next() as u32;
    let told_acked = up_nxt.wrapping_sub(if chance.one_in(2) { 0 } else { chance.below(5000) });
    let down_nxt = chance.next() as u32;
    Flow {
        seq_delta: if chance.one_in(4) { 0 } else { chance.next() as u32 },
        ts_delta: if chance.one_in(4) { 0 } else { chance.next() as u32 },
        ts_floor: chance.next() as u32,
        server_tsval: if chance.one_in(16) { 0 } else { chance.next() as u32 },
        told_tsval: chance.next() as u32,
        ts_recent: chance.next() as u32,
        up_nxt,
        told_acked,
        server_edge: up_nxt.wrapping_add(chance.below(100_000)),
        down_nxt,
        client_acked: down_nxt.wrapping_sub(chance.below(5000)),
        client_edge: down_nxt.wrapping_add(chance.below(100_000)),
        client_shift: chance.below(15) as u8,
        server_shift: chance.below(15) as u8,
        told_shift: chance.below(15) as u8,
        timestamps: !chance.one_in(4),
        bounds: understudy_protocol::Bounds {
            up: up_nxt.wrapping_add(chance.below(150_000)),
            down: down_nxt.wrapping_add(chance.below(150_000)),
        },
    }
}

/// TCP options: as a kernel writes them, in odd layouts, and broken ones.
fn options(chance: &mut Chance, flow: &Flow, from_client: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (near_value, near_echo) = if from_client {
        (flow.ts_recent, flow.server_tsval.wrapping_add(flow.ts_delta))
    } else {
        (flow.told_tsval.wrapping_sub(flow.ts_delta), flow.ts_recent)
    };
    let stamps = |chance: &mut Chance, bytes: &mut Vec<u8>| {
        bytes.extend([8, 10]);
        bytes.extend(chance.near(near_value).to_be_bytes());
        bytes.extend(chance.near(near_echo).to_be_bytes());
    };
    if flow.timestamps != chance.one_in(32) {
        bytes.extend([1; 2].iter().take(if chance.one_in(8) { chance.below(3) as usize } else { 2 }));
        stamps(chance, &mut bytes);
    }
    if chance.one_in(3) {
        let blocks = 1 + chance.below(4);
        bytes.extend([1; 2].iter().take(if chance.one_in(8) { chance.below(3) as usize } else { 2 }));
        bytes.extend([5, 2 + 8 * blocks as u8]);
        for _ in 0..2 * blocks {
            bytes.extend((chance.next() as u32).to_be_bytes());
        }
    }
    while chance.one_in(6) {
        match chance.below(9) {
            0 => bytes.extend([2, 4, 5, 0xb4]),
            1 => bytes.extend([3, 3, 7]),
            2 => bytes.extend([4, 2]),
            // Of wrong lengths.
            5 => bytes.extend([2 + chance.below(4) as u8, 2 + chance.below(2) as u8, 0]),
            3 => stamps(chance, &mut bytes),
            4 => bytes.extend([19, 18]),
            _ => {
                let length = 2 + chance.below(10) as usize;
                bytes.extend([30 + chance.below(200) as u8, length as u8]);
                bytes.extend((2..length).map(|_| chance.next() as u8));
            }
        }
    }
    while bytes.len() % 4 != 0 {
        bytes.push(if chance.one_in(4) { 0 } else { 1 });
    }
    bytes.truncate(40);
    if !bytes.is_empty() && chance.one_in(8) {
        let at = chance.below(bytes.len() as u32) as usize;
        bytes[at] = chance.next() as u8;
    }
    bytes
}

/// An IP packet, mostly sound, and near what `flow` takes next.
fn packet(chance: &mut Chance, flow: &Flow, from_client: bool, v6: bool) -> Vec<u8> {
    let (psc, guest, client) = addresses(v6);
    let (source, destination) = if from_client { (client.ip(), psc) } else { (guest, client.ip()) };
    let ports = if from_client { (client.port(), PORT) } else { (PORT, client.port()) };
    let options = options(chance, flow, from_client);
    let payload = match chance.below(4) {
        0 => 0,
        1 => chance.below(32),
        _ => chance.below(1400),
    };
    let payload: Vec<u8> = (0..payload).map(|at| (at as u8).wrapping_mul(7)).collect();
    let (seq, ack) = if from_client {
        (chance.near(flow.up_nxt), chance.near(flow.down_nxt))
    } else {
        (chance.near(flow.down_nxt).wrapping_sub(flow.seq_delta), chance.near(flow.up_nxt))
    };
    let flags = if chance.one_in(12) { chance.next() as u8 } else { 0x10 | (chance.below(2) as u8) << 3 };
    let mut tcp = Vec::new();
    tcp.extend(ports.0.to_be_bytes());
    tcp.extend(ports.1.to_be_bytes());
    tcp.extend(seq.to_be_bytes());
    tcp.extend(ack.to_be_bytes());
    tcp.extend([(((20 + options.len()) / 4) << 4) as u8, flags]);
    tcp.extend((chance.next() as u16).to_be_bytes());
    tcp.extend([0, 0]);
    tcp.extend((if chance.one_in(8) { chance.next() as u16 } else { 0 }).to_be_bytes());
    tcp.extend(&options);
    tcp.extend(&payload);
    let words = if chance.one_in(64) { chance.below(11) as usize } else { 0 };
    let mut ip = wrap(source, destination, words, tcp, |right, pseudo| match chance.below(8) {
        0 => chance.next() as u16,
        1 => pseudo,
        2 => 0xffff,
        _ => right,
    });
    // Hostile: a bit anywhere in the headers, a frame cut off, or padded.
    if chance.one_in(16) {
        let at = chance.below(60.min(ip.len() as u32)) as usize;
        ip[at] ^= 1 << chance.below(8);
        if !v6 && chance.one_in(2) {
            ip[10..12].fill(0);
            let header = (usize::from(ip[0] & 15) * 4).min(ip.len());
            let check = !fold(sum(&ip[..header]));
            ip[10..12].copy_from_slice(&check.to_be_bytes());
        }
    }
    if chance.one_in(32) {
        // The kernel refuses to run on less than an IP header.
        let length = 40 + chance.below(ip.len() as u32 - 39) as usize;
        ip.truncate(length);
    }
    if chance.one_in(32) {
        ip.extend(std::iter::repeat_n(0xa5, chance.below(20) as usize));
    }
    ip
}

/// An IP packet, with this many words of IPv4 options, around a TCP segment, whose checksum is what `check` makes of the
/// right one and the partial one.
fn wrap(
    source: IpAddr,
    destination: IpAddr,
    words: usize,
    mut tcp: Vec<u8>,
    check: impl FnOnce(u16, u16) -> u16,
) -> Vec<u8> {
    let mut ip = Vec::new();
    let addresses = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ip.extend([0x45 + words as u8, 0]);
            ip.extend(((20 + 4 * words + tcp.len()) as u16).to_be_bytes());
            ip.extend([0, 1, 0x40, 0, 64, 6, 0, 0]);
            let addresses = [source.octets(), destination.octets()].concat();
            ip.extend(&addresses);
            ip.extend(std::iter::repeat_n(1, 4 * words));
            let check = !fold(sum(&ip));
            ip[10..12].copy_from_slice(&check.to_be_bytes());
            addresses
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ip.extend([0x60, 0, 0, 0]);
            ip.extend((tcp.len() as u16).to_be_bytes());
            ip.extend([6, 64]);
            let addresses = [source.octets(), destination.octets()].concat();
            ip.extend(&addresses);
            addresses
        }
        _ => unreachable!(),
    };
    let pseudo = sum(&addresses) + 6 + tcp.len() as u64;
    let check = check(!fold(pseudo + sum(&tcp)), fold(pseudo));
    tcp[16..18].copy_from_slice(&check.to_be_bytes());
    ip.extend(tcp);
    ip
}

/// Of the packet, without what pads its frame.
fn length(packet: &[u8], v6: bool) -> usize {
    if v6 {
        40 + usize::from(u16::from_be_bytes([packet[4], packet[5]]))
    } else {
        usize::from(u16::from_be_bytes([packet[2], packet[3]]))
    }
}

/// Whether the packet is still one of this conversation, so that the programs look at it.
fn belongs(
    packet: &[u8],
    original: (usize, usize, usize),
    psc: IpAddr,
    guest: IpAddr,
    client: SocketAddr,
    from_client: bool,
) -> bool {
    let (source_at, destination_at, length) = original;
    let octets = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let (source, destination) = if from_client { (client.ip(), psc) } else { (guest, client.ip()) };
    let tcp = if psc.is_ipv4() { usize::from(packet[0] & 15) * 4 } else { 40 };
    let Some(header) = packet.get(tcp..tcp + 4) else { return false };
    let ports = if from_client { (client.port(), PORT) } else { (PORT, client.port()) };
    packet[source_at..source_at + length] == octets(source)
        && packet[destination_at..destination_at + length] == octets(destination)
        && header[..2] == ports.0.to_be_bytes()
        && header[2..] == ports.1.to_be_bytes()
}

#[test]
fn the_kernel_translates_as_the_protocol_says() {
    let cases = number("BPF_CASES").map_or(CASES, |cases| cases as u32);
    compare(cases, false);
}

/// No heartbeat ever came.
#[test]
fn so_it_does_while_the_daemon_is_away() {
    let cases = number("BPF_CASES").map_or(CASES / 4, |cases| cases as u32);
    compare(cases, true);
}

/// The kernel's test-run takes no tags: what becomes of those the lab shows.
#[test]
fn what_has_no_tag_is_nothing_to_a_service_in_a_vlan() {
    let Bench { mut programs, mut tap } = common::bench_in_vlan(Daemon::Present, Some(5));
    let mut chance = Chance(1);
    let mut out = Vec::new();
    for case in 0..1_000 {
        let (v6, from_client) = (case % 3 == 0, case % 2 == 0);
        let flow = flow(&mut chance);
        let packet = packet(&mut chance, &flow, from_client, v6);
        let (source, destination) = if from_client { (CLIENT_MAC, PSC_MAC) } else { (GUEST_MAC, OTHER_MAC) };
        let before = frame(&packet, source, destination, v6);
        let key = Key::new(addresses(v6).2, PORT);
        let bounds = Bounds { up: flow.bounds.up, down: flow.bounds.down };
        tap.install(&key, Conversation::new(&flow, CLIENT_MAC, 0), bounds).unwrap();
        let (verdict, _) = programs.rehearse(from_client, &before, &mut out, 1).unwrap();
        assert_eq!((verdict, &out), (TC_ACT_UNSPEC, &before), "{packet:02x?}");
        assert_eq!(tap.next(Source::Service), None);
    }
    assert!(tap.counters()["other_vlan"] > 900, "{:?}", tap.counters());
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|number| number.parse().ok())
}

/// The packet as it must leave while the daemon is away, if it must leave.
fn alone(flow: &Flow, packet: &[u8], from_client: bool, v6: bool) -> Option<Vec<u8>> {
    let (psc, guest, _) = addresses(v6);
    let mut packet = packet.to_vec();
    let outcome = match (is_syn(&packet, v6), from_client) {
        (true, true) => Flow::client_to_server_as_is(&mut packet, guest),
        (true, false) => Flow::server_to_client_as_is(&mut packet, psc),
        (false, true) => flow.client_to_server_alone(&mut packet, guest),
        (false, false) => flow.server_to_client_alone(&mut packet, psc),
    };
    outcome.ok().map(|()| packet)
}

fn is_syn(packet: &[u8], v6: bool) -> bool {
    let tcp = if v6 { 40 } else { usize::from(packet[0] & 15) * 4 };
    packet[tcp + 13] & 2 != 0
}

fn compare(cases: u32, away: bool) {
    let daemon = if away { Daemon::AwayServe } else { Daemon::Present };
    let Bench { mut programs, mut tap } = common::bench(daemon);
    let seed = number("BPF_SEED").unwrap_or(1);
    let mut chance = Chance(seed);
    let (mut passed, mut aside, mut foreign) = (0, 0, 0);
    let mut out = Vec::new();
    for case in 0..cases {
        let (v6, from_client) = (chance.one_in(3), chance.one_in(2));
        let (psc, guest, client) = addresses(v6);
        let mut flow = flow(&mut chance);
        if away {
            // They are not in force then, but only if they would be felt.
            flow.bounds.up = flow.server_edge.wrapping_add(1 << 29);
            flow.bounds.down = flow.down_nxt.wrapping_add(1 << 30);
        }
        let packet = packet(&mut chance, &flow, from_client, v6);
        let key = Key::new(client, PORT);
        let bounds = Bounds { up: flow.bounds.up, down: flow.bounds.down };
        let place = chance.below(CONVERSATIONS);
        tap.install(&key, Conversation::new(&flow, CLIENT_MAC, place), bounds).unwrap();
        let (source_mac, destination_mac) =
            if from_client { (CLIENT_MAC, PSC_MAC) } else { (GUEST_MAC, OTHER_MAC) };
        let before = frame(&packet, source_mac, destination_mac, v6);
        let mut expected_flow = flow;
        let mut expected = packet.clone();
        let outcome = if from_client {
            expected_flow.client_to_server(&mut expected, guest)
        } else {
            expected_flow.server_to_client(&mut expected, psc)
        };
        let (verdict, _) = programs.rehearse(from_client, &before, &mut out, 1).unwrap();
        let record = tap.next(Source::Service);
        let recorded = tap.packet(Source::Service).to_vec();
        let entry = tap.conversation(&key).unwrap();
        let about = format!(
            "case {case} of seed {seed}: {outcome:?}, from client {from_client}, {flow:?}\n{packet:02x?}"
        );
        let offsets = if v6 { (8, 24, 16) } else { (12, 16, 4) };
        if outcome != Err(Aside::Foreign) && !belongs(&packet, offsets, psc, guest, client, from_client) {
            // Somebody else's: only that it is not touched. While the daemon is away it is another client's.
            assert!(away || out == before, "{about}");
            while tap.next(Source::Rvm(SLOT)).is_some() {}
            continue;
        }
        match outcome {
            Ok(edge) => {
                passed += 1;
                let passes = if from_client { TC_ACT_REDIRECT } else { TC_ACT_OK };
                assert_eq!(verdict, passes, "{about}");
                let (to, from) = if from_client { (GUEST_MAC, PSC_MAC) } else { (CLIENT_MAC, PSC_MAC) };
                let after = frame(&expected, from, to, v6);
                assert_eq!(out, after, "{about}");
                let record = record.unwrap_or_else(|| panic!("not recorded: {about}"));
                assert!(record.forwarded && !record.handed_over, "{about}");
                assert_eq!((record.edge, record.trusted), (edge, false), "{about}");
            }
            Err(Aside::Foreign) => {
                foreign += 1;
                assert_eq!(verdict, TC_ACT_UNSPEC, "{about}");
                assert_eq!(record, None, "{about}");
            }
            Err(_) if away && let Some(expected) = alone(&flow, &packet, from_client, v6) => {
                aside += 1;
                let passes = if from_client { TC_ACT_REDIRECT } else { TC_ACT_OK };
                assert_eq!(verdict, passes, "{about}");
                let anew = is_syn(&packet, v6);
                let to = if from_client {
                    GUEST_MAC
                } else if anew {
                    OTHER_MAC
                } else {
                    CLIENT_MAC
                };
                assert_eq!(out, frame(&expected, PSC_MAC, to, v6), "{about}");
                assert!(record.is_some_and(|record| record.forwarded && record.unattended), "{about}");
                assert_eq!(entry.epoch == u32::MAX, anew && !from_client, "{about}");
                assert_eq!(entry.passing == ALONE, !anew, "{about}");
                assert_eq!(recorded, packet[..length(&packet, v6)], "{about}");
                continue;
            }
            Err(why) => {
                aside += 1;
                assert_eq!(verdict, TC_ACT_SHOT, "{about}");
                assert_eq!(out, before, "{about}");
                let slot = (!from_client).then_some(SLOT);
                let handed_over = why == Aside::DaemonFromNow;
                let epoch = tap.epoch();
                let expected = Copied {
                    length: length(&packet, v6),
                    slot,
                    forwarded: false,
                    edge: 0,
                    trusted: false,
                    unattended: false,
                    handed_over,
                    epoch,
                    source_mac,
                };
                assert_eq!(record, Some(expected), "{about}");
            }
        }
        if outcome != Err(Aside::Foreign) {
            assert_eq!(recorded, packet[..length(&packet, v6)], "{about}");
        }
        assert_eq!(entry.flow(bounds), expected_flow, "{about}");
        assert_eq!(entry.passing == 0, outcome == Err(Aside::DaemonFromNow), "{about}");
    }
    println!("{passed} passed, {aside} for the daemon, {foreign} foreign");
    assert!(passed > cases / 8 && aside > cases / 8 && foreign > cases / 64, "{passed} {aside} {foreign}");
}

const OVM: ServerId = ServerId(0);
const RVM: ServerId = ServerId(1);

/// What the engine counts of what it does not take.
const REFUSALS: [&str; 19] = [
    "malformed_truncated",
    "malformed_header",
    "ip_options",
    "malformed_options",
    "fragments",
    "bad_checksum",
    "not_replicated",
    "wrong_address",
    "fenced",
    "no_ovm",
    "authenticated",
    "unacceptable",
    "bad_ack",
    "passed_unrecorded",
    "acknowledged_unrecorded",
    "conversation_bytes",
    "retained_bytes",
    "contradictions",
    "ovm_contradictions",
];

fn input(from_client: bool, passage: Passage, packet: &[u8]) -> Input<'_> {
    match from_client {
        true => Input::Client { link: LinkAddress(CLIENT_MAC), passage, packet },
        false => Input::Server { server: OVM, passage, packet },
    }
}

/// The engine, with one conversation, which is the plane's.
struct Engine {
    service: Service,
    now: Instant,
    flow: Flow,
    entry: u32,
}

impl Engine {
    fn new(chance: &mut Chance, v6: bool) -> Self {
        let (psc, guest, client) = addresses(v6);
        let mut config = ServiceConfig::new("differential", vec![psc], vec![PORT]);
        config.limits.ahead_bytes = 1 << 20;
        let mut service = Service::new(config);
        let now = Instant::from_micros(1_000_000);
        service.handle(now, Input::PlanePasses).unwrap();
        // Nobody speaks to the replica but the engine.
        let replica: IpAddr = if v6 { "fd77::12".parse().unwrap() } else { "10.77.0.12".parse().unwrap() };
        let spec = |id, address| ServerSpec { id, addresses: vec![address], mtu: 1500 };
        let (ovm, rvm, seeding) = (spec(OVM, guest), spec(RVM, replica), Seeding::AssumeIdentical);
        service.handle(now, Input::Command(Command::InstallOvm(ovm))).unwrap();
        service.handle(now, Input::Command(Command::Attach { spec: rvm, seeding })).unwrap();
        let (client_iss, server_iss) = (chance.next() as u32, chance.next() as u32);
        let stamps = !chance.one_in(4);
        let options = |syn: bool, tsval: u32, tsecr: u32| {
            let mut options = if syn { vec![2, 4, 5, 0xb4, 4, 2, 1, 1, 1, 3, 3, 7] } else { Vec::new() };
            if stamps {
                options.extend([1, 1, 8, 10]);
                options.extend([tsval.to_be_bytes(), tsecr.to_be_bytes()].concat());
            }
            options
        };
        let segment = |(from, to): (u16, u16), seq: u32, ack: u32, flags: u8, options: Vec<u8>| {
            let mut tcp = [from.to_be_bytes(), to.to_be_bytes()].concat();
            tcp.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
            tcp.extend([(((20 + options.len()) / 4) << 4) as u8, flags]);
            tcp.extend(60_000_u16.to_be_bytes());
            tcp.extend([0; 4]);
            tcp.extend(options);
            tcp
        };
        let mut say = |from_client: bool, seq: u32, ack: u32, flags: u8, options: Vec<u8>| {
            let ports = if from_client { (client.port(), PORT) } else { (PORT, client.port()) };
            let tcp = segment(ports, seq, ack, flags, options);
            let (src, dst) = if from_client { (client.ip(), psc) } else { (guest, client.ip()) };
            let packet = wrap(src, dst, 0, tcp, |right, _| right);
            service.handle(now, input(from_client, Passage::Kept, &packet)).unwrap();
            while service.poll(now).is_some() {}
        };
        let [first, second] = [client_iss.wrapping_add(1), server_iss.wrapping_add(1)];
        say(true, client_iss, 0, 0x02, options(true, 700, 0));
        say(false, server_iss, first, 0x12, options(true, 9_000, 700));
        say(true, first, second, 0x10, options(false, 701, 9_000));
        service.handle(now, Input::PlaneIdle).unwrap();
        let Some(Output::Rule(Rule::HandOver(handover))) = service.poll(now) else {
            panic!("the conversation can be the plane's");
        };
        let Handover { flow, entry, .. } = *handover;
        Self { service, now, flow, entry }
    }

    fn refused(&self) -> Vec<u64> {
        let counters = self.service.status().counters;
        REFUSALS.iter().map(|name| counters[name]).collect()
    }
}

/// Whether the packet's TCP checksum is right.
fn is_right(packet: &[u8], v6: bool) -> bool {
    let (addresses, tcp) = if v6 { (8..40, 40) } else { (12..20, 20) };
    let tcp = &packet[tcp..length(packet, v6)];
    fold(sum(&packet[addresses]) + 6 + tcp.len() as u64 + sum(tcp)) == 0xffff
}

/// Whatever the kernel passes by its own judgment, the engine takes as it is, except what its receiver finds broken, which the
/// engine finds broken, too. No replica ever falls behind because of what a client sent.
#[test]
fn what_the_kernel_passes_the_engine_takes() {
    let cases = number("BPF_CASES").map_or(CASES / 4, |cases| cases as u32);
    let Bench { mut programs, mut tap } = common::bench(Daemon::Present);
    let seed = number("BPF_SEED").unwrap_or(1);
    let mut chance = Chance(seed);
    let (mut passed, mut broken, mut stories) = (0, 0, 0);
    let mut out = Vec::new();
    let mut case = 0;
    while case < cases {
        stories += 1;
        let v6 = chance.one_in(3);
        let (_, _, client) = addresses(v6);
        let key = Key::new(client, PORT);
        let mut engine = Engine::new(&mut chance, v6);
        let bounds = Bounds { up: engine.flow.bounds.up, down: engine.flow.bounds.down };
        let entry = Conversation::new(&engine.flow, CLIENT_MAC, engine.entry);
        tap.install(&key, entry, bounds).unwrap();
        for _ in 0..16 {
            case += 1;
            let entry = tap.conversation(&key).unwrap();
            if entry.passing == 0 {
                break;
            }
            let flow = entry.flow(bounds);
            let from_client = !chance.one_in(3);
            let packet = packet(&mut chance, &flow, from_client, v6);
            let (psc, guest, _) = addresses(v6);
            let offsets = if v6 { (8, 24, 16) } else { (12, 16, 4) };
            if !belongs(&packet, offsets, psc, guest, client, from_client) {
                continue;
            }
            let (source, destination) =
                if from_client { (CLIENT_MAC, PSC_MAC) } else { (GUEST_MAC, OTHER_MAC) };
            let frame = frame(&packet, source, destination, v6);
            programs.rehearse(from_client, &frame, &mut out, 1).unwrap();
            let Some(record) = tap.next(Source::Service) else { continue };
            let passage = match record {
                Copied { forwarded: true, edge, trusted, .. } => Passage::Passed { edge, trusted },
                Copied { handed_over: true, .. } => Passage::HandedOver,
                _ => Passage::Kept,
            };
            let recorded = tap.packet(Source::Service).to_vec();
            let before = engine.refused();
            let (service, now) = (&mut engine.service, engine.now);
            service.handle(now, input(from_client, passage, &recorded)).unwrap();
            while service.poll(now).is_some() {}
            let about = format!("case {case} of seed {seed}: {passage:?}, {flow:?}\n{packet:02x?}");
            let status = engine.service.status();
            if status.counters["acknowledged_unrecorded"] > 0 {
                // This OVM says that it has what lies in a gap, or was broken: no honest one does.
                break;
            }
            if record.forwarded {
                let mut expected = before;
                if is_right(&recorded, v6) {
                    passed += 1;
                } else {
                    broken += 1;
                    expected[REFUSALS.iter().position(|name| *name == "bad_checksum").unwrap()] += 1;
                }
                assert_eq!(engine.refused(), expected, "{about}");
            }
            assert_eq!(status.servers[1].stale, None, "{about}");
        }
        tap.remove(&key);
        while tap.next(Source::Service).is_some() {}
    }
    println!("{passed} taken, {broken} broken for everybody, {stories} conversations");
    assert!(passed > cases / 16 && broken > cases / 64, "{passed} {broken}");
}
