//! One client connection to the PSC, with its counterpart on every server.
//!
//! Read before an edit: RFC 9293 §3.4 (sequence numbers), §3.10.7.4 (acceptability), RFC 7323
//! (timestamps, window scale), RFC 2018 and 2883 (SACK), RFC 5961 (blind attacks).
//!
//! This file holds the state and what the client's segments do to it; `answer` what servers'
//! segments do, `feed` how the daemon plays the client, `recuperation` how it plays the server,
//! `verdict` what may be concluded against the OVM.

use crate::context::Context;
use crate::leg::{Leg, Legs, Phase};
use crate::mask;
use crate::passing::Passage;
use crate::queue::{MAX_SERVERS, Slot};
use crate::recuperation::Recuperating;
use crate::sender::Sender;
use crate::seq::{later, position_of, seq_of};
use crate::stream::Stream;
use crate::table::{ConversationId, Key};
use crate::verdict::Suspicion;
use crate::wire::{Flags, Options, SackBlocks, Segment};
use crate::{EventKind, Instant, LinkAddress, ServerId, StaleReason, Uncovered};

/// What a client said of itself in its SYN, as far as the OVM agreed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Client {
    pub(crate) iss: u32,
    /// Largest segment it takes, options included.
    pub(crate) mss: u16,
    /// Shift of the windows it advertises; `None` if windows are not scaled.
    pub(crate) shift: Option<u8>,
    pub(crate) sack: bool,
    pub(crate) timestamps: bool,
    /// Its latest TSval.
    pub(crate) tsval: u32,
    /// TS.Recent of the OVM (RFC 7323 §4.3): the basis of PAWS.
    pub(crate) ts_recent: u32,
    /// SND.UNA of the servers: down position that it acknowledged.
    pub(crate) acked: u64,
    /// Right edge of its window.
    pub(crate) edge: u64,
}

/// What the client was told by any server so far; never taken back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    /// ISS_client_view: fixed by the SYN-ACK that the client accepted.
    pub(crate) iss: u32,
    /// Shift of the windows that it is told.
    pub(crate) shift: u8,
    /// MSS of that SYN-ACK.
    pub(crate) mss: u16,
    /// Highest up position acknowledged to it.
    pub(crate) acked: u64,
    /// Furthest right edge of the window.
    pub(crate) edge: u64,
    /// Last TSval.
    pub(crate) tsval: u32,
}

/// A FIN or RST of the OVM that is not passed on yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    pub(crate) position: u64,
    pub(crate) rst: bool,
    /// When RVMs are asked, so that the opinions on all conversations are there when the first hold ends.
    pub(crate) review: Instant,
    pub(crate) until: Instant,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Conversation {
    pub(crate) id: ConversationId,
    pub(crate) key: Key,
    pub(crate) link: LinkAddress,
    /// Epoch in which its legs were last arranged.
    pub(crate) epoch: u64,
    pub(crate) client: Client,
    pub(crate) told: Told,
    /// Recorded bytes of the client.
    pub(crate) up: Stream,
    /// Position of the client's FIN, and its mark in the service-wide order.
    pub(crate) up_fin: Option<(u64, u64)>,
    /// Position of the client's RST, and its mark in the service-wide order.
    pub(crate) up_rst: Option<(u64, u64)>,
    /// What the client was sent.
    pub(crate) down: Stream,
    /// Position of the FIN that the client was sent.
    pub(crate) down_fin: Option<u64>,
    pub(crate) legs: Legs,
    pub(crate) held: Option<Held>,
    pub(crate) recuperating: Option<Box<Recuperating>>,
    pub(crate) suspicion: Suspicion,
    /// When it ended for client and OVM.
    pub(crate) closed: Option<Instant>,
    /// It was reset by the daemon: whatever the client still sends is answered with a RST.
    pub(crate) was_reset: bool,
    pub(crate) last_heard: Instant,
    /// Since when the client owes an ACK of what it was sent up to a position (a client that
    /// acknowledges byte by byte still owes the rest); and whether that is too
    /// long for servers to share the wait.
    pub(crate) client_owes: Option<(Instant, u64)>,
    pub(crate) is_client_silent: bool,
    pub(crate) probes: u8,
    /// When it is registered to be looked at.
    pub(crate) deadline: Option<Instant>,
    /// It is in the service's list of work.
    pub(crate) queued: bool,
    /// The data plane passes it by itself, since it was stopped that often.
    pub(crate) passing: Option<u32>,
    /// It is in the service's list of conversations that the data plane may pass.
    pub(crate) is_passable_queued: bool,
    /// Its share of the service's retained bytes.
    pub(crate) retained: u64,
}

/// Probes to an idle client before it counts as dead, and the time between them.
const IDLE_PROBES: u8 = 5;
const IDLE_PROBE_INTERVAL: core::time::Duration = core::time::Duration::from_secs(15);

/// How often a closed conversation that a new OVM has yet to catch up with is looked at.
const AWAITED_INTERVAL: core::time::Duration = core::time::Duration::from_secs(1);

/// Time in which an RVM must get on while room for what it lacks runs out: longer than a retransmission.
const STANDSTILL: core::time::Duration = core::time::Duration::from_millis(500);

/// Longer than any delayed ACK of a client on a usable path.
const CLIENT_SILENCE: core::time::Duration = core::time::Duration::from_millis(500);

impl Conversation {
    /// Something is in flight anywhere: bytes that somebody has not acknowledged or produced.
    pub(crate) fn is_busy(&self) -> bool {
        self.closed.is_none()
            && (self.retained > 0
                || self.recuperating.is_some()
                || self.client.acked < self.down_end()
                || self.suspicion.is_pending())
    }

    /// Open for client and OVM.
    pub(crate) fn is_open(&self) -> bool {
        self.closed.is_none()
    }

    /// SND.NXT towards the client, FIN counted.
    pub(crate) fn down_end(&self) -> u64 {
        self.down.highest().max(self.down_fin.map_or(0, |fin| fin + 1))
    }

    /// End of the client's recorded sequence space, FIN counted.
    pub(crate) fn up_end(&self) -> u64 {
        self.up_fin.map_or(self.up.end(), |(fin, _)| fin + 1)
    }

    // ---- the client's segments ------------------------------------------------------------------

    /// A segment of the client that is not a SYN.
    pub(crate) fn handle_client(&mut self, link: LinkAddress, segment: &Segment<'_>, ctx: &mut Context) {
        if self.was_reset || (self.up_rst.is_some() && !segment.flags.has(Flags::RST)) {
            // Behind its own RST a client has nothing to say either.
            return self.answer_with_reset(link, segment, ctx);
        }
        let Some(start) = position_of(self.client.iss, segment.seq, self.up.end()) else {
            ctx.counters.unacceptable += 1;
            return;
        };
        if segment.flags.has(Flags::RST) {
            return self.handle_client_reset(start, segment, ctx);
        }
        if !segment.flags.has(Flags::ACK) {
            ctx.counters.unacceptable += 1;
            return;
        }
        let ack = position_of(self.told.iss, segment.ack, self.client.acked);
        let Some(ack) = ack.filter(|ack| *ack <= self.down_end()) else {
            // RFC 5961 §5: neither recorded nor passed on.
            ctx.counters.bad_ack += 1;
            return;
        };
        let mut first_copy = Vec::new();
        let mut passed = *segment;
        if segment.flags.has(Flags::URG) {
            // Urgent bytes leave the stream of a server that reads them out of band, one for each pointer
            // that it saw: servers that see other segments would differ (RFC 6093 §3.4: middleboxes clear it).
            ctx.counters.urgent += 1;
            passed = Segment { flags: segment.flags.without(Flags::URG), urgent: 0, ..passed };
        }
        if self.is_acceptable(start, segment) {
            self.last_heard = ctx.now;
            self.probes = 0;
            self.link = link;
            self.note_acknowledgment(start, ack, segment, ctx);
            let Some(contradicts) = self.record(start, segment, ctx) else { return };
            if contradicts {
                if ctx.passage == Passage::Passed {
                    // The OVM has the other copy.
                    self.uncover(ctx);
                }
                first_copy.extend_from_slice(segment.payload);
                self.up.restore(start, &mut first_copy);
                passed.payload = &first_copy;
            }
            self.trim_to_recorded(start, &mut passed);
        } else {
            ctx.counters.unacceptable += 1;
            if start + segment.sequence_length() > self.told.acked {
                // It is answered for its position or time; a guest that is more lenient must not take
                // what was not recorded.
                passed = Segment { flags: passed.flags.without(Flags::FIN), payload: &[], ..passed };
            }
            // Somebody must answer it with an ACK: the OVM, or the daemon in its place.
            if let Some(recuperating) = &mut self.recuperating {
                recuperating.ack_due = true;
            }
        }
        if self.closed.is_some() && !self.is_through(ctx) && segment.sequence_length() > 0 {
            // Its last ACK was lost, and the server that sent it is gone (RFC 9293 §3.10.7.4, TIME-WAIT).
            let ack = self.segment_to_client();
            self.send_to_client(&ack, ctx);
        }
        self.forward_to_ovm(ack, &passed, ctx);
    }

    /// Leaves of a segment what was recorded of it. Kernels differ in what they take beyond the window
    /// or behind a FIN; what the OVM alone would take makes every RVM stale.
    fn trim_to_recorded(&self, start: u64, segment: &mut Segment<'_>) {
        let stop = self.told.edge.max(self.told.acked).min(self.up_fin.map_or(u64::MAX, |(fin, _)| fin));
        let text = text_before(Some(stop), start, segment.payload);
        let cut = text.len() < segment.payload.len();
        if cut || self.up_fin.is_none_or(|(fin, _)| fin != start + text.len() as u64) {
            segment.flags = segment.flags.without(Flags::FIN);
        }
        segment.payload = text;
        if cut && text.is_empty() {
            // A probe of a closed window: without its byte it is answered at an old position only.
            segment.seq = seq_of(self.client.iss, self.told.acked).wrapping_sub(1);
        }
    }

    /// The OVM speaks with the client itself.
    fn is_through(&self, ctx: &Context) -> bool {
        ctx.ovm().and_then(|(slot, server)| self.legs.get(slot, server)).is_some_and(|leg| leg.through)
    }

    /// RFC 9293 §3.10.7.4 with PAWS (RFC 7323 §5). Lenient where servers differ: what is recorded and
    /// not taken by the OVM is sent again by the client.
    fn is_acceptable(&self, start: u64, segment: &Segment<'_>) -> bool {
        let end = start + segment.sequence_length();
        let in_window = start <= self.told.edge.max(self.told.acked) && end >= self.told.acked;
        let in_time = match segment.options.timestamps {
            Some((tsval, _)) if self.client.timestamps => {
                // One tick of tolerance, as Linux has it, for reordered segments.
                !later(self.client.ts_recent, tsval.wrapping_add(1))
            }
            _ => true,
        };
        in_window && in_time
    }

    fn note_acknowledgment(&mut self, start: u64, ack: u64, segment: &Segment<'_>, ctx: &mut Context) {
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
            self.client.acked = ack;
            self.client.edge = ack + window;
            if let Some(recuperating) = &mut self.recuperating {
                recuperating.acknowledged(ack, newly, duplicate, ctx.now);
            }
        }
    }

    /// Records payload and FIN. `None` if there was no room: then the segment must not
    /// be passed on either, and the client will send it again. Else whether it contradicts what was
    /// recorded: the OVM, too, gets the first copy only, so a client can't make servers differ.
    fn record(&mut self, start: u64, segment: &Segment<'_>, ctx: &mut Context) -> Option<bool> {
        let end = start + segment.payload.len() as u64;
        let mut contradicts = false;
        let text = text_before(self.up_fin.map(|(fin, _)| fin), start, segment.payload);
        if !text.is_empty() {
            let before = self.up.end();
            let mark = ctx.order.mark();
            let room = self.told.edge.max(self.told.acked).saturating_sub(start);
            let taken = &text[..text.len().min(usize::try_from(room).unwrap_or(usize::MAX))];
            let inserted = self.up.insert(start, taken, mark, ctx.room());
            if inserted.refused {
                ctx.note_refused();
                self.blame_laggards(ctx);
                return None;
            }
            contradicts = inserted.conflict.is_some_and(|position| position >= self.told.acked);
            ctx.counters.contradictions += u64::from(contradicts);
            let end = self.up.end();
            let grown = end - before;
            if grown > 0 {
                // An OVM may have acknowledged what was never recorded.
                self.for_each_leg(ctx, |slot, leg, ctx| {
                    ctx.due(slot, end.saturating_sub(leg.rcv_nxt.max(before)) as i64);
                });
            }
            if let Some(recuperating) = &mut self.recuperating {
                // A retransmission or a gap: the client waits for an ACK.
                recuperating.ack_due |= grown == 0;
            }
        }
        // Not one with text recorded behind it: that would be taken from servers that have it.
        if segment.flags.has(Flags::FIN) && self.up_fin.is_none() && end >= self.up.highest() {
            self.up_fin = Some((end, ctx.order.mark()));
        }
        Some(contradicts)
    }

    /// Room for what RVMs lack runs out. One that follows, at its own pace, only slows the transfer; one
    /// that hardly moves must not stop the client, unless the operator chose that.
    pub(crate) fn blame_laggards(&mut self, ctx: &mut Context) {
        if ctx.config.on_lag == crate::LagPolicy::Wait {
            return;
        }
        let ovm = ctx.queue.ovm();
        let much = u64::from(ctx.config.limits.conversation_bytes) / 2;
        let least = much / 32;
        let (taken, acked) = (self.told.acked, self.client.acked);
        self.for_each_leg(ctx, |slot, leg, ctx| {
            let lacks = taken.saturating_sub(leg.rcv_nxt);
            let unsaid = if leg.covers() { acked.saturating_sub(leg.compared) } else { 0 };
            let blamed = Some(slot) != ovm && !leg.through && leg.gone.is_none() && lacks.max(unsaid) >= much;
            let progress = leg.rcv_nxt + leg.compared;
            let (since, before) = *leg.paced.get_or_insert((ctx.now, progress));
            if !blamed || progress - before >= least {
                leg.paced = blamed.then_some((ctx.now, progress));
            } else if ctx.now.since(ctx.measured_from(since)) >= STANDSTILL {
                ctx.laggards.push(slot);
            }
        });
    }

    /// Passes the client's segment to the OVM, if the OVM has the conversation.
    fn forward_to_ovm(&mut self, ack: u64, segment: &Segment<'_>, ctx: &mut Context) {
        if ctx.passage == Passage::Passed {
            return;
        }
        let Some((slot, server)) = ctx.ovm() else { return };
        let Some(leg) = self.legs.get_mut(slot, server).filter(|leg| leg.through) else { return };
        let Some(guest) = ctx.guest(slot, self.key.psc) else { return };
        let translated = Segment {
            dst: guest,
            ack: seq_of(leg.iss, ack),
            options: Options {
                timestamps: segment
                    .options
                    .timestamps
                    .map(|(tsval, tsecr)| (tsval, leg.translated_tsecr(tsecr))),
                sack: segment.options.sack.moved(leg.iss.wrapping_sub(self.told.iss)),
                ..segment.options
            },
            ..*segment
        };
        translated.emit_split(leg.mss, |packet| ctx.send_to_server(server, packet));
    }

    /// RFC 5961 §3: only the exact position counts, that is, behind all that was recorded: servers would
    /// otherwise differ in what they had taken before it. Others are answered with an ACK, by the daemon,
    /// since a lenient OVM might close.
    fn handle_client_reset(&mut self, start: u64, segment: &Segment<'_>, ctx: &mut Context) {
        if start == self.up_end() {
            self.up_rst = Some((start, ctx.order.mark()));
            self.forward_to_ovm(self.client.acked, segment, ctx);
            self.close(ctx);
        } else if self.closed.is_some() {
            self.forward_to_ovm(self.client.acked, segment, ctx);
        } else {
            ctx.counters.unacceptable += 1;
            if (self.told.acked..=self.told.edge).contains(&start) {
                let challenge = self.segment_to_client();
                self.send_to_client(&challenge, ctx);
            }
        }
    }

    fn answer_with_reset(&mut self, link: LinkAddress, segment: &Segment<'_>, ctx: &mut Context) {
        if segment.flags.has(Flags::RST) || !segment.flags.has(Flags::ACK) {
            return;
        }
        let reset =
            Segment { seq: segment.ack, ack: 0, flags: Flags::RST, window: 0, ..self.segment_to_client() };
        ctx.send_to_client(link, reset.emit());
    }

    // ---- towards the client ---------------------------------------------------------------------

    /// A segment to the client with nothing in it but the present acknowledgment, window and time.
    pub(crate) fn segment_to_client(&self) -> Segment<'static> {
        let window = self.told.edge.saturating_sub(self.told.acked) >> self.told.shift;
        Segment {
            src: self.key.psc,
            dst: self.key.client,
            seq: seq_of(self.told.iss, self.down_end()),
            ack: seq_of(self.client.iss, self.told.acked),
            flags: Flags::ACK,
            window: u16::try_from(window).unwrap_or(u16::MAX),
            urgent: 0,
            options: Options {
                timestamps: self.client.timestamps.then_some((self.told.tsval, self.client.ts_recent)),
                ..Options::default()
            },
            ecn: 0,
            payload: &[],
        }
    }

    /// Sends a segment to the client, split as it needs.
    pub(crate) fn send_to_client(&mut self, segment: &Segment<'_>, ctx: &mut Context) {
        ctx.note_sent_to_client(segment.payload);
        let link = self.link;
        segment.emit_split(self.client.mss, |packet| ctx.send_to_client(link, packet));
    }

    /// A TSval for the client: never earlier than the last one.
    pub(crate) fn advance_tsval(&mut self, tsval: u32) -> u32 {
        if later(tsval, self.told.tsval) {
            self.told.tsval = tsval;
        }
        self.told.tsval
    }

    // ---- legs -----------------------------------------------------------------------------------

    /// Calls `visit` for each leg of a server in the queue.
    pub(crate) fn for_each_leg(
        &mut self,
        ctx: &mut Context,
        mut visit: impl FnMut(Slot, &mut Leg, &mut Context),
    ) {
        for (slot, server) in ctx.roster() {
            if let Some(leg) = self.legs.get_mut(slot, server) {
                visit(slot, leg, ctx);
            }
        }
    }

    /// Gives the server a leg, or says why it has none.
    pub(crate) fn add_leg(&mut self, slot: Slot, leg: Leg, ctx: &mut Context) {
        if ctx.guest(slot, self.key.psc).is_none() {
            self.legs.set_absent(slot, Uncovered::OptionsDiffer);
            ctx.mark_stale(slot, StaleReason::UncoveredConversation);
            return;
        }
        ctx.count(slot, 1, 0);
        self.legs.put(slot, Box::new(leg));
    }

    /// The server does not cover the conversation any more, so its state may differ from now on.
    pub(crate) fn drop_leg(&mut self, slot: Slot, leg: &Leg, reason: Uncovered, ctx: &mut Context) {
        self.settle_accounts(slot, leg, ctx);
        if leg.is_open() {
            self.send_reset_to(slot, leg, ctx);
        }
        self.legs.set_absent(slot, reason);
        ctx.progressed[slot.index()] = true;
        ctx.mark_stale(slot, StaleReason::UncoveredConversation);
    }

    /// The server reset the conversation, or refused it.
    pub(crate) fn note_gone(&self, slot: Slot, leg: &mut Leg, ctx: &mut Context) {
        if leg.gone.is_none() {
            if self.is_open() {
                ctx.count(slot, -leg.counts().0, 0);
            }
            leg.gone = Some(ctx.now);
            leg.sender.disarm();
            ctx.progressed[slot.index()] = true;
        }
    }

    /// Takes what `leg` stands for out of its server's sums.
    fn settle_accounts(&self, slot: Slot, leg: &Leg, ctx: &mut Context) {
        let up = self.up.end().saturating_sub(leg.rcv_nxt.max(1)) as i64;
        let down = if leg.through { 0 } else { self.down.end() as i64 - leg.answers.end() as i64 };
        ctx.due(slot, -(up + down));
        if self.is_open() {
            let (covered, diverged) = leg.counts();
            ctx.count(slot, -covered, -diverged);
        }
    }

    // ---- the end --------------------------------------------------------------------------------

    /// Both FINs are acknowledged, or somebody reset it.
    pub(crate) fn close(&mut self, ctx: &mut Context) {
        if self.closed.is_some() {
            return;
        }
        for (slot, server) in ctx.roster() {
            if let Some(leg) = self.legs.get(slot, server) {
                let (covered, diverged) = leg.counts();
                ctx.count(slot, -covered, -diverged);
            }
        }
        self.closed = Some(ctx.now);
        ctx.gaps.remove(&self.id);
        ctx.open = ctx.open.saturating_sub(1);
        self.release_hold(ctx);
        self.end_recuperation(ctx);
    }

    /// It leaves the table. An RVM that still lacked bytes of it lacks them for good; one that still owed
    /// answers is held to no order any more.
    pub(crate) fn end(&mut self, ctx: &mut Context) {
        self.close(ctx);
        let open_at_ovm = self.is_open_at_ovm(ctx);
        let ovm = ctx.queue.ovm();
        ctx.owed.remove(&self.id);
        for (slot, server) in ctx.roster() {
            if let Some(leg) = self.legs.take(slot, server) {
                let owes = !leg.through && leg.covers() && leg.answers.end() < self.down.end();
                if leg.gone.is_none() && (leg.rcv_nxt < self.up.end() || owes) {
                    ctx.mark_stale(slot, StaleReason::MissedBytes);
                }
                if open_at_ovm && ovm == Some(slot) && leg.is_open() {
                    self.send_reset_to(slot, &leg, ctx);
                }
                self.settle_accounts(slot, &leg, ctx);
            }
        }
        ctx.progressed = [true; MAX_SERVERS];
        ctx.retained = ctx.retained.saturating_sub(self.retained);
    }

    pub(crate) fn release_hold(&mut self, ctx: &mut Context) {
        if self.held.take().is_some() {
            ctx.holding.remove(&self.id);
            ctx.disputes.remove(&self.id);
            if ctx.holding.is_empty() {
                ctx.refusals.clear();
            }
        }
    }

    /// Closes the conversation if both sides have closed and acknowledged.
    fn close_if_finished(&mut self, ctx: &mut Context) {
        let (Some(down_fin), Some((up_fin, _))) = (self.down_fin, self.up_fin) else { return };
        let Some((slot, server)) = ctx.ovm() else { return };
        let served = self.legs.get(slot, server).is_some_and(|leg| leg.rcv_nxt > up_fin);
        if served && self.client.acked > down_fin {
            self.close(ctx);
        }
    }

    /// The conversation can't go on correctly: the client is sent a RST when its turn comes.
    pub(crate) fn reset(&mut self, ctx: &mut Context) {
        if self.was_reset || self.closed.is_some() {
            return;
        }
        ctx.recuperation.reset += 1;
        ctx.counters.resets += 1;
        ctx.event(EventKind::Reset { client: self.key.client });
        ctx.resets.push_back(self.id);
        let fin = self.up_fin.is_some_and(|(fin, _)| fin == self.up.end());
        self.abort(self.up.end() + u64::from(fin), ctx);
    }

    /// The client is, or will be, sent a RST. Servers get what it had been promised up to `position`, then
    /// a RST too.
    pub(crate) fn abort(&mut self, position: u64, ctx: &mut Context) {
        self.up_rst = Some((position, ctx.order.mark()));
        self.was_reset = true;
        self.play_client(ctx);
        self.close(ctx);
    }

    /// The RST of [`Conversation::reset`]. The position is a guess when data is in flight; the client
    /// answers a wrong one with a challenge ACK (RFC 5961 §3.2), which is then answered exactly.
    pub(crate) fn send_reset(&mut self, ctx: &mut Context) {
        let reset = Segment { flags: Flags::RST.with(Flags::ACK), window: 0, ..self.segment_to_client() };
        ctx.send_to_client(self.link, reset.emit());
    }

    /// Resets the server's side, at the exact position.
    pub(crate) fn send_reset_to(&self, slot: Slot, leg: &Leg, ctx: &mut Context) {
        if let Some(guest) = ctx.guest(slot, self.key.psc) {
            let reset = Segment {
                seq: seq_of(self.client.iss, leg.rcv_nxt),
                flags: Flags::RST.with(Flags::ACK),
                window: 0,
                ..self.segment_to_leg(leg, guest)
            };
            ctx.send_to_server(leg.server, reset.emit());
        }
    }

    // ---- work -----------------------------------------------------------------------------------

    /// Arranges itself for the present epoch if it is of an older one.
    pub(crate) fn follow_epoch(&mut self, ctx: &mut Context) {
        if self.epoch != ctx.epoch {
            self.enter_epoch(ctx);
        }
    }

    /// Does whatever is due: feeds servers, recuperates, judges, releases. Called after each segment
    /// and when the deadline has come. False if the conversation is to be forgotten.
    pub(crate) fn work(&mut self, ctx: &mut Context) -> bool {
        self.legs.retain(|index, server| {
            ctx.queue.iter().any(|known| known.id == server && known.slot.index() == index)
        });
        self.follow_epoch(ctx);
        if self.client.acked < self.down.end() {
            let (since, _) = *self.client_owes.get_or_insert((ctx.now, self.down.end()));
            self.is_client_silent = ctx.now.since(since) >= CLIENT_SILENCE;
        } else {
            self.client_owes = None;
            self.is_client_silent = false;
        }
        for (slot, server) in ctx.roster() {
            if let Some(mut leg) = self.legs.take(slot, server) {
                match self.tend(slot, &mut leg, ctx) {
                    Ok(()) => self.legs.put(slot, leg),
                    Err(reason) => self.drop_leg(slot, &leg, reason, ctx),
                }
            }
        }
        if self.retained >= u64::from(ctx.config.limits.conversation_bytes) / 2 {
            self.blame_laggards(ctx);
        }
        self.recuperate(ctx);
        if self.is_open() {
            self.review_hold(ctx);
            self.judge(ctx);
            self.close_if_finished(ctx);
        } else if self.is_awaited(ctx) {
            self.judge(ctx);
        }
        self.release(ctx);
        if self.is_open_at_ovm(ctx) {
            ctx.owed.insert(self.id);
        } else {
            ctx.owed.remove(&self.id);
        }
        self.is_wanted(ctx)
    }

    /// A new OVM, catching up, still has to produce an answer of this conversation, though that may have
    /// ended for the client.
    fn is_awaited(&self, ctx: &Context) -> bool {
        let ovm = ctx.queue.ovm().filter(|_| ctx.is_catching_up());
        ovm.is_some_and(|ovm| ctx.order.awaited(ovm) == Some(self.id))
    }

    /// It ended under an earlier OVM, and the present one has yet to take the client's last bytes, or to
    /// close: until then they must be supplied, and what it says is not for the client.
    fn is_open_at_ovm(&self, ctx: &Context) -> bool {
        self.closed.is_some()
            && ctx.ovm().and_then(|(slot, server)| self.legs.get(slot, server)).is_some_and(|leg| {
                let ended = leg.rcv_nxt >= self.up_end() && leg.fin.is_some_and(|fin| leg.told.0 > fin);
                !leg.through && leg.gone.is_none() && leg.covers() && !ended
            })
    }

    /// Forgets bytes that nobody needs any more.
    fn release(&mut self, ctx: &mut Context) {
        let mut up = self.up.end();
        let mut down = if self.was_reset { self.down.end() } else { self.client.acked };
        for (slot, server) in ctx.roster() {
            if let Some(leg) = self.legs.get(slot, server).filter(|leg| leg.gone.is_none()) {
                up = up.min(leg.rcv_nxt);
                if !leg.through && leg.covers() {
                    down = down.min(leg.compared);
                }
            }
        }
        self.up.release(up);
        let lookback = if ctx.config.masks.is_empty() { 0 } else { mask::LOOKBACK };
        self.down.release(if self.closed.is_some() { down } else { down.saturating_sub(lookback) });
        let mut retained = (self.up.retained() + self.down.retained()) as u64;
        for (slot, server) in ctx.roster() {
            retained += self.legs.get(slot, server).map_or(0, |leg| leg.answers.retained() as u64);
        }
        ctx.retained = ctx.retained - self.retained + retained;
        self.retained = retained;
    }

    /// Whether to keep it: open and its client alive, or closed and its linger not over.
    fn is_wanted(&mut self, ctx: &mut Context) -> bool {
        match self.closed {
            Some(closed) => {
                let timing = ctx.config.timing;
                let keep = if self.is_open_at_ovm(ctx) { timing.idle_probe } else { timing.linger };
                ctx.now < closed + keep.max(timing.linger)
            }
            None if self.probes >= IDLE_PROBES && ctx.now >= self.idle_deadline(ctx) => {
                // Nobody there: every server is told, the client would not hear it.
                self.reset(ctx);
                true
            }
            None => {
                if ctx.now >= self.idle_deadline(ctx) {
                    self.probes += 1;
                    let probe = Segment {
                        seq: seq_of(self.told.iss, self.client.acked).wrapping_sub(1),
                        ..self.segment_to_client()
                    };
                    ctx.send_to_client(self.link, probe.emit());
                }
                true
            }
        }
    }

    fn idle_deadline(&self, ctx: &Context) -> Instant {
        self.last_heard + ctx.config.timing.idle_probe + IDLE_PROBE_INTERVAL * u32::from(self.probes)
    }

    /// When it must be looked at again.
    pub(crate) fn next_deadline(&self, ctx: &Context) -> Instant {
        let mut next = match self.closed {
            Some(closed) => (closed + ctx.config.timing.linger).max(ctx.now + AWAITED_INTERVAL),
            None => self.idle_deadline(ctx),
        };
        let mut consider = |deadline: Option<Instant>| {
            if let Some(deadline) = deadline {
                next = next.min(deadline);
            }
        };
        for (slot, server) in ctx.roster() {
            if let Some(leg) = self.legs.get(slot, server) {
                consider(leg.sender.deadline());
                if leg.gone.is_some() && !leg.through && self.is_open() {
                    consider(leg.gone.map(|gone| gone + crate::feed::GONE_GRACE));
                }
                if leg.is_open() && !leg.covers() && self.up_rst.is_some() {
                    let grace = self.closed.map(|closed| closed + crate::feed::GONE_GRACE);
                    consider(grace.filter(|grace| *grace > ctx.now));
                }
            }
        }
        if !self.is_open() && self.is_awaited(ctx) {
            consider(self.suspicion.deadline(&ctx.config.timing, ctx));
        }
        if self.is_open() {
            consider(self.recuperating.as_ref().and_then(|recuperating| recuperating.sender.deadline()));
            consider(
                self.client_owes
                    .filter(|_| !self.is_client_silent && ctx.queue.rvms().next().is_some())
                    .map(|(since, _)| since + CLIENT_SILENCE),
            );
            consider(self.held.map(|held| if ctx.now < held.review { held.review } else { held.until }));
            consider(self.suspicion.deadline(&ctx.config.timing, ctx));
        }
        next
    }

    /// A leg as it begins: handshake with `server` complete as the client saw it.
    pub(crate) fn through_leg(server: ServerId, told: &Told, window: u16) -> Leg {
        Leg {
            phase: Phase::Open,
            through: true,
            iss: told.iss,
            shift: told.shift,
            mss: told.mss,
            tsval: told.tsval,
            ts_floor: told.tsval,
            rcv_nxt: 1,
            edge: 1 + u64::from(window),
            told: (1, 0),
            // The SYN is acknowledged: what the daemon itself may have to send begins behind it.
            sender: Sender::new(1),
            ..Leg::opening(server)
        }
    }

    pub(crate) fn options_to_leg(&self, leg: &Leg) -> Options {
        Options {
            timestamps: self.client.timestamps.then_some((self.client.tsval, leg.tsval)),
            ..Options::default()
        }
    }

    /// SACK blocks for an ACK of the daemon's own: without them a sender that was permitted SACK takes
    /// its duplicates for nothing, and each loss costs a retransmission timeout.
    pub(crate) fn sack_blocks(&self, stream: &Stream, iss: u32) -> SackBlocks {
        let mut blocks = SackBlocks::default();
        if self.client.sack {
            for island in stream.islands() {
                blocks.push(seq_of(iss, island.start), seq_of(iss, island.end));
            }
        }
        blocks
    }
}

/// Text behind a FIN is ignored (RFC 9293 §3.10.7.4); some keepalives carry a byte in the FIN's place.
pub(crate) fn text_before(fin: Option<u64>, start: u64, text: &[u8]) -> &[u8] {
    let room = fin.map_or(u64::MAX, |fin| fin.saturating_sub(start));
    &text[..text.len().min(usize::try_from(room).unwrap_or(usize::MAX))]
}
