//! `cargo lab bench`: what Understudy costs and how quickly it acts, against a plain bridge in the
//! same run.

pub(crate) mod rtt;
