//! Round trips of one client over each path in turn.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;

use super::path::Path;
use crate::client::pingpong::{PingPong, histogram};
use crate::client::place::{Place, join};
use crate::host::{Domain, Lab, Service};
use crate::stage::own_address;
use crate::stage::pinning::{Pinning, pin_host};

/// Times of one path, in nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) path: Path,
    pub(crate) pings: Histogram<u64>,
    pub(crate) transactions: Histogram<u64>,
}

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Every path is measured once per round, so that drift of the machine affects all paths alike.
    pub(crate) rounds: usize,
    /// Samples of each kind per path and round: pings after as many again to warm up, then transactions after a tenth.
    pub(crate) samples: usize,
}

/// Measures these paths in turn. dom0d must not be running; it is not running afterwards either. `each` is told
/// what was measured.
pub(crate) fn measure(
    lab: &Lab,
    pinning: Pinning,
    paths: &[Path],
    effort: Effort,
    mut each: impl FnMut(usize, &Series),
) -> Result<Vec<Series>> {
    pin_domains(lab, pinning)?;
    let mut all = Vec::new();
    for &path in paths {
        all.push(Series { path, pings: histogram()?, transactions: histogram()? });
    }
    for round in 0..effort.rounds {
        for series in &mut all {
            clear(lab)?;
            let path = series.path;
            let ((), lost) = path.with(lab, pinning, Service::Redis, |target| {
                sample(lab, pinning, target, effort.samples, series)
            })?;
            ensure!(lost == 0, "{}: {lost} replicas fell behind", path.name());
            each(round, series);
        }
    }
    clear(lab)?;
    Ok(all)
}

/// The OVM beside the client, the others beside dom0d.
pub(super) fn pin_domains(lab: &Lab, pinning: Pinning) -> Result<()> {
    for domain in lab.domains()? {
        let cpu = if domain.place == 1 { pinning.client_and_ovm } else { pinning.dom0d_and_rvms };
        pin_host(&domain.host, cpu)?;
    }
    Ok(())
}

/// Makes every server's state the same again: empty.
pub(crate) fn clear(lab: &Lab) -> Result<()> {
    for domain in lab.domains()? {
        domain.run(&["redis-cli", "FLUSHALL"])?;
    }
    Ok(())
}

/// Ends the connections that earlier measurements left in servers that were paused meanwhile. They count against the service's
/// limit, and a server that retransmits an answer in one sends to a client that a new dom0d does not know.
pub(crate) fn hang_up(servers: &[Domain]) -> Result<()> {
    for server in servers {
        server.run(&["ss", "--kill", "--tcp", "sport", ">=", ":6379", "and", "sport", "<=", ":6389"])?;
    }
    Ok(())
}

fn sample(
    lab: &Lab,
    pinning: Pinning,
    target: SocketAddr,
    samples: usize,
    series: &mut Series,
) -> Result<()> {
    let client = Place::new(lab.client().netns);
    let done = Arc::new(AtomicBool::new(false));
    let beside = match series.path {
        Path::PlainTwice => {
            let other = own_address(&lab.domain("guest-2")?, Service::Redis)?.1;
            let place = client.pinned(Some(pinning.dom0d_and_rvms));
            let done = Arc::clone(&done);
            Some(place.spawn("beside", move || {
                let mut connection = PingPong::connect(other, "beside")?;
                while !done.load(Ordering::Relaxed) {
                    connection.pings(100, &mut histogram()?)?;
                }
                Ok(())
            })?)
        }
        _ => None,
    };
    let place = client.pinned(Some(pinning.client_and_ovm));
    let sampled = place.run(move || {
        let mut warm = histogram()?;
        let (mut pings, mut transactions) = (histogram()?, histogram()?);
        let mut connection = PingPong::connect(target, "rtt")?;
        connection.pings(samples, &mut warm)?;
        connection.pings(samples, &mut pings)?;
        connection.transactions(samples / 10, &mut warm)?;
        connection.transactions(samples, &mut transactions)?;
        Ok((pings, transactions))
    });
    done.store(true, Ordering::Relaxed);
    beside.map_or(Ok(()), join)?;
    let (pings, transactions) = sampled?;
    series.pings.add(&pings)?;
    series.transactions.add(&transactions)?;
    Ok(())
}
