//! What servers' segments do to a conversation.
//!
//! The OVM's are recorded and passed on; everybody else's only move the daemon's picture of that
//! server: what it acknowledged, what it answered.

use crate::config::LagPolicy;
use crate::conversation::handshake::mtu_mss;
use crate::conversation::state::Held;
use crate::conversation::turn::Turn;
use crate::conversation::{Conversation, LEAST_MSS, text_before};
use crate::event::{Evidence, ServerId, StaleReason, Uncovered};
use crate::follower::leg::{Leg, Phase};
use crate::follower::queue::Follower;
use crate::input::Passage;
use crate::key::Slot;
use crate::rules::rule;
use crate::tcp::seq::{position_of, seq_of};
use crate::wire::{Flags, Options, Segment};

/// Kernels take a segment whole that begins in their window; the FIN takes one place more.
const BEYOND_WINDOW: u64 = (64 << 10) + 1;

impl Conversation {
    /// A segment that the server in `slot` sent.
    pub(crate) fn handle_server(
        &mut self,
        slot: Slot,
        server: ServerId,
        segment: &Segment<'_>,
        turn: &mut Turn<'_>,
    ) {
        let Some(mut leg) = self.legs.take(slot, server) else { return };
        if let Some((tsval, _)) = segment.options.timestamps.filter(|_| !segment.flags.has(Flags::RST)) {
            leg.note_tsval(tsval);
        }
        let (is_through, spoke) = (leg.through, turn.then.spoke);
        let kept = match leg.phase {
            Phase::SynSent => self.handle_syn_ack(&mut leg, slot, segment, turn),
            Phase::Open if leg.through => {
                self.handle_ovm(&mut leg, segment, turn);
                self.check_passed_to_client(leg.numbers.iss, segment, turn);
                Ok(())
            }
            Phase::Open => {
                self.handle_suppressed(&mut leg, slot, segment, turn);
                Ok(())
            }
        };
        rule!(
            turn.counters,
            broken_rule_4,
            is_through || spoke == turn.then.spoke,
            "a suppressed segment made the engine speak to the client"
        );
        match kept {
            Ok(()) => self.legs.put(slot, leg),
            Err(reason) => self.drop_leg(slot, &leg, reason, turn),
        }
    }

    // ---- handshake ------------------------------------------------------------------------------

    /// The answer to the SYN that the daemon sent in the client's name (RFC 9293 §3.10.7.3).
    fn handle_syn_ack(
        &mut self,
        leg: &mut Leg,
        slot: Slot,
        segment: &Segment<'_>,
        turn: &mut Turn<'_>,
    ) -> Result<(), Uncovered> {
        let acknowledges = segment.flags.has(Flags::ACK) && segment.ack == self.client.iss.wrapping_add(1);
        if segment.flags.has(Flags::RST) {
            if acknowledges && turn.queue.ovm() == Some(slot) {
                // A new OVM refuses what the client has: its service may have died in turn.
                self.note_gone(slot, leg, turn);
                return Ok(());
            }
            return if acknowledges { Err(Uncovered::RvmReset) } else { Ok(()) };
        }
        if !segment.flags.has(Flags::SYN) || !acknowledges {
            if segment.flags.has(Flags::ACK) && !segment.flags.has(Flags::SYN) {
                // An old connection of the same client on this server: reset it, then try again.
                self.refuse(slot, leg, segment, turn);
            }
            return Ok(());
        }
        let options = &segment.options;
        let mss = options.mss.unwrap_or(if self.key.psc.is_ipv4() { 536 } else { 1220 });
        // The client relies on what the OVM agreed to; without resizing and reformatting segments
        // such a server could never take over.
        if options.timestamps.is_some() != self.client.timestamps
            || (options.window_shift.is_none() && self.client.shift.is_some())
            || mss < self.told.mss
        {
            return Err(Uncovered::OptionsDiffer);
        }
        leg.phase = Phase::Open;
        leg.numbers.iss = segment.seq;
        leg.numbers.shift = options.window_shift.filter(|_| self.client.shift.is_some()).unwrap_or(0);
        leg.numbers.mss = mss.max(LEAST_MSS).min(mtu_mss(slot, &self.key, turn.queue));
        // For a server that was promoted before it had answered: its time begins here.
        leg.numbers.ts_delta = self.told.tsval.wrapping_sub(leg.numbers.tsval);
        leg.numbers.ts_floor = leg.numbers.tsval;
        leg.rcv_nxt = 1;
        leg.edge = 1 + u64::from(segment.window);
        leg.sender.disarm();
        leg.sender.acknowledged(1, 0, turn.now);
        leg.waits.owes_since = None;
        leg.told = (1, 0);
        leg.ack_due = true;
        Ok(())
    }

    // ---- the OVM --------------------------------------------------------------------------------

    fn handle_ovm(&mut self, leg: &mut Leg, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        let is_ovm = turn.ovm().is_some_and(|(_, ovm)| ovm == leg.server);
        rule!(turn.counters, broken_rule_1, is_ovm, "another server's segment is taken for the OVM's");
        let Some(start) = position_of(leg.numbers.iss, segment.seq, self.down.end()) else { return };
        if segment.flags.has(Flags::RST) {
            return self.handle_ovm_reset(leg, start, segment, turn);
        }
        if leg.gone.is_some() {
            // Behind its RST, which may be held, there is nothing to hear.
            return;
        }
        let ack = position_of(self.client.iss, segment.ack, leg.rcv_nxt);
        if let Some(ack) = ack.filter(|ack| segment.flags.has(Flags::ACK) && *ack > self.up_end()) {
            if ack > leg.edge.max(self.told.edge) + BEYOND_WINDOW {
                // Nobody was ever told to send so much (RFC 9293 §3.10.7.4): no kernel says that.
                turn.counters.bad_ack += 1;
                return;
            }
            // By whatever way they came there, it has bytes that no RVM will get.
            turn.counters.acknowledged_unrecorded += 1;
            self.go_on_alone(ack, turn);
        }
        turn.counters.ovm_segments += 1;
        if segment.flags.has(Flags::SYN) {
            if start != 0 {
                // It began anew, and will refuse the client's next segment.
                turn.counters.unacceptable += 1;
                return;
            }
            // A retransmitted SYN-ACK: the client's third ACK was lost on the way to the OVM.
            self.forward_to_client(leg, start, segment, segment.flags, segment.payload, turn);
            return;
        }
        if segment.flags.has(Flags::ACK) {
            self.note_ovm_acknowledgment(leg, segment, turn);
        }
        // What the client has no window for it does not take; a window probe may carry one byte more. What the plane has
        // passed may be within a window that the client took back since.
        let stop = if turn.passed() { u64::MAX } else { (self.client.edge + 1).max(self.down.highest()) };
        if start > stop {
            turn.counters.unacceptable += 1;
            return;
        }
        let text = text_before(leg.said.fin.into_iter().chain([stop]).min(), start, segment.payload);
        let before = self.down.end();
        let recorded = self.record_answer(start, text, turn);
        leg.said.asked &= self.down.end() == before;
        let Some(payload) = recorded else { return };
        let mut flags = segment.flags;
        let position = start + segment.payload.len() as u64;
        if position > stop {
            flags = flags.without(Flags::FIN);
        }
        if flags.has(Flags::FIN) {
            leg.said.fin = Some(position);
            if self.must_hold(position, false, leg.rcv_nxt, turn) {
                flags = flags.without(Flags::FIN);
            } else {
                self.pass_fin(position);
            }
        }
        self.forward_to_client(leg, start, segment, flags, payload.as_deref().unwrap_or(text), turn);
    }

    fn note_ovm_acknowledgment(&mut self, leg: &mut Leg, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        let Some(ack) = position_of(self.client.iss, segment.ack, leg.rcv_nxt) else { return };
        if ack < leg.rcv_nxt {
            return;
        }
        if ack > leg.rcv_nxt {
            Self::note_progress(leg, ack, turn);
        }
        leg.edge = ack + (u64::from(segment.window) << leg.numbers.shift);
    }

    /// A server acknowledged the client's bytes up to `ack`.
    fn note_progress(leg: &mut Leg, ack: u64, turn: &mut Turn<'_>) {
        if turn.ovm().is_some_and(|(_, ovm)| ovm == leg.server) {
            turn.then.taken = true;
        }
        leg.rcv_nxt = ack;
        leg.said.asked = true;
        leg.waits.owes_since = None;
    }

    /// Records the OVM's payload. `None`: it must not be passed on. `Some(Some(bytes))`: these must be
    /// passed on in its place, since the client may have the first copy of some.
    fn record_answer(&mut self, start: u64, payload: &[u8], turn: &mut Turn<'_>) -> Option<Option<Vec<u8>>> {
        if payload.is_empty() {
            return Some(None);
        }
        let before = self.down.end();
        let beyond = start > before;
        let inserted = self.down.insert(start, payload, 0, turn.room(beyond));
        if inserted.refused {
            turn.note_refused(beyond);
            self.blame_laggards(turn);
            return None;
        }
        self.note_answer(before, turn);
        if inserted.conflict.is_none() {
            return Some(None);
        }
        if turn.passed() {
            // The client has both copies.
            self.uncover(turn);
        }
        turn.counters.ovm_contradictions += 1;
        let mut first_copy = payload.to_vec();
        self.down.restore(start, &mut first_copy);
        Some(Some(first_copy))
    }

    /// What the client is sent grew from `before`: the record follows.
    pub(crate) fn note_answer(&mut self, before: u64, turn: &mut Turn<'_>) {
        let end = self.down.end();
        if end == before {
            return;
        }
        turn.note_answer();
        self.suspicion.note_answer();
        if turn.queue.rvms().next().is_some() {
            turn.record.answered(self.id, end);
            // An RVM that was faster has produced this already.
            turn.note_all_produced();
        }
    }

    fn forward_to_client(
        &mut self,
        leg: &Leg,
        start: u64,
        segment: &Segment<'_>,
        flags: Flags,
        payload: &[u8],
        turn: &mut Turn<'_>,
    ) {
        let window_shift = if segment.flags.has(Flags::SYN) { 0 } else { leg.numbers.shift };
        self.told.acked = self.told.acked.max(leg.rcv_nxt);
        self.offer_window(leg.rcv_nxt + (u64::from(segment.window) << window_shift), turn);
        self.shown.0 = match turn.plane.passage() {
            Passage::Passed { edge, .. } => position_of(self.client.iss, edge, self.told.edge).unwrap_or(0),
            _ => self.told.edge,
        };
        let timestamps = segment
            .options
            .timestamps
            .map(|(tsval, tsecr)| (self.advance_tsval(tsval.wrapping_add(leg.numbers.ts_delta)), tsecr));
        if turn.passed() {
            return turn.note_sent_to_client(payload);
        }
        let translated = Segment {
            seq: seq_of(self.told.iss, start),
            flags,
            urgent: segment.urgent,
            ecn: segment.ecn,
            options: Options { timestamps, ..segment.options },
            payload,
            ..self.segment_to_client()
        };
        self.send_to_client(&translated, turn);
    }

    /// Moves the right edge of the client's window, never back. Where clients wait for RVMs, no
    /// further than there is room to keep what an RVM still lacks.
    pub(crate) fn offer_window(&mut self, edge: u64, turn: &mut Turn<'_>) {
        let limit = if turn.passed() { self.bounds.0 } else { self.room_up(turn) };
        if limit < edge {
            turn.counters.lag_bytes += 1;
        }
        self.told.edge = self.told.edge.max(edge.min(limit));
    }

    /// Up to where there is room to keep what the client sends.
    pub(crate) fn room_up(&self, turn: &Turn<'_>) -> u64 {
        let limit = u64::from(turn.config.limits.conversation_bytes);
        self.up.base()
            + match turn.config.on_lag {
                // No more than can be kept: what finds no room would be sent in vain.
                LagPolicy::Evict => limit,
                LagPolicy::Wait => limit / 2,
            }
    }

    // ---- close ----------------------------------------------------------------------------------

    /// Whether the OVM's FIN or RST at `position` waits for a covering RVM; begins the wait.
    pub(crate) fn must_hold(&mut self, position: u64, rst: bool, had: u64, turn: &mut Turn<'_>) -> bool {
        // Behind a FIN that was passed a RST is still one to be doubted.
        let open = self.is_open() && (rst || self.down_fin.is_none());
        let before = self.state.held();
        // When it closed: a kernel goes on to acknowledge what no service reads any more.
        let had = before.map_or(had.min(self.up_end()), |held| held.had);
        let opinion = self.opinion(position, rst, had, turn);
        if !open || !matches!(opinion, Opinion::Unknown | Opinion::Disputed) {
            self.state.let_go();
            return false;
        }
        turn.counters.closes_held += u64::from(before.is_none());
        // A RST after a FIN, or the other way round: the last word counts.
        let hold = turn.config.timing.close_hold;
        let (review, until) =
            before.map_or((Some(turn.now + hold * 3 / 4), turn.now + hold), |held| (held.review, held.until));
        let is_disputed = opinion == Opinion::Disputed || before.is_some_and(|held| held.is_disputed);
        self.state.hold(Held { position, rst, had, review, until, is_disputed });
        true
    }

    /// A replica may delay its ACK for longer than a close is held (RFC 9293 §3.8.6.3), or have lost a segment:
    /// what it has not acknowledged of what the OVM `had` it is sent again, which a TCP answers at once.
    fn ask_for_opinions(&mut self, had: u64, turn: &mut Turn<'_>) {
        for (slot, server) in turn.roster() {
            if let Some(mut leg) = self.legs.take(slot, server) {
                if leg.is_open() && !leg.through && leg.rcv_nxt < had {
                    self.retransmit_first(&mut leg, turn);
                }
                self.legs.put(slot, leg);
            }
        }
    }

    /// What the OVM has, as far as it was recorded.
    pub(crate) fn ovm_had(&self, turn: &Turn<'_>) -> u64 {
        let leg = turn.ovm().and_then(|(slot, server)| self.legs.get(slot, server));
        leg.map_or(self.up_end(), |leg| leg.rcv_nxt.min(self.up_end()))
    }

    /// What the covering RVMs say about a close at `position`.
    fn opinion(&self, position: u64, rst: bool, had: u64, turn: &Turn<'_>) -> Opinion {
        let ovm = turn.queue.ovm();
        let closes = self.up_fin.is_some_and(|(fin, _)| had > fin);
        let mut opinion = Opinion::None;
        for (slot, server) in turn.roster().filter(|(slot, _)| Some(*slot) != ovm) {
            let Some(leg) = self.legs.get(slot, server).filter(|leg| leg.covers()) else { continue };
            let doubtful = |server: &Follower| turn.is_stale(server) || server.recovering.is_some();
            if turn.queue.get(slot).is_none_or(doubtful) {
                // It may close, or go on, for reasons of its own.
                continue;
            }
            let answered = leg.said.answers.end();
            // One that has closed still repeats what the client lacks, and hears it out; behind a RST nobody does.
            let shares = match rst {
                true => leg.gone.is_some() && leg.produced() >= position,
                false => leg.said.fin == Some(position),
            };
            if shares {
                return Opinion::Shared;
            }
            // One that is merely behind disputes nothing: it has what the OVM had, has answered all
            // the OVM answered, and stays. That of a client that has closed itself is no news.
            let quiet =
                turn.now.since(turn.measured_from(leg.said.answered_at)) >= turn.config.timing.close_hold / 2;
            let stays = leg.said.fin.is_none() && leg.gone.is_none();
            let disputes = answered > position
                || (stays && !closes && answered == position && quiet && leg.rcv_nxt >= had && leg.is_open());
            opinion =
                if disputes || opinion == Opinion::Disputed { Opinion::Disputed } else { Opinion::Unknown };
        }
        opinion
    }

    fn pass_fin(&mut self, position: u64) {
        self.down_fin = Some(position);
    }

    fn handle_ovm_reset(&mut self, leg: &mut Leg, start: u64, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        // Behind a FIN that is held, the client knows of neither.
        let start =
            if leg.said.fin.is_some_and(|fin| start == fin + 1) { self.down_end().min(start) } else { start };
        // At its SND.NXT, or, where there is no socket any more, at what the client acknowledged
        // (RFC 9293 §3.10.7.1). The client ignores any other (RFC 5961 §3.2), and so do we.
        if start != self.down_end() && start != self.down.end() && start != self.client.acked {
            turn.counters.unacceptable += 1;
            if (self.client.acked..self.client.edge.max(self.down_end())).contains(&start)
                && let Some(guest) = turn.queue.ovm().and_then(|slot| turn.guest(slot, self.key.psc))
            {
                // It is asked as the client would: if the connection is gone, the answer is exact.
                let challenge = self.segment_to_leg(leg, guest);
                turn.send_to_server(leg.server, challenge.emit());
            }
            return;
        }
        if let Some(slot) = turn.queue.ovm() {
            self.note_gone(slot, leg, turn);
        }
        if self.must_hold(start, true, leg.rcv_nxt, turn) {
            return;
        }
        let flags = segment.flags;
        self.pass_reset(start, flags, leg.rcv_nxt, turn);
    }

    /// Passes a RST of the OVM on, exactly where it was; servers that stay behind are reset too, when they
    /// have what the OVM `had`. One that has more may have acted on what the OVM refused.
    fn pass_reset(&mut self, position: u64, flags: Flags, had: u64, turn: &mut Turn<'_>) {
        let had = had.min(self.up_end());
        let ovm = turn.queue.ovm();
        self.for_each_leg(turn, |slot, leg, turn| {
            let closed = leg.said.fin.is_some() || leg.gone.is_some();
            if Some(slot) != ovm && leg.covers() && !closed && leg.sender.highest > had {
                turn.mark_stale(slot, StaleReason::TookMore);
            }
        });
        let reset =
            Segment { seq: seq_of(self.told.iss, position), flags, window: 0, ..self.segment_to_client() };
        let link = self.link;
        turn.send_to_client(link, reset.emit());
        self.abort(had, turn);
    }

    /// Decides about a held FIN or RST: an RVM shares it, or its time is over. If RVMs dispute several at once and the
    /// OVM refuses new connections, [`crate::Evidence::UnsharedClose`] is the answer instead (rule 11).
    pub(crate) fn review_hold(&mut self, turn: &mut Turn<'_>) {
        let Some(mut held) = self.state.held() else { return };
        let opinion = self.opinion(held.position, held.rst, held.had, turn);
        if matches!(opinion, Opinion::Unknown | Opinion::Disputed) {
            held.is_disputed |= opinion == Opinion::Disputed;
            let is_due = held.review.take_if(|review| turn.now >= *review).is_some();
            self.state.hold(held);
            if is_due {
                self.ask_for_opinions(held.had, turn);
            }
            if turn.now < held.ends(turn) {
                return;
            }
            // A handshake that was refused meanwhile is a conversation too.
            let unshared = turn.closes.unshared_beside(self.id) + usize::from(held.is_disputed);
            let several = unshared > 1 && !self.suspicion.close_disputed;
            let hold = turn.config.timing.close_hold;
            // What was heard before a dispute says nothing about it.
            let is_news = held.is_disputed && !turn.closes.is_disputed(self.id);
            let on_purpose = turn.closes.are_on_purpose(hold, turn.now).filter(|_| !is_news);
            if several && on_purpose.is_none() {
                // The OVM's answer to the daemon's SYN is still to come.
                self.state.hold(Held { until: turn.now + hold / 4, ..held });
                return;
            }
            turn.counters.closes_unshared += 1;
            turn.counters.acquittals += u64::from(several && on_purpose == Some(true));
            if several && on_purpose == Some(false) {
                // If nothing can be promoted, it passes next time.
                self.suspicion.close_disputed = true;
                turn.accuse_ovm(Evidence::UnsharedClose);
                self.state.hold(Held { until: turn.now + hold, ..held });
                return;
            }
        }
        self.state.let_go();
        if held.position < self.down.end() {
            // A new OVM that left behind what the client has: nothing that it says can be passed on.
            return self.reset(turn);
        }
        if held.rst {
            self.pass_reset(held.position, Flags::RST.with(Flags::ACK), self.ovm_had(turn), turn);
        } else {
            self.pass_fin(held.position);
            let fin = Segment {
                seq: seq_of(self.told.iss, held.position),
                flags: Flags::FIN.with(Flags::ACK),
                ..self.segment_to_client()
            };
            self.send_to_client(&fin, turn);
        }
    }

    // ---- everybody else -------------------------------------------------------------------------

    /// An RVM, or the new OVM in recuperation: nothing of this segment reaches a client as it is.
    fn handle_suppressed(&mut self, leg: &mut Leg, slot: Slot, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        turn.counters.rvm_segments += 1;
        let Some(start) = position_of(leg.numbers.iss, segment.seq, leg.said.answers.end()) else { return };
        if segment.flags.has(Flags::RST) {
            self.note_gone(slot, leg, turn);
            return;
        }
        if leg.gone.is_some() {
            // Behind its RST there is nothing to hear; or it has not heard the daemon's.
            if segment.flags.has(Flags::ACK) {
                self.refuse(slot, leg, segment, turn);
            }
            return;
        }
        if segment.flags.has(Flags::SYN) {
            leg.ack_due = true;
            return;
        }
        if !segment.flags.has(Flags::ACK) {
            return;
        }
        leg.has_spoken = true;
        self.note_suppressed_acknowledgment(leg, segment, turn);
        let before = leg.said.answers.end();
        let was_stopped = leg.is_stopped(self.client.mss);
        // It was never told of a larger window: what it sends beyond is no answer, only memory.
        let edge = self.client.edge.max(leg.told.1).max(self.down.highest());
        let text = text_before(leg.said.fin.into_iter().chain([edge]).min(), start, segment.payload);
        if !text.is_empty() {
            // What the client was sent already need not be kept until it is compared.
            let is_repetition = leg.covers()
                && start == leg.said.compared
                && start == before
                && self.down.says(start, text)
                && leg.said.answers.skip(text.len() as u64);
            if is_repetition {
                leg.said.compared = leg.said.answers.end();
            } else if leg.said.answers.insert(start, text, 0, turn.room(false)).refused {
                turn.note_refused(false);
            }
            let grown = leg.said.answers.end() - before;
            if grown > 0 {
                if turn.queue.ovm() == Some(slot) {
                    turn.note_answer();
                }
                self.note_pause(leg, before, was_stopped, turn);
                leg.said.asked = false;
                leg.said.answered_at = turn.now;
                turn.note_produced(slot);
            }
            // A gap or a repetition: it waits for an ACK (RFC 9293 §3.10.7.4).
            leg.ack_due |= grown == 0;
        } else if start < leg.said.answers.end() || !segment.payload.is_empty() {
            // A keepalive or a window probe.
            leg.ack_due = true;
        }
        if segment.flags.has(Flags::FIN) {
            let position = start + segment.payload.len() as u64;
            leg.ack_due |= leg.said.fin.is_some();
            leg.said.fin.get_or_insert(position);
        }
    }

    fn note_suppressed_acknowledgment(&mut self, leg: &mut Leg, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        let Some(ack) = position_of(self.client.iss, segment.ack, leg.rcv_nxt) else { return };
        if ack < leg.rcv_nxt || ack > leg.sender.highest.max(leg.direct) {
            return;
        }
        let edge = ack + (u64::from(segment.window) << leg.numbers.shift);
        if ack > leg.rcv_nxt {
            let bytes = ack - leg.rcv_nxt;
            Self::note_progress(leg, ack, turn);
            if leg.sender.acknowledged(ack, bytes, turn.now) {
                self.retransmit_first(leg, turn);
            }
        } else if edge == leg.edge
            && segment.payload.is_empty()
            && !segment.flags.has(Flags::FIN)
            && leg.sender.duplicate(ack)
        {
            self.retransmit_first(leg, turn);
        }
        leg.edge = edge;
    }
}

/// What covering RVMs say about a close of the OVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opinion {
    /// There is no covering RVM.
    None,
    /// One did the same.
    Shared,
    /// One has had the chance, and goes on.
    Disputed,
    /// They are behind.
    Unknown,
}
