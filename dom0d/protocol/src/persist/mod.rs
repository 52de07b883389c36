//! A service as bytes, so that another process can continue where this one stopped.

pub(crate) mod saved;
