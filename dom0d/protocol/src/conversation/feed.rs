//! The daemon plays the client towards a server: it sends the recorded stream in order, in the order of the record
//! (rule 3), within the server's window, and acknowledges nothing that the client has not acknowledged.

use core::net::SocketAddr;

use crate::conversation::Conversation;
use crate::conversation::turn::Turn;
use crate::event::{EventKind, ServerId, Uncovered};
use crate::follower::leg::{GONE_GRACE, Leg, Phase};
use crate::follower::mask::{self, Compared};
use crate::follower::queue::Queue;
use crate::key::Slot;
use crate::output::Destination;
use crate::tcp::seq::seq_of;
use crate::time::Instant;
use crate::wire::{Flags, Options, Segment};

/// Most bytes of payload in one packet; headers and options take the rest of the 65,535 bytes that an IP packet can
/// have.
const LARGEST: u64 = 65_000;

impl Conversation {
    /// Compares a server's answers, feeds it, and keeps its timers. After an error the server no longer covers the
    /// conversation.
    pub(crate) fn tend(&mut self, slot: Slot, leg: &mut Leg, turn: &mut Turn<'_>) -> Result<(), Uncovered> {
        if leg.through {
            return Ok(());
        }
        if leg.phase == Phase::SynSent && leg.gone.is_none() {
            return self.tend_handshake(slot, leg, turn);
        }
        self.compare(slot, leg, turn);
        if let Some(gone) = leg.gone {
            let ovm =
                turn.ovm().and_then(|(slot, ovm)| self.legs.get(slot, ovm)).map_or(0, |ovm| ovm.rcv_nxt);
            let unsaid = self.up_rst.is_none() && leg.covers() && leg.said.answers.end() < self.down.end();
            let lacks =
                turn.queue.ovm() != Some(slot) && (leg.rcv_nxt.max(1) < self.told.acked.max(ovm) || unsaid);
            // The server reset the conversation before it had every byte that the OVM or the client's acknowledgments
            // cover, or before it had produced every answer; or the conversation is still open after the grace time.
            let alone = lacks || (self.is_open() && turn.now >= gone + GONE_GRACE);
            return if alone { Err(Uncovered::RvmReset) } else { Ok(()) };
        }
        self.feed(slot, leg, turn);
        self.note_debt(slot, leg, turn);
        Ok(())
    }

    fn tend_handshake(&mut self, slot: Slot, leg: &mut Leg, turn: &mut Turn<'_>) -> Result<(), Uncovered> {
        if self.up_rst.is_some_and(|(position, _)| position <= 1) {
            // The client reset the conversation before the server knew of it, and had sent no data.
            self.note_gone(slot, leg, turn);
            return Ok(());
        }
        let first = !leg.sender.is_armed();
        if first || leg.sender.expired(0, turn.now) {
            turn.counters.retransmissions += u64::from(!first);
            leg.sender.arm(turn.now);
            let Some(guest) = turn.guest(slot, self.key.psc) else { return Err(Uncovered::OptionsDiffer) };
            let syn = Segment {
                seq: self.client.iss,
                ack: 0,
                flags: Flags::SYN,
                window: u16::MAX,
                options: Options {
                    mss: Some(self.client.mss),
                    window_shift: self.client.shift,
                    sack_permitted: self.client.sack,
                    timestamps: self.client.timestamps.then_some((self.client.tsval, 0)),
                    ..Options::default()
                },
                ..self.segment_to_leg(leg, guest)
            };
            turn.send_to_server(leg.server, syn.emit());
        }
        self.note_debt(slot, leg, turn);
        Ok(())
    }

    /// Compares what the server answered with what the client was sent.
    pub(crate) fn compare(&mut self, slot: Slot, leg: &mut Leg, turn: &mut Turn<'_>) {
        if leg.covers() {
            let compared =
                match mask::compare(&turn.config.masks, &self.down, &leg.said.answers, leg.said.compared) {
                    // The server closed where the client was sent more.
                    Compared::Equal(_)
                        if turn.queue.ovm() != Some(slot)
                            && leg.said.fin.is_some_and(|fin| fin < self.down.end()) =>
                    {
                        Compared::Diverged(leg.said.fin.unwrap_or(leg.said.compared))
                    }
                    // The server continues where the client was sent a FIN.
                    Compared::Equal(position)
                        if self.down_fin.is_some_and(|fin| leg.said.answers.end() > fin) =>
                    {
                        Compared::Diverged(self.down_fin.unwrap_or(position))
                    }
                    compared => compared,
                };
            match compared {
                Compared::Equal(position) => leg.said.compared = position,
                Compared::Diverged(position) => {
                    leg.said.diverged_at = Some(position);
                    turn.counters.divergences += 1;
                    turn.note_produced(slot);
                    turn.event(EventKind::Diverged {
                        server: leg.server,
                        client: self.key.client,
                        position: position.saturating_sub(1),
                    });
                }
            }
        }
        leg.said.answers.release(if leg.covers() { leg.said.compared } else { leg.said.answers.end() });
    }

    /// Sends what the server may have now (rule 3): data, FIN, RST, or an ACK.
    fn feed(&mut self, slot: Slot, leg: &mut Leg, turn: &mut Turn<'_>) {
        let Some(guest) = turn.guest(slot, self.key.psc) else { return };
        let una = leg.rcv_nxt;
        if leg.sender.expired(una, turn.now) {
            turn.counters.retransmissions += 1;
            if una == leg.sender.highest || leg.edge <= una {
                self.probe_window(leg, guest, turn);
            }
        }
        while self.feed_data(slot, leg, guest, turn) {}
        self.feed_fin(slot, leg, guest, turn);
        // At a RST a kernel discards what its service has not read yet, so the RST follows once the server has produced
        // the answers that the client was sent.
        if self.up_rst.is_some_and(|(position, mark)| {
            position <= leg.rcv_nxt && self.has_answered(leg, turn) && turn.permits(slot, mark, self.id)
        }) {
            self.send_reset_to(slot, leg, turn);
            self.note_gone(slot, leg, turn);
            return;
        }
        let told = self.told_to(leg);
        let window = leg.told.1.saturating_sub(leg.told.0);
        let opened = told.1 > leg.told.1
            && (window < 2 * u64::from(leg.numbers.mss) || told.1 - leg.told.1 >= window / 4);
        let is_due = leg.ack_due || opened;
        if !is_due
            && told.0 > leg.told.0
            && leg.sender.nxt < self.up.end()
            && turn.then.progressed[slot.index()]
        {
            // The server's next bytes may have waited for what it just produced; they carry the acknowledgment.
            turn.then.unacknowledged = true;
        } else if is_due || told.0 > leg.told.0 {
            leg.ack_due = false;
            leg.tell(told, self.client.mss, turn.now);
            let mut ack = self.segment_to_leg(leg, guest);
            ack.options.sack = self.sack_blocks(&leg.said.answers, leg.numbers.iss);
            turn.send_to_server(leg.server, ack.emit());
        }
    }

    /// Position from which on the server in `slot`, an RVM, waits for the OVM, which may never take these bytes: its RST
    /// is held; or its kernel may have dropped the half-open connection of a client that completed its handshake late,
    /// and is given time to refuse the first bytes. Otherwise a client alone could make RVMs act on bytes that the OVM
    /// never took (rule 11).
    pub(super) fn refused_from(&self, slot: Slot, turn: &Turn<'_>) -> Option<u64> {
        let refused = self.state.held().filter(|held| held.rst).map(|held| held.had);
        let is_pending = self.refusable_until.is_some_and(|until| turn.now < until);
        if refused.is_none() && !is_pending {
            return None;
        }
        let (ovm, server) = turn.ovm().filter(|(ovm, _)| *ovm != slot)?;
        refused.or_else(|| {
            let ovm = self.legs.get(ovm, server).filter(|ovm| ovm.through)?;
            let is_taken =
                self.told.acked.max(ovm.rcv_nxt) > 1 || self.down.end() > 1 || ovm.said.fin.is_some();
            (!is_taken).then_some(1)
        })
    }

    /// The record does not wait for a server that diverged. Only the length of its answers shows that it has read the
    /// requests, and only if its answers have the same length; hence the time limit.
    fn has_answered(&self, leg: &Leg, turn: &Turn<'_>) -> bool {
        leg.covers()
            || leg.said.answers.end() >= self.down.end()
            || self.state.closed_at().is_none_or(|closed| turn.now >= closed + GONE_GRACE)
    }

    /// Sends data, as one packet, if any may be sent.
    fn feed_data(&mut self, slot: Slot, leg: &mut Leg, guest: SocketAddr, turn: &mut Turn<'_>) -> bool {
        let from = leg.sender.nxt;
        let reset = self.up_rst.map_or(u64::MAX, |(position, _)| position);
        let room =
            u64::from(leg.numbers.mss).saturating_sub(if self.client.timestamps { 12 } else { 0 }).max(1);
        let first = match leg.is_established() {
            true => u64::MAX,
            false if from == leg.rcv_nxt => from + room,
            false => from,
        };
        let limit = leg
            .edge
            .min(leg.sender.limit(leg.rcv_nxt, turn.config.limits.inflight_bytes))
            .min(self.up.end().min(reset).min(first))
            .min(self.refused_from(slot, turn).unwrap_or(u64::MAX));
        let stop = limit.min(from + LARGEST / room * room);
        let mut to = from;
        while to < stop {
            let Some((mark, run_end)) = self.up.mark_at(to) else { break };
            if to >= leg.sender.highest && !turn.permits(slot, mark, self.id) {
                break;
            }
            to = run_end.min(stop);
        }
        if to <= from {
            if from < self.up.end() && leg.edge <= from && !leg.sender.is_armed() {
                leg.sender.arm(turn.now);
            }
            return false;
        }
        self.send_data(leg, guest, from, to, turn);
        leg.sender.sent(to, turn.now);
        true
    }

    fn send_data(&mut self, leg: &mut Leg, guest: SocketAddr, from: u64, to: u64, turn: &mut Turn<'_>) {
        leg.waits.handed_at = turn.now;
        leg.tell(self.told_to(leg), self.client.mss, turn.now);
        leg.ack_due = false;
        let payload = self.up.copy(from..to);
        let segment = Segment {
            seq: seq_of(self.client.iss, from),
            flags: Flags::ACK.with(Flags::PSH),
            payload: &payload,
            ..self.segment_to_leg(leg, guest)
        };
        let to = Destination::Server(leg.server);
        segment.emit_large(leg.numbers.mss, |packet, size| turn.send(to, packet, size));
    }

    fn feed_fin(&mut self, slot: Slot, leg: &mut Leg, guest: SocketAddr, turn: &mut Turn<'_>) {
        let Some((position, mark)) = self.up_fin else { return };
        let refused = self.up_rst.is_some_and(|(reset, _)| reset <= position);
        if refused
            || leg.sender.nxt != position
            || position != self.up.end()
            || self.refused_from(slot, turn).is_some_and(|refused| refused <= position)
            || (position > leg.rcv_nxt && !leg.is_established())
            || !turn.permits(slot, mark, self.id)
        {
            return;
        }
        self.send_fin(leg, guest, position, turn);
        leg.sender.sent(position + 1, turn.now);
    }

    fn send_fin(&mut self, leg: &mut Leg, guest: SocketAddr, position: u64, turn: &mut Turn<'_>) {
        leg.waits.handed_at = turn.now;
        leg.tell(self.told_to(leg), self.client.mss, turn.now);
        leg.ack_due = false;
        let fin = Segment {
            seq: seq_of(self.client.iss, position),
            flags: Flags::FIN.with(Flags::ACK),
            ..self.segment_to_leg(leg, guest)
        };
        turn.send_to_server(leg.server, fin.emit());
    }

    /// Sends the segment at SND.UNA again, at once.
    pub(crate) fn retransmit_first(&mut self, leg: &mut Leg, turn: &mut Turn<'_>) {
        let Some(slot) = turn.queue.slot_of(leg.server) else { return };
        let Some(guest) = turn.guest(slot, self.key.psc) else { return };
        let from = leg.rcv_nxt;
        // Bytes that were never sent may have to wait for earlier answers (rule 3).
        let known = if leg.through { self.up.end() } else { self.up.end().min(leg.sender.highest) };
        let to = known.min(from + u64::from(leg.numbers.mss).saturating_sub(12).max(1));
        if from < to && from >= self.up.base() {
            turn.counters.retransmissions += 1;
            self.send_data(leg, guest, from, to, turn);
        } else if self.up_fin.is_some_and(|(fin, _)| fin == from && (leg.through || fin < leg.sender.highest))
        {
            turn.counters.retransmissions += 1;
            self.send_fin(leg, guest, from, turn);
        }
    }

    /// Probes a closed window (RFC 9293 §3.8.6.1) as Linux does: a segment with an old sequence number makes the server
    /// send its present window.
    pub(crate) fn probe_window(&mut self, leg: &mut Leg, guest: SocketAddr, turn: &mut Turn<'_>) {
        let present = self.segment_to_leg(leg, guest);
        let old = seq_of(self.client.iss, leg.rcv_nxt).wrapping_sub(1);
        let probe = Segment { seq: if leg.is_established() { old } else { present.seq }, ..present };
        turn.send_to_server(leg.server, probe.emit());
        leg.sender.arm(turn.now);
    }

    /// The acknowledgment (a down position) and right window edge to tell the server: never an ACK of bytes that the
    /// server has not sent or the client has not acknowledged.
    ///
    /// One exception: if the client stops acknowledging, a server whose congestion window is smaller than the OVM's
    /// would stop before the OVM's position, and through the record (rule 3) hold up the requests of all other clients.
    /// The daemon retains what it sent that client and can supply it whoever serves, so it acknowledges those bytes to
    /// the server. In a conversation that has ended the client acknowledges nothing more either.
    fn told_to(&self, leg: &Leg) -> (u64, u64) {
        if leg.through {
            return (self.client.acked, self.client.edge.min(self.bounds.1));
        }
        let mut acknowledged = leg.produced().min(self.client.acked);
        if self.is_client_silent || !self.is_open() {
            acknowledged = acknowledged.max(leg.said.compared.min(self.down.end()));
        }
        // The server may send everything that the client was sent, even if the client's window has shrunk since. It
        // also keeps the window that it was told: otherwise a client that shrinks its window would have the replica's
        // answers dropped.
        (acknowledged.max(leg.told.0), self.client.edge.max(self.down.end()).max(leg.told.1))
    }

    /// A segment in the client's name that carries only acknowledgment, window and timestamps.
    pub(crate) fn segment_to_leg(&self, leg: &Leg, guest: SocketAddr) -> Segment<'static> {
        let (ack, edge) = self.told_to(leg);
        let window = edge.saturating_sub(ack) >> self.client.shift.unwrap_or(0);
        let nxt = if leg.is_established() { leg.sender.nxt.max(leg.rcv_nxt) } else { leg.rcv_nxt };
        Segment {
            src: self.key.client,
            dst: guest,
            seq: seq_of(self.client.iss, nxt),
            ack: seq_of(leg.numbers.iss, ack),
            flags: Flags::ACK,
            window: u16::try_from(window).unwrap_or(u16::MAX),
            urgent: 0,
            options: self.options_to_leg(leg),
            ecn: 0,
            payload: &[],
        }
    }

    /// Notices a server whose kernel has owed an acknowledgment or a SYN-ACK for too long.
    fn note_debt(&mut self, slot: Slot, leg: &mut Leg, turn: &mut Turn<'_>) {
        let owes = leg.phase == Phase::SynSent || leg.rcv_nxt < leg.sender.highest;
        let shut = leg.rcv_nxt < self.up.end() && leg.edge <= leg.rcv_nxt;
        // A server whose domain does not run owes nothing meanwhile.
        let runs = turn.queue.get(slot).filter(|server| server.running);
        let Some(excused_at) = runs.map(|server| server.excused_at).filter(|_| owes || shut) else {
            leg.waits.owes_since = None;
            return;
        };
        let ovm_edge = self.ovm_edge(turn.queue);
        if leg.waits.owes_since.is_none() {
            leg.waits.ovm_edge = ovm_edge;
        }
        let since = *leg.waits.owes_since.get_or_insert(turn.now);
        if !owes && leg.waits.ovm_edge == ovm_edge {
            // The window is closed because the service reads nothing. The OVM's service reads nothing either: its
            // buffer may just be larger.
            return;
        }
        if turn.now.since(turn.excuses.unstarved(since).max(excused_at)) >= turn.config.timing.lag_limit
            && turn.queue.ovm() != Some(slot)
        {
            turn.note_laggard(slot);
        }
    }

    fn ovm_edge(&self, queue: &Queue) -> u64 {
        queue.ovm_server().and_then(|ovm| self.legs.get(ovm.slot, ovm.id)).map_or(0, |ovm| ovm.edge)
    }

    /// The kernel of the server in `slot` has owed an acknowledgment, a SYN-ACK or an open window since `at` or
    /// earlier. A closed window counts only if the OVM's window has moved meanwhile.
    pub(crate) fn has_owed_since(&self, slot: Slot, server: ServerId, at: Instant, queue: &Queue) -> bool {
        self.legs.get(slot, server).is_some_and(|leg| {
            let owes = leg.phase == Phase::SynSent || leg.rcv_nxt < leg.sender.highest;
            leg.gone.is_none()
                && leg.covers()
                && leg.waits.owes_since.is_some_and(|since| since <= at)
                && (owes || leg.waits.ovm_edge != self.ovm_edge(queue))
        })
    }
}
