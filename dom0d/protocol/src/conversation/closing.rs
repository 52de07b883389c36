//! Closes of the OVM: a FIN or RST waits until a covering RVM has done the same, or until the hold ends. Closes of
//! several conversations that no RVM shares are evidence that the service in the OVM died (rule 11).

use crate::conversation::Conversation;
use crate::conversation::state::Held;
use crate::conversation::turn::Turn;
use crate::event::{Evidence, StaleReason};
use crate::follower::leg::Leg;
use crate::follower::queue::Follower;
use crate::tcp::seq::seq_of;
use crate::wire::{Flags, Segment};

impl Conversation {
    /// Whether the OVM's FIN or RST at `position` waits for a covering RVM; begins the wait.
    pub(crate) fn must_hold(&mut self, position: u64, rst: bool, had: u64, turn: &mut Turn<'_>) -> bool {
        // A RST that follows a passed FIN is held, too.
        let open = self.is_open() && (rst || self.down_fin.is_none());
        let before = self.state.held();
        // RCV.NXT as of the close counts: a kernel continues to acknowledge bytes that no service reads any more.
        let had = before.map_or(had.min(self.up_end()), |held| held.had);
        let opinion = self.opinion(position, rst, had, turn);
        if !open || !matches!(opinion, Opinion::Unknown | Opinion::Disputed) {
            self.state.let_go();
            return false;
        }
        turn.counters.closes_held += u64::from(before.is_none());
        // If a RST follows a held FIN, or a FIN a held RST, the last one counts.
        let hold = turn.config.timing.close_hold;
        let (review, until) =
            before.map_or((Some(turn.now + hold * 3 / 4), turn.now + hold), |held| (held.review, held.until));
        let is_disputed = opinion == Opinion::Disputed || before.is_some_and(|held| held.is_disputed);
        self.state.hold(Held { position, rst, had, review, until, is_disputed });
        true
    }

    /// Retransmits to each replica what it has not acknowledged below `had`, the OVM's RCV.NXT: a TCP answers a
    /// retransmission at once. Otherwise a replica may delay its ACK for longer than the hold (RFC 9293 §3.8.6.3), or
    /// lack a lost segment.
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

    /// The OVM's RCV.NXT, as far as its bytes were recorded.
    pub(crate) fn ovm_had(&self, turn: &Turn<'_>) -> u64 {
        let leg = turn.ovm().and_then(|(slot, server)| self.legs.get(slot, server));
        leg.map_or(self.up_end(), |leg| leg.rcv_nxt.min(self.up_end()))
    }

    /// Whether the covering RVMs share or dispute a close at `position`.
    fn opinion(&self, position: u64, rst: bool, had: u64, turn: &Turn<'_>) -> Opinion {
        let ovm = turn.queue.ovm();
        let closes = self.up_fin.is_some_and(|(fin, _)| had > fin);
        let mut opinion = Opinion::None;
        for (slot, server) in turn.roster().filter(|(slot, _)| Some(*slot) != ovm) {
            let Some(leg) = self.legs.get(slot, server).filter(|leg| leg.covers()) else { continue };
            let doubtful = |server: &Follower| turn.is_stale(server) || server.recovering.is_some();
            if turn.queue.get(slot).is_none_or(doubtful) {
                // A server that is stale or recovering may close, or stay open, for reasons of its own.
                continue;
            }
            let answered = leg.said.answers.end();
            // After a FIN a server still retransmits to the client and receives from it; after a RST it does neither.
            // So only a RST (or a refusal) shares a RST.
            let shares = match rst {
                true => leg.gone.is_some() && leg.produced() >= position,
                false => leg.said.fin == Some(position),
            };
            if shares {
                return Opinion::Shared;
            }
            // An RVM disputes a close only if it has received what the OVM had, has answered all that the OVM answered,
            // and stays open. An RVM that is merely behind disputes nothing. If the client has closed, a close of the
            // OVM is expected, and staying open disputes nothing.
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

    pub(super) fn pass_fin(&mut self, position: u64) {
        self.down_fin = Some(position);
    }

    pub(super) fn handle_ovm_reset(
        &mut self,
        leg: &mut Leg,
        start: u64,
        segment: &Segment<'_>,
        turn: &mut Turn<'_>,
    ) {
        // If the OVM's FIN is held, the client has seen neither FIN nor RST.
        let start =
            if leg.said.fin.is_some_and(|fin| start == fin + 1) { self.down_end().min(start) } else { start };
        // A RST counts at the OVM's SND.NXT, or, if the socket is gone, at the client's acknowledgment (RFC 9293
        // §3.10.7.1). The client ignores any other (RFC 5961 §3.2), and so does the daemon.
        if start != self.down_end() && start != self.down.end() && start != self.client.acked {
            turn.counters.unacceptable += 1;
            if (self.client.acked..self.client.edge.max(self.down_end())).contains(&start)
                && let Some(guest) = turn.queue.ovm().and_then(|slot| turn.guest(slot, self.key.psc))
            {
                // Send the OVM the challenge ACK that the client would send: if the connection is gone, the OVM answers
                // with a RST at the exact position.
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

    /// Passes a RST of the OVM on, at its exact position. The other servers are reset too, once they have the bytes up
    /// to `had`, the OVM's RCV.NXT. A server that was given more may have acted on bytes that the OVM refused, and
    /// becomes stale (rule 5).
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

    /// Passes a held FIN or RST on once an RVM shares it, or once the hold ends. If RVMs dispute several at once and
    /// the OVM refuses new connections, accuses the OVM by [`crate::Evidence::UnsharedClose`] instead (rule 11).
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
            // A handshake that the OVM refused meanwhile counts as a conversation.
            let unshared = turn.closes.unshared_beside(self.id) + usize::from(held.is_disputed);
            let several = unshared > 1 && !self.suspicion.close_disputed;
            let hold = turn.config.timing.close_hold;
            // An answer that the daemon heard before the dispute says nothing about it.
            let is_news = held.is_disputed && !turn.closes.is_disputed(self.id);
            let on_purpose =
                turn.closes.are_on_purpose(hold, turn.excuses.heard_since(), turn.now).filter(|_| !is_news);
            if several && on_purpose.is_none() {
                // The OVM's answer to the daemon's SYN is still to come.
                self.state.hold(Held { until: turn.now + hold / 4, ..held });
                return;
            }
            turn.counters.closes_unshared += 1;
            turn.counters.acquittals += u64::from(several && on_purpose == Some(true));
            if several && on_purpose == Some(false) {
                // If no server can be promoted, the close passes at the next review.
                self.suspicion.close_disputed = true;
                turn.accuse_ovm(Evidence::UnsharedClose);
                self.state.hold(Held { until: turn.now + hold, ..held });
                return;
            }
        }
        self.state.let_go();
        if held.position < self.down.end() {
            // A new OVM closed before the position that the client has received: nothing that it sends can be passed
            // on.
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
}

/// Whether covering RVMs share a close of the OVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opinion {
    /// There is no covering RVM.
    None,
    /// At least one did the same.
    Shared,
    /// At least one could have done the same by now, and stays open.
    Disputed,
    /// They are behind, so neither is known.
    Unknown,
}
