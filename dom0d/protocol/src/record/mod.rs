//! What was said, once, in the order in which it was recorded, service-wide.

pub(crate) mod order;
