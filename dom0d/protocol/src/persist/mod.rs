//! A service as bytes, so that another process can go on where this one was.

pub(crate) mod saved;
