//! How frames reach a domain and come back: its vif, and the PSC's anchor on the bridge.

pub(crate) mod anchor;
pub(crate) mod changes;
pub(crate) mod device;
pub(crate) mod frame;
pub(crate) mod psc;
pub(crate) mod vif;
