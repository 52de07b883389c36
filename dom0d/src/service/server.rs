//! One domain that belongs to a service: what dom0d knows of it, and its place relative to the queue.

use serde::{Deserialize, Serialize};
use understudy_protocol::{Evidence, Instant, ServerId, ServerSpec};

use crate::discovery::sent_away;
use crate::domain::{DomainId, DomainRef};
use crate::host::liveness::{Excuse, Watch};
use crate::link::vif::{Arrival, Vif};

/// One life of one domain, in one service; a migration within the host does not end it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Server {
    /// As operators know it.
    pub(crate) domain: DomainRef,
    /// What it serves through.
    pub(crate) vif: Vif,
    /// Where it stands.
    pub(crate) place: Place,
    /// The hypervisor's last information on its domain.
    pub(crate) watch: Watch,
    /// It runs, as far as the hypervisor says.
    pub(crate) running: bool,
    /// An operator announced maintenance at that moment.
    pub(crate) announced: Option<Instant>,
    /// This daemon paused it to fence it.
    pub(crate) fenced: bool,
    /// The evidence that its service last acted upon.
    pub(crate) accused: Option<Evidence>,
    /// Another service fences its domain, for this evidence.
    pub(crate) doomed: Option<Evidence>,
    /// Moved to another domid, whose vif is not connected yet.
    pub(crate) moving: bool,
    /// Its domain is gone, and it stays the OVM only because no replica could be promoted.
    pub(crate) gone: bool,
}

/// Where a server stands relative to its service's queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Place {
    /// Waits until the kernel's rules of this version hold its vif.
    Preparing(u64),
    /// Ready to join, once the service has an OVM.
    Waiting,
    /// Could be in the queue, but for this reason.
    Held(String),
    /// In the queue.
    Queued,
    /// Was in the queue, and left it for this reason.
    Left(String),
    /// An operator detached it.
    Detached,
    /// The OVM's state is being copied to it.
    Copying,
}

impl Server {
    /// A server that has just appeared.
    pub(crate) fn new(arrival: &Arrival, place: Place) -> Self {
        Self {
            domain: arrival.domain.clone(),
            vif: arrival.vif.clone(),
            place,
            watch: Watch::default(),
            // Until the hypervisor is asked, a millisecond from now.
            running: true,
            announced: None,
            fenced: false,
            accused: None,
            doomed: None,
            moving: false,
            gone: false,
        }
    }

    /// It as placement handed it over.
    pub(crate) fn arrival(&self) -> Arrival {
        Arrival { domain: self.domain.clone(), vif: self.vif.clone() }
    }

    /// Its domain lives on under another number, behind another vif.
    pub(crate) fn move_to(&mut self, domain: DomainRef, vif: String) {
        self.domain = domain;
        self.vif.name = vif;
        self.moving = true;
    }

    /// Its vif was opened again.
    pub(crate) fn vif_opened(&mut self, arrival: &Arrival) {
        self.vif = arrival.vif.clone();
        self.moving = false;
        self.gone = false;
    }

    /// This life of its domain.
    pub(crate) fn life(&self) -> DomainId {
        DomainId::from(&self.domain)
    }

    /// What the engine is told of it.
    pub(crate) fn spec(&self, id: ServerId) -> ServerSpec {
        ServerSpec { id, addresses: self.vif.addresses.clone(), mtu: self.vif.mtu }
    }

    /// What excuses it for not running.
    pub(crate) fn excuse(&self) -> Excuse {
        Excuse {
            announced: self.announced,
            migrating: sent_away(&self.domain.name).is_some(),
            moving: self.moving,
            fenced: self.fenced,
            doomed: self.doomed,
        }
    }

    /// Whether the kernel must keep what it sends from the bridge.
    pub(crate) fn is_contained(&self) -> bool {
        match self.place {
            Place::Preparing(_) | Place::Waiting | Place::Queued | Place::Left(_) => true,
            Place::Held(_) | Place::Detached | Place::Copying => false,
        }
    }

    /// Why it is not in the queue, and what to do; `None` if it is in it.
    pub(crate) fn absence(&self) -> Option<String> {
        match &self.place {
            Place::Queued => None,
            Place::Preparing(_) => Some("its vif is being prepared".to_owned()),
            Place::Waiting => Some("waits for the OVM; nothing is replicated before it serves".to_owned()),
            Place::Held(reason) | Place::Left(reason) => Some(reason.clone()),
            Place::Copying => Some("the OVM's state is being copied to it".to_owned()),
            Place::Detached => Some("detached by an operator; attach it to have it back".to_owned()),
        }
    }
}
