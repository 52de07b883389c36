//! Measures the cost of a segment in the kernel by BPF test-run, with and without recording. The conversation's translation
//! changes nothing, so that the same segment can pass again and again. Needs root.

use std::net::IpAddr;
use std::time::Duration;

use understudy_bpf::layout::{Bounds, Conversation, Key, Server};
use understudy_bpf::{Settings, Source, load};
use understudy_protocol::Flow;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PORT: u16 = 6379;
const LOOPBACK: u32 = 1;
/// Fewer than fill the ring.
const RUNS: u32 = 10_000;
const ROUNDS: usize = 50;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let psc = IpAddr::from([10, 77, 0, 100]);
    let client = "10.77.0.1:40000".parse()?;
    let settings = Settings {
        psc: vec![psc],
        psc_mac: MAC,
        vlan: None,
        ports: vec![PORT],
        conversations: 1,
        daemon_grace: Duration::from_secs(1),
        // No heartbeat comes: what finds the ring full passes unrecorded.
        serve: true,
        pins: None,
    };
    let (mut programs, mut tap) = load(&settings)?;
    // The PSC's own address, so that a rewritten segment is the one that came.
    tap.set_server(
        0,
        Server { ifindex: LOOPBACK, has_v4: 1, mac: MAC, v4: [10, 77, 0, 100], ..Server::default() },
    );
    tap.activate(Some(0));
    let flow =
        Flow { timestamps: true, up_nxt: 1000, told_acked: 1000, server_edge: 60_000, ..Flow::default() };
    tap.install(
        &Key::new(client, PORT),
        Conversation::new(&flow, MAC, 0),
        Bounds { up: 60_000, down: 60_000 },
    )?;
    let mut packet = vec![0x45, 0, 0, 52, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 77, 0, 1, 10, 77, 0, 100];
    packet.extend([0x9c, 0x40, 0x18, 0xeb, 0, 0, 3, 0xe8, 0, 0, 0, 0, 0x80, 0x10, 1, 0, 0, 0, 0, 0]);
    packet.extend([1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0]);
    let frame = [MAC.as_slice(), &MAC, &[8, 0], &packet].concat();
    let mut out = Vec::new();
    let mut run = || {
        let (verdict, time) = programs.rehearse(true, &frame, &mut out, RUNS)?;
        if verdict != 7 {
            return Err(format!("the segment does not pass: verdict {verdict}").into());
        }
        Ok::<_, Box<dyn std::error::Error>>(time)
    };
    let mut recorded = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        recorded.push(run()?);
        while tap.next(Source::Service).is_some() {}
    }
    // Nobody reads any more.
    while tap.unrecorded() == 0 {
        run()?;
    }
    let mut unrecorded = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        unrecorded.push(run()?);
    }
    for (what, mut times) in [("and recording 52 bytes", recorded), ("without recording", unrecorded)] {
        times.sort_unstable();
        println!(
            "parsing, look-up, rewriting, checksums, {what}: median {} ns, fastest {} ns",
            times[ROUNDS / 2].as_nanos(),
            times[0].as_nanos()
        );
    }
    Ok(())
}
