//! One large transfer up and down over each path in turn.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::path::Path;
use super::rtt::pin_domains;
use super::summary::quantile;
use crate::client::http;
use crate::client::place::Place;
use crate::host::{Lab, Service};
use crate::stage::own_address;
use crate::stage::pinning::Pinning;

/// Medians over the rounds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) path: String,
    pub(crate) download_mb_per_s: f64,
    pub(crate) upload_mb_per_s: f64,
    pub(crate) download_ratio_to_plain: f64,
    pub(crate) upload_ratio_to_plain: f64,
    /// To [`Path::PlainTwice`], for a path that carries every byte twice, where it was measured.
    pub(crate) download_ratio_to_fair_limit: Option<f64>,
    pub(crate) upload_ratio_to_fair_limit: Option<f64>,
    /// Replicas that fell behind and were lost, over all rounds.
    pub(crate) lost: usize,
    /// Every replica held the whole upload at the end of each round.
    pub(crate) replicated: bool,
}

/// The first path is what the others are compared with.
pub(crate) fn measure(lab: &Lab, pinning: Pinning, paths: &[Path], rounds: usize) -> Result<Vec<Row>> {
    pin_domains(lab, pinning)?;
    let mut speeds = vec![(Vec::new(), Vec::new(), 0, true); paths.len()];
    for _ in 0..rounds {
        for (path, (down, up, lost, replicated)) in paths.iter().zip(&mut speeds) {
            let ((), now_lost) = path.with(lab, pinning, Service::Http, |target| {
                let (d, u, sha256) = transfer(lab, pinning, *path, target)?;
                down.push(d);
                up.push(u);
                *replicated &= all_hold(lab, path.replicas(), &sha256)?;
                Ok(())
            })?;
            *lost += now_lost;
        }
    }
    let median = |speeds: &[u64]| quantile(speeds, 0.5) as f64 / 1e6;
    let medians: Vec<_> = speeds.iter().map(|(down, up, ..)| (median(down), median(up))).collect();
    let (plain_down, plain_up) = medians.first().copied().unwrap_or_default();
    let twice = paths.iter().position(|&path| path == Path::PlainTwice).map(|at| medians[at]);
    let rows = paths.iter().zip(medians).zip(speeds);
    Ok(rows
        .map(|((path, (down, up)), (_, _, lost, replicated))| {
            let fair = twice.filter(|_| path.replicas() == 1);
            Row {
                path: path.name(),
                download_mb_per_s: down,
                upload_mb_per_s: up,
                download_ratio_to_plain: down / plain_down,
                upload_ratio_to_plain: up / plain_up,
                download_ratio_to_fair_limit: fair.map(|(fair_down, _)| down / fair_down),
                upload_ratio_to_fair_limit: fair.map(|(_, fair_up)| up / fair_up),
                lost,
                replicated,
            }
        })
        .collect())
}

/// Bytes per second down and up, and SHA-256 of what was sent up.
fn transfer(lab: &Lab, pinning: Pinning, path: Path, target: SocketAddr) -> Result<(u64, u64, String)> {
    let client = Place::new(lab.client().netns);
    let mut clients = vec![(client.pinned(Some(pinning.client_and_ovm)), target)];
    if path == Path::PlainTwice {
        // Where dom0d is, which is the replica's client.
        let other = own_address(&lab.domain("guest-2")?, Service::Http)?.1;
        clients.push((client.pinned(Some(pinning.dom0d_and_rvms)), other));
    }
    let bytes = lab.config().large_file_bytes;
    let down = at_once(&clients, |place, target| http::download(place, target, "/large.bin"))?;
    ensure!(down.bytes == bytes, "{} of {bytes} bytes came", down.bytes);
    let up = at_once(&clients, |place, target| http::upload(place, target, "/upload/bench.bin", bytes, 5))?;
    let speed = |t: &http::Transfer| (t.bytes as f64 / t.took.as_secs_f64()) as u64;
    Ok((speed(&down), speed(&up), up.sha256))
}

/// What the first client's transfer did, once all have ended.
fn at_once(
    clients: &[(Place, SocketAddr)],
    start: impl Fn(&Place, SocketAddr) -> Result<http::Running>,
) -> Result<http::Transfer> {
    let running: Vec<_> =
        clients.iter().map(|(place, target)| start(place, *target)).collect::<Result<_>>()?;
    let done: Vec<_> = running.into_iter().map(http::Running::finish).collect::<Result<_>>()?;
    done.into_iter().next().context("nobody transfers")
}

fn all_hold(lab: &Lab, replicas: usize, sha256: &str) -> Result<bool> {
    for domain in lab.domains()?.iter().filter(|domain| domain.place <= replicas + 1) {
        let path = domain.uploaded("bench.bin");
        // A replica may be a moment behind; it has the file under its name once it has it whole.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while http::file_sha256(&path).ok().as_deref() != Some(sha256) {
            if std::time::Instant::now() > deadline {
                return Ok(false);
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        std::fs::remove_file(&path)?;
    }
    Ok(true)
}

pub(crate) fn print(rows: &[Row]) {
    println!(
        "  path               down MB/s  of plain   of fair    up MB/s  of plain   of fair  replicas lost  every byte replicated"
    );
    let percent = |ratio: f64| format!("{:.1} %", ratio * 100.0);
    let fair = |ratio: Option<f64>| ratio.map_or(String::new(), percent);
    for row in rows {
        println!(
            "  {:<16} {:>11.1} {:>9} {:>9} {:>10.1} {:>9} {:>9}  {:>13}  {}",
            row.path,
            row.download_mb_per_s,
            percent(row.download_ratio_to_plain),
            fair(row.download_ratio_to_fair_limit),
            row.upload_mb_per_s,
            percent(row.upload_ratio_to_plain),
            fair(row.upload_ratio_to_fair_limit),
            row.lost,
            if row.replicated { "yes" } else { "NO" }
        );
    }
}
