//! A domain, as Xen, its toolstack and operators know it.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(crate) use understudy_api::{Domain as DomainRef, KnownDomain};

/// One life of one domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct DomainId {
    /// The identity, checked before anything is done: domids are reused.
    pub(crate) uuid: Uuid,
    /// The number of this life.
    pub(crate) domid: u16,
}

impl From<&DomainRef> for DomainId {
    fn from(domain: &DomainRef) -> Self {
        Self { uuid: domain.uuid, domid: domain.domid }
    }
}
