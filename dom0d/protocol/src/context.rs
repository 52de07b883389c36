//! What the conversations of one service share while they work.

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::accounts::Share;
use crate::config::ServiceConfig;
use crate::counters::Counters;
use crate::event::{
    Destination, Effect, Event, EventKind, Evidence, LinkAddress, Passage, ServerId, Sign, StaleReason,
    Transmit,
};
use crate::follower::queue::Queue;
use crate::key::{ConversationId, Key, MAX_SERVERS, Slot};
use crate::record::order::Order;
use crate::suspicion::REMINDERS;
use crate::time::Instant;
use crate::wire::Checksum;

/// Addresses that an OVM is known to ask for: as many as Linux itself keeps (`gc_thresh3`).
const UNREACHED: usize = 1_024;

/// How long a kernel waits until it asks for an address again (RFC 4861 §10), and a little.
const ASKS_AGAIN: Duration = Duration::from_millis(1_100);

/// How the present epoch's recuperation goes.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Recuperation {
    /// Conversations still in it.
    pub(crate) pending: BTreeSet<ConversationId>,
    pub(crate) recuperated: u64,
    pub(crate) reset: u64,
    /// No byte of this epoch was sent to a client yet.
    pub(crate) first_byte_due: bool,
    /// Length of the service-wide order at the cutover: the new OVM is fed in that order up to here.
    pub(crate) mark: u64,
    /// The end of this recuperation was told, or there is none.
    pub(crate) reported: bool,
}

impl Recuperation {
    /// No conversation is left in it, and nobody was told.
    pub(crate) fn is_to_be_reported(&self) -> bool {
        !self.reported && self.pending.is_empty()
    }
}

/// See the module.
#[derive(Serialize, Deserialize)]
pub(crate) struct Context {
    pub(crate) now: Instant,
    #[serde(skip, default = "ServiceConfig::unconfigured")]
    pub(crate) config: ServiceConfig,
    pub(crate) queue: Queue,
    pub(crate) order: Order,
    pub(crate) epoch: u64,
    pub(crate) recuperation: Recuperation,
    pub(crate) counters: Counters,
    out: VecDeque<Transmit>,
    effects: VecDeque<Effect>,
    /// What the conversation at work was before.
    #[serde(skip)]
    before: Share,
    /// Bytes held by all conversations.
    pub(crate) retained: u64,
    /// Those of clients and OVM among them that are beyond gaps.
    pub(crate) out_of_order: u64,
    /// Open conversations.
    pub(crate) open: u64,
    /// Conversations that ended under an earlier OVM, and that the present one has yet to end.
    pub(crate) owed: BTreeSet<ConversationId>,
    /// Conversations in which a FIN or RST of the OVM is held.
    pub(crate) holding: BTreeSet<ConversationId>,
    /// Handshakes that the OVM refused while closes were held.
    pub(crate) refusals: BTreeSet<Key>,
    /// Conversations whose client was sent bytes beyond a gap, and up to where.
    pub(crate) gaps: BTreeMap<ConversationId, u64>,
    /// Those among them whose close RVMs dispute.
    pub(crate) disputes: BTreeSet<ConversationId>,
    /// Conversations whose clients are to be sent a RST.
    pub(crate) resets: VecDeque<ConversationId>,
    /// Slots whose server produced something: the order may move on.
    pub(crate) progressed: [bool; MAX_SERVERS],
    /// Conversations in which an RVM is still to be acknowledged what it said, once the order has moved on: at the end
    /// of the input at hand.
    #[serde(skip)]
    pub(crate) unacknowledged: Vec<ConversationId>,
    /// The caller has not polled the latest [`Effect::Cutover`]: until then nothing of the new epoch leaves.
    pub(crate) cutover_untold: bool,
    /// The data plane passes conversations by itself; grows each time it was stopped.
    pub(crate) plane: Option<u32>,
    /// What the data plane did with the packet at hand.
    pub(crate) passage: Passage,
    /// The data plane has passed the packet at hand, and nothing shows yet that its bytes are recorded.
    #[serde(skip)]
    pub(crate) untaken: bool,
    /// Evidence against the OVM found while working.
    pub(crate) suspicion: Option<Evidence>,
    /// RVMs that fell behind a limit.
    pub(crate) laggards: Vec<Slot>,
    /// When the OVM last sent a new byte in any conversation.
    pub(crate) last_answer: Instant,
    /// When the OVM last acknowledged something new in any conversation.
    pub(crate) last_taken: Instant,
    /// When the OVM's kernel last showed that it lives.
    pub(crate) last_sign: Instant,
    /// When the OVM was last asked for a sign of life.
    asked_at: Option<Instant>,
    /// Whom the OVM asked the address of, when, and what that is.
    unreached: BTreeMap<IpAddr, (Instant, Option<LinkAddress>)>,
    /// When the caller was last found to have been starved of CPU.
    pub(crate) starved_at: Instant,
    /// When there was last a reason to begin anew with what speaks against the OVM.
    pub(crate) excused_at: Instant,
    /// When the caller last came late by so much that RVMs may not have been heard about a close.
    pub(crate) late_at: Instant,
}

impl Context {
    pub(crate) fn new(config: ServiceConfig) -> Self {
        Self {
            now: Instant::default(),
            config,
            queue: Queue::default(),
            order: Order::default(),
            epoch: 0,
            recuperation: Recuperation { reported: true, ..Recuperation::default() },
            counters: Counters::default(),
            out: VecDeque::new(),
            effects: VecDeque::new(),
            before: Share::default(),
            retained: 0,
            out_of_order: 0,
            open: 0,
            owed: BTreeSet::new(),
            holding: BTreeSet::new(),
            refusals: BTreeSet::new(),
            gaps: BTreeMap::new(),
            disputes: BTreeSet::new(),
            resets: VecDeque::new(),
            progressed: [false; MAX_SERVERS],
            unacknowledged: Vec::new(),
            cutover_untold: false,
            plane: None,
            passage: Passage::Kept,
            untaken: false,
            suspicion: None,
            laggards: Vec::new(),
            last_answer: Instant::default(),
            last_taken: Instant::default(),
            last_sign: Instant::default(),
            asked_at: None,
            unreached: BTreeMap::new(),
            starved_at: Instant::default(),
            excused_at: Instant::default(),
            late_at: Instant::default(),
        }
    }

    pub(crate) fn send_to_client(&mut self, link: LinkAddress, packet: Vec<u8>) {
        self.send(Destination::Client(link), packet, 0);
    }

    pub(crate) fn send_to_server(&mut self, server: ServerId, packet: Vec<u8>) {
        self.send(Destination::Server(server), packet, 0);
    }

    /// What [`crate::wire::Segment::emit_large`] made.
    pub(crate) fn send(&mut self, to: Destination, packet: Vec<u8>, segment: u16) {
        self.out.push_back(Transmit { to, packet, segment });
    }

    /// The client was sent something: the first byte of an epoch is told.
    pub(crate) fn note_sent_to_client(&mut self, payload: &[u8]) {
        if self.recuperation.first_byte_due && !payload.is_empty() {
            self.recuperation.first_byte_due = false;
            self.event(EventKind::FirstByte { epoch: self.epoch });
        }
    }

    pub(crate) fn next_transmit(&mut self) -> Option<Transmit> {
        self.out.pop_front()
    }

    /// Drops what was about to be sent on behalf of a deposed server.
    pub(crate) fn drop_transmits_to_clients(&mut self) {
        self.out.retain(|transmit| !matches!(transmit.to, Destination::Client(_)));
    }

    pub(crate) fn effect(&mut self, effect: Effect) {
        self.effects.push_back(effect);
    }

    pub(crate) fn event(&mut self, kind: EventKind) {
        if self.effects.len() < self.config.limits.events as usize {
            self.effects.push_back(Effect::Event(Event { at: self.now, kind }));
        } else {
            self.counters.events += 1;
        }
    }

    pub(crate) fn next_effect(&mut self) -> Option<Effect> {
        let effect = self.effects.pop_front();
        if matches!(effect, Some(Effect::Cutover { .. })) {
            self.cutover_untold = false;
        }
        effect
    }

    /// A packet comes, of which the data plane says this.
    pub(crate) fn begin_passage(&mut self, passage: Passage) {
        self.passage = passage;
        self.untaken = self.passed();
    }

    /// What the checksum of the packet at hand must be: as its receiver sees it, if it is with that one already.
    pub(crate) fn checksum(&self) -> Checksum {
        match self.passage {
            Passage::Passed { trusted: true, .. } => Checksum::Trusted,
            Passage::Passed { trusted: false, .. } => Checksum::Right,
            _ => Checksum::RightOrPartial,
        }
    }

    /// The packet at hand is with the other side already.
    pub(crate) fn passed(&self) -> bool {
        matches!(self.passage, Passage::Passed { .. })
    }

    /// Bytes that one direction of a conversation may hold now, if a segment is to join it that does (not) come behind a
    /// gap.
    pub(crate) fn room(&self, beyond: bool) -> usize {
        if self.passed() {
            // It is with the other side already; the plane's own buffer bounds how much that can be.
            return usize::MAX;
        }
        let full = self.retained >= self.config.limits.retained_bytes || (beyond && self.has_enough_beyond());
        if full { 0 } else { self.config.limits.conversation_bytes as usize }
    }

    /// Who has bytes on the other side of a gap repeats them: so long as that closes first.
    fn has_enough_beyond(&self) -> bool {
        self.out_of_order >= self.config.limits.out_of_order_bytes
    }

    /// A segment found no [`Context::room`].
    pub(crate) fn note_refused(&mut self, beyond: bool) {
        if self.room(false) == 0 {
            self.counters.retained_bytes += 1;
        } else if beyond && self.has_enough_beyond() {
            self.counters.out_of_order_bytes += 1;
        } else {
            self.counters.conversation_bytes += 1;
        }
    }

    pub(crate) fn mark_stale(&mut self, slot: Slot, reason: StaleReason) {
        if let Some(event) = self.queue.mark_stale(slot, reason) {
            self.event(event);
        }
    }

    /// Every RVM missed something.
    pub(crate) fn mark_all_stale(&mut self, reason: StaleReason) {
        for (slot, _) in self.roster() {
            self.mark_stale(slot, reason);
        }
    }

    /// There is an RVM whose state equals the OVM's.
    pub(crate) fn has_equal_rvm(&self) -> bool {
        self.queue.rvms().any(|slot| self.queue.get(slot).is_some_and(|server| server.stale.is_none()))
    }

    /// The queue's slots and servers, copied so that the context stays free.
    pub(crate) fn roster(&self) -> impl Iterator<Item = (Slot, ServerId)> + use<> {
        let mut roster = [None; MAX_SERVERS];
        for (place, server) in roster.iter_mut().zip(self.queue.iter()) {
            *place = Some((server.slot, server.id));
        }
        roster.into_iter().flatten()
    }

    /// The OVM's slot and id.
    pub(crate) fn ovm(&self) -> Option<(Slot, ServerId)> {
        self.queue.ovm_server().map(|server| (server.slot, server.id))
    }

    /// The OVM has not produced every answer that clients were sent before it was promoted.
    pub(crate) fn is_catching_up(&self) -> bool {
        self.queue.ovm().is_some_and(|ovm| self.order.cursor(ovm) < self.recuperation.mark)
    }

    /// Whether client bytes of `mark` may be handed to the server in `slot` now. A new OVM waits only
    /// for answers of its predecessors: the later ones are its own.
    pub(crate) fn permits(&mut self, slot: Slot, mark: u64, conversation: ConversationId) -> bool {
        let own = self.queue.ovm() == Some(slot);
        let mark = if own { mark.min(self.recuperation.mark) } else { mark };
        self.order.permits(slot, mark, conversation)
    }

    /// Forgets what nobody follows any more of the service-wide order.
    pub(crate) fn release_order(&mut self) {
        let behind = self.queue.ovm().filter(|_| self.is_catching_up());
        self.order.release(self.queue.rvms().chain(behind));
    }

    /// The address that `psc` has on the server in `slot`.
    pub(crate) fn guest(&self, slot: Slot, psc: SocketAddr) -> Option<SocketAddr> {
        let address: IpAddr = self.queue.get(slot)?.address(psc.ip())?;
        Some(SocketAddr::new(address, psc.port()))
    }

    /// A conversation begins to work.
    pub(crate) fn begin_turn(&mut self, before: Share) {
        self.before = before;
    }

    /// Bytes of both directions that the server in `slot` has followed, ever, where it is `behind` now in the conversation
    /// at work.
    pub(crate) fn followed(&self, slot: Slot, behind: u64) -> u64 {
        let before = self.before.servers[slot.index()].behind;
        self.queue.get(slot).map_or(0, |server| server.followed) + before.saturating_sub(behind)
    }

    /// The conversation `id` has worked, and is `after` now: the service's sums and lists follow.
    pub(crate) fn end_turn(&mut self, id: ConversationId, after: &Share) {
        let before = core::mem::take(&mut self.before);
        let moved = |sum: u64, before: u64, after: u64| (sum + after).saturating_sub(before);
        self.open = moved(self.open, before.is_open.into(), after.is_open.into());
        self.retained = moved(self.retained, before.retained, after.retained);
        self.out_of_order = moved(self.out_of_order, before.beyond, after.beyond);
        for server in self.queue.iter_mut() {
            let (before, after) = (before.servers[server.slot.index()], after.servers[server.slot.index()]);
            {
                server.covered = moved(server.covered, before.covered.into(), after.covered.into());
                server.diverged = moved(server.diverged, before.diverged.into(), after.diverged.into());
                server.behind = moved(server.behind, before.behind, after.behind);
                server.followed += before.behind.saturating_sub(after.behind);
                server.held = moved(server.held, before.kept, after.kept);
            }
        }
        if before.is_held || after.is_held {
            set(&mut self.holding, id, after.is_held);
            set(&mut self.disputes, id, after.is_disputed);
            if self.holding.is_empty() {
                self.refusals.clear();
            }
        }
        if before.is_recuperating || after.is_recuperating {
            set(&mut self.recuperation.pending, id, after.is_recuperating);
        }
        if before.gap != after.gap {
            // Once a gap closes, the client has answers behind it that a new OVM must give itself before anybody's next
            // request: at a promotion they must be known.
            match after.gap {
                Some(highest) => self.gaps.insert(id, highest),
                None => self.gaps.remove(&id),
            };
        }
    }

    /// Conversations beside this one in which RVMs dispute a close of the OVM.
    pub(crate) fn disputes_beside(&self, id: ConversationId) -> usize {
        self.disputes.len() - usize::from(self.disputes.contains(&id))
    }

    /// Asks the OVM for a sign of life: once, however many conversations want to know.
    pub(crate) fn ask_ovm(&mut self) {
        let Some((_, ovm)) = self.ovm() else { return };
        let least = self.config.timing.unacked_limit / (REMINDERS + 1) / 2;
        if self.asked_at.is_none_or(|at| self.now.since(at) >= least) {
            self.asked_at = Some(self.now);
            self.counters.questions += 1;
            self.effect(Effect::Ask(ovm));
        }
    }

    /// The OVM's kernel gave a sign of life.
    pub(crate) fn note_sign(&mut self, sign: Sign) {
        self.last_sign = self.now;
        if let Sign::Asked { target, link } = sign {
            if self.unreached.len() >= UNREACHED {
                let now = self.now;
                self.unreached.retain(|_, (at, _)| now.since(*at) < ASKS_AGAIN);
            }
            if self.unreached.len() < UNREACHED || self.unreached.contains_key(&target) {
                self.unreached.insert(target, (self.now, link));
            }
        }
    }

    /// Whether the OVM may have been unable to reach a client since then, for want of its next hop's address.
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

    /// What was known of the OVM's life is nothing to its successor.
    pub(crate) fn forget_signs(&mut self) {
        self.asked_at = None;
        self.unreached.clear();
    }

    /// From when on evidence that began at `since` speaks against the OVM.
    pub(crate) fn measured_from(&self, since: Instant) -> Instant {
        self.unstarved(since).max(self.excused_at)
    }

    /// From when on what has stood since `since` is not the daemon's own fault.
    pub(crate) fn unstarved(&self, since: Instant) -> Instant {
        since.max(self.starved_at)
    }
}

fn set(list: &mut BTreeSet<ConversationId>, id: ConversationId, belongs: bool) {
    if belongs {
        list.insert(id);
    } else {
        list.remove(&id);
    }
}
