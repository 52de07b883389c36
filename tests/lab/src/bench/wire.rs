//! The client's link as it is with a network card: 1 Gbit/s each way, and no frame longer than the MTU.

use anyhow::Result;

use crate::host::network::{GUEST_INTERFACE, UPLINK};
use crate::host::{Host, Lab};

/// A timer may be late by 1 ms without wasting the link; a queue of 8 ms.
const LIMIT: [&str; 7] = ["tbf", "rate", "1gbit", "burst", "128k", "limit", "1m"];

/// Limits the link while `work` goes on. If that fails, only the lab's end lifts the limit.
pub(crate) fn limited<T>(lab: &Lab, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let ends = [(lab.client(), GUEST_INTERFACE), (lab.dom0(), UPLINK)];
    for (host, device) in &ends {
        host.run(&[&["tc", "qdisc", "add", "dev", device, "root"], &LIMIT[..]].concat())?;
        segment(host, device, "off")?;
    }
    let done = work()?;
    for (host, device) in &ends {
        host.run(&["tc", "qdisc", "del", "dev", device, "root"])?;
        segment(host, device, "on")?;
    }
    Ok(done)
}

/// Without TSO the kernel cuts packets to the MTU behind the limit, in front of the link.
fn segment(host: &Host, device: &str, tso: &str) -> Result<()> {
    host.run(&["ethtool", "-K", device, "tso", tso]).map(drop)
}
