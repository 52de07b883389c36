//! Evidence against the OVM that one conversation gives: kinds (c) and (d) of [`Evidence`].
//!
//! An RVM is a witness. The same host gave it the same bytes, so if the RVM acknowledged or answered and the OVM did
//! not, neither the host nor the client nor the request is to blame.
//!
//! A client is no witness (rule 11). Its segments, its silence and its address can keep a healthy OVM from answering.
//! So the daemon itself asks before it accuses: it sends the client's bytes and acknowledgment in segments of its own,
//! and asks for a sign of life that depends on no client.

use core::time::Duration;

use crate::conversation::Conversation;
use crate::conversation::turn::Turn;
use crate::event::Evidence;
use crate::follower::leg::{Leg, Phase};
use crate::follower::mask::{self, Compared};
use crate::follower::queue::Follower;
use crate::key::{MAX_SERVERS, Slot};
use crate::suspicion::{REMINDERS, Suspicion, reminder};
use crate::tcp::seq::seq_of;
use crate::wire::Segment;

/// Longer than a busy service pauses between two pieces of one answer. Data that follows a longer pause may be
/// unsolicited: each server sends it by its own timers, not at the same time as the others.
const PAUSE: Duration = Duration::from_millis(10);

impl Conversation {
    /// Looks for evidence against the OVM, and accuses it through [`Turn::accuse_ovm`].
    pub(crate) fn judge(&mut self, turn: &mut Turn<'_>) {
        let Some((slot, server)) = turn.ovm() else { return };
        if !turn.queue.ovm_server().is_some_and(|ovm| ovm.running) {
            self.suspicion =
                Suspicion { close_disputed: self.suspicion.close_disputed, ..Default::default() };
            return;
        }
        let Some(mut ovm) = self.legs.take(slot, server) else { return };
        if ovm.gone.is_none() {
            self.judge_acknowledgment(&mut ovm, turn);
            self.judge_progress(slot, &mut ovm, turn);
            self.judge_window(slot, &mut ovm, turn);
        }
        self.legs.put(slot, ovm);
    }

    fn judge_acknowledgment(&mut self, ovm: &mut Leg, turn: &mut Turn<'_>) {
        let acknowledged = ovm.rcv_nxt;
        let within_window = self.given_to(ovm) > acknowledged;
        let witnessed = within_window
            && turn.roster().any(|(slot, server)| {
                server != ovm.server
                    && turn.queue.get(slot).is_some_and(|server| server.recovering.is_none())
                    && self
                        .legs
                        .get(slot, server)
                        .is_some_and(|rvm| rvm.rcv_nxt > acknowledged && rvm.covers())
            });
        if !witnessed {
            self.suspicion.unacked_since = None;
            return;
        }
        // A kernel that acknowledges other clients' bytes, or gives another sign of life, is not dead. One
        // conversation, which its client may have brought to a standstill, deposes nobody.
        let sign = turn.lived_at();
        let lives = self.suspicion.unacked_since.is_some_and(|since| sign > since);
        turn.counters.acquittals += u64::from(lives && self.suspicion.reminders > 0);
        if self.suspicion.unacked_since.is_none() || self.suspicion.unacked_at != acknowledged || lives {
            self.suspicion.unacked_since = Some(turn.now);
            self.suspicion.unacked_at = acknowledged;
            self.suspicion.reminders = 0;
        }
        let since = self.suspicion.unacked_since.unwrap_or(turn.now);
        let waited = turn.now.since(turn.measured_from(since));
        let limit = turn.config.timing.unacked_limit;
        if waited < reminder(limit, 1) {
            self.suspicion.reminders = 0;
        } else if waited >= limit && self.suspicion.reminders > 0 {
            turn.accuse_ovm(Evidence::UnacknowledgedSegment);
        } else if self.suspicion.reminders < REMINDERS
            && waited >= reminder(limit, self.suspicion.reminders + 1)
        {
            if waited >= limit {
                // The daemon accuses no OVM that it has not asked: ask now, and begin the wait anew (rule 11).
                self.suspicion.unacked_since = Some(turn.now);
            }
            self.suspicion.reminders += 1;
            turn.ask_ovm();
            if ovm.through {
                ovm.sender.nxt = ovm.sender.nxt.max(acknowledged);
                self.retransmit_first(ovm, turn);
            }
        }
    }

    /// End of the bytes that the OVM was given and has room for, as an up position. Bytes that the daemon still
    /// withholds from a new OVM do not count.
    fn given_to(&self, ovm: &Leg) -> u64 {
        if ovm.phase == Phase::SynSent {
            // The OVM was given the SYN.
            return 1;
        }
        let given = if ovm.through { self.up_end() } else { self.up_end().min(ovm.sender.highest) };
        given.min(ovm.edge)
    }

    /// The OVM may have missed an acknowledgment or window that the daemon believes it has. So the daemon sends both
    /// again, and asks for the OVM's own, in segments that no client could have spoilt.
    fn nudge(&mut self, slot: Slot, ovm: &mut Leg, turn: &mut Turn<'_>) {
        self.suspicion.nudges += 1;
        turn.ask_ovm();
        if let Some(guest) = turn.guest(slot, self.key.psc).filter(|_| ovm.is_open()) {
            turn.send_to_server(ovm.server, self.segment_to_leg(ovm, guest).emit());
            // An old sequence number: each state of a socket answers it with an ACK (RFC 9293 §3.10.7.4).
            let old = seq_of(self.client.iss, ovm.rcv_nxt).wrapping_sub(1);
            turn.send_to_server(ovm.server, Segment { seq: old, ..self.segment_to_leg(ovm, guest) }.emit());
        }
    }

    /// Asks the OVM when the next reminder is due, in a wait that ends at [`crate::Timing::progress_limit`].
    fn nudge_if_due(&mut self, slot: Slot, ovm: &mut Leg, waited: Duration, turn: &mut Turn<'_>) {
        let limit = turn.config.timing.progress_limit;
        if waited < reminder(limit, 1) {
            self.suspicion.nudges = 0;
        } else if self.suspicion.nudges < REMINDERS && waited >= reminder(limit, self.suspicion.nudges + 1) {
            self.nudge(slot, ovm, turn);
        }
    }

    /// An RVM sent data after `from`. If it was free to send, was not asked for anything, and had paused before, the
    /// data is unsolicited: other servers may be about to send the same by their own timers.
    pub(crate) fn note_pause(&mut self, rvm: &Leg, from: u64, was_stopped: bool, turn: &Turn<'_>) {
        let since = rvm.said.answered_at.max(rvm.said.acknowledged_at);
        let paused = turn.now.since(turn.measured_from(since)) >= PAUSE;
        if rvm.said.asked || was_stopped || !paused || from < self.down.end() {
            return;
        }
        let (first, last) = self.paused;
        self.paused = if last < self.down.end() { (from, from) } else { (first.min(from), last.max(from)) };
    }

    /// Whether the OVM owes the client bytes from `position` on: the client asked and got no answer since, or RVMs
    /// continued there without a pause. (An OVM that has not acknowledged the request yet may still do so late.)
    /// Whatever else RVMs send at another time than the OVM is unsolicited data, by their own timers.
    fn is_owed(&self, position: u64, ovm: &Leg) -> bool {
        let (first, last) = self.paused;
        let is_asked = ovm.said.asked || ovm.rcv_nxt < self.given_to(ovm);
        position < self.down.end() || is_asked || (position > 1 && !(first..=last).contains(&position))
    }

    fn judge_progress(&mut self, slot: Slot, ovm: &mut Leg, turn: &mut Turn<'_>) {
        // The OVM's SND.NXT, as a down position. In recuperation it can be less than what the client was sent.
        let position = if ovm.through { self.down.end() } else { ovm.said.answers.end() };
        // Whether the OVM was given every byte that its next answer depends on: until then the daemon owes them.
        let given = ovm.through
            || ovm.sender.highest >= self.up_end()
            || (turn.is_catching_up() && turn.record.awaited(slot) == Some(self.id));
        // Whether the OVM knows of room for a segment: for an RVM that is behind, the OVM may have been told of a
        // smaller window than the client's.
        let has_room = !ovm.through
            || self.shown.1 >= self.client.edge
            || self.shown.1 >= position + u64::from(self.client.mss);
        // If the client has not acknowledged everything, the OVM may be waiting for the network.
        let idle = given
            && self.client.acked >= position
            && !(ovm.through && self.client.acked_beside)
            && self.client.edge > position
            && has_room
            && self.down_fin.is_none_or(|fin| position < fin);
        let idle = idle && self.is_owed(position, ovm);
        let since = match self.suspicion.silent_since.filter(|_| self.suspicion.silent_at == position) {
            Some(since) => since.max(ovm.waits.handed_at),
            None => turn.now,
        };
        self.suspicion.silent_at = position;
        let waited = turn.now.since(turn.measured_from(since));
        let is_over = waited >= turn.config.timing.progress_limit;
        let has_witnesses = {
            let (ahead, witnesses) = self.ahead(position, ovm, turn);
            idle && ahead.iter().flatten().count() * 2 > witnesses
        };
        let was_asked = self.suspicion.nudges > 0;
        if has_witnesses {
            self.nudge_if_due(slot, ovm, waited, turn);
        }
        let (ahead, witnesses) = self.ahead(position, ovm, turn);
        self.suspicion.silent_since = if !has_witnesses {
            None
        } else if !is_over {
            Some(since)
        } else if ovm.rcv_nxt < self.given_to(ovm) {
            // The OVM has not acknowledged the whole request: that is for (c) to judge, or its delayed ACK is still to
            // come.
            Some(turn.now)
        } else if witnesses == 1 && turn.answered_at() > since {
            // A single RVM could itself be at fault: against its word alone, the OVM must be silent in every
            // conversation.
            Some(turn.answered_at())
        } else if !was_asked {
            Some(turn.now)
        } else if turn.signs.is_unreached(self.key.client.ip(), self.link, since) {
            // The OVM can't reach this client: it lacks a next hop's link address.
            turn.counters.acquittals += 1;
            Some(turn.now)
        } else if self.is_agreed(&ahead, witnesses, position, turn) {
            turn.accuse_ovm(Evidence::NoProgress);
            Some(since)
        } else {
            Some(turn.now)
        };
    }

    /// A service that hangs during an upload answers nothing, while its kernel acknowledges all that it has room for.
    /// The evidence is that its window stays closed where those of RVMs are open.
    fn judge_window(&mut self, slot: Slot, ovm: &mut Leg, turn: &mut Turn<'_>) {
        let least = u64::from(ovm.numbers.mss);
        let shut = ovm.is_open() && ovm.edge.saturating_sub(ovm.rcv_nxt) < least.min(1 << ovm.numbers.shift);
        let (mut witnesses, mut open) = (0, 0);
        for server in self.witnesses(ovm, turn).filter(|_| shut) {
            witnesses += 1;
            let leg = self.legs.get(server.slot, server.id).filter(|leg| leg.is_open() && leg.covers());
            open += usize::from(leg.is_some_and(|rvm| rvm.edge >= ovm.edge + least));
        }
        if open * 2 <= witnesses {
            self.suspicion.shut_since = None;
            return;
        }
        if self.suspicion.shut_since.is_none() || self.suspicion.shut_at != ovm.edge {
            self.suspicion.shut_since = Some(turn.now);
            self.suspicion.shut_at = ovm.edge;
        }
        let since = self.suspicion.shut_since.unwrap_or(turn.now);
        let waited = turn.now.since(turn.measured_from(since));
        let was_asked = self.suspicion.nudges > 0;
        if self.suspicion.silent_since.is_none() {
            self.nudge_if_due(slot, ovm, waited, turn);
        }
        if waited < turn.config.timing.progress_limit {
            return;
        }
        if !was_asked {
            self.suspicion.shut_since = Some(turn.now);
        } else if witnesses == 1 && turn.answered_at() > since {
            self.suspicion.shut_since = Some(turn.answered_at());
        } else {
            turn.accuse_ovm(Evidence::NoProgress);
        }
    }

    /// Promotable RVMs, without those that lack bytes which the OVM has acknowledged: what they do not answer says
    /// nothing.
    fn witnesses<'a>(&'a self, ovm: &Leg, turn: &'a Turn<'_>) -> impl Iterator<Item = &'a Follower> {
        let taken = ovm.rcv_nxt;
        turn.queue.iter().filter(move |server| {
            let leg = self.legs.get(server.slot, server.id);
            turn.not_promotable(server).is_none() && leg.is_none_or(|rvm| rvm.rcv_nxt >= taken)
        })
    }

    /// By slot: the legs of witnesses that have produced an answer beyond `position`. Also the number of witnesses.
    fn ahead(&self, position: u64, ovm: &Leg, turn: &Turn<'_>) -> ([Option<&Leg>; MAX_SERVERS], usize) {
        let mut witnesses = 0;
        let mut ahead = [None; MAX_SERVERS];
        for server in self.witnesses(ovm, turn) {
            witnesses += 1;
            ahead[server.slot.index()] = self
                .legs
                .get(server.slot, server.id)
                .filter(|rvm| rvm.covers() && rvm.server != ovm.server && rvm.said.answers.end() > position);
        }
        (ahead, witnesses)
    }

    /// Whether a majority of the promotable RVMs has the same answer from `position` on, as far as each has answered.
    fn is_agreed(&self, ahead: &[Option<&Leg>], witnesses: usize, position: u64, turn: &Turn<'_>) -> bool {
        let majority = |count: usize| count * 2 > witnesses;
        // Answers that the client was already sent are compared with the client's stream, not among RVMs.
        if position < self.down.end() {
            return majority(ahead.iter().flatten().filter(|rvm| rvm.said.compared > position).count());
        }
        let same = |one: &Leg, other: &Leg| {
            let compared =
                mask::compare(&turn.config.masks, &one.said.answers, &other.said.answers, position);
            matches!(compared, Compared::Equal(_))
        };
        let mut candidates = ahead.iter().flatten();
        candidates.any(|one| majority(ahead.iter().flatten().filter(|other| same(one, other)).count()))
    }
}
