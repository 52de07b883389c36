//! Round trips of one client with 0 to 3 replicas, and over the plain bridge in between.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;

use crate::client::pingpong::{PingPong, histogram};
use crate::client::place::Place;
use crate::host::{Domain, Lab, Service};
use crate::stage::operator::Operator;
use crate::stage::own_address;
use crate::stage::pinning::{Pinning, pin_host, pin_process};
use crate::stage::{unhurried, with_replicas};

/// Times of one path, in nanoseconds.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    /// `None`: the plain bridge, without dom0d.
    pub(crate) replicas: Option<usize>,
    pub(crate) pings: Histogram<u64>,
    pub(crate) transactions: Histogram<u64>,
}

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// Largest number of replicas; the lab has at least that many.
    pub(crate) replicas: usize,
    /// Every path is measured once per round, so that drift of the machine meets all alike.
    pub(crate) rounds: usize,
    /// Samples of each kind per path and round, after as many again tenfold fewer to warm up.
    pub(crate) samples: usize,
}

/// Measures the plain path and those with 0, 1, ... replicas in turn. dom0d must not be running; it
/// is not running afterwards either. `each` is told what was measured.
pub(crate) fn measure(
    lab: &Lab,
    pinning: Pinning,
    effort: Effort,
    mut each: impl FnMut(usize, &Series),
) -> Result<Vec<Series>> {
    for domain in lab.domains()? {
        let cpu = match domain.place {
            1 => pinning.client_and_ovm,
            _ => pinning.dom0d_and_rvms,
        };
        pin_host(&domain.host, cpu)?;
    }
    let mut all = Vec::new();
    for replicas in std::iter::once(None).chain((0..=effort.replicas).map(Some)) {
        all.push(Series { replicas, pings: histogram()?, transactions: histogram()? });
    }
    for round in 0..effort.rounds {
        for series in &mut all {
            clear(lab)?;
            match series.replicas {
                None => {
                    let (_, address) = own_address(&lab.domain("guest-1")?, Service::Redis)?;
                    sample(lab, pinning, address, effort.samples, series)?;
                }
                Some(replicas) => {
                    let config = unhurried(&with_replicas(&lab.default_config(), replicas));
                    let dom0d = lab.start_dom0d(&config)?;
                    pin_process(dom0d.pid(), pinning.dom0d_and_rvms)?;
                    let operator = Operator::new(dom0d.control_socket())?;
                    operator.seed_all(&config)?;
                    let psc = operator.service(Service::Redis.name())?.psc;
                    if let Some(psc) = psc.iter().find(|address| address.is_ipv4()) {
                        let address = SocketAddr::new(*psc, Service::Redis.port());
                        sample(lab, pinning, address, effort.samples, series)?;
                    }
                    let left = operator.service(Service::Redis.name())?.promotable();
                    ensure!(
                        left == replicas,
                        "{left} of {replicas} replicas are left: the others fell behind"
                    );
                    dom0d.stop()?;
                }
            }
            each(round, series);
        }
    }
    clear(lab)?;
    Ok(all)
}

/// Makes every server's state the same again: empty.
pub(crate) fn clear(lab: &Lab) -> Result<()> {
    for domain in lab.domains()? {
        domain.run(&["redis-cli", "FLUSHALL"])?;
    }
    Ok(())
}

/// Ends what connections earlier measurements left in servers that were paused under them: they count
/// against what the service takes, and a server that repeats an answer to one of them is at work for
/// somebody whom a new dom0d does not know.
pub(crate) fn hang_up(servers: &[Domain]) -> Result<()> {
    for server in servers {
        server.run(&["ss", "--kill", "--tcp", "sport", "=", ":6379"])?;
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
    let place = Place::new(lab.client().netns).pinned(Some(pinning.client_and_ovm));
    let (pings, transactions) = place.run(move || {
        let mut warm = histogram()?;
        let (mut pings, mut transactions) = (histogram()?, histogram()?);
        let mut connection = PingPong::connect(target, "rtt")?;
        connection.pings(samples / 10, &mut warm)?;
        connection.pings(samples, &mut pings)?;
        connection.transactions(samples / 10, &mut warm)?;
        connection.transactions(samples, &mut transactions)?;
        Ok((pings, transactions))
    })?;
    series.pings.add(&pings)?;
    series.transactions.add(&transactions)?;
    Ok(())
}
