//! Samples as medians and tails, and how they print.

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::path::Path;
use super::rtt::Series;

/// Round trips over one path, in microseconds.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Rtt {
    pub(crate) path: String,
    pub(crate) ping: Times,
    pub(crate) transaction: Times,
}

/// A distribution, in microseconds, and its ratios to the plain path's.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Times {
    pub(crate) samples: u64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) max_us: f64,
    pub(crate) ratio_to_plain_p50: f64,
    pub(crate) ratio_to_plain_p99: f64,
}

impl Times {
    /// From nanoseconds.
    fn of(times: &Histogram<u64>, plain: &Histogram<u64>) -> Self {
        let at = |h: &Histogram<u64>, q: f64| h.value_at_quantile(q) as f64 / 1_000.0;
        Self {
            samples: times.len(),
            p50_us: at(times, 0.5),
            p90_us: at(times, 0.9),
            p99_us: at(times, 0.99),
            max_us: times.max() as f64 / 1_000.0,
            ratio_to_plain_p50: at(times, 0.5) / at(plain, 0.5),
            ratio_to_plain_p99: at(times, 0.99) / at(plain, 0.99),
        }
    }
}

pub(crate) fn rtt(series: &[Series]) -> Result<Vec<Rtt>> {
    let plain = series.iter().find(|s| s.path == Path::Plain).context("the plain path was not measured")?;
    Ok(series
        .iter()
        .map(|s| Rtt {
            path: s.path.name(),
            ping: Times::of(&s.pings, &plain.pings),
            transaction: Times::of(&s.transactions, &plain.transactions),
        })
        .collect())
}

pub(crate) fn print_rtt(rows: &[Rtt]) {
    println!("  path                          samples      p50       p90       p99       max   p50 x  p99 x");
    for row in rows {
        for (what, t) in [("ping", &row.ping), ("transaction", &row.transaction)] {
            println!(
                "  {:<16} {what:<12} {:>8} {:>8.1} {:>9.1} {:>9.1} {:>9.1}  {:>6.2} {:>6.2}",
                row.path,
                t.samples,
                t.p50_us,
                t.p90_us,
                t.p99_us,
                t.max_us,
                t.ratio_to_plain_p50,
                t.ratio_to_plain_p99
            );
        }
    }
}

/// A quantile of a few samples, by nearest rank; 0 of none.
pub(crate) fn quantile(samples: &[u64], q: f64) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}
