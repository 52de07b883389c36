//! The OVM's signs of life, from all conversations and from ARP and ND (rule 11).

use core::net::IpAddr;
use core::time::Duration;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::LinkAddress;
use crate::input::Sign;
use crate::suspicion::REMINDERS;
use crate::time::Instant;

/// Most addresses remembered that an OVM asks for: as many as Linux itself keeps (`gc_thresh3`).
const UNREACHED: usize = 1_024;

/// A little longer than a kernel waits before it asks for an address again (RFC 4861 §10).
const ASKS_AGAIN: Duration = Duration::from_millis(1_100);

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Signs {
    /// When the OVM last sent a new byte in any conversation.
    answered_at: Instant,
    /// When it last acknowledged something new in any conversation.
    took_at: Instant,
    /// When its kernel last gave another sign of life.
    lived_at: Instant,
    /// When the daemon last asked it for a sign of life.
    asked_at: Option<Instant>,
    /// By the IP address whose link address it asked for: when it asked, and the right answer if that is known.
    unreached: BTreeMap<IpAddr, (Instant, Option<LinkAddress>)>,
}

impl Signs {
    /// When the OVM last sent a new byte in any conversation.
    pub(crate) fn answered_at(&self) -> Instant {
        self.answered_at
    }

    /// When the OVM last acknowledged something new, or gave another sign of life.
    pub(crate) fn lived_at(&self) -> Instant {
        self.took_at.max(self.lived_at)
    }

    /// The OVM sent a new byte.
    pub(crate) fn note_answer(&mut self, now: Instant) {
        self.answered_at = now;
    }

    /// The OVM acknowledged something new.
    pub(crate) fn note_taken(&mut self, now: Instant) {
        self.took_at = now;
    }

    /// The OVM's kernel lives.
    pub(crate) fn note_life(&mut self, now: Instant) {
        self.lived_at = now;
    }

    /// Whether the daemon may ask the OVM for a sign of life: once in a while, however many conversations want to know.
    pub(crate) fn may_ask(&self, now: Instant, unacked_limit: Duration) -> bool {
        let least = unacked_limit / (REMINDERS + 1) / 2;
        self.asked_at.is_none_or(|at| now.since(at) >= least)
    }

    /// The daemon has asked this OVM.
    pub(crate) fn was_asked(&self) -> bool {
        self.asked_at.is_some()
    }

    /// The daemon asks the OVM now.
    pub(crate) fn note_asked(&mut self, now: Instant) {
        self.asked_at = Some(now);
    }

    /// The OVM's kernel gave a sign of life.
    pub(crate) fn note_sign(&mut self, sign: Sign, now: Instant) {
        self.note_life(now);
        if let Sign::Asked { target, link } = sign {
            if self.unreached.len() >= UNREACHED {
                self.unreached.retain(|_, (at, _)| now.since(*at) < ASKS_AGAIN);
            }
            if self.unreached.len() < UNREACHED || self.unreached.contains_key(&target) {
                self.unreached.insert(target, (now, link));
            }
        }
    }

    /// Whether the OVM may have been unable to reach a client since `since`, because it lacks the link address of its
    /// next hop.
    pub(crate) fn is_unreached(&self, client: IpAddr, next_hop: LinkAddress, since: Instant) -> bool {
        let open = |at: Instant| at + ASKS_AGAIN >= since;
        self.unreached.get(&client).is_some_and(|(at, _)| open(*at))
            || self.unreached.values().any(|(at, link)| *link == Some(next_hop) && open(*at))
    }

    /// The OVM sent a client something.
    pub(crate) fn note_reached(&mut self, client: IpAddr, next_hop: Option<LinkAddress>) {
        if !self.unreached.is_empty() {
            self.unreached.retain(|ip, (_, link)| *ip != client && (link.is_none() || *link != next_hop));
        }
    }

    /// Forgets the former OVM's questions and the addresses that it could not reach.
    pub(crate) fn forget(&mut self) {
        self.asked_at = None;
        self.unreached.clear();
    }
}
