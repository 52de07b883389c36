//! From promotion until a conversation's counts on the new OVM reach those of the old (paper §IV.B):
//! the daemon plays the server towards the client, from what it recorded and what the new OVM answers.

use crate::conversation::Conversation;
use crate::conversation::state::Recuperating;
use crate::conversation::turn::Turn;
use crate::follower::leg::{Leg, Phase};
use crate::tcp::sender::Sender;
use crate::tcp::seq::seq_of;
use crate::tcp::stream::Stream;
use crate::wire::{Flags, Segment};

impl Conversation {
    /// Arranges the legs for the service's present epoch.
    pub(crate) fn enter_epoch(&mut self, turn: &mut Turn<'_>) {
        self.epoch = turn.epoch;
        self.suspicion = Default::default();
        // What the deposed OVM wanted to close is the new OVM's to decide.
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

    /// From now on the daemon plays the client towards every server, also towards one that was the OVM
    /// (and may be it again): everything that the client was sent came from that one.
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
                // It may have closed, and the client not been told yet.
                leg.said.fin = leg.said.fin.or(down_fin);
                leg.told = (acked, 0);
                leg.ack_due = true;
            }
        });
    }

    /// From now on the daemon plays the server.
    pub(crate) fn begin_recuperation(&mut self) {
        self.state.recuperate(Box::new(Recuperating::from(self.client.acked, self.down_end())));
    }

    /// One step: take what the new OVM answered, tell the client, hand back if the counts are reached.
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
            // A close of the new OVM's own is held like any other: its service may have died in turn.
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

    /// What the new OVM answered beyond what the client was sent is now what the client is sent.
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
                // Bytes beyond a gap, sent under the old OVM, are compared as they are reached.
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

    /// Sends the client what it lacks, or an ACK if one is due.
    fn serve(&mut self, recuperating: &mut Recuperating, turn: &mut Turn<'_>) {
        let una = self.client.acked;
        if recuperating.sender.expired(una, turn.now) {
            turn.counters.retransmissions += 1;
            if una == recuperating.sender.highest || self.client.edge <= una {
                // The client's window is closed: ask for it.
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

    /// What a full segment to the client carries (RFC 6691: the MSS counts options).
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

    /// The new OVM has acknowledged whatever the client was acknowledged and has answered whatever the
    /// client was sent; every conversation's earlier causes have reached it.
    fn has_recuperated(&self, leg: &Leg, turn: &Turn<'_>) -> bool {
        leg.phase == Phase::Open
            && leg.rcv_nxt >= self.told.acked
            && leg.sender.nxt >= self.up_end()
            // It keeps what it was not told to be acknowledged; the daemon supplies the rest.
            && self.client.acked >= leg.told.0
            && leg.said.compared >= self.down.highest()
            // It was told that these arrived: nobody but the daemon has them.
            && leg.said.answers.islands().next().is_none()
            && (self.down_fin.is_none() || leg.said.fin == self.down_fin)
            && !turn.is_catching_up()
    }
}
