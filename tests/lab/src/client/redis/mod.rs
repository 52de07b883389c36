//! Redis under load: many connections whose every answer is known beforehand.

pub(crate) mod load;
pub(crate) mod script;
pub(crate) mod session;
pub(crate) mod verify;
