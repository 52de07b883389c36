//! One large transfer up and down, over the plain bridge and with 0 to 3 replicas.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::summary::quantile;
use crate::client::http;
use crate::client::place::Place;
use crate::host::{Lab, Service};
use crate::stage::operator::Operator;
use crate::stage::pinning::{Pinning, pin_host, pin_process};
use crate::stage::{own_address, unhurried, with_replicas};

/// Medians over the rounds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// `null`: the plain bridge.
    pub(crate) replicas: Option<usize>,
    pub(crate) download_mb_per_s: f64,
    pub(crate) upload_mb_per_s: f64,
    pub(crate) download_ratio_to_plain: f64,
    pub(crate) upload_ratio_to_plain: f64,
    /// Every replica held the whole upload at the end.
    pub(crate) replicated: bool,
}

pub(crate) fn measure(lab: &Lab, pinning: Pinning, rounds: usize) -> Result<Vec<Row>> {
    for domain in lab.domains()? {
        let cpu = if domain.place == 1 { pinning.client_and_ovm } else { pinning.dom0d_and_rvms };
        pin_host(&domain.host, cpu)?;
    }
    let paths: Vec<Option<usize>> = std::iter::once(None).chain((0..=3).map(Some)).collect();
    let mut speeds = vec![(Vec::new(), Vec::new(), true); paths.len()];
    for _ in 0..rounds {
        for (path, (down, up, replicated)) in paths.iter().zip(&mut speeds) {
            match path {
                None => {
                    let (_, address) = own_address(&lab.domain("guest-1")?, Service::Http)?;
                    let (d, u, _) = transfer(lab, pinning, address)?;
                    down.push(d);
                    up.push(u);
                }
                Some(replicas) => {
                    let config = unhurried(&with_replicas(&lab.default_config(), *replicas));
                    let dom0d = lab.start_dom0d(&config)?;
                    pin_process(dom0d.pid(), pinning.dom0d_and_rvms)?;
                    let operator = Operator::new(dom0d.control_socket())?;
                    operator.seed_all(&config)?;
                    let psc = operator.service(Service::Http.name())?.psc;
                    let Some(psc) = psc.iter().find(|address| address.is_ipv4()) else { continue };
                    let address = SocketAddr::new(*psc, Service::Http.port());
                    let (d, u, sha256) = transfer(lab, pinning, address)?;
                    down.push(d);
                    up.push(u);
                    *replicated &= all_hold(lab, *replicas, &sha256)?;
                    let left = operator.service(Service::Http.name())?.promotable();
                    ensure!(
                        left == *replicas,
                        "{left} of {replicas} replicas are left: the others fell behind"
                    );
                    dom0d.stop()?;
                }
            }
        }
    }
    let median = |speeds: &[u64]| quantile(speeds, 0.5) as f64 / 1e6;
    let plain = speeds.first().map(|(down, up, _)| (median(down), median(up)));
    let (plain_down, plain_up) = plain.unwrap_or_default();
    Ok(paths
        .iter()
        .zip(&speeds)
        .map(|(replicas, (down, up, replicated))| Row {
            replicas: *replicas,
            download_mb_per_s: median(down),
            upload_mb_per_s: median(up),
            download_ratio_to_plain: median(down) / plain_down,
            upload_ratio_to_plain: median(up) / plain_up,
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
    println!("  path           down MB/s  of plain    up MB/s  of plain  every byte replicated");
    for row in rows {
        let path = match row.replicas {
            None => "plain".to_owned(),
            Some(n) => format!("{n} replicas"),
        };
        println!(
            "  {path:<12} {:>10.0} {:>8.1} % {:>9.0} {:>8.1} %  {}",
            row.download_mb_per_s,
            row.download_ratio_to_plain * 100.0,
            row.upload_mb_per_s,
            row.upload_ratio_to_plain * 100.0,
            if row.replicated { "yes" } else { "NO" }
        );
    }
}
