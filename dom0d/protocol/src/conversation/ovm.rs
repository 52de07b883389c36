//! The OVM's segments: the daemon records them and passes them on to the client (rule 2). Those of all other servers
//! are in `replica`.

use crate::config::LagPolicy;
use crate::conversation::turn::Turn;
use crate::conversation::{Conversation, text_before};
use crate::event::ServerId;
use crate::follower::leg::{Leg, Phase};
use crate::input::Passage;
use crate::key::Slot;
use crate::rules::rule;
use crate::tcp::seq::{position_of, seq_of};
use crate::wire::{Flags, Options, Segment};

/// Kernels accept a whole segment if it begins in their window; a FIN occupies one more sequence number.
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

    fn handle_ovm(&mut self, leg: &mut Leg, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        let is_ovm = turn.ovm().is_some_and(|(_, ovm)| ovm == leg.server);
        rule!(turn.counters, broken_rule_1, is_ovm, "another server's segment was taken for the OVM's");
        let Some(start) = position_of(leg.numbers.iss, segment.seq, self.down.end()) else { return };
        if segment.flags.has(Flags::RST) {
            return self.handle_ovm_reset(leg, start, segment, turn);
        }
        if leg.gone.is_some() {
            // The OVM has sent a RST, which may be held: whatever follows is ignored.
            return;
        }
        let ack = position_of(self.client.iss, segment.ack, leg.rcv_nxt);
        if let Some(ack) = ack.filter(|ack| segment.flags.has(Flags::ACK) && *ack > self.up_end()) {
            if ack > leg.edge.max(self.told.edge) + BEYOND_WINDOW {
                // No client was ever offered such a window (RFC 9293 §3.10.7.4): no kernel acknowledges that.
                turn.counters.bad_ack += 1;
                return;
            }
            // However they reached it, the OVM has bytes that no RVM will get (rule 10).
            turn.counters.acknowledged_unrecorded += 1;
            self.go_on_alone(ack, turn);
        }
        turn.counters.ovm_segments += 1;
        if segment.flags.has(Flags::SYN) {
            if start != 0 {
                // The OVM began another connection, and will refuse the client's next segment.
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
        // The client drops what exceeds its window; a window probe may exceed it by one byte. A passed segment may lie
        // in a window that the client has shrunk since.
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
    pub(super) fn note_progress(leg: &mut Leg, ack: u64, turn: &mut Turn<'_>) {
        if turn.ovm().is_some_and(|(_, ovm)| ovm == leg.server) {
            turn.then.taken = true;
        }
        leg.rcv_nxt = ack;
        leg.said.asked = true;
        leg.waits.owes_since = None;
    }

    /// Records the OVM's payload. `None`: the caller must not pass it on. `Some(Some(bytes))`: the caller must pass
    /// these on instead, because the client may already have another copy of some (rule 2).
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
            // The client was sent both copies.
            self.uncover(turn);
        }
        turn.counters.ovm_contradictions += 1;
        let mut first_copy = payload.to_vec();
        self.down.restore(start, &mut first_copy);
        Some(Some(first_copy))
    }

    /// The answer to the client grew from `before` on: appends that to the record.
    pub(crate) fn note_answer(&mut self, before: u64, turn: &mut Turn<'_>) {
        let end = self.down.end();
        if end == before {
            return;
        }
        turn.note_answer();
        self.suspicion.note_answer();
        if turn.queue.rvms().next().is_some() {
            turn.record.answered(self.id, end);
            // A faster RVM may have produced this already.
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

    /// Moves the right edge of the client's window, never back, and no further than there is room to keep what an RVM
    /// still lacks.
    pub(crate) fn offer_window(&mut self, edge: u64, turn: &mut Turn<'_>) {
        let limit = if turn.passed() { self.bounds.0 } else { self.room_up(turn) };
        if limit < edge {
            turn.counters.lag_bytes += 1;
        }
        self.told.edge = self.told.edge.max(edge.min(limit));
    }

    /// The up position up to which there is room to keep what the client sends (rule 6).
    pub(crate) fn room_up(&self, turn: &Turn<'_>) -> u64 {
        let limit = u64::from(turn.config.limits.conversation_bytes);
        self.up.base()
            + match turn.config.on_lag {
                // No more than the daemon can keep: it would drop the rest.
                LagPolicy::Evict => limit,
                LagPolicy::Wait => limit / 2,
            }
    }
}
