//! What is written down while an engine runs, and what a successor makes of it.
#![allow(clippy::unwrap_used)]

mod golden;

use understudy_driver::Engine as _;
use understudy_protocol::{Command, LinkAddress, Seeding, ServerSpec};

use super::*;

const NOW: Instant = Instant::from_micros(1_000_000);

fn config() -> config::Service {
    let text =
        "[[service]]\nname = \"s\"\npsc = \"10.77.0.100\"\nports = [80]\novm = \"a\"\nrvms = [\"b\"]\n";
    text.parse::<config::Config>().unwrap().services.remove(0)
}

/// What a successor with this configuration finds.
fn left(base: &Path, config: &config::Service) -> Result<Left, Lost> {
    Engine::left(base, digest(config), config.engine.clone())
}

/// An engine with a journal, and the files' base.
fn journaled(name: &str) -> (Engine, std::path::PathBuf) {
    let config = config();
    let base = std::env::temp_dir().join(format!("dom0d-{name}-{}", std::process::id()));
    let mut engine = Engine::new(config.engine.clone());
    engine.begin_journal(&base, digest(&config)).unwrap();
    (engine, base)
}

/// One whose journal is so full that a new snapshot is due.
fn due(name: &str) -> (Engine, std::path::PathBuf) {
    let (mut engine, base) = journaled(name);
    // Not one of the service: nothing comes of it but a record.
    let packet = vec![0; 60_000];
    while !engine.journal.as_ref().unwrap().is_due() {
        engine
            .tell(NOW, Input::Client { link: LinkAddress([2; 6]), passage: Passage::Kept, packet: &packet });
    }
    (engine, base)
}

const CLIENT: ([u8; 4], u16) = ([10, 77, 0, 1], 40_000);
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;

/// A packet as a guest or a client on this host sends it: with a partial checksum.
fn packet(
    from: ([u8; 4], u16),
    to: ([u8; 4], u16),
    (seq, ack): (u32, u32),
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    let length = 20 + payload.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend((20 + length).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
    packet.extend([from.0, to.0].concat());
    let header: u32 = packet.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    packet[10..12].copy_from_slice(&(!((header & 0xffff) + (header >> 16)) as u16).to_be_bytes());
    packet.extend([from.1.to_be_bytes(), to.1.to_be_bytes()].concat());
    packet.extend([seq.to_be_bytes(), ack.to_be_bytes()].concat());
    packet.extend([0x50, flags, 0xff, 0xff]);
    let addresses = packet[12..20].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum = addresses.sum::<u32>() + 6 + u32::from(length);
    packet.extend(((sum & 0xffff) as u16 + (sum >> 16) as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

#[test]
fn a_successor_hears_what_a_replica_repeated_though_it_was_not_written_down() {
    let (mut engine, base) = journaled("repeating");
    let link = LinkAddress([2, 0, 0, 0, 0, 1]);
    let psc = ([10, 77, 0, 100], 80);
    let [ovm, rvm] = [11, 12].map(|last| ([10, 77, 0, last], 80));
    let spec = |id, (address, _): ([u8; 4], u16)| ServerSpec {
        id: ServerId(id),
        addresses: vec![address.into()],
        mtu: 1500,
    };
    engine.command(NOW, Command::InstallOvm(spec(0, ovm))).unwrap();
    let (spec, seeding) = (spec(1, rvm), Seeding::AssumeIdentical);
    engine.command(NOW, Command::Attach { spec, seeding }).unwrap();
    let drain = |engine: &mut Engine| {
        let polled = std::iter::from_fn(|| engine.poll(NOW)).count() as u32;
        engine.polled(NOW, polled + 1);
    };
    let answer = b"what both servers answer, at some length. ".repeat(100);
    let from_client = |numbers, flags| packet(CLIENT, psc, numbers, flags, &[]);
    engine.tell(NOW, Input::Client { link, passage: Passage::Kept, packet: &from_client((100, 0), SYN) });
    drain(&mut engine);
    let server_says = |id, from, numbers, flags, payload: &[u8], engine: &mut Engine| {
        let packet = packet(from, CLIENT, numbers, flags, payload);
        engine.tell(NOW, Input::Server { server: ServerId(id), passage: Passage::Kept, packet: &packet });
        drain(engine);
    };
    server_says(0, ovm, (5_000, 101), SYN | ACK, &[], &mut engine);
    engine.tell(NOW, Input::Client { link, passage: Passage::Kept, packet: &from_client((101, 5_001), ACK) });
    drain(&mut engine);
    server_says(1, rvm, (9_000, 101), SYN | ACK, &[], &mut engine);
    server_says(0, ovm, (5_001, 101), ACK, &answer[..4_000], &mut engine);
    let before = engine.journal.as_ref().unwrap().records().unwrap().map(<[u8]>::len).sum::<usize>();
    server_says(1, rvm, (9_001, 101), ACK, &answer[..1_000], &mut engine);
    let taken = engine.journal.as_ref().unwrap().records().unwrap().map(<[u8]>::len).sum::<usize>() - before;
    assert!(taken < 200, "{taken} bytes for what is known");
    // What is ahead of the OVM is.
    server_says(1, rvm, (10_001, 101), ACK, &answer[1_000..4_100], &mut engine);
    let status = engine.conversations(0, 9);
    let expected = engine.save();
    drop(engine);
    let left = left(&base, &config()).unwrap();
    assert!(left.engine.save() == expected, "{status:?}");
    remove(&base).unwrap();
}

#[test]
fn a_changed_configuration_costs_conversations_only_where_they_depend_on_it() {
    let after = |name: &str, change: fn(&mut config::Service)| {
        let (engine, base) = journaled(name);
        drop(engine);
        let mut config = config();
        change(&mut config);
        let left = left(&base, &config).map(|left| left.engine.config().clone());
        remove(&base).unwrap();
        left.map(|engine| assert_eq!(engine, config.engine))
    };
    let harmless: [fn(&mut config::Service); 6] = [
        |config| config.maintenance_limit *= 2,
        |config| config.rvms.clear(),
        |config| config.engine.name.push('2'),
        |config| config.engine.timing.close_hold *= 2,
        |config| config.engine.masks.push(understudy_protocol::Mask::http_date()),
        |config| config.on_daemon_loss = config::OnDaemonLoss::Protect,
    ];
    for change in harmless {
        after("harmless", change).unwrap();
    }
    let matters: [fn(&mut config::Service); 5] = [
        |config| config.engine.psc[0] = [10, 77, 0, 101].into(),
        |config| config.engine.ports.push(81),
        |config| config.engine.limits.conversations -= 1,
        |config| config.psc_mac[5] ^= 1,
        |config| config.vlan = Some(7),
    ];
    for change in matters {
        assert!(matches!(after("matters", change), Err(Lost::Differs)));
    }
}

#[test]
fn an_engine_that_gave_its_journal_up_is_followed_by_nobody() {
    let (mut engine, base) = journaled("given-up");
    let packet = &vec![0; 64 << 20];
    engine.tell(NOW, Input::Client { link: LinkAddress([2; 6]), passage: Passage::Kept, packet });
    assert!(!engine.is_journaled());
    engine.tell(NOW, Input::Timeout);
    assert!(matches!(left(&base, &config()), Err(Lost::Damaged)));
    remove(&base).unwrap();
}

#[test]
fn a_snapshot_that_is_due_waits_for_the_end_of_a_cutover() {
    let (mut engine, base) = due("urgent");
    engine.set_urgent(true);
    engine.tell(NOW, Input::Timeout);
    engine.polled(NOW, 0);
    assert!(engine.journal.as_ref().unwrap().is_due());
    engine.set_urgent(false);
    engine.tell(NOW, Input::Timeout);
    assert!(!engine.journal.as_ref().unwrap().is_due());
    remove(&base).unwrap();
}

#[test]
fn without_room_for_another_input_the_snapshot_comes_all_the_same() {
    let (mut engine, base) = due("full");
    engine.set_urgent(true);
    let packet = vec![0; 60_000];
    for _ in 0..200 {
        engine
            .tell(NOW, Input::Client { link: LinkAddress([2; 6]), passage: Passage::Kept, packet: &packet });
    }
    // More than the reserve: it was written in between, and a successor can follow.
    assert!(engine.is_journaled());
    assert!(!engine.journal.as_ref().unwrap().is_due());
    remove(&base).unwrap();
}

#[test]
fn what_was_left_with_a_byte_changed_is_not_gone_on_with() {
    let (mut engine, base) = journaled("flipped");
    for n in 0..9 {
        engine.tell(NOW + std::time::Duration::from_millis(n), Input::Timeout);
    }
    let expected = engine.save();
    drop(engine);
    let file = base.with_extension("journal.1");
    let whole = std::fs::read(&file).unwrap();
    let end = whole.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    let mut refused = 0;
    for at in 0..end {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        std::fs::write(&file, &flipped).unwrap();
        match left(&base, &config()) {
            Ok(left) => assert!(left.engine.save() == expected, "byte {at} of {end}"),
            Err(_) => refused += 1,
        }
        remove(&base).unwrap();
    }
    // Not the count of tries.
    assert!(refused >= end - 8, "{refused} of {end}");
}
