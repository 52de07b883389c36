//! What this version of dom0d leaves when it is killed in mid-conversation, as a file that later versions must be able to go
//! on with, or must say that they can't.
//!
//! Whoever changes the format on purpose (and its number: `FORMAT` of the journal, or of the engine's saved state) writes
//! the file anew: `GOLDEN=write cargo test -p dom0d golden`.

use std::path::PathBuf;
use std::sync::OnceLock;

use understudy_protocol::{Destination, Evidence, Output, Transmit};

use super::*;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/store/succession/tests/golden.journal");

/// In place of a digest: the file is to outlive changes of what the kernel's maps hold.
const DIGEST: u64 = 7;

const PSC: ([u8; 4], u16) = ([10, 77, 0, 100], 80);
const SERVERS: [([u8; 4], u16); 2] = [([10, 77, 0, 11], 80), ([10, 77, 0, 12], 80)];
/// Where each server begins to count.
const ISS: [u32; 2] = [5_000, 9_000];
const KNOWN: &[u8] = b"what is known beside the engine";

fn base(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("dom0d-{name}-{}", std::process::id()))
}

/// Packets that the engine sends, and to whom.
fn drain(engine: &mut Engine) -> Vec<(Destination, Vec<u8>)> {
    let mut sent = Vec::new();
    let mut count = 1;
    while let Some(output) = engine.poll(NOW) {
        count += 1;
        if let Output::Transmit(Transmit { to, packet, .. }) = output {
            sent.push((to, packet));
        }
    }
    engine.polled(NOW, count);
    sent
}

fn client_says(
    engine: &mut Engine,
    numbers: (u32, u32),
    flags: u8,
    text: &[u8],
) -> Vec<(Destination, Vec<u8>)> {
    let packet = packet(CLIENT, PSC, numbers, flags, text);
    engine.tell(
        NOW,
        Input::Client { link: LinkAddress([2, 0, 0, 0, 0, 1]), passage: Passage::Kept, packet: &packet },
    );
    drain(engine)
}

/// At `position` behind its SYN.
fn server_says(engine: &mut Engine, server: usize, (position, ack): (u32, u32), flags: u8, text: &[u8]) {
    let packet = packet(SERVERS[server], CLIENT, (ISS[server] + position, ack), flags, text);
    let server = ServerId(server as u32);
    engine.tell(NOW, Input::Server { server, passage: Passage::Kept, packet: &packet });
    drain(engine);
}

/// A conversation begins, then the journal; the client has an answer that the replica has yet to give.
fn leave(base: &Path) {
    let mut engine = Engine::new(config().engine);
    engine.tell(NOW, Input::PlanePasses);
    let spec =
        |id: usize| ServerSpec { id: ServerId(id as u32), addresses: vec![SERVERS[id].0.into()], mtu: 1500 };
    engine.command(NOW, Command::InstallOvm(spec(0))).unwrap();
    engine.command(NOW, Command::Attach { spec: spec(1), seeding: Seeding::AssumeIdentical }).unwrap();
    client_says(&mut engine, (100, 0), SYN, b"");
    server_says(&mut engine, 0, (0, 101), SYN | ACK, b"");
    client_says(&mut engine, (101, ISS[0] + 1), ACK, b"");
    engine.begin_journal(base, DIGEST).unwrap();
    engine.set_surroundings(KNOWN.to_vec());
    server_says(&mut engine, 1, (0, 101), SYN | ACK, b"");
    client_says(&mut engine, (101, ISS[0] + 1), ACK, b"question");
    server_says(&mut engine, 0, (1, 109), ACK, b"answer");
}

/// The part of a journal's only file that is in use.
fn used(file: &Path) -> Vec<u8> {
    let bytes = std::fs::read(file).unwrap();
    let used = bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    bytes[..used.next_multiple_of(8)].to_vec()
}

fn file(base: &Path) -> PathBuf {
    base.with_extension("journal.1")
}

/// The file's bytes, written anew before if that is asked for.
fn golden() -> &'static [u8] {
    static GOLDEN: OnceLock<Vec<u8>> = OnceLock::new();
    GOLDEN.get_or_init(|| {
        if std::env::var_os("GOLDEN").is_some_and(|word| word == "write") {
            let base = base("golden-new");
            leave(&base);
            std::fs::write(FILE, used(&file(&base))).unwrap();
            remove(&base).unwrap();
        }
        std::fs::read(FILE).unwrap()
    })
}

#[test]
fn golden_journal_is_gone_on_with() {
    let base = base("golden");
    std::fs::write(file(&base), golden()).unwrap();
    let Left { mut engine, .. } = Engine::left(&base, DIGEST, config().engine).unwrap();
    assert_eq!(engine.surroundings(), KNOWN);
    let status = engine.status();
    assert_eq!((status.epoch, status.conversations, engine.ovm()), (1, 1, Some(ServerId(0))));
    assert_eq!((status.servers[1].stale, status.servers[1].covered), (None, 1));
    engine.tell(NOW, Input::Evidence { server: ServerId(0), evidence: Evidence::DomainGone });
    drain(&mut engine);
    assert_eq!((engine.epoch(), engine.ovm()), (2, Some(ServerId(1))));
    server_says(&mut engine, 1, (1, 109), ACK, b"answer");
    let sent = client_says(&mut engine, (109, ISS[0] + 7), ACK, b"another question");
    let to_replica = |(to, packet): &(Destination, Vec<u8>)| {
        *to == Destination::Server(ServerId(1)) && packet.ends_with(b"another question")
    };
    assert!(sent.iter().any(to_replica), "{sent:?}");
    remove(&base).unwrap();
}

/// A change of what is written that nobody meant shows here; one that was meant needs another number.
#[test]
fn golden_journal_is_what_is_left_today() {
    let base = base("golden-today");
    leave(&base);
    assert!(used(&file(&base)) == golden(), "see the head of {}", file!());
    remove(&base).unwrap();
}

#[test]
fn golden_journal_of_another_format_is_refused_with_its_number() {
    let base = base("golden-older");
    let mut bytes = golden().to_vec();
    // The first word, little-endian, ends in the format's digit.
    bytes[0] = b'4';
    std::fs::write(file(&base), bytes).unwrap();
    let error = Engine::left(&base, DIGEST, config().engine).map(drop).unwrap_err();
    assert_eq!(error.to_string(), "its journal has format 4, and this dom0d reads format 5");
    remove(&base).unwrap();
}
