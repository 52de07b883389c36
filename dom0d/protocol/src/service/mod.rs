//! One PSC, its server queue and its conversations: the engine's interface.
//!
//! `reception` handles segments without a conversation, `settle` carries out what follows from conversations' turns,
//! `drain` seeds a server once no conversation is open, `operator` carries out commands, `passing` deals with a plane
//! that passes conversations by itself, `catching_up` decides when a follower has caught up, and `repetition` helps to
//! keep a journal short.

pub(crate) mod catching_up;
pub(crate) mod drain;
pub(crate) mod operator;
pub(crate) mod passing;
pub(crate) mod reception;
pub(crate) mod repetition;
pub(crate) mod settle;

use core::net::{IpAddr, SocketAddr};
use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::accounts::Share;
use crate::config::ServiceConfig;
use crate::context::Context;
use crate::conversation::Conversation;
use crate::conversation::handshake::{Handshakes, Third};
use crate::conversation::table::Table;
use crate::conversation::turn::Turn;
use crate::event::{Evidence, LinkAddress, ServerId, StaleReason};
use crate::input::{Input, OperatorError, Sign};
use crate::key::{ConversationId, Key};
use crate::output::Output;
use crate::promotion::{self, Unplanned};
use crate::time::Instant;
use crate::wire::{self, Flags, Malformed, Parsed};

/// Most conversations that one call looks at, so that new packets never wait for long.
pub(crate) const SWEEP: usize = 128;
/// Places of the table that one tick looks at for conversations that may fall asleep.
const CALMED: usize = 512;
/// How often the service checks limits on RVMs.
const TICK: Duration = Duration::from_millis(100);

/// New conversations wait until the open ones have ended (rule 12).
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Drain {
    pub(crate) purpose: Purpose,
    /// The epoch of the OVM that it is about.
    pub(crate) epoch: u64,
    pub(crate) deadline: Instant,
    pub(crate) held: VecDeque<(LinkAddress, Vec<u8>)>,
}

/// What follows once no conversation is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// The service takes this server as equal to the OVM.
    Seed(ServerId),
    /// The service then holds clients for at most `limit`, so that nothing changes the OVM's state.
    Hold { limit: Duration },
    /// The service holds clients now.
    Held,
}

/// One PSC with its server queue and conversations.
///
/// Hand it each input ([`Service::handle`]), then poll its outputs ([`Service::poll`]) until `None`, and carry them out
/// in that order. [`Service::next_timeout`] says when it must be told the time. It does nothing by itself.
#[derive(Serialize, Deserialize)]
pub struct Service {
    pub(crate) ctx: Context,
    pub(crate) table: Table,
    pub(crate) handshakes: Handshakes,
    pub(crate) unplanned: Unplanned,
    pub(crate) drain: Option<Drain>,
    /// Conversations that have work to do at once.
    pub(crate) work: VecDeque<ConversationId>,
    pub(crate) timers: BTreeSet<(Instant, ConversationId)>,
    pub(crate) next_tick: Instant,
    /// After a promotion, the next place of the table to look at; `None` once every conversation has followed.
    pub(crate) sweep: Option<usize>,
    pub(crate) next_resets: Instant,
    pub(crate) links: BTreeMap<IpAddr, LinkAddress>,
    /// Unknown conversations in which clients sent the OVM data.
    pub(crate) unknown: BTreeSet<Key>,
    /// Conversations that the data plane may probably pass by itself; the handover checks that again.
    pub(crate) passable: VecDeque<ConversationId>,
    /// True if the latest input was [`Input::PlaneIdle`].
    pub(crate) idle: bool,
}

impl Service {
    /// A service without servers: clients' segments are dropped until [`crate::Command::InstallOvm`].
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
            links: BTreeMap::new(),
            unknown: BTreeSet::new(),
            passable: VecDeque::new(),
            idle: false,
        }
    }

    /// Handles an input that happened at `now`. Only a [`crate::Command`] is ever refused; then nothing has changed.
    ///
    /// `now` must not run backwards; if it does, the difference counts as zero.
    pub fn handle(&mut self, now: Instant, input: Input<'_>) -> Result<(), OperatorError> {
        self.idle = false;
        match input {
            Input::Client { link, passage, packet } => self.handle_tapped_client(now, link, packet, passage),
            Input::Server { server, passage, packet } => {
                self.handle_tapped_server(now, server, packet, passage);
            }
            Input::Timeout => self.handle_timeout(now),
            Input::Sign { server, sign } => self.handle_sign(now, server, sign),
            Input::Running { server, running } => self.handle_running(now, server, running),
            Input::OwnConnection { server } => self.handle_own_connection(now, server),
            Input::Evidence { server, evidence } => self.handle_evidence(now, server, evidence),
            Input::PlanePasses => self.set_plane_passes(),
            Input::PlaneIdle => self.handle_plane_idle(),
            Input::PlaneStopped => self.handle_plane_stopped(),
            Input::Untold => self.handle_untold(),
            Input::Confirmed { accused, evidence } => self.handle_confirmed(now, accused, evidence),
            Input::Command(command) => {
                self.ctx.now = self.ctx.now.max(now);
                return self.carry_out(command);
            }
        }
        Ok(())
    }

    /// An IP packet from a client to the PSC.
    pub(crate) fn handle_client(&mut self, now: Instant, link: LinkAddress, packet: &[u8]) {
        self.begin(now);
        let segment = match wire::parse_with(packet, self.ctx.plane.checksum()) {
            Ok(Parsed::Tcp(segment)) => segment,
            Ok(Parsed::Icmp(icmp)) => return self.handle_icmp(&icmp),
            Ok(Parsed::Other { .. }) => return self.ctx.counters.not_replicated += 1,
            Err(malformed) => return self.count_malformed(malformed),
        };
        if segment.payload.is_empty() {
            self.ctx.plane.note_accounted();
        }
        let config = &self.ctx.config;
        if !config.psc.contains(&segment.dst.ip()) || !config.ports.contains(&segment.dst.port()) {
            self.ctx.counters.not_replicated += 1;
            return;
        }
        // A guest silently drops a packet whose source is one of its own addresses, and would look dead.
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
        if self.is_held() && self.table.find(&key).is_none() {
            // The segment would begin a conversation, or belongs to an unknown one. The client retransmits it.
            self.ctx.counters.held_segments += 1;
            return;
        }
        if let Third::Complete(embryonic) = self.handshakes.handle_third(&key, &segment, self.ovm()) {
            self.open(key, embryonic);
        }
        if let Some(id) = self.table.find(&key) {
            self.with(id, |conversation, turn| {
                conversation.handle_client(link, &segment, turn);
                conversation.check_passed_to_ovm(&segment, turn);
            });
        } else {
            self.handle_unknown_client(key, link, &segment);
        }
    }

    /// An IP packet that came out of a server's vif.
    pub(crate) fn handle_server(&mut self, now: Instant, server: ServerId, packet: &[u8]) {
        self.begin(now);
        let Some(slot) = self.ctx.queue.slot_of(server) else {
            self.ctx.counters.fenced += 1;
            return;
        };
        let segment = match wire::parse_with(packet, self.ctx.plane.checksum()) {
            Ok(Parsed::Tcp(segment)) => segment,
            Ok(_) => return self.ctx.counters.not_replicated += 1,
            Err(malformed) => return self.count_malformed(malformed),
        };
        if segment.payload.is_empty() {
            self.ctx.plane.note_accounted();
        }
        let Some(psc) =
            self.psc_of(segment.src).filter(|psc| self.ctx.guest(slot, *psc) == Some(segment.src))
        else {
            self.ctx.counters.wrong_address += 1;
            return;
        };
        if !self.ctx.config.ports.contains(&psc.port()) || segment.options.authenticated {
            self.ctx.counters.not_replicated += 1;
            return;
        }
        let key = Key { client: segment.dst, psc };
        if self.ctx.queue.ovm() == Some(slot) {
            self.handshakes.note_ovm_heard(&mut self.ctx.counters);
            if self.ctx.closes.hear_probed(&key, &segment, self.ctx.now) {
                // The daemon's SYN was only a question: reset the connection.
                return self.refuse(server, &segment);
            }
            self.ctx.signs.note_reached(key.client.ip(), self.links.get(&key.client.ip()).copied());
            if segment.sequence_length() == 0 && !segment.flags.has(Flags::RST) {
                // A segment without data is the kernel's own acknowledgment: a sign of life.
                self.ctx.signs.note_life(self.ctx.now);
            }
        } else if self.handshakes.is_witness(&key, &segment) {
            return self.hear_witness(slot);
        }
        if self.ctx.queue.ovm() == Some(slot) && self.handle_ovm_handshake(&key, server, &segment) {
            return;
        }
        if let Some(id) = self.table.find(&key) {
            self.with(id, |conversation, turn| conversation.handle_server(slot, server, &segment, turn));
        } else if self.ctx.queue.ovm() == Some(slot) {
            self.handle_unknown_ovm(key, server, &segment);
        } else if !(segment.flags.has(Flags::SYN) && self.handshakes.acknowledges(&key, &segment)) {
            // A server that was sent the SYN as a witness, or was the OVM, may wait for the end of the handshake, where
            // its leg begins.
            self.refuse(server, &segment);
        }
    }

    /// The PSC's socket that corresponds to a server's socket.
    pub(crate) fn psc_of(&self, guest: SocketAddr) -> Option<SocketAddr> {
        let psc = self.ctx.config.psc.iter().find(|psc| psc.is_ipv4() == guest.is_ipv4())?;
        Some(SocketAddr::new(*psc, guest.port()))
    }

    fn handle_evidence(&mut self, now: Instant, server: ServerId, evidence: Evidence) {
        self.begin(now);
        let Some(slot) = self.ctx.queue.slot_of(server) else { return };
        if self.ctx.queue.ovm() == Some(slot) {
            // The caller has stopped a plane that passes conversations by itself.
            self.accuse(evidence);
        } else {
            promotion::evict(slot, StaleReason::MissedBytes, &mut self.ctx);
        }
        self.settle();
    }

    fn handle_sign(&mut self, now: Instant, server: ServerId, sign: Sign) {
        self.begin(now);
        if self.ovm() == Some(server) {
            self.handshakes.note_ovm_heard(&mut self.ctx.counters);
            self.ctx.signs.note_sign(sign, self.ctx.now);
        }
        self.settle();
    }

    fn handle_running(&mut self, now: Instant, server: ServerId, running: bool) {
        self.begin(now);
        if let Some(slot) = self.ctx.queue.slot_of(server)
            && let Some(server) = self.ctx.queue.get_mut(slot)
        {
            server.running = running;
            server.excused_at = now;
            if self.ctx.queue.ovm() == Some(slot) {
                self.ctx.excuses.excuse_ovm(now);
            }
        }
    }

    fn handle_own_connection(&mut self, now: Instant, server: ServerId) {
        self.begin(now);
        let ovm = self.ctx.queue.ovm();
        if let Some(slot) = self.ctx.queue.slot_of(server).filter(|slot| Some(*slot) != ovm)
            && let Some(server) = self.ctx.queue.get_mut(slot)
        {
            server.own_connections = true;
        }
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.begin(now);
        if now >= self.next_tick {
            self.next_tick = now + TICK;
            self.check_limits();
            self.table.calm(now, CALMED);
        }
        self.ctx.act(|turn| self.handshakes.ask_witnesses(turn));
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

    /// The next output; `None` if there is none until the next input. Does bounded work per call.
    pub fn poll(&mut self, now: Instant) -> Option<Output> {
        loop {
            if let Some(output) = self.ctx.outbox.pop() {
                return Some(output);
            }
            let Some(id) = self.work.pop_front() else { return self.next_handover() };
            self.begin(now);
            if let Some(conversation) = self.table.get_mut(id) {
                conversation.queued = false;
            }
            self.with(id, |_, _| {});
        }
    }

    /// When the caller must hand over [`Input::Timeout`] next; at once while there is something to poll.
    pub fn next_timeout(&self) -> Option<Instant> {
        if self.sweep.is_some() || !self.work.is_empty() || !self.ctx.outbox.is_empty() {
            return Some(self.ctx.now);
        }
        let timer = self.timers.first().map(|(due, _)| *due);
        let resets = (!self.ctx.pending.resets.is_empty()).then_some(self.next_resets);
        let drain = self.drain.as_ref().map(|drain| drain.deadline);
        let tick = self.ctx.queue.rvms().next().map(|_| self.next_tick);
        let drain = drain.map(|deadline| deadline.min(self.next_tick));
        let question = tick.and(self.handshakes.question_due(self.ctx.config.timing.unacked_limit));
        [timer, resets, drain, tick, question, self.ctx.probe_due()].into_iter().flatten().min()
    }

    pub(crate) fn begin(&mut self, now: Instant) {
        let now = now.max(self.ctx.now);
        let late = self.next_timeout().map_or(Duration::ZERO, |due| now.since(due));
        if late >= self.ctx.config.timing.starvation {
            // A starved host stalls every server: none is at fault for that time.
            self.ctx.counters.starvations += 1;
            self.ctx.excuses.note_starved(now);
        }
        if late >= self.ctx.config.timing.close_hold / 2 {
            self.ctx.excuses.note_late(now);
        }
        self.ctx.now = now;
    }

    fn count_malformed(&mut self, malformed: Malformed) {
        // The receiver drops the packet for its checksum, too.
        if malformed == Malformed::Checksum {
            self.ctx.plane.note_accounted();
        }
        let counters = &mut self.ctx.counters;
        *match malformed {
            Malformed::Truncated => &mut counters.malformed_truncated,
            Malformed::Header => &mut counters.malformed_header,
            Malformed::IpOptions => &mut counters.ip_options,
            Malformed::Options => &mut counters.malformed_options,
            Malformed::Fragment => &mut counters.fragments,
            Malformed::Checksum => &mut counters.bad_checksum,
        } += 1;
    }

    /// Gives a conversation its turn: `change`, then all that is due; carries out what follows for the service.
    pub(crate) fn with(&mut self, id: ConversationId, change: impl FnOnce(&mut Conversation, &mut Turn<'_>)) {
        if let Some(conversation) = self.table.get_mut(id) {
            let was_open = conversation.is_open();
            let before = conversation.share(&self.ctx.queue);
            let mut turn = self.ctx.turn(before);
            // This comes first: otherwise a deposed OVM's segment would still count as the OVM's (rule 1).
            conversation.follow_epoch(&mut turn);
            conversation.note_passage(turn.plane);
            change(conversation, &mut turn);
            if conversation.work(&mut turn) {
                let next = conversation.next_deadline(&turn);
                let may_be_passed = conversation.review_passing(&mut turn);
                let turn = turn.end();
                let after = conversation.share(&self.ctx.queue);
                self.ctx.follow(id, turn, &after);
                if may_be_passed {
                    self.passable.push_back(id);
                }
                Self::schedule(&mut self.timers, conversation, next);
                let closed = was_open && !conversation.is_open();
                self.table.review(id, closed);
            } else {
                let turn = turn.end();
                let after = conversation.share(&self.ctx.queue);
                self.ctx.follow(id, turn, &after);
                self.abandon(id);
            }
        }
        self.settle();
    }

    fn schedule(
        timers: &mut BTreeSet<(Instant, ConversationId)>,
        conversation: &mut Conversation,
        next: Instant,
    ) {
        // An earlier deadline stays: a turn that comes too early costs little.
        if conversation.deadline.is_none_or(|deadline| next < deadline) {
            if let Some(deadline) = conversation.deadline {
                timers.remove(&(deadline, conversation.id));
            }
            conversation.deadline = Some(next);
            timers.insert((next, conversation.id));
        }
    }

    /// Removes a conversation that is over, or whose addresses or place another conversation needs.
    pub(crate) fn abandon(&mut self, id: ConversationId) {
        self.end(id, |_, _| {});
    }

    /// Ends a conversation after `change`, its last turn.
    pub(crate) fn end(&mut self, id: ConversationId, change: impl FnOnce(&mut Conversation, &mut Turn<'_>)) {
        if let Some(mut conversation) = self.table.remove(id) {
            let before = conversation.share(&self.ctx.queue);
            let mut turn = self.ctx.turn(before);
            change(&mut conversation, &mut turn);
            conversation.end(&mut turn);
            conversation.stop_passing(&mut turn);
            let turn = turn.end();
            self.ctx.follow(id, turn, &Share::default());
            if conversation.is_passable_queued {
                self.forget_passable(id);
            }
            if let Some(deadline) = conversation.deadline {
                self.timers.remove(&(deadline, id));
            }
        }
    }
}

fn is_unicast(address: SocketAddr) -> bool {
    let ip = address.ip();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    !(ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() || broadcast || address.port() == 0)
}
