//! TCP as both sides of the daemon need it: sequence numbers, streams, a sender, and the translation of headers.

pub(crate) mod sender;
pub(crate) mod seq;
pub(crate) mod stream;
pub(crate) mod translate;
