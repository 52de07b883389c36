//! The server queue: the servers of a service, in order, and whether each may be promoted (rule 5).

use core::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::accounts::{Share, moved};
use crate::event::{EventKind, NotPromotable, ServerId, StaleReason};
use crate::input::ServerSpec;
use crate::key::{MAX_SERVERS, Slot};
use crate::time::Instant;

/// What a server must reach to have caught up: the state of a past moment.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Goal {
    pub(crate) at: Instant,
    /// Length of the record at that moment.
    pub(crate) mark: u64,
    pub(crate) followed: u64,
}

/// One server.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Follower {
    pub(crate) id: ServerId,
    pub(crate) slot: Slot,
    addresses: Vec<IpAddr>,
    pub(crate) mtu: u16,
    pub(crate) stale: Option<StaleReason>,
    pub(crate) running: bool,
    /// It opened connections of its own.
    pub(crate) own_connections: bool,
    /// It kept clients' bytes waiting in the record for longer than the limit, and has not caught up since.
    pub(crate) lagging: bool,
    /// When it was deposed for a fault, if it has not caught up since.
    pub(crate) recovering: Option<Instant>,
    /// The goal that it must reach to have caught up.
    pub(crate) goal: Option<Goal>,
    /// When its domain last stopped or continued: what it failed to do before does not count against it.
    pub(crate) excused_at: Instant,
    /// Since when conversations have waited for it without its cursor in the record moving.
    pub(crate) waiting_since: Option<Instant>,
    pub(crate) sums: Sums,
}

/// The sums of all conversations' shares for one server.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Sums {
    /// Open conversations it covers.
    pub(crate) covered: u64,
    /// Open conversations in which it diverged; they are not among the covered ones.
    pub(crate) diverged: u64,
    /// Bytes of both directions that it has not acknowledged or not produced.
    pub(crate) behind: u64,
    /// Bytes of its answers that are kept until they are compared.
    pub(crate) kept: u64,
    /// Bytes of both directions that it has ever followed.
    pub(crate) followed: u64,
}

impl Follower {
    /// Its own address of the same family.
    pub(crate) fn address(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|address| address.is_ipv4() == like.is_ipv4())
    }
}

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Queue {
    /// In the operator's order.
    servers: Vec<Follower>,
    ovm: Option<Slot>,
}

impl Queue {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Follower> + '_ {
        self.servers.iter()
    }

    pub(crate) fn get(&self, slot: Slot) -> Option<&Follower> {
        self.servers.iter().find(|server| server.slot == slot)
    }

    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<&mut Follower> {
        self.servers.iter_mut().find(|server| server.slot == slot)
    }

    /// Whether `address` is some server's own.
    pub(crate) fn has_address(&self, address: IpAddr) -> bool {
        self.servers.iter().any(|server| server.addresses.contains(&address))
    }

    pub(crate) fn slot_of(&self, id: ServerId) -> Option<Slot> {
        self.servers.iter().find(|server| server.id == id).map(|server| server.slot)
    }

    pub(crate) fn ovm(&self) -> Option<Slot> {
        self.ovm
    }

    pub(crate) fn ovm_server(&self) -> Option<&Follower> {
        self.get(self.ovm?)
    }

    /// Slots of RVMs.
    pub(crate) fn rvms(&self) -> impl Iterator<Item = Slot> + '_ {
        self.servers.iter().map(|server| server.slot).filter(|slot| Some(*slot) != self.ovm)
    }

    pub(crate) fn set_ovm(&mut self, slot: Slot) {
        self.ovm = Some(slot);
        if let Some(server) = self.get_mut(slot) {
            server.stale = None;
            server.lagging = false;
            server.recovering = None;
            server.own_connections = false;
        }
    }

    /// Adds a server at the end; `None` if no slot is free.
    pub(crate) fn push(&mut self, spec: ServerSpec, stale: Option<StaleReason>) -> Option<Slot> {
        let slot = Slot::all().find(|slot| self.get(*slot).is_none())?;
        self.servers.push(Follower {
            id: spec.id,
            slot,
            addresses: spec.addresses,
            mtu: spec.mtu.max(576),
            stale,
            running: true,
            own_connections: false,
            lagging: false,
            recovering: None,
            goal: None,
            excused_at: Instant::default(),
            waiting_since: None,
            sums: Sums::default(),
        });
        Some(slot)
    }

    /// Removes a server. The cost does not depend on its legs: each conversation frees the leg of an unknown server at
    /// its next turn.
    pub(crate) fn remove(&mut self, slot: Slot) -> Option<Follower> {
        let index = self.servers.iter().position(|server| server.slot == slot)?;
        if self.ovm == Some(slot) {
            self.ovm = None;
        }
        Some(self.servers.remove(index))
    }

    /// The event for a server that becomes stale; `None` if it is the OVM or is stale already.
    pub(crate) fn stale_event(&self, slot: Slot, reason: StaleReason) -> Option<EventKind> {
        let server = self.get(slot).filter(|server| server.stale.is_none() && self.ovm != Some(slot))?;
        Some(EventKind::Stale { server: server.id, reason })
    }

    /// There is an RVM whose state equals the OVM's.
    pub(crate) fn has_equal_rvm(&self) -> bool {
        self.servers.iter().any(|server| Some(server.slot) != self.ovm && server.stale.is_none())
    }

    /// Slots and servers, copied so that the queue stays free.
    pub(crate) fn roster(&self) -> impl Iterator<Item = (Slot, ServerId)> + use<> {
        let mut roster = [None; MAX_SERVERS];
        for (place, server) in roster.iter_mut().zip(self.iter()) {
            *place = Some((server.slot, server.id));
        }
        roster.into_iter().flatten()
    }

    /// The address that `psc` has on the server in `slot`.
    pub(crate) fn guest(&self, slot: Slot, psc: SocketAddr) -> Option<SocketAddr> {
        let address: IpAddr = self.get(slot)?.address(psc.ip())?;
        Some(SocketAddr::new(address, psc.port()))
    }

    /// Replaces a conversation's share `before` by `after`.
    pub(crate) fn settle(&mut self, before: &Share, after: &Share) {
        for server in &mut self.servers {
            let (before, after) = (before.servers[server.slot.index()], after.servers[server.slot.index()]);
            let sums = &mut server.sums;
            sums.covered = moved(sums.covered, before.covered.into(), after.covered.into());
            sums.diverged = moved(sums.diverged, before.diverged.into(), after.diverged.into());
            sums.behind = moved(sums.behind, before.behind, after.behind);
            sums.followed += before.behind.saturating_sub(after.behind);
            sums.kept = moved(sums.kept, before.kept, after.kept);
        }
    }

    /// Why a server can't be promoted unasked.
    pub(crate) fn not_promotable(&self, server: &Follower) -> Option<NotPromotable> {
        if self.ovm == Some(server.slot) {
            Some(NotPromotable::IsOvm)
        } else if let Some(reason) = server.stale {
            Some(NotPromotable::Stale(reason))
        } else if !server.running {
            Some(NotPromotable::NotRunning)
        } else if server.recovering.is_some() {
            Some(NotPromotable::Recovering)
        } else if server.own_connections {
            Some(NotPromotable::OwnConnections)
        } else {
            server.lagging.then_some(NotPromotable::Lagging)
        }
    }
}
