//! What outlives the process: the journal of each service's inputs until the next boot of dom0, and who served last beyond
//! that.

pub(crate) mod durable;
mod journal;
pub(crate) mod memory;
pub(crate) mod succession;
