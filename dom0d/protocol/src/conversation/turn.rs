//! A conversation's turn: what the conversation sees of its service while it works, and what follows for the service.
//!
//! A conversation changes itself, appends to the record, and sends packets and events. It names everything else that
//! must follow ([`Consequences`]); the service does that afterwards.

use core::net::SocketAddr;

use crate::accounts::{Accounts, Share};
use crate::config::ServiceConfig;
use crate::counters::Counters;
use crate::epoch::Recuperation;
use crate::event::{Event, EventKind, Evidence, LinkAddress, NotPromotable, ServerId, StaleReason};
use crate::follower::queue::{Follower, Queue};
use crate::key::{ConversationId, MAX_SERVERS, Slot};
use crate::outbox::Outbox;
use crate::output::{Destination, Output};
use crate::plane::Plane;
use crate::record::Record;
use crate::suspicion::closes::Closes;
use crate::suspicion::excuses::Excuses;
use crate::suspicion::signs::Signs;
use crate::time::Instant;

/// What follows for the service from a conversation's turn.
#[derive(Debug, Default)]
pub(crate) struct Consequences {
    /// Evidence against the OVM.
    pub(crate) evidence: Option<Evidence>,
    /// RVMs that fell behind a limit.
    pub(crate) laggards: Vec<Slot>,
    /// RVMs whose state may differ from now on.
    pub(crate) stale: [Option<StaleReason>; MAX_SERVERS],
    /// Servers that produced something: their marks in the record may advance.
    pub(crate) progressed: [bool; MAX_SERVERS],
    /// An RVM's answer is to be acknowledged after its mark has advanced: the segment that the mark releases carries
    /// the ACK.
    pub(crate) unacknowledged: bool,
    /// The service must send the client a RST.
    pub(crate) reset: bool,
    /// The conversation has ended recuperation: client and new OVM exchange their own segments.
    pub(crate) recuperated: bool,
    /// The OVM sent a new byte.
    pub(crate) answered: bool,
    /// The OVM acknowledged something new.
    pub(crate) taken: bool,
    /// The OVM was asked for a sign of life.
    pub(crate) asked: bool,
    /// The first byte of the epoch was sent to the client.
    pub(crate) first_byte: bool,
    /// The client was sent something.
    pub(crate) spoke: bool,
    /// The conversation has processed the packet at hand: its bytes are recorded, or the RVMs that lack them are
    /// marked.
    pub(crate) looked_at: bool,
}

/// See the module.
pub(crate) struct Turn<'a> {
    pub(crate) now: Instant,
    pub(crate) config: &'a ServiceConfig,
    pub(crate) queue: &'a Queue,
    pub(crate) record: &'a mut Record,
    pub(crate) counters: &'a mut Counters,
    pub(crate) outbox: &'a mut Outbox,
    /// The service's present epoch, and how its recuperation goes.
    pub(crate) epoch: u64,
    pub(crate) recuperation: &'a Recuperation,
    pub(crate) accounts: &'a Accounts,
    pub(crate) signs: &'a Signs,
    pub(crate) excuses: &'a Excuses,
    pub(crate) closes: &'a Closes,
    pub(crate) plane: &'a Plane,
    /// The conversation's share when the turn began.
    pub(crate) before: Share,
    pub(crate) then: Consequences,
}

impl Turn<'_> {
    /// The turn is over. Returns the conversation's share before it, and what follows.
    pub(crate) fn end(self) -> (Share, Consequences) {
        (self.before, self.then)
    }

    // ---- what it says -------------------------------------------------------------------------

    pub(crate) fn send_to_client(&mut self, link: LinkAddress, packet: Vec<u8>) {
        self.send(Destination::Client(link), packet, 0);
    }

    pub(crate) fn send_to_server(&mut self, server: ServerId, packet: Vec<u8>) {
        self.send(Destination::Server(server), packet, 0);
    }

    /// Sends a packet that [`crate::wire::Segment::emit_large`] made.
    pub(crate) fn send(&mut self, to: Destination, packet: Vec<u8>, segment: u16) {
        self.then.spoke |= matches!(to, Destination::Client(_));
        self.outbox.send(to, packet, segment);
    }

    pub(crate) fn event(&mut self, kind: EventKind) {
        let event = Event { at: self.now, kind };
        self.counters.events += u64::from(!self.outbox.event(event, self.config.limits.events));
    }

    /// The client was sent `payload`: reports the first byte of an epoch.
    pub(crate) fn note_sent_to_client(&mut self, payload: &[u8]) {
        if self.recuperation.first_byte_due && !self.then.first_byte && !payload.is_empty() {
            self.then.first_byte = true;
            self.event(EventKind::FirstByte { epoch: self.epoch });
        }
    }

    /// Asks the OVM for a sign of life, unless that was just done.
    pub(crate) fn ask_ovm(&mut self) {
        let Some((_, ovm)) = self.ovm() else { return };
        if !self.then.asked && self.signs.may_ask(self.now, self.config.timing.unacked_limit) {
            self.then.asked = true;
            self.counters.questions += 1;
            self.outbox.push(Output::Ask(ovm));
        }
    }

    // ---- what follows -------------------------------------------------------------------------

    /// The state of the server in `slot` may differ from the OVM's from now on (rule 5).
    pub(crate) fn mark_stale(&mut self, slot: Slot, reason: StaleReason) {
        if self.then.stale[slot.index()].is_none()
            && let Some(event) = self.queue.stale_event(slot, reason)
        {
            self.then.stale[slot.index()] = Some(reason);
            self.event(event);
        }
    }

    /// Every RVM missed something.
    pub(crate) fn mark_all_stale(&mut self, reason: StaleReason) {
        for (slot, _) in self.roster() {
            self.mark_stale(slot, reason);
        }
    }

    /// Accuses the OVM.
    pub(crate) fn accuse_ovm(&mut self, evidence: Evidence) {
        self.then.evidence.get_or_insert(evidence);
    }

    /// The RVM in `slot` fell behind a limit.
    pub(crate) fn note_laggard(&mut self, slot: Slot) {
        self.then.laggards.push(slot);
    }

    /// The server in `slot` produced something, or the record need no longer wait for it.
    pub(crate) fn note_produced(&mut self, slot: Slot) {
        self.then.progressed[slot.index()] = true;
    }

    /// The record must look again at what every server has produced.
    pub(crate) fn note_all_produced(&mut self) {
        self.then.progressed = [true; MAX_SERVERS];
    }

    /// The OVM sent a new byte.
    pub(crate) fn note_answer(&mut self) {
        self.then.answered = true;
    }

    /// When the OVM last sent a new byte in any conversation.
    pub(crate) fn answered_at(&self) -> Instant {
        if self.then.answered { self.now } else { self.signs.answered_at() }
    }

    /// When the OVM last acknowledged something new, or gave another sign of life.
    pub(crate) fn lived_at(&self) -> Instant {
        if self.then.taken { self.now } else { self.signs.lived_at() }
    }

    // ---- what it sees -------------------------------------------------------------------------

    /// The queue's slots and servers.
    pub(crate) fn roster(&self) -> impl Iterator<Item = (Slot, ServerId)> + use<> {
        self.queue.roster()
    }

    /// The OVM's slot and id.
    pub(crate) fn ovm(&self) -> Option<(Slot, ServerId)> {
        self.queue.ovm_server().map(|server| (server.slot, server.id))
    }

    /// The address that `psc` has on the server in `slot`.
    pub(crate) fn guest(&self, slot: Slot, psc: SocketAddr) -> Option<SocketAddr> {
        self.queue.guest(slot, psc)
    }

    /// Why a server can't be promoted unasked.
    pub(crate) fn not_promotable(&self, server: &Follower) -> Option<NotPromotable> {
        let stale = self.then.stale[server.slot.index()].map(NotPromotable::Stale);
        self.queue.not_promotable(server).or(stale)
    }

    /// The server's state may differ from the OVM's.
    pub(crate) fn is_stale(&self, server: &Follower) -> bool {
        server.stale.is_some() || self.then.stale[server.slot.index()].is_some()
    }

    /// Bytes of both directions that the server in `slot` has ever followed, given that it is `behind` bytes behind in
    /// this conversation now.
    pub(crate) fn followed(&self, slot: Slot, behind: u64) -> u64 {
        let before = self.before.servers[slot.index()].behind;
        self.queue.get(slot).map_or(0, |server| server.sums.followed) + before.saturating_sub(behind)
    }

    /// Bytes kept for all conversations, given that this one keeps `own` bytes now.
    pub(crate) fn retained(&self, own: u64) -> u64 {
        self.accounts.retained().saturating_sub(self.before.retained) + own
    }

    /// The OVM has not produced every answer that clients were sent before it was promoted.
    pub(crate) fn is_catching_up(&self) -> bool {
        self.recuperation.is_catching_up(self.queue, self.record)
    }

    /// Whether client bytes that were recorded at `mark` may be handed to the server in `slot` now (rule 3). A new OVM
    /// waits only for answers of its predecessors: the later ones are its own.
    pub(crate) fn permits(&mut self, slot: Slot, mark: u64, conversation: ConversationId) -> bool {
        let own = self.queue.ovm() == Some(slot);
        let mark = if own { mark.min(self.recuperation.mark) } else { mark };
        self.record.permits(slot, mark, conversation)
    }

    /// The data plane has already passed the packet at hand to its receiver.
    pub(crate) fn passed(&self) -> bool {
        self.plane.passed()
    }

    /// Bytes that one direction of the conversation may hold now (rule 6), for a segment that lies beyond a gap
    /// (`beyond`) or not.
    pub(crate) fn room(&self, beyond: bool) -> usize {
        // The receiver has a passed segment already; the plane's ring bounds how much that can be.
        if self.passed() { usize::MAX } else { self.accounts.room(beyond, &self.config.limits) }
    }

    /// A segment found no [`Turn::room`].
    pub(crate) fn note_refused(&mut self, beyond: bool) {
        self.accounts.count_refused(beyond, &self.config.limits, self.counters);
    }

    /// The time from which evidence that began at `since` counts against the OVM.
    pub(crate) fn measured_from(&self, since: Instant) -> Instant {
        self.excuses.measured_from(since)
    }
}
