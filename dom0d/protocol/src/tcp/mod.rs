//! The parts of TCP that the engine needs: sequence numbers, streams, a sender, and the translation of headers.

pub(crate) mod sender;
pub(crate) mod seq;
pub(crate) mod stream;
pub(crate) mod translate;
