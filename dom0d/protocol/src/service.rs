//! One PSC, its server queue and its conversations: the engine's interface, and who gets which packet.

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::context::Context;
use crate::conversation::Conversation;
use crate::handshake::{Embryonic, Handshakes, Third};
use crate::passing::Passage;
use crate::promotion::{self, Deposed, Unplanned};
use crate::queue::{MAX_SERVERS, Slot};
use crate::seq::{position_of, seq_of};
use crate::table::{ConversationId, Key, Table};
use crate::wire::{self, Flags, Icmp, IcmpError, Malformed, Parsed, Segment};
use crate::{
    Effect, EventKind, Evidence, Instant, LinkAddress, ServerId, ServiceConfig, StaleReason, Transmit,
    Uncovered,
};

/// Conversations looked at in one call after a promotion, so that new packets never wait for long.
const SWEEP: usize = 128;
/// How often limits on RVMs are checked.
const TICK: Duration = Duration::from_millis(100);
/// Link addresses remembered for clients of unprotected conversations.
const LINKS: usize = 4096;
/// How long RVMs may take for a closed conversation's last bytes before its addresses are used again
/// (RFC 6298 §2.1: a SYN is sent again after a second).
const REUSE: Duration = Duration::from_millis(900);
/// Refused handshakes counted while closes are held; more tell no more.
const HELD_REFUSALS: usize = 16;
/// SYNs kept during a drain.
const HELD_SYNS: usize = 1024;

/// A seeding that waits for open conversations to end.
#[derive(Debug)]
pub(crate) struct Drain {
    pub(crate) server: ServerId,
    pub(crate) deadline: Instant,
    held: VecDeque<(LinkAddress, Vec<u8>)>,
}

/// One PSC with its server queue and conversations.
///
/// After any input, drain in this order: [`Service::poll_effect`] until `None` (a cutover must be in
/// force before packets of the new epoch leave), then [`Service::poll_transmit`] until `None`, then
/// ask [`Service::poll_timeout`] when to call [`Service::handle_timeout`].
pub struct Service {
    pub(crate) ctx: Context,
    pub(crate) table: Table,
    pub(crate) handshakes: Handshakes,
    pub(crate) unplanned: Unplanned,
    pub(crate) drain: Option<Drain>,
    /// Conversations to be looked at at once.
    work: VecDeque<ConversationId>,
    timers: BTreeSet<(Instant, ConversationId)>,
    next_tick: Instant,
    /// Next place of the table to look at after a promotion; `None` when all are done.
    sweep: Option<usize>,
    next_resets: Instant,
    links: HashMap<IpAddr, LinkAddress>,
    /// Conversations that the data plane may pass by itself, as far as is known.
    pub(crate) passable: VecDeque<ConversationId>,
}

impl Service {
    /// A service without servers: clients' segments are dropped until [`Service::install_ovm`].
    pub fn new(config: ServiceConfig) -> Self {
        Self {
            ctx: Context::new(config),
            table: Table::default(),
            handshakes: Handshakes::default(),
            unplanned: Unplanned::default(),
            drain: None,
            work: VecDeque::new(),
            timers: BTreeSet::new(),
            next_tick: Instant::default(),
            sweep: None,
            next_resets: Instant::default(),
            links: HashMap::new(),
            passable: VecDeque::new(),
        }
    }

    // ---- inputs -------------------------------------------------------------------------------

    /// An IP packet from a client to the PSC. `link` is the frame's source address.
    pub fn handle_client(&mut self, now: Instant, link: LinkAddress, packet: &[u8]) {
        self.begin(now);
        let segment = match wire::parse(packet) {
            Ok(Parsed::Tcp(segment)) => segment,
            Ok(Parsed::Icmp(icmp)) => return self.handle_icmp(&icmp),
            Ok(Parsed::Other { .. }) => return self.ctx.counters.not_replicated += 1,
            Err(malformed) => return self.count_malformed(malformed),
        };
        let config = &self.ctx.config;
        if !config.psc.contains(&segment.dst.ip()) || !config.ports.contains(&segment.dst.port()) {
            self.ctx.counters.not_replicated += 1;
            return;
        }
        // A guest drops what comes from an address of its own, in silence: it would look dead.
        let is_ours = config.psc.contains(&segment.src.ip()) || self.ctx.queue.has_address(segment.src.ip());
        if !is_unicast(segment.src) || is_ours {
            self.ctx.counters.wrong_address += 1;
            return;
        }
        self.ctx.counters.client_segments += 1;
        if segment.options.authenticated {
            self.ctx.counters.authenticated += 1;
            return;
        }
        if self.ctx.queue.ovm().is_none() {
            self.ctx.counters.no_ovm += 1;
            return;
        }
        let key = Key { client: segment.src, psc: segment.dst };
        if segment.flags.has(Flags::SYN) {
            return self.handle_client_syn(key, link, &segment, packet);
        }
        if let Third::Complete(embryonic) = self.handshakes.handle_third(&key, &segment, &self.ctx) {
            self.open(key, embryonic);
        }
        if let Some(id) = self.table.find(&key) {
            self.with(id, |conversation, ctx| {
                conversation.handle_client(link, &segment, ctx);
                conversation.check_passed_to_ovm(&segment, ctx);
            });
        } else {
            if segment.flags.has(Flags::RST) {
                self.handshakes.forget(&key);
            }
            self.pass_unprotected_to_ovm(link, &segment);
        }
    }

    /// An IP packet that came out of a server's vif. Packets that are not this service's (another
    /// port, another protocol) are ignored and counted. An unknown id is a deposed or former
    /// server: dropped and counted.
    pub fn handle_server(&mut self, now: Instant, server: ServerId, packet: &[u8]) {
        self.begin(now);
        let Some(slot) = self.ctx.queue.slot_of(server) else {
            self.ctx.counters.fenced += 1;
            return;
        };
        let segment = match wire::parse(packet) {
            Ok(Parsed::Tcp(segment)) => segment,
            Ok(_) => return self.ctx.counters.not_replicated += 1,
            Err(malformed) => return self.count_malformed(malformed),
        };
        let psc = self.ctx.config.psc.iter().copied().find(|psc| psc.is_ipv4() == segment.src.is_ipv4());
        let psc = psc.map(|psc| SocketAddr::new(psc, segment.src.port()));
        let Some(psc) = psc.filter(|psc| self.ctx.guest(slot, *psc) == Some(segment.src)) else {
            self.ctx.counters.wrong_address += 1;
            return;
        };
        if !self.ctx.config.ports.contains(&psc.port()) || segment.options.authenticated {
            self.ctx.counters.not_replicated += 1;
            return;
        }
        let key = Key { client: segment.dst, psc };
        if self.ctx.queue.ovm() == Some(slot) {
            self.handshakes.note_ovm_heard();
        } else if self.handshakes.is_witness(&key, &segment) {
            return self.hear_witness(slot);
        }
        if self.ctx.queue.ovm() == Some(slot) && self.handle_ovm_handshake(&key, server, &segment) {
            return;
        }
        if let Some(id) = self.table.find(&key) {
            self.with(id, |conversation, ctx| conversation.handle_server(slot, server, &segment, ctx));
        } else if self.ctx.queue.ovm() == Some(slot) {
            self.pass_unprotected_to_client(key, &segment);
        } else if !(segment.flags.has(Flags::SYN) && self.handshakes.acknowledges(&key, &segment)) {
            // One that was asked, or was the OVM, may wait for the handshake's end: its leg begins there.
            self.refuse(server, &segment);
        }
    }

    /// Liveness found evidence of kind (a) or (b) against a server. For the OVM: promotion (or
    /// [`crate::EventKind::NoCandidate`]). For an RVM: eviction.
    pub fn handle_evidence(&mut self, now: Instant, server: ServerId, evidence: Evidence) {
        self.begin(now);
        let Some(slot) = self.ctx.queue.slot_of(server) else { return };
        if self.ctx.queue.ovm() == Some(slot) {
            // The caller has stopped a plane that passes by itself.
            self.accuse(evidence);
        } else {
            promotion::evict(slot, StaleReason::MissedBytes, &mut self.ctx);
        }
        self.settle();
    }

    /// A server is (not) running as far as the domain's state tells; one that is not is never
    /// promoted, and an OVM whose pause was announced is not accused by (c) or (d).
    pub fn handle_running(&mut self, now: Instant, server: ServerId, running: bool) {
        self.begin(now);
        if let Some(slot) = self.ctx.queue.slot_of(server)
            && let Some(server) = self.ctx.queue.get_mut(slot)
        {
            server.running = running;
            // What it did not do while it stood still is not held against it.
            self.ctx.starved_at = now;
        }
    }

    /// The time that [`Service::poll_timeout`] named has come (calling early or late is fine).
    pub fn handle_timeout(&mut self, now: Instant) {
        self.begin(now);
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.check_limits();
        }
        self.handshakes.ask_witnesses(&mut self.ctx);
        self.end_drain();
        self.sweep();
        for _ in 0..SWEEP {
            match self.timers.first().copied() {
                Some((due, id)) if due <= now => {
                    self.timers.pop_first();
                    if let Some(conversation) = self.table.get_mut(id) {
                        conversation.deadline = None;
                    }
                    self.with(id, |_, _| {});
                }
                _ => break,
            }
        }
        self.send_resets();
        self.settle();
    }

    // ---- outputs ------------------------------------------------------------------------------

    /// The next effect outside the data path.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.ctx.next_effect()
    }

    /// The next packet to send. Does bounded work per call.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Transmit> {
        loop {
            if self.ctx.cutover_untold {
                // Found while working here: the caller learns of it first.
                return None;
            }
            if let Some(transmit) = self.ctx.next_transmit() {
                return Some(transmit);
            }
            let id = self.work.pop_front()?;
            self.begin(now);
            if let Some(conversation) = self.table.get_mut(id) {
                conversation.queued = false;
            }
            self.with(id, |_, _| {});
        }
    }

    /// When [`Service::handle_timeout`] must be called next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.sweep.is_some() || !self.work.is_empty() || self.ctx.cutover_untold {
            return Some(self.ctx.now);
        }
        let timer = self.timers.first().map(|(due, _)| *due);
        let resets = (!self.ctx.resets.is_empty()).then_some(self.next_resets);
        let drain = self.drain.as_ref().map(|drain| drain.deadline);
        let tick = self.ctx.queue.rvms().next().map(|_| self.next_tick);
        let question = tick.and(self.handshakes.question_due(self.ctx.config.timing.unacked_limit));
        [timer, resets, drain, tick, question].into_iter().flatten().min()
    }

    // ---- who gets which packet ------------------------------------------------------------------

    fn begin(&mut self, now: Instant) {
        let now = now.max(self.ctx.now);
        if let Some(due) = self.poll_timeout()
            && now.since(due) >= self.ctx.config.timing.starvation
        {
            // A starved host stalls everybody: nobody is at fault for that time.
            self.ctx.counters.starvations += 1;
            self.ctx.starved_at = now;
        }
        self.ctx.now = now;
    }

    fn count_malformed(&mut self, malformed: Malformed) {
        let counters = &mut self.ctx.counters;
        *match malformed {
            Malformed::Truncated => &mut counters.malformed_truncated,
            Malformed::Header => &mut counters.malformed_header,
            Malformed::Options => &mut counters.malformed_options,
            Malformed::Fragment => &mut counters.fragments,
            Malformed::Checksum => &mut counters.bad_checksum,
        } += 1;
    }

    fn handle_client_syn(&mut self, key: Key, link: LinkAddress, syn: &Segment<'_>, packet: &[u8]) {
        if syn.flags.has(Flags::ACK.with(Flags::RST).with(Flags::FIN)) {
            self.ctx.counters.unacceptable += 1;
            return;
        }
        let known = self.table.find(&key).filter(|id| {
            self.table.get(*id).is_some_and(|known| known.is_open() && known.client.iss == syn.seq)
        });
        if let Some(id) = known {
            return self.with(id, |conversation, ctx| conversation.handle_repeated_syn(syn, ctx));
        }
        let former = self.table.find(&key).and_then(|id| self.table.get(id));
        if former.is_some_and(|former| !former.is_open() && former.client.iss == syn.seq) {
            // A late duplicate of the SYN that began what has ended.
            self.ctx.counters.unacceptable += 1;
            return;
        }
        if former.is_some_and(|former| former.is_unfinished(&self.ctx)) {
            self.ctx.counters.early_reuse += 1;
            return;
        }
        if let Some(drain) = &mut self.drain {
            self.ctx.counters.held_syns += 1;
            if drain.held.len() < HELD_SYNS {
                drain.held.push_back((link, packet.to_vec()));
            } else {
                self.ctx.counters.held_syns_dropped += 1;
            }
            return;
        }
        self.remember_link(key.client.ip(), link);
        self.handshakes.handle_syn(key, link, syn, &mut self.ctx);
    }

    /// SYN-ACKs and refusals of the OVM; true if the segment needs nothing else.
    fn handle_ovm_handshake(&mut self, key: &Key, server: ServerId, segment: &Segment<'_>) -> bool {
        if segment.flags.has(Flags::RST) {
            if !self.ctx.holding.is_empty() && self.handshakes.acknowledges(key, segment) {
                // The service may have died inside the OVM: the client asks again, and gets whoever
                // serves then.
                if self.ctx.refusals.len() < HELD_REFUSALS {
                    self.ctx.refusals.insert(*key);
                }
                return true;
            }
            if self.handshakes.handle_refusal(key, segment) {
                self.send_as_is(*key, segment);
                return true;
            }
            return false;
        }
        if segment.flags.has(Flags::SYN) && self.handshakes.is_answered_otherwise(key, server, segment.seq) {
            return true;
        }
        if segment.flags.has(Flags::SYN) && self.handshakes.handle_syn_ack(key, server, segment) {
            self.send_as_is(*key, segment);
            return true;
        }
        false
    }

    /// An RVM speaks of a conversation that there is not (any more): RFC 9293 §3.10.7.1.
    fn refuse(&mut self, server: ServerId, segment: &Segment<'_>) {
        if segment.flags.has(Flags::ACK) && !segment.flags.has(Flags::RST) {
            let reset = Segment {
                src: segment.dst,
                dst: segment.src,
                seq: segment.ack,
                ack: 0,
                flags: Flags::RST,
                window: 0,
                options: Default::default(),
                payload: &[],
                ..*segment
            };
            self.ctx.send_to_server(server, reset.emit());
        }
    }

    /// An RVM answered a SYN that the OVM, silent altogether, did not.
    fn hear_witness(&mut self, slot: Slot) {
        self.handshakes.note_ovm_heard();
        let trusted =
            self.ctx.queue.get(slot).is_some_and(|server| self.ctx.queue.not_promotable(server).is_none());
        if trusted && self.ctx.queue.ovm_server().is_some_and(|ovm| ovm.running) {
            self.suspect(Evidence::UnacknowledgedSegment);
        }
        self.settle();
    }

    /// The client's handshake with the OVM is complete: every RVM gets its SYN now.
    fn open(&mut self, key: Key, embryonic: Embryonic) {
        if let Some(former) = self.table.find(&key) {
            self.abandon(former);
        }
        let limit = self.ctx.config.limits.conversations;
        let mut id = self.table.reserve(key, limit);
        if id.is_none()
            && let Some(closed) = self.table.oldest_closed()
        {
            self.abandon(closed);
            id = self.table.reserve(key, limit);
        }
        let Some(id) = id else {
            self.ctx.counters.conversations += 1;
            self.ctx.event(EventKind::Unprotected { client: key.client, reason: Uncovered::TableFull });
            return;
        };
        match embryonic.open(id, key, &mut self.ctx) {
            Some(conversation) => self.table.put(conversation),
            None => self.table.cancel(id, &key),
        }
    }

    /// Works on a conversation, then does what followed from it.
    fn with(&mut self, id: ConversationId, change: impl FnOnce(&mut Conversation, &mut Context)) {
        if let Some(mut conversation) = self.table.take(id) {
            let was_open = conversation.is_open();
            // First, or a deposed OVM's segment would still pass as the OVM's.
            conversation.follow_epoch(&mut self.ctx);
            self.note_passage(&mut conversation);
            change(&mut conversation, &mut self.ctx);
            let wanted = conversation.work(&mut self.ctx);
            if wanted {
                self.schedule(&mut conversation);
                self.review_passing(&mut conversation);
                let closed = was_open && !conversation.is_open();
                self.table.put(conversation);
                if closed {
                    self.table.note_closed(id);
                }
            } else {
                self.forget(&mut conversation);
            }
        }
        self.settle();
    }

    fn schedule(&mut self, conversation: &mut Conversation) {
        let next = conversation.next_deadline(&self.ctx);
        // An earlier registration stays: being looked at too early costs little.
        if conversation.deadline.is_none_or(|deadline| next < deadline) {
            if let Some(deadline) = conversation.deadline {
                self.timers.remove(&(deadline, conversation.id));
            }
            conversation.deadline = Some(next);
            self.timers.insert((next, conversation.id));
        }
    }

    /// Removes a conversation whose addresses or place are wanted for another.
    fn abandon(&mut self, id: ConversationId) {
        if let Some(mut conversation) = self.table.take(id) {
            self.forget(&mut conversation);
        }
    }

    fn forget(&mut self, conversation: &mut Conversation) {
        conversation.end(&mut self.ctx);
        conversation.stop_passing(&mut self.ctx);
        if conversation.is_passable_queued {
            self.forget_passable(conversation.id);
        }
        if let Some(deadline) = conversation.deadline {
            self.timers.remove(&(deadline, conversation.id));
        }
        self.table.forget(conversation);
    }

    /// Follows up what conversations left in the context: suspicion, laggards, the order.
    pub(crate) fn settle(&mut self) {
        if let Some(evidence) = self.ctx.suspicion.take() {
            self.suspect(evidence);
        }
        while let Some(slot) = self.ctx.laggards.pop() {
            promotion::evict(slot, StaleReason::Lagged, &mut self.ctx);
        }
        self.advance_order();
        if self.sweep.is_none() && self.ctx.recuperation.is_to_be_reported() {
            Conversation::report(&mut self.ctx);
        }
    }

    fn advance_order(&mut self) {
        if !self.ctx.progressed.contains(&true) {
            return;
        }
        let Self { ctx, table, work, .. } = self;
        let was_catching_up = ctx.is_catching_up();
        for (slot, server) in ctx.roster() {
            if !core::mem::take(&mut ctx.progressed[slot.index()]) {
                continue;
            }
            let mut woken = Vec::new();
            let moved = ctx.order.advance(
                slot,
                |id, position| {
                    table.get(id).is_none_or(|conversation| conversation.has_produced(slot, server, position))
                },
                |id| woken.push(id),
            );
            if moved && let Some(server) = ctx.queue.get_mut(slot) {
                server.waiting_since = None;
            }
            // Once, or each of the OVM's segments would cost a look at all conversations in recuperation.
            if ctx.queue.ovm() == Some(slot) && was_catching_up && !ctx.is_catching_up() {
                woken.extend(ctx.recuperation.pending.iter().copied());
            }
            for id in woken {
                if let Some(conversation) = table.get_mut(id).filter(|conversation| !conversation.queued) {
                    conversation.queued = true;
                    work.push_back(id);
                }
            }
        }
        ctx.progressed = [false; MAX_SERVERS];
        ctx.release_order();
    }

    /// Something speaks against the OVM: promote, or say why not.
    pub(crate) fn accuse(&mut self, evidence: Evidence) {
        let Some((_, ovm)) = self.ctx.ovm() else { return };
        self.ctx.event(EventKind::Suspected { server: ovm, evidence });
        let candidate = promotion::candidate(&self.ctx);
        let mut because = promotion::obstacles(&self.ctx);
        if let Some(slot) = candidate {
            if self.unplanned.admit(&self.ctx) {
                promotion::cut_over(slot, Some(evidence), Deposed::Fenced, &mut self.ctx);
                return self.after_cutover();
            }
            self.ctx.counters.promotions_limited += 1;
            if let Some(server) = self.ctx.queue.get(slot) {
                because.push((server.id, crate::NotPromotable::PromotionLimit));
            }
        }
        // Nobody is accused again for the same silence before the limits have passed once more.
        self.ctx.starved_at = self.ctx.now;
        self.ctx.event(EventKind::NoCandidate { server: Some(ovm), evidence, because });
    }

    /// Those with something in flight first, then all others.
    pub(crate) fn after_cutover(&mut self) {
        self.handshakes.reopen(&mut self.ctx);
        self.ctx.progressed = [true; MAX_SERVERS];
        let busy: Vec<_> = self.table.busy().collect();
        for id in busy {
            if let Some(conversation) = self.table.get_mut(id).filter(|conversation| !conversation.queued) {
                conversation.queued = true;
                self.work.push_back(id);
            }
        }
        self.sweep = Some(0);
    }

    fn sweep(&mut self) {
        let Some(first) = self.sweep else { return };
        for index in first..first + SWEEP {
            match self.table.at(index) {
                Some(Some(id)) if self.table.get(id).is_some_and(|known| known.epoch != self.ctx.epoch) => {
                    self.with(id, |_, _| {});
                }
                Some(_) => {}
                None => {
                    self.sweep = None;
                    return;
                }
            }
        }
        self.sweep = Some(first + SWEEP);
    }

    fn send_resets(&mut self) {
        if self.ctx.resets.is_empty() || self.ctx.now < self.next_resets {
            return;
        }
        self.next_resets = self.ctx.now + Duration::from_millis(1);
        for _ in 0..self.ctx.config.limits.resets_per_ms.max(1) {
            let Some(id) = self.ctx.resets.pop_front() else { break };
            self.with(id, |conversation, ctx| conversation.send_reset(ctx));
        }
    }

    fn check_limits(&mut self) {
        let limits = self.ctx.config.limits;
        let (now, lag_limit) = (self.ctx.now, self.ctx.config.timing.lag_limit);
        let evicts = self.ctx.config.on_lag == crate::LagPolicy::Evict;
        let slots: Vec<Slot> = self.ctx.queue.rvms().collect();
        for slot in slots {
            let waiting = self.ctx.order.is_waiting(slot);
            let outstanding = self.ctx.order.outstanding(slot);
            let starved_at = self.ctx.starved_at;
            let Some(server) = self.ctx.queue.get_mut(slot) else { continue };
            let since = waiting.then(|| *server.waiting_since.get_or_insert(now));
            server.waiting_since = since;
            server.lagging = since.is_some_and(|since| now.since(since.max(starved_at)) >= lag_limit);
            if evicts && server.behind_bytes() > limits.lag_bytes {
                self.ctx.counters.lag_bytes += 1;
                promotion::evict(slot, StaleReason::Lagged, &mut self.ctx);
            } else if outstanding > u64::from(limits.order_entries) {
                self.ctx.counters.order_entries += 1;
                promotion::evict(slot, StaleReason::Lagged, &mut self.ctx);
            }
        }
        // An earlier eviction may not have freed yet what it will.
        if self.ctx.retained >= limits.retained_bytes && self.sweep.is_none() {
            let behind = |slot: &Slot| self.ctx.queue.get(*slot).map_or(0, |server| server.behind_bytes());
            if let Some(slot) = self.ctx.queue.rvms().max_by_key(behind) {
                self.ctx.counters.retained_bytes += 1;
                promotion::evict(slot, StaleReason::Lagged, &mut self.ctx);
            }
        }
        self.ctx.release_order();
    }

    // ---- a drain --------------------------------------------------------------------------------

    pub(crate) fn begin_drain(&mut self, server: ServerId, deadline: Instant) {
        self.drain = Some(Drain { server, deadline, held: VecDeque::new() });
        self.end_drain();
    }

    fn end_drain(&mut self) {
        if self.drain.is_none() {
            return;
        }
        let open = self.unsettled();
        let Some(drain) = self.drain.take_if(|drain| open == 0 || self.ctx.now >= drain.deadline) else {
            return;
        };
        if open == 0 {
            self.mark_seeded(drain.server);
        } else {
            self.ctx.event(EventKind::DrainFailed { server: drain.server, open });
        }
        for (link, packet) in drain.held {
            self.handle_client(self.ctx.now, link, &packet);
        }
    }

    /// Conversations that may still change the OVM's state: open ones, and those that it has yet to be
    /// given to the end.
    pub(crate) fn unsettled(&mut self) -> u64 {
        while self.sweep.is_some() {
            self.sweep();
        }
        self.ctx.open + self.ctx.owed.len() as u64
    }

    pub(crate) fn mark_seeded(&mut self, id: ServerId) {
        if let Some(slot) = self.ctx.queue.slot_of(id) {
            self.ctx.order.start(slot);
            if let Some(server) = self.ctx.queue.get_mut(slot) {
                server.stale = None;
                server.behind = 0;
            }
            self.ctx.event(EventKind::Seeded { server: id });
        }
    }

    // ---- what flows without protection ----------------------------------------------------------

    /// A conversation that the daemon does not know flows all the same. After a promotion the new OVM
    /// answers it with a RST of its own: a clean end.
    fn pass_unprotected_to_ovm(&mut self, link: LinkAddress, segment: &Segment<'_>) {
        if self.ctx.passage == Passage::Passed {
            return;
        }
        let Some((slot, server)) = self.ctx.ovm() else { return };
        let Some(guest) = self.ctx.guest(slot, segment.dst) else { return };
        self.remember_link(segment.src.ip(), link);
        self.ctx.counters.unprotected_segments += 1;
        let mss = self.ctx.queue.get(slot).map_or(536, |server| server.mtu.saturating_sub(60));
        let translated = Segment { dst: guest, ..*segment };
        translated.emit_split(mss, |packet| self.ctx.send_to_server(server, packet));
    }

    /// An OVM's segment in a conversation that the daemon does not know. Unless it is a refusal, or the
    /// handshake is still to be completed, the OVM serves somebody whose bytes no RVM gets.
    fn pass_unprotected_to_client(&mut self, key: Key, segment: &Segment<'_>) {
        self.ctx.counters.unprotected_segments += 1;
        let begins = self.handshakes.note_acknowledgment(&key, segment);
        if !segment.flags.has(Flags::RST.with(Flags::SYN)) && !begins {
            self.ctx.mark_all_stale(StaleReason::UncoveredConversation);
        }
        self.send_as_is(key, segment);
    }

    /// Sends an OVM's segment on with nothing but its address changed.
    fn send_as_is(&mut self, key: Key, segment: &Segment<'_>) {
        if self.ctx.passage == Passage::Passed {
            return;
        }
        let Some(link) = self.links.get(&key.client.ip()).copied() else { return };
        let translated = Segment { src: key.psc, ..*segment };
        let mss = if key.psc.is_ipv4() { 1460 } else { 1440 };
        translated.emit_split(mss, |packet| self.ctx.send_to_client(link, packet));
    }

    fn remember_link(&mut self, client: IpAddr, link: LinkAddress) {
        if self.links.len() >= LINKS && !self.links.contains_key(&client) {
            // Rare and harmless: they are learned again from the next segment.
            self.links.clear();
        }
        self.links.insert(client, link);
    }

    /// An ICMP error about something that a client was sent.
    fn handle_icmp(&mut self, icmp: &Icmp<'_>) {
        let key = Key { client: icmp.quoted_dst, psc: icmp.quoted_src };
        let Some((slot, server)) = self.ctx.ovm() else { return };
        let Some(guest) = self.ctx.guest(slot, key.psc) else { return };
        if self.ctx.config.psc.contains(&icmp.to)
            && icmp.to == key.psc.ip()
            && guest.is_ipv4() == icmp.from.is_ipv4()
        {
            let mut seq = None;
            if let Some(conversation) = self.table.find(&key).and_then(|id| self.table.get_mut(id)) {
                seq = conversation.handle_icmp(icmp.error, icmp.quoted_seq, slot, server);
            }
            if let Some(seq) = seq {
                self.ctx.counters.icmp_errors += 1;
                self.ctx.send_to_server(server, icmp.translated(guest.ip(), seq));
                return;
            }
        }
        self.ctx.counters.not_replicated += 1;
    }
}

impl Conversation {
    /// The OVM must answer a SYN that was sent again, or the daemon in its place.
    fn handle_repeated_syn(&mut self, syn: &Segment<'_>, ctx: &mut Context) {
        if let Some(recuperating) = &mut self.recuperating {
            recuperating.ack_due = true;
            return;
        }
        let Some((slot, server)) = ctx.ovm() else { return };
        if self.legs.get(slot, server).is_some_and(|leg| leg.through)
            && let Some(guest) = ctx.guest(slot, self.key.psc)
        {
            ctx.send_to_server(server, Segment { dst: guest, payload: &[], ..*syn }.emit());
        }
    }

    /// The path to the client is narrower, or there is none. The quoted sequence number as the OVM
    /// knows it, if the quotation is of something in flight (RFC 5927 §4.1).
    fn handle_icmp(
        &mut self,
        error: IcmpError,
        quoted_seq: u32,
        slot: Slot,
        server: ServerId,
    ) -> Option<u32> {
        let position = position_of(self.told.iss, quoted_seq, self.client.acked)?;
        if position < self.client.acked || position >= self.down_end() {
            return None;
        }
        if let IcmpError::TooBig(mtu) = error {
            let headers = if self.key.psc.is_ipv4() { 40 } else { 60 };
            let least = if self.key.psc.is_ipv4() { 536 } else { 1220 };
            let mss = u16::try_from(mtu.saturating_sub(headers)).unwrap_or(u16::MAX).max(least);
            self.client.mss = self.client.mss.min(mss);
        }
        self.legs.get(slot, server).filter(|leg| leg.through).map(|leg| seq_of(leg.iss, position))
    }

    /// Closed just now, and an RVM has yet to take the last bytes: another conversation in its place
    /// would make that RVM stale, and a client could do so at will. Its next SYN comes after a second.
    fn is_unfinished(&self, ctx: &Context) -> bool {
        let is_recent = self.closed.is_some_and(|closed| ctx.now.since(closed) < REUSE);
        is_recent
            && ctx.roster().any(|(slot, server)| {
                self.legs
                    .get(slot, server)
                    .is_some_and(|leg| !leg.through && leg.gone.is_none() && leg.rcv_nxt < self.up.end())
            })
    }

    /// For the order: the server has answered up to `position`, or never will comparably.
    fn has_produced(&self, slot: Slot, server: ServerId, position: u64) -> bool {
        self.legs.get(slot, server).is_none_or(|leg| {
            leg.through || !leg.covers() || leg.gone.is_some() || leg.answers.end() >= position
        })
    }
}

fn is_unicast(address: SocketAddr) -> bool {
    let ip = address.ip();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    !(ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || broadcast || address.port() == 0)
}
