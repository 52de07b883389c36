//! One large transfer up and down over each path in turn.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::path::Path;
use super::rtt::pin_domains;
use super::summary::quantile;
use crate::client::http;
use crate::client::place::Place;
use crate::host::{Lab, Service};
use crate::stage::pinning::Pinning;

/// Medians over the rounds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) path: String,
    pub(crate) download_mb_per_s: f64,
    pub(crate) upload_mb_per_s: f64,
    pub(crate) download_ratio_to_plain: f64,
    pub(crate) upload_ratio_to_plain: f64,
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
                let (d, u, sha256) = transfer(lab, pinning, target)?;
                down.push(d);
                up.push(u);
                *replicated &= all_hold(lab, path.replicas(), &sha256)?;
                Ok(())
            })?;
            *lost += now_lost;
        }
    }
    let median = |speeds: &[u64]| quantile(speeds, 0.5) as f64 / 1e6;
    let plain = speeds.first().map(|(down, up, ..)| (median(down), median(up)));
    let (plain_down, plain_up) = plain.unwrap_or_default();
    Ok(paths
        .iter()
        .zip(&speeds)
        .map(|(path, (down, up, lost, replicated))| Row {
            path: path.name(),
            download_mb_per_s: median(down),
            upload_mb_per_s: median(up),
            download_ratio_to_plain: median(down) / plain_down,
            upload_ratio_to_plain: median(up) / plain_up,
            lost: *lost,
            replicated: *replicated,
        })
        .collect())
}

/// Bytes per second down and up, and SHA-256 of what was sent up.
fn transfer(lab: &Lab, pinning: Pinning, target: SocketAddr) -> Result<(u64, u64, String)> {
    let place = Place::new(lab.client().netns).pinned(Some(pinning.client_and_ovm));
    let down = http::download(&place, target, "/large.bin")?.finish()?;
    let bytes = lab.config().large_file_bytes;
    ensure!(down.bytes == bytes, "{} of {bytes} bytes came", down.bytes);
    let up = http::upload(&place, target, "/upload/bench.bin", bytes, 5)?.finish()?;
    let speed = |t: &http::Transfer| (t.bytes as f64 / t.took.as_secs_f64()) as u64;
    Ok((speed(&down), speed(&up), up.sha256))
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
        "  path               down MB/s  of plain    up MB/s  of plain  replicas lost  every byte replicated"
    );
    for row in rows {
        println!(
            "  {:<16} {:>10.0} {:>8.1} % {:>9.0} {:>8.1} %  {:>13}  {}",
            row.path,
            row.download_mb_per_s,
            row.download_ratio_to_plain * 100.0,
            row.upload_mb_per_s,
            row.upload_ratio_to_plain * 100.0,
            row.lost,
            if row.replicated { "yes" } else { "NO" }
        );
    }
}
