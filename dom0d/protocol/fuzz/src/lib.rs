//! Fuzz targets of the protocol engine: hostile clients, servers and operators. Each target decodes any byte string into
//! inputs, and panics when the engine breaks a promise. The same targets run under libFuzzer (`fuzz.sh`) and under `cargo
//! test`, on the corpus (`tests/replay.rs`).

mod bytes;
mod oracle;
mod packet;
mod plane;
mod world;

use understudy_protocol::{Instant, LinkAddress, ServerId};

use bytes::Bytes;
use world::World;

/// Arbitrary packets from clients and servers, of which none need be valid.
///
/// Every other packet gets right checksums: otherwise nothing would get past that check.
pub fn packets(input: &[u8]) {
    let mut bytes = Bytes::new(input);
    let mut world = World::new(&mut bytes);
    world.unmark();
    while !bytes.is_empty() {
        let from = bytes.byte();
        let length = usize::from(bytes.byte()) * 2;
        let mut raw = bytes.take(length).to_vec();
        if from & 0x80 != 0 {
            packet::repair(&mut raw);
        }
        match from & 3 {
            0 | 1 => world.raw_from_client(LinkAddress([2, 0, 0, 0, 0, from & 1]), &raw),
            _ => world.raw_from_server(ServerId(u32::from(from >> 2 & 3)), &raw),
        }
    }
    world.finish();
}

/// A story of handshakes, segments that are valid or nearly so, time, faults, and an operator's commands.
pub fn engine(input: &[u8]) {
    let mut bytes = Bytes::new(input);
    let mut world = World::new(&mut bytes);
    // Longer stories cost time and find nothing that shorter ones do not.
    for _ in 0..400 {
        if bytes.is_empty() {
            break;
        }
        world.step(&mut bytes);
    }
    world.finish();
}

/// The origin of the worlds' clock.
const START: Instant = Instant::from_micros(1_000_000);
