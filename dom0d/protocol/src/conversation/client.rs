//! The client's segments: the daemon judges each as a TCP would, records it, and passes it on to the OVM (rule 2).

use core::time::Duration;

use crate::conversation::turn::Turn;
use crate::conversation::{Conversation, text_before};
use crate::event::{LinkAddress, ServerId};
use crate::input::Passage;
use crate::key::Slot;
use crate::output::Destination;
use crate::tcp::seq::{later, position_of, seq_of};
use crate::wire::{Flags, IcmpError, Options, Segment};

/// For how long a kernel keeps a half-open connection at least: Linux drops one at its first retransmission timeout
/// at the earliest (RFC 6298 §2), when it has too many.
const HALF_OPEN: Duration = Duration::from_secs(1);

impl Conversation {
    /// A segment of the client that is not a SYN.
    pub(crate) fn handle_client(&mut self, link: LinkAddress, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        if self.state.was_reset() || (self.up_rst.is_some() && !segment.flags.has(Flags::RST)) {
            // After its own RST, too, a client has nothing to say.
            return self.answer_with_reset(link, segment, turn);
        }
        let Some(start) = position_of(self.client.iss, segment.seq, self.up.end()) else {
            turn.counters.unacceptable += 1;
            return;
        };
        if segment.flags.has(Flags::RST) {
            return self.handle_client_reset(start, segment, turn);
        }
        if !segment.flags.has(Flags::ACK) {
            turn.counters.unacceptable += 1;
            return;
        }
        let sent = self.down_end();
        let ack = position_of(self.told.iss, segment.ack, self.client.acked);
        // A passed segment may acknowledge an answer that another CPU passed but whose record has not arrived yet. The
        // plane has judged the acknowledgment, so it is only cut to what is recorded.
        let ack = ack.map(|ack| if turn.passed() { ack.min(sent) } else { ack });
        let Some(ack) = ack.filter(|ack| *ack <= sent) else {
            // RFC 5961 §5: the segment is neither recorded nor passed on.
            turn.counters.bad_ack += 1;
            return;
        };
        let mut first_copy = Vec::new();
        let mut passed = *segment;
        if segment.flags.has(Flags::URG) {
            // A server that reads urgent data out of band removes one byte from its stream for each urgent pointer that
            // it sees. Servers that get the stream in other segments would differ, so the daemon clears URG, as
            // middleboxes do (RFC 6093 §3.4).
            turn.counters.urgent += 1;
            passed = Segment { flags: segment.flags.without(Flags::URG), urgent: 0, ..passed };
        }
        // The OVM has a passed segment already: the plane judged it by the same grammar (rule 10).
        if turn.passed() || self.is_acceptable(start, segment) {
            self.last_heard = turn.now;
            self.probes = 0;
            self.link = link;
            self.note_acknowledgment(start, ack, segment, turn);
            let Some(contradicts) = self.record(start, segment, turn) else { return };
            if contradicts {
                if turn.passed() {
                    // The OVM has the other copy.
                    self.uncover(turn);
                }
                first_copy.extend_from_slice(segment.payload);
                self.up.restore(start, &mut first_copy);
                passed.payload = &first_copy;
            }
            self.trim_to_recorded(start, &mut passed);
        } else {
            turn.counters.unacceptable += 1;
            if start + segment.sequence_length() > self.told.acked {
                // The OVM answers it for its sequence number or timestamp; a more lenient OVM must not accept bytes
                // that were not recorded.
                passed = Segment { flags: passed.flags.without(Flags::FIN), payload: &[], ..passed };
            }
            // An unacceptable segment is answered with an ACK: by the OVM, or by the daemon in its place.
            if let Some(recuperating) = self.state.recuperating_mut() {
                recuperating.ack_due = true;
            }
        }
        if !self.is_open() && !self.is_through(turn) && segment.sequence_length() > 0 {
            // The client missed the last ACK, and the server that sent it is gone (RFC 9293 §3.10.7.4, TIME-WAIT).
            let ack = self.segment_to_client();
            self.send_to_client(&ack, turn);
        }
        self.forward_to_ovm(ack, &passed, turn);
    }

    /// Cuts a segment to what was recorded of it. Kernels differ in what they accept beyond the window or after a FIN;
    /// whatever the OVM alone accepted would make every RVM stale (rule 10).
    fn trim_to_recorded(&self, start: u64, segment: &mut Segment<'_>) {
        let stop = self.told.edge.max(self.told.acked).min(self.up_fin.map_or(u64::MAX, |(fin, _)| fin));
        let text = text_before(Some(stop), start, segment.payload);
        let cut = text.len() < segment.payload.len();
        if cut || self.up_fin.is_none_or(|(fin, _)| fin != start + text.len() as u64) {
            segment.flags = segment.flags.without(Flags::FIN);
        }
        segment.payload = text;
        if cut && text.is_empty() {
            // A probe of a closed window lost its byte. At an old sequence number the OVM still answers it.
            segment.seq = seq_of(self.client.iss, self.told.acked).wrapping_sub(1);
        }
    }

    /// Acceptable by RFC 9293 §3.10.7.4 and PAWS (RFC 7323 §5). The test is lenient where kernels differ: if the OVM
    /// drops bytes that the daemon recorded, the client retransmits them.
    fn is_acceptable(&self, start: u64, segment: &Segment<'_>) -> bool {
        let end = start + segment.sequence_length();
        let in_window = start <= self.told.edge.max(self.told.acked) && end >= self.told.acked;
        let in_time = match segment.options.timestamps {
            Some((tsval, _)) if self.client.timestamps => {
                // Like Linux, tolerate one tick for reordered segments.
                !later(self.client.ts_recent, tsval.wrapping_add(1))
            }
            _ => true,
        };
        in_window && in_time
    }

    fn note_acknowledgment(&mut self, start: u64, ack: u64, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        if let Some((tsval, _)) = segment.options.timestamps {
            if later(tsval, self.client.tsval) {
                self.client.tsval = tsval;
            }
            if start <= self.told.acked && later(tsval, self.client.ts_recent) {
                self.client.ts_recent = tsval;
            }
        }
        let window = u64::from(segment.window) << self.client.shift.unwrap_or(0);
        if ack >= self.client.acked {
            let duplicate = ack == self.client.acked
                && segment.sequence_length() == 0
                && ack + window == self.client.edge;
            let newly = ack - self.client.acked;
            if self.client_owes.is_some_and(|(_, position)| ack >= position) {
                self.client_owes = None;
            }
            let repeats = start < self.told.acked && start + segment.sequence_length() <= self.told.acked;
            self.client.acked_beside = repeats && (newly > 0 || self.client.acked_beside);
            self.client.acked = ack;
            self.client.edge = ack + window;
            if let Some(recuperating) = self.state.recuperating_mut() {
                recuperating.acknowledged(ack, newly, duplicate, turn.now);
            }
        }
    }

    /// Records payload and FIN. `None` if there was no room: the caller must not pass the segment on (rule 2), and the
    /// client retransmits it. Otherwise whether the segment contradicts recorded bytes: the OVM, too, gets the first
    /// copy only, so that a client can't make servers differ.
    fn record(&mut self, start: u64, segment: &Segment<'_>, turn: &mut Turn<'_>) -> Option<bool> {
        let end = start + segment.payload.len() as u64;
        let mut contradicts = false;
        let text = text_before(self.up_fin.map(|(fin, _)| fin), start, segment.payload);
        if !text.is_empty() {
            let before = self.up.end();
            let mark = turn.record.mark();
            let stop = if turn.passed() { end } else { self.told.edge.max(self.told.acked) };
            let room = stop.saturating_sub(start);
            let taken = &text[..text.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
            let beyond = start > before;
            let inserted = self.up.insert(start, taken, mark, turn.room(beyond));
            if inserted.refused {
                turn.note_refused(beyond);
                self.blame_laggards(turn);
                return None;
            }
            contradicts = inserted.conflict.is_some_and(|position| position >= self.told.acked);
            turn.counters.contradictions += u64::from(contradicts);
            let end = self.up.end();
            let grown = end - before;
            if start < before
                && let Some(ovm) = turn.ovm().and_then(|(slot, server)| self.legs.get_mut(slot, server))
                && ovm.rcv_nxt < end
            {
                // The OVM may receive these bytes only now.
                ovm.waits.handed_at = turn.now;
            }
            if let Some(recuperating) = self.state.recuperating_mut() {
                // A retransmission, or a segment beyond a gap, calls for an ACK.
                recuperating.ack_due |= grown == 0;
            }
        }
        // A FIN before text that is recorded already is ignored: servers may have accepted that text.
        if segment.flags.has(Flags::FIN) && self.up_fin.is_none() && end >= self.up.highest() {
            self.up_fin = Some((end, turn.record.mark()));
        }
        if self.up_end() > 1 && self.refusable_until.is_none() {
            let is_late = turn.now.since(self.begun) >= HALF_OPEN;
            let hold = if is_late { turn.config.timing.close_hold } else { Duration::ZERO };
            self.refusable_until = Some(turn.now + hold);
        }
        Some(contradicts)
    }

    /// Passes the client's segment on to the OVM, if the OVM is open in this conversation and the daemon does not play
    /// the client to it.
    fn forward_to_ovm(&mut self, ack: u64, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        self.shown.1 = self.client.edge;
        if let Passage::Passed { edge, .. } = turn.plane.passage() {
            self.shown.1 = position_of(self.told.iss, edge, self.client.edge).unwrap_or(0);
            return;
        }
        let Some((slot, server)) = turn.ovm() else { return };
        let Some(leg) = self.legs.get_mut(slot, server).filter(|leg| leg.through) else { return };
        let Some(guest) = turn.guest(slot, self.key.psc) else { return };
        let translated = Segment {
            dst: guest,
            ack: seq_of(leg.numbers.iss, ack),
            options: Options {
                timestamps: segment
                    .options
                    .timestamps
                    .map(|(tsval, tsecr)| (tsval, leg.translated_tsecr(tsecr))),
                sack: segment.options.sack.moved(leg.numbers.iss.wrapping_sub(self.told.iss)),
                ..segment.options
            },
            ..*segment
        };
        let to = Destination::Server(server);
        translated.emit_large(leg.numbers.mss, |packet, size| turn.send(to, packet, size));
    }

    /// Only a RST at exactly RCV.NXT of the client's stream counts (RFC 5961 §3): at any other position, servers would
    /// differ in the bytes that they accepted before it. The daemon itself answers other RSTs in the window with a
    /// challenge ACK, because a lenient OVM might close.
    fn handle_client_reset(&mut self, start: u64, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        if start == self.up_end() {
            self.up_rst = Some((start, turn.record.mark()));
            self.forward_to_ovm(self.client.acked, segment, turn);
            self.close(turn);
        } else if !self.is_open() {
            self.forward_to_ovm(self.client.acked, segment, turn);
        } else {
            turn.counters.unacceptable += 1;
            if (self.told.acked..=self.told.edge).contains(&start) {
                let challenge = self.segment_to_client();
                self.send_to_client(&challenge, turn);
            }
        }
    }

    fn answer_with_reset(&mut self, link: LinkAddress, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        if segment.flags.has(Flags::RST) || !segment.flags.has(Flags::ACK) {
            return;
        }
        let reset =
            Segment { seq: segment.ack, ack: 0, flags: Flags::RST, window: 0, ..self.segment_to_client() };
        turn.send_to_client(link, reset.emit());
    }

    /// A SYN in an open conversation (RFC 5961 §4). The daemon answers it for all servers: RVMs never receive it, so the OVM
    /// must not receive it either, since its kernel could close the connection. A client that has forgotten the
    /// conversation answers the challenge with a RST, which closes it at every server. The RST's position is exact only
    /// after the OVM has acknowledged everything recorded. Until then the daemon sends the OVM its first unacknowledged
    /// segment again, and the client retransmits its SYN.
    pub(crate) fn answer_syn(&mut self, link: LinkAddress, turn: &mut Turn<'_>) {
        turn.counters.unacceptable += 1;
        if self.told.acked == self.up_end() {
            return turn.send_to_client(link, self.segment_to_client().emit());
        }
        let Some((slot, server)) = turn.ovm() else { return };
        if let Some(mut ovm) = self.legs.take(slot, server) {
            if ovm.through {
                self.retransmit_first(&mut ovm, turn);
            }
            self.legs.put(slot, ovm);
        }
    }

    /// An ICMP error reports that the path to the client is narrower or broken. Returns the quoted sequence number in
    /// the OVM's numbering, if the quoted segment is in flight (RFC 5927 §4.1).
    pub(crate) fn handle_icmp(
        &mut self,
        error: IcmpError,
        quoted_seq: u32,
        slot: Slot,
        server: ServerId,
    ) -> Option<u32> {
        let position = position_of(self.told.iss, quoted_seq, self.client.acked)?;
        if position < self.client.acked || position >= self.down_end() {
            return None;
        }
        if let IcmpError::TooBig(mtu) = error {
            let headers = if self.key.psc.is_ipv4() { 40 } else { 60 };
            let least = if self.key.psc.is_ipv4() { 536 } else { 1220 };
            let mss = u16::try_from(mtu.saturating_sub(headers)).unwrap_or(u16::MAX).max(least);
            self.client.mss = self.client.mss.min(mss);
        }
        self.legs.get(slot, server).filter(|leg| leg.through).map(|leg| seq_of(leg.numbers.iss, position))
    }
}
