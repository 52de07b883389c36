//! What outlives the process. The [`journal`] of each service's inputs lasts until dom0 boots again; a successor repeats it
//! ([`succession`]). The [`memory`] of who served last survives reboots, in a [`durable`] file.

pub(crate) mod durable;
mod journal;
pub(crate) mod memory;
pub(crate) mod succession;
