//! Recuperation: from a promotion until a conversation's counts on the new OVM reach those of the old (paper §IV.B).
//! The daemon plays the server towards the client, from what it recorded and what the new OVM answers, so that the
//! client sees one stream (rule 2).

use crate::conversation::Conversation;
use crate::conversation::state::Recuperating;
use crate::conversation::turn::Turn;
use crate::follower::leg::{Leg, Phase};
use crate::tcp::sender::Sender;
use crate::tcp::seq::seq_of;
use crate::tcp::stream::Stream;
use crate::wire::{Flags, Segment};

impl Conversation {
    /// Prepares the legs for the service's present epoch. A conversation that the new OVM does not cover is reset (rule
    /// 7).
    pub(crate) fn enter_epoch(&mut self, turn: &mut Turn<'_>) {
        self.epoch = turn.epoch;
        self.suspicion = Default::default();
        // A close that the deposed OVM began is for the new OVM to decide.
        self.state.let_go();
        self.play_client(turn);
        if !self.is_open() {
            return;
        }
        let Some((slot, server)) = turn.ovm() else { return };
        let tsval = self.told.tsval;
        match self.legs.get_mut(slot, server) {
            Some(leg) if leg.gone.is_none() && leg.covers() => {
                leg.numbers.ts_delta = tsval.wrapping_sub(leg.numbers.tsval);
                leg.numbers.ts_floor = leg.numbers.tsval;
                self.begin_recuperation();
            }
            _ => self.reset(turn),
        }
    }

    /// From now on the daemon plays the client towards every server, including the deposed OVM (which may become the
    /// OVM again): that server has produced everything that the client was sent.
    pub(crate) fn play_client(&mut self, turn: &mut Turn<'_>) {
        let (down_end, down_fin, acked) = (self.down.end(), self.down_fin, self.client.acked);
        let direct = self.up.highest().max(self.up_end());
        self.for_each_leg(turn, |_, leg, _| {
            if leg.through {
                leg.through = false;
                leg.sender = Sender::new(leg.rcv_nxt);
                leg.direct = direct;
                leg.said.answers = Stream::new(down_end);
                leg.said.compared = down_end;
                // The deposed OVM may have sent a FIN that the client was not sent yet.
                leg.said.fin = leg.said.fin.or(down_fin);
                leg.told = (acked, 0);
                leg.ack_due = true;
            }
        });
    }

    /// From now on the daemon plays the server towards the client.
    pub(crate) fn begin_recuperation(&mut self) {
        self.state.recuperate(Box::new(Recuperating::from(self.client.acked, self.down_end())));
    }

    /// One step of recuperation: adopts what the new OVM answered, sends the client what it lacks, and ends
    /// recuperation once the counts are reached.
    pub(crate) fn recuperate(&mut self, turn: &mut Turn<'_>) {
        if !self.is_recuperating() {
            return;
        }
        let Some((slot, server)) = turn.ovm() else { return };
        let Some(mut leg) = self.legs.take(slot, server) else { return self.reset(turn) };
        let Some(mut recuperating) = self.state.take_recuperating() else { return };
        self.adopt_answers(&mut leg, turn);
        let early = leg.said.fin.filter(|fin| *fin < self.down.end());
        if !leg.covers() || leg.gone.is_some() || early.is_some() {
            // A close of the new OVM is held like any other: its service may have died, too.
            let position = leg.covers().then(|| early.unwrap_or(leg.said.answers.end()));
            self.state.recuperate(recuperating);
            self.legs.put(slot, leg);
            if !position.is_some_and(|position| self.must_hold(position, true, self.ovm_had(turn), turn)) {
                self.reset(turn);
            }
            return;
        }
        if leg.phase == Phase::Open {
            recuperating.ack_due |= leg.rcv_nxt > self.told.acked;
            self.told.acked = self.told.acked.max(leg.rcv_nxt);
            self.offer_window(leg.edge, turn);
            if self.client.timestamps {
                self.advance_tsval(leg.numbers.tsval.wrapping_add(leg.numbers.ts_delta));
            }
        }
        self.serve(&mut recuperating, turn);
        if self.has_recuperated(&leg, turn) {
            leg.through = true;
            self.shown = (self.told.edge, leg.told.1);
            leg.sender.disarm();
            turn.then.recuperated = true;
        } else {
            self.state.recuperate(recuperating);
        }
        self.legs.put(slot, leg);
    }

    /// Moves what the new OVM answered beyond the client's stream into the client's stream.
    fn adopt_answers(&mut self, leg: &mut Leg, turn: &mut Turn<'_>) {
        loop {
            let before = self.down.end();
            if !leg.covers() || leg.said.compared < before || leg.said.answers.end() <= before {
                break;
            }
            let bytes = leg.said.answers.copy(before..leg.said.answers.end());
            let limit = turn.config.limits.conversation_bytes as usize;
            if self.down.insert(before, &bytes, 0, limit).refused {
                turn.counters.conversation_bytes += 1;
                break;
            }
            self.note_answer(before, turn);
            if let Some(slot) = turn.queue.slot_of(leg.server) {
                // Bytes beyond a gap that the old OVM sent are compared as the answers reach them.
                self.compare(slot, leg, turn);
            }
        }
        if self.down_fin.is_none()
            && leg.covers()
            && let Some(fin) = leg.said.fin.filter(|fin| *fin == self.down.highest())
            && !self.must_hold(fin, false, leg.rcv_nxt, turn)
        {
            self.down_fin = Some(fin);
        }
    }

    /// Sends the client the bytes that it lacks, or an ACK if one is due.
    fn serve(&mut self, recuperating: &mut Recuperating, turn: &mut Turn<'_>) {
        let una = self.client.acked;
        if recuperating.sender.expired(una, turn.now) {
            turn.counters.retransmissions += 1;
            if una == recuperating.sender.highest || self.client.edge <= una {
                // Nothing is in flight, or the client's window is closed: an old sequence number makes the client send
                // its present window.
                let probe =
                    Segment { seq: seq_of(self.told.iss, una).wrapping_sub(1), ..self.segment_to_client() };
                self.send_to_client(&probe, turn);
                recuperating.sender.arm(turn.now);
            }
        }
        if core::mem::take(&mut recuperating.resend) {
            let to = self.down.end().min(una + self.payload_to_client());
            if una < to {
                turn.counters.retransmissions += 1;
                self.send_answer(una, to, turn);
            }
        }
        let mut sent = false;
        loop {
            let from = recuperating.sender.nxt;
            let bound = turn.config.limits.inflight_bytes;
            let limit = self.client.edge.min(recuperating.sender.limit(una, bound)).min(self.down.end());
            let to = limit.min(from + self.payload_to_client());
            if to <= from {
                break;
            }
            self.send_answer(from, to, turn);
            recuperating.sender.sent(to, turn.now);
            sent = true;
        }
        if let Some(fin) = self.down_fin.filter(|fin| recuperating.sender.nxt == *fin) {
            let segment = Segment {
                seq: seq_of(self.told.iss, fin),
                flags: Flags::FIN.with(Flags::ACK),
                ..self.segment_to_client()
            };
            self.send_to_client(&segment, turn);
            recuperating.sender.sent(fin + 1, turn.now);
            sent = true;
        }
        if recuperating.sender.nxt < self.down_end() && !recuperating.sender.is_armed() {
            recuperating.sender.arm(turn.now);
        }
        if recuperating.ack_due && !sent {
            let mut ack = self.segment_to_client();
            ack.options.sack = self.sack_blocks(&self.up, self.client.iss);
            self.send_to_client(&ack, turn);
        }
        recuperating.ack_due = false;
    }

    /// Payload of a full segment to the client, in bytes (RFC 6691: TCP options count against the MSS).
    fn payload_to_client(&self) -> u64 {
        let options = if self.client.timestamps { 12 } else { 0 };
        u64::from(self.client.mss.saturating_sub(options).max(1))
    }

    fn send_answer(&mut self, from: u64, to: u64, turn: &mut Turn<'_>) {
        let payload = self.down.copy(from..to);
        let segment = Segment {
            seq: seq_of(self.told.iss, from),
            flags: Flags::ACK.with(Flags::PSH),
            payload: &payload,
            ..self.segment_to_client()
        };
        self.send_to_client(&segment, turn);
    }

    /// Whether the new OVM has acknowledged every byte whose ACK the client got, has produced every byte that the
    /// client was sent, and has caught up with the record in all conversations.
    fn has_recuperated(&self, leg: &Leg, turn: &Turn<'_>) -> bool {
        leg.phase == Phase::Open
            && leg.rcv_nxt >= self.told.acked
            && leg.sender.nxt >= self.up_end()
            // The OVM must still hold every byte that the client lacks: it frees bytes that the daemon acknowledged to
            // it.
            && self.client.acked >= leg.told.0
            && leg.said.compared >= self.down.highest()
            // The daemon has selectively acknowledged (SACK) bytes beyond a gap that the client lacks: the OVM would
            // not retransmit them.
            && leg.said.answers.islands().next().is_none()
            && (self.down_fin.is_none() || leg.said.fin == self.down_fin)
            && !turn.is_catching_up()
    }
}
