//! A domain, as Xen, its toolstack and operators know it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One life of one domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct DomainId {
    /// The identity, checked before anything is done: domids are reused.
    pub(crate) uuid: Uuid,
    /// The number of this life.
    pub(crate) domid: u16,
}

/// A domain as operators and toolstacks know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DomainRef {
    /// The toolstack's handle.
    pub(crate) name: String,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// The number of this life of it.
    pub(crate) domid: u16,
}

/// A domain that could serve but is not in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct KnownDomain {
    /// Which.
    pub(crate) domain: DomainRef,
    /// Why it is not in the queue, and what to do.
    pub(crate) reason: String,
}
