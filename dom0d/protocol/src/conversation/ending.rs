//! How a conversation ends, for the client and at each server, and how long the daemon remembers it.

use core::time::Duration;

use crate::conversation::Conversation;
use crate::conversation::turn::Turn;
use crate::event::{EventKind, StaleReason};
use crate::follower::leg::Leg;
use crate::follower::queue::Queue;
use crate::key::Slot;
use crate::tcp::seq::seq_of;
use crate::time::Instant;
use crate::wire::{Flags, Segment};

/// Keepalive probes to an idle client before it counts as dead, and the time between them.
const IDLE_PROBES: u8 = 5;
const IDLE_PROBE_INTERVAL: core::time::Duration = core::time::Duration::from_secs(15);

/// How long RVMs may take for a closed conversation's last bytes before its addresses are used again. The client
/// retransmits its SYN after a second (RFC 6298 §2.1).
const REUSE: Duration = Duration::from_millis(900);

impl Conversation {
    /// Both FINs are acknowledged, or a side reset the conversation.
    pub(crate) fn close(&mut self, turn: &mut Turn<'_>) {
        self.state.close(turn.now);
    }

    /// Closes the conversation if both sides have closed and acknowledged.
    pub(crate) fn close_if_finished(&mut self, turn: &mut Turn<'_>) {
        let (Some(down_fin), Some((up_fin, _))) = (self.down_fin, self.up_fin) else { return };
        let Some((slot, server)) = turn.ovm() else { return };
        let served = self.legs.get(slot, server).is_some_and(|leg| leg.rcv_nxt > up_fin);
        if served && self.client.acked > down_fin {
            self.close(turn);
        }
    }

    /// The conversation can't continue correctly (rule 7): the daemon sends the client a RST when its turn comes.
    pub(crate) fn reset(&mut self, turn: &mut Turn<'_>) {
        if !self.is_open() {
            return;
        }
        turn.counters.resets += 1;
        turn.event(EventKind::Reset { client: self.key.client });
        turn.then.reset = true;
        let fin = self.up_fin.is_some_and(|(fin, _)| fin == self.up.end());
        self.abort(self.up.end() + u64::from(fin), turn);
    }

    /// The daemon sends the client a RST, now or later. Servers get the client's bytes up to `position`, then a RST
    /// too.
    pub(crate) fn abort(&mut self, position: u64, turn: &mut Turn<'_>) {
        self.up_rst = Some((position, turn.record.mark()));
        self.state.reset(turn.now);
        self.play_client(turn);
    }

    /// Sends the RST of [`Conversation::reset`]. While data is in flight its position is a guess; the client answers a
    /// wrong one with a challenge ACK (RFC 5961 §3.2), and the daemon answers that with a RST at the exact position.
    pub(crate) fn send_reset(&mut self, turn: &mut Turn<'_>) {
        let reset = Segment { flags: Flags::RST.with(Flags::ACK), window: 0, ..self.segment_to_client() };
        turn.send_to_client(self.link, reset.emit());
    }

    /// Resets the server's connection, at its RCV.NXT.
    pub(crate) fn send_reset_to(&self, slot: Slot, leg: &Leg, turn: &mut Turn<'_>) {
        if let Some(guest) = turn.guest(slot, self.key.psc) {
            let reset = Segment {
                seq: seq_of(self.client.iss, leg.rcv_nxt),
                flags: Flags::RST.with(Flags::ACK),
                window: 0,
                ..self.segment_to_leg(leg, guest)
            };
            turn.send_to_server(leg.server, reset.emit());
        }
    }

    /// Answers with a RST a server's segment of a connection that does not exist (any more): RFC 9293 §3.10.7.1.
    pub(crate) fn refuse(&self, slot: Slot, leg: &Leg, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        if let Some(guest) = turn.guest(slot, self.key.psc) {
            let reset = Segment { seq: segment.ack, flags: Flags::RST, ..self.segment_to_leg(leg, guest) };
            turn.send_to_server(leg.server, reset.emit());
        }
    }

    /// A new OVM is catching up, and the record waits for its answer in this conversation, which may have ended for the
    /// client.
    pub(crate) fn is_awaited(&self, turn: &Turn<'_>) -> bool {
        let ovm = turn.queue.ovm().filter(|_| turn.is_catching_up());
        ovm.is_some_and(|ovm| turn.record.awaited(ovm) == Some(self.id))
    }

    /// The conversation ended under an earlier OVM, and the present OVM has not yet acknowledged the client's last
    /// bytes, or has not closed. Until then the daemon supplies those bytes and suppresses what the OVM sends.
    pub(crate) fn is_open_at_ovm(&self, queue: &Queue) -> bool {
        !self.is_open()
            && queue.ovm_server().and_then(|ovm| self.legs.get(ovm.slot, ovm.id)).is_some_and(|leg| {
                let ended = leg.rcv_nxt >= self.up_end() && leg.said.fin.is_some_and(|fin| leg.told.0 > fin);
                !leg.through && leg.gone.is_none() && !ended
            })
    }

    /// The server lacks bytes of the client, or has not produced answers that the client was sent.
    fn is_behind(&self, leg: &Leg) -> bool {
        let owes = leg.covers() && leg.said.answers.end() < self.down.end();
        !leg.through && leg.gone.is_none() && (leg.rcv_nxt < self.up.end() || owes)
    }

    /// The conversation closed just now, and an RVM is behind. If another conversation took its addresses, that RVM
    /// would become stale, and a client could cause that at will. The client's next SYN comes after a second.
    pub(crate) fn is_unfinished(&self, now: Instant, queue: &Queue) -> bool {
        let is_recent = self.state.closed_at().is_some_and(|closed| now.since(closed) < REUSE);
        let mut legs = queue.roster().filter_map(|(slot, server)| self.legs.get(slot, server));
        is_recent && legs.any(|leg| self.is_behind(leg))
    }

    /// Whether to keep the conversation: it is open and its client lives, or it closed and its linger time is not over.
    pub(crate) fn is_wanted(&mut self, turn: &mut Turn<'_>) -> bool {
        match self.state.closed_at() {
            Some(closed) => {
                let timing = turn.config.timing;
                let keep = if self.is_open_at_ovm(turn.queue) { timing.idle_probe } else { timing.linger };
                turn.now < closed + keep.max(timing.linger)
            }
            None if self.probes >= IDLE_PROBES && turn.now >= self.idle_deadline(turn) => {
                // The client is dead: reset the conversation at every server.
                self.reset(turn);
                true
            }
            None => {
                if turn.now >= self.idle_deadline(turn) {
                    self.probes += 1;
                    let probe = Segment {
                        seq: seq_of(self.told.iss, self.client.acked).wrapping_sub(1),
                        ..self.segment_to_client()
                    };
                    turn.send_to_client(self.link, probe.emit());
                }
                true
            }
        }
    }

    pub(crate) fn idle_deadline(&self, turn: &Turn<'_>) -> Instant {
        self.last_heard + turn.config.timing.idle_probe + IDLE_PROBE_INTERVAL * u32::from(self.probes)
    }

    /// The conversation leaves the table. An RVM that still lacks bytes or answers of it becomes stale (rule 5), and
    /// the record no longer waits for its answers.
    pub(crate) fn end(&mut self, turn: &mut Turn<'_>) {
        self.close(turn);
        let open_at_ovm = self.is_open_at_ovm(turn.queue);
        let ovm = turn.queue.ovm();
        for (slot, server) in turn.roster() {
            if let Some(leg) = self.legs.take(slot, server) {
                if self.is_behind(&leg) {
                    turn.mark_stale(slot, StaleReason::MissedBytes);
                }
                if open_at_ovm && ovm == Some(slot) && leg.is_open() {
                    self.send_reset_to(slot, &leg, turn);
                }
            }
        }
        turn.note_all_produced();
    }
}
