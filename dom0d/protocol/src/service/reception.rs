//! Segments that belong to no conversation yet, or to none at all.

use core::net::IpAddr;

use crate::accounts::Share;
use crate::conversation::handshake::Embryonic;
use crate::event::{EventKind, Evidence, LinkAddress, ServerId, StaleReason, Uncovered};
use crate::key::{Key, Slot};
use crate::output::Destination;
use crate::service::Service;
use crate::wire::{Flags, Icmp, Segment};

/// Most link addresses remembered, of clients in handshakes and unprotected conversations.
const LINKS: usize = 4096;
/// Most unknown conversations that are told apart. With more, each counts as if its client had sent data.
const UNKNOWN: usize = 4096;
/// Most SYNs kept during a drain.
const HELD_SYNS: usize = 1024;

impl Service {
    pub(crate) fn handle_client_syn(
        &mut self,
        key: Key,
        link: LinkAddress,
        syn: &Segment<'_>,
        packet: &[u8],
    ) {
        if syn.flags.has(Flags::ACK.with(Flags::RST).with(Flags::FIN)) {
            self.ctx.counters.unacceptable += 1;
            return;
        }
        let open =
            self.table.find(&key).filter(|id| self.table.get_mut(*id).is_some_and(|known| known.is_open()));
        if let Some(id) = open {
            return self.with(id, |conversation, turn| conversation.answer_syn(link, turn));
        }
        let former = self.table.find(&key).and_then(|id| self.table.get_mut(id)).map(|former| &*former);
        if former.is_some_and(|former| !former.is_open() && former.client.iss == syn.seq) {
            // A late duplicate of the SYN that began the conversation which has ended.
            self.ctx.counters.unacceptable += 1;
            return;
        }
        if former.is_some_and(|former| former.is_unfinished(self.ctx.now, &self.ctx.queue)) {
            self.ctx.counters.early_reuse += 1;
            return;
        }
        if let Some(drain) = &mut self.drain {
            self.ctx.counters.held_syns += 1;
            if drain.held.len() < HELD_SYNS {
                drain.held.push_back((link, packet.to_vec()));
            } else {
                self.ctx.counters.held_syns_dropped += 1;
            }
            return;
        }
        self.remember_link(key.client.ip(), link);
        self.ctx.closes.give_up_probe(&key);
        self.ctx.act(|turn| self.handshakes.handle_syn(key, link, syn, turn));
    }

    /// SYN-ACKs and refusals of the OVM; true if the segment needs nothing else.
    pub(crate) fn handle_ovm_handshake(
        &mut self,
        key: &Key,
        server: ServerId,
        segment: &Segment<'_>,
    ) -> bool {
        if segment.flags.has(Flags::RST) {
            if !self.ctx.closes.is_empty() && self.handshakes.acknowledges(key, segment) {
                // The service in the OVM may have died. The client retransmits its SYN, and reaches the OVM of that
                // time.
                self.ctx.closes.note_refusal(*key, self.ctx.now);
                return true;
            }
            if self.handshakes.handle_refusal(key, segment) {
                self.send_as_is(*key, segment);
                return true;
            }
            return false;
        }
        if segment.flags.has(Flags::SYN) && self.handshakes.is_answered_otherwise(key, server, segment.seq) {
            return true;
        }
        if segment.flags.has(Flags::SYN) && self.handshakes.handle_syn_ack(key, server, segment) {
            self.send_as_is(*key, segment);
            return true;
        }
        false
    }

    /// Answers a server's segment of a conversation that does not exist (any more) with a RST: RFC 9293 §3.10.7.1.
    pub(crate) fn refuse(&mut self, server: ServerId, segment: &Segment<'_>) {
        if segment.flags.has(Flags::ACK) && !segment.flags.has(Flags::RST) {
            let reset = bare(segment, Flags::RST, segment.ack);
            let reset = Segment { src: segment.dst, dst: segment.src, ..reset };
            self.ctx.send_to_server(server, reset.emit());
        }
    }

    /// An RVM answered a SYN that the OVM left unanswered, while the OVM sent nothing at all (rule 11).
    pub(crate) fn hear_witness(&mut self, slot: Slot) {
        self.handshakes.forget_unheard();
        let trusted =
            self.ctx.queue.get(slot).is_some_and(|server| self.ctx.queue.not_promotable(server).is_none());
        if trusted && self.ctx.queue.ovm_server().is_some_and(|ovm| ovm.running) {
            self.suspect(Evidence::UnacknowledgedSegment);
        }
        self.settle();
    }

    /// The client's handshake with the OVM is complete: every RVM gets its SYN now.
    pub(crate) fn open(&mut self, key: Key, embryonic: Embryonic) {
        if let Some(former) = self.table.find(&key) {
            self.abandon(former);
        }
        let limit = self.ctx.config.limits.conversations;
        let mut id = self.table.reserve(key, limit);
        if id.is_none()
            && let Some(closed) = self.table.oldest_closed()
        {
            self.abandon(closed);
            id = self.table.reserve(key, limit);
        }
        let Some(id) = id else {
            self.ctx.counters.conversations += 1;
            self.ctx.event(EventKind::Unprotected { client: key.client, reason: Uncovered::TableFull });
            self.ctx.mark_all_stale(StaleReason::UncoveredConversation);
            return;
        };
        let mut turn = self.ctx.turn(Share::default());
        let opened = embryonic.open(id, key, &mut turn);
        let turn = turn.end();
        match opened {
            Some(conversation) => {
                let share = conversation.share(&self.ctx.queue);
                self.ctx.follow(id, turn, &share);
                self.table.put(conversation);
            }
            None => self.table.cancel(id, &key),
        }
    }

    /// A client's segment in a conversation that the daemon does not know: it began before the daemon did or while the
    /// table was full, or its handshake had to make room for others. If no RVM equals the OVM, the segment flows
    /// unprotected (rule 7). Otherwise the daemon refuses the conversation: else a single client could make every RVM
    /// stale.
    pub(crate) fn handle_unknown_client(&mut self, key: Key, link: LinkAddress, segment: &Segment<'_>) {
        if segment.flags.has(Flags::RST) {
            self.handshakes.forget(&key);
            return self.pass_unprotected_to_ovm(link, segment);
        }
        if self.ctx.plane.passed() || !self.ctx.queue.has_equal_rvm() {
            return self.pass_unprotected_to_ovm(link, segment);
        }
        if self.handshakes.knows(&key) {
            // The segment does not complete the handshake. The OVM answers its sequence numbers, and must get no data
            // from it.
            let flags = segment.flags.without(Flags::FIN);
            return self.pass_unprotected_to_ovm(link, &Segment { flags, payload: &[], ..*segment });
        }
        self.ctx.counters.unknown_refused += 1;
        if segment.flags.has(Flags::ACK) {
            let reset = bare(segment, Flags::RST, segment.ack);
            self.ctx.send_to_client(link, Segment { src: segment.dst, dst: segment.src, ..reset }.emit());
        }
        // Reset the OVM's side, too: otherwise it would wait for this client, and retransmit to it.
        if let Some((slot, ovm)) = self.ctx.ovm()
            && let Some(dst) = self.ctx.guest(slot, key.psc)
        {
            self.ctx.send_to_server(ovm, Segment { dst, ..bare(segment, Flags::RST, segment.seq) }.emit());
        }
    }

    /// The OVM's segment in a conversation that the daemon does not know.
    pub(crate) fn handle_unknown_ovm(&mut self, key: Key, server: ServerId, segment: &Segment<'_>) {
        // The OVM acknowledges a SYN, and the client learns its TSval.
        let begins = segment.sequence_length() == 0 && self.handshakes.acknowledges(&key, segment);
        if self.ctx.plane.passed()
            || begins
            || segment.flags.has(Flags::RST)
            || !self.ctx.queue.has_equal_rvm()
        {
            return self.pass_unprotected_to_client(key, segment);
        }
        self.ctx.counters.unknown_refused += 1;
        self.refuse(server, segment);
        // A client whose handshake continues retransmits, so it is not reset.
        if !segment.flags.has(Flags::SYN) && !self.handshakes.knows(&key) {
            self.send_as_is(key, &bare(segment, Flags::RST.with(Flags::ACK), segment.seq));
        }
    }

    /// Passes a segment of an unknown conversation on. After a promotion the new OVM resets that conversation itself: a
    /// clean end.
    fn pass_unprotected_to_ovm(&mut self, link: LinkAddress, segment: &Segment<'_>) {
        if !segment.payload.is_empty() {
            let key = Key { client: segment.src, psc: segment.dst };
            if self.unknown.len() < UNKNOWN {
                self.unknown.insert(key);
            }
        }
        if self.ctx.plane.passed() {
            return;
        }
        let Some((slot, server)) = self.ctx.ovm() else { return };
        let Some(guest) = self.ctx.guest(slot, segment.dst) else { return };
        self.remember_link(segment.src.ip(), link);
        self.ctx.counters.unprotected_segments += 1;
        let mss = self.ctx.queue.get(slot).map_or(536, |server| server.mtu.saturating_sub(60));
        let translated = Segment { dst: guest, ..*segment };
        let to = Destination::Server(server);
        translated.emit_large(mss, |packet, size| self.ctx.send(to, packet, size));
    }

    /// Passes the OVM's segment of an unknown conversation on. If it carries data, or acknowledges data that a client
    /// sent there, the OVM serves a client whose bytes no RVM gets, and every RVM becomes stale. Remains of a
    /// conversation that ended long ago harm nothing.
    fn pass_unprotected_to_client(&mut self, key: Key, segment: &Segment<'_>) {
        self.ctx.counters.unprotected_segments += 1;
        let begins = self.handshakes.note_acknowledgment(&key, segment);
        let heard = self.unknown.len() == UNKNOWN || self.unknown.contains(&key);
        if !segment.flags.has(Flags::RST.with(Flags::SYN))
            && !begins
            && (heard || !segment.payload.is_empty())
        {
            self.unknown.clear();
            self.ctx.event(EventKind::Unprotected { client: key.client, reason: Uncovered::MidStream });
            self.ctx.mark_all_stale(StaleReason::UncoveredConversation);
        }
        self.send_as_is(key, segment);
    }

    /// Passes an OVM's segment on with only its address changed.
    fn send_as_is(&mut self, key: Key, segment: &Segment<'_>) {
        if self.ctx.plane.passed() {
            return;
        }
        let Some(link) = self.links.get(&key.client.ip()).copied() else { return };
        let translated = Segment { src: key.psc, ..*segment };
        let mss = if key.psc.is_ipv4() { 1460 } else { 1440 };
        let to = Destination::Client(link);
        translated.emit_large(mss, |packet, size| self.ctx.send(to, packet, size));
    }

    fn remember_link(&mut self, client: IpAddr, link: LinkAddress) {
        if self.links.len() >= LINKS && !self.links.contains_key(&client) {
            // Rare and harmless: the daemon learns each again from the client's next segment.
            self.links.clear();
        }
        self.links.insert(client, link);
    }

    /// An ICMP error that quotes a segment which a client was sent.
    pub(crate) fn handle_icmp(&mut self, icmp: &Icmp<'_>) {
        let key = Key { client: icmp.quoted_dst, psc: icmp.quoted_src };
        let Some((slot, server)) = self.ctx.ovm() else { return };
        let Some(guest) = self.ctx.guest(slot, key.psc) else { return };
        if self.ctx.config.psc.contains(&icmp.to)
            && icmp.to == key.psc.ip()
            && guest.is_ipv4() == icmp.from.is_ipv4()
        {
            let mut seq = None;
            if let Some(conversation) = self.table.find(&key).and_then(|id| self.table.get_mut(id)) {
                seq = conversation.handle_icmp(icmp.error, icmp.quoted_seq, slot, server);
            }
            if let Some(seq) = seq {
                self.ctx.counters.icmp_errors += 1;
                self.ctx.send_to_server(server, icmp.translated(guest.ip(), seq));
                return;
            }
        }
        self.ctx.counters.not_replicated += 1;
    }
}

/// A segment between the same sockets without payload and options.
fn bare<'a>(segment: &Segment<'a>, flags: Flags, seq: u32) -> Segment<'a> {
    let ack = if flags.has(Flags::ACK) { segment.ack } else { 0 };
    Segment { seq, ack, flags, window: 0, urgent: 0, options: Default::default(), payload: &[], ..*segment }
}
