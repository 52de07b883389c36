//! The segments of a server towards which the daemon plays the client: an RVM, or a new OVM in recuperation. The daemon
//! suppresses them all (rule 4) and notes what that server acknowledged and answered.

use crate::conversation::handshake::mtu_mss;
use crate::conversation::turn::Turn;
use crate::conversation::{Conversation, LEAST_MSS, text_before};
use crate::event::Uncovered;
use crate::follower::leg::{Leg, Phase};
use crate::key::Slot;
use crate::tcp::seq::position_of;
use crate::wire::{Flags, Segment};

impl Conversation {
    /// The server's answer to the SYN that the daemon sent in the client's name (RFC 9293 §3.10.7.3).
    pub(super) fn handle_syn_ack(
        &mut self,
        leg: &mut Leg,
        slot: Slot,
        segment: &Segment<'_>,
        turn: &mut Turn<'_>,
    ) -> Result<(), Uncovered> {
        let acknowledges = segment.flags.has(Flags::ACK) && segment.ack == self.client.iss.wrapping_add(1);
        if segment.flags.has(Flags::RST) {
            if acknowledges && turn.queue.ovm() == Some(slot) {
                // A new OVM refuses a connection that the client has: the new OVM's service may have died, too.
                self.note_gone(slot, leg, turn);
                return Ok(());
            }
            return if acknowledges { Err(Uncovered::RvmReset) } else { Ok(()) };
        }
        if !segment.flags.has(Flags::SYN) || !acknowledges {
            if segment.flags.has(Flags::ACK) && !segment.flags.has(Flags::SYN) {
                // The server still has an old connection with these addresses: reset it, then send the SYN again.
                self.refuse(slot, leg, segment, turn);
            }
            return Ok(());
        }
        let options = &segment.options;
        let mss = options.mss.unwrap_or(if self.key.psc.is_ipv4() { 536 } else { 1220 });
        // The client relies on what the OVM agreed to. A server that agrees to less could take over only if the daemon
        // resized or reformatted segments.
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
        // If the server was promoted before it answered the SYN, its timestamps begin here.
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

    /// A segment of an RVM, or of the new OVM in recuperation: the daemon suppresses it (rule 4).
    pub(super) fn handle_suppressed(
        &mut self,
        leg: &mut Leg,
        slot: Slot,
        segment: &Segment<'_>,
        turn: &mut Turn<'_>,
    ) {
        turn.counters.rvm_segments += 1;
        let Some(start) = position_of(leg.numbers.iss, segment.seq, leg.said.answers.end()) else { return };
        if segment.flags.has(Flags::RST) {
            return self.handle_suppressed_reset(leg, slot, start, turn);
        }
        if leg.gone.is_some() {
            // The server has sent a RST, and whatever follows is ignored; or it has not received the daemon's RST,
            // which is then sent again.
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
        // The server was never told of a larger window: bytes beyond it would only cost memory (rule 6). But the byte of
        // a window probe is kept: a sender may have no timer to repeat it once the window is open.
        let edge = self.client.edge.max(leg.told.1).max(self.down.highest()).max(before + 1);
        let text = text_before(leg.said.fin.into_iter().chain([edge]).min(), start, segment.payload);
        if !text.is_empty() {
            // Bytes that equal what the client was sent need not be kept for a later comparison.
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
            // A segment beyond a gap, a retransmission, or a window probe calls for an ACK (RFC 9293 §3.10.7.4).
            leg.ack_due |= grown == 0 || start >= leg.told.1;
        } else if start < leg.said.answers.end() || !segment.payload.is_empty() {
            // A keepalive or a window probe calls for an ACK.
            leg.ack_due = true;
        }
        if segment.flags.has(Flags::FIN) {
            let position = start + segment.payload.len() as u64;
            leg.ack_due |= leg.said.fin.is_some();
            leg.said.fin.get_or_insert(position);
        }
    }

    /// Only a RST at the exact position counts (RFC 5961 §3): the server's SND.NXT, or, if the server has no such socket any
    /// more, the position that the daemon last acknowledged to it. Any other RST is challenged, and a server that has
    /// closed answers the challenge with an exact one. A new OVM that still catches up answers a client's wrong
    /// acknowledgment with a RST and keeps the connection (RFC 9293 §3.10.7.4, SYN-RECEIVED).
    fn handle_suppressed_reset(&self, leg: &mut Leg, slot: Slot, start: u64, turn: &mut Turn<'_>) {
        if [leg.said.answers.end(), leg.produced(), leg.told.0].contains(&start) {
            return self.note_gone(slot, leg, turn);
        }
        turn.counters.unacceptable += 1;
        if let Some(guest) = turn.guest(slot, self.key.psc).filter(|_| leg.gone.is_none()) {
            turn.send_to_server(leg.server, self.segment_to_leg(leg, guest).emit());
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
