//! What clients do: real sockets and real frames, from inside the client's network namespace.
//!
//! Workloads run as threads of the lab's own process that entered the namespace, so that their
//! timestamps, the faults' and the daemon's events are on one clock without any exchange.

pub(crate) mod clock;
pub(crate) mod forger;
pub(crate) mod frames;
pub(crate) mod hostile;
pub(crate) mod http;
pub(crate) mod pingpong;
pub(crate) mod place;
pub(crate) mod postgres;
pub(crate) mod random;
pub(crate) mod redis;
pub(crate) mod sniff;
