//! Types of dom0d's control API.
pub use understudy_protocol as protocol;
