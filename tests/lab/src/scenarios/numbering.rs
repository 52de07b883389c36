//! Sequence numbers that wrap in mid-transfer, in either direction, before and after a failover.
//!
//! Nothing is patched to get there: Linux chooses an initial sequence number per pair of addresses
//! and ports, so connections are opened until one of them begins close enough below 2^32 for its
//! transfer to wrap where the story wants it.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Scenario;
use super::transfer::{Direction, Large};
use crate::client::frames::{ACK, SYN};
use crate::client::http;
use crate::client::sniff::Wire;
use crate::host::{Fault, Service};
use crate::stage::Stage;
use crate::stage::failover::Failover;

/// Connections tried: one in 70 begins in a range of 60 MB, so that all fail once in 10^12 runs.
const TRIES: usize = 2_000;

pub(super) fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for (direction, name) in [(Direction::Download, "download"), (Direction::Upload, "upload")] {
        for (when, place) in [("before", 30_000_000..90_000_000), ("after", 170_000_000..230_000_000)] {
            let place = place.clone();
            all.push(
                Scenario::new(format!("numbering/wrap/{name}/{when}-failover"), move |lab| {
                    wrap(lab, direction, place.clone())
                })
                .within(Duration::from_secs(180)),
            );
        }
    }
    all
}

/// The numbers of the body's direction wrap after as many bytes as `place` says; the fault strikes
/// at 120 MB of 300.
fn wrap(lab: &str, direction: Direction, place: std::ops::Range<u32>) -> Result<()> {
    let stage = Stage::up(lab, 1, &[Service::Http])?;
    let stream = connection(&stage, direction, place)?;
    let large = Large::begin_on(&stage, direction, stream)?;
    large.wait_part(0.4)?;
    let at = stage.lab.fault(Fault::Freeze, "guest-1")?;
    let failover = Failover::observe(&stage, Service::Http, Fault::Freeze, at)?;
    large.expect_whole(&stage)?;
    failover.expect_plausible()
}

/// An open connection whose sender of the body has `place` bytes left below 2^32.
fn connection(stage: &Stage, direction: Direction, place: std::ops::Range<u32>) -> Result<TcpStream> {
    let target = stage.psc(Service::Http)?;
    stage.client().run(move || {
        let wire = Wire::open_only()?;
        for attempt in 0..TRIES {
            let stream = http::connect(target)?;
            let local = stream.local_addr()?;
            let flags = match direction {
                Direction::Upload => SYN,
                Direction::Download => SYN | ACK,
            };
            let seen = wire
                .next(Duration::from_secs(2), |seen| {
                    seen.flags & (SYN | ACK) == flags && (seen.from == local || seen.to == local)
                })?
                .context("the handshake was not seen on the client's link")?;
            let left = seen.sequence.wrapping_neg();
            if place.contains(&left) {
                println!("  connection {attempt} begins at {}: wraps after {left} bytes", seen.sequence);
                return Ok(stream);
            }
        }
        bail!("none of {TRIES} connections begins where it would wrap")
    })
}
