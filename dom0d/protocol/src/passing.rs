//! Conversations that a data plane passes between client and OVM by itself (see [`crate::Flow`]), so that the
//! engine only hears what was said. Which those are, and from when to when.
//!
//! The plane is told of one at a time ([`Service::poll_handover`]), at a moment when it has nothing more to tell,
//! and gives it back by itself with the first segment that is not what comes next. All of them end at once when
//! the plane is stopped, as it must be before a cutover: what it passed under the old epoch is heard first.

use crate::context::Context;
use crate::conversation::Conversation;
use crate::key::ConversationId;
use crate::seq::{position_of, seq_of};
use crate::service::Service;
use crate::stream::Stream;
use crate::wire::Segment;
use crate::{
    Effect, Evidence, Flow, Handover, Instant, LinkAddress, Passage, ServerId, StaleReason, Uncovered,
};

/// A conversation is handed over while the daemon holds less than this part of its limit for it, and taken back
/// at twice that: window and order of a slow replica are the engine's to keep.
const HANDOVER_SHARE: u64 = 4;

impl Service {
    /// The data plane can pass conversations by itself.
    pub fn set_plane_passes(&mut self) {
        self.ctx.plane.get_or_insert(0);
    }

    /// As [`Service::handle_client`], of a packet that the plane may have passed on.
    pub fn handle_tapped_client(&mut self, now: Instant, link: LinkAddress, packet: &[u8], passage: Passage) {
        self.ctx.passage = passage;
        self.handle_client(now, link, packet);
        self.ctx.passage = Passage::Kept;
    }

    /// As [`Service::handle_server`], of a packet that the plane may have passed on.
    pub fn handle_tapped_server(&mut self, now: Instant, server: ServerId, packet: &[u8], passage: Passage) {
        self.ctx.passage = passage;
        self.handle_server(now, server, packet);
        self.ctx.passage = Passage::Kept;
    }

    /// The plane passes nothing any more, and the engine has heard all that it had passed.
    pub fn handle_plane_stopped(&mut self) {
        self.ctx.plane = self.ctx.plane.map(|times| times.wrapping_add(1));
    }

    /// The plane passed something that it could not tell: no RVM can follow.
    pub fn handle_untold(&mut self) {
        self.ctx.mark_all_stale(StaleReason::MissedBytes);
    }

    /// The answer to [`Effect::StopPlane`], after [`Service::handle_plane_stopped`]: the evidence is acted upon.
    pub fn handle_confirmed(&mut self, now: Instant, evidence: Evidence) {
        self.ctx.now = self.ctx.now.max(now);
        self.accuse(evidence);
        self.settle();
    }

    /// The next conversation that the plane may pass by itself. To be asked only when everything that the plane
    /// has for the engine was handled: what is older than the [`Flow`] would not fit it.
    pub fn poll_handover(&mut self) -> Option<Handover> {
        loop {
            let id = self.passable.pop_front()?;
            let Some(mut conversation) = self.table.take(id) else { continue };
            conversation.is_passable_queued = false;
            let handover = conversation.hand_over(&self.ctx);
            self.table.put(conversation);
            if handover.is_some() {
                return handover;
            }
        }
    }

    /// After work on a conversation: whether the plane may pass it, or must no longer.
    pub(crate) fn review_passing(&mut self, conversation: &mut Conversation) {
        let Some(times) = self.ctx.plane else { return };
        if conversation.passing == Some(times) {
            if !conversation.may_pass(&self.ctx, 2) {
                conversation.stop_passing(&mut self.ctx);
            }
        } else if !conversation.is_passable_queued && conversation.may_pass(&self.ctx, 1) {
            conversation.is_passable_queued = true;
            self.passable.push_back(conversation.id);
        }
    }

    /// Where the plane passes by itself, it is stopped before anything follows from evidence.
    pub(crate) fn suspect(&mut self, evidence: Evidence) {
        if self.ctx.plane.is_some() {
            self.ctx.effect(Effect::StopPlane(evidence));
        } else {
            self.accuse(evidence);
        }
    }

    /// The plane may have given the conversation back with the segment at hand.
    pub(crate) fn note_passage(&self, conversation: &mut Conversation) {
        if self.ctx.passage == Passage::HandedOver && conversation.passing == self.ctx.plane {
            // Not forgotten: what the plane keeps of it is to be removed in the end.
            conversation.passing = conversation.passing.map(|times| times.wrapping_sub(1));
        }
    }

    /// A conversation ends that waits to be handed over.
    pub(crate) fn forget_passable(&mut self, id: ConversationId) {
        self.passable.retain(|queued| *queued != id);
    }
}

impl Conversation {
    /// Nothing but what comes next is to be expected, and the engine has room for it.
    fn may_pass(&self, ctx: &Context, shares: u64) -> bool {
        let room = u64::from(ctx.config.limits.conversation_bytes) / HANDOVER_SHARE * shares;
        let room_for_all = ctx.config.limits.retained_bytes / HANDOVER_SHARE * shares;
        let through = ctx
            .ovm()
            .and_then(|(slot, server)| self.legs.get(slot, server))
            .is_some_and(|leg| leg.through && leg.gone.is_none());
        through
            && self.closed.is_none()
            && self.recuperating.is_none()
            && self.held.is_none()
            && (self.up_fin, self.up_rst, self.down_fin) == (None, None, None)
            && self.up.highest() == self.up.end()
            && self.down.highest() == self.down.end()
            && self.retained < room
            && ctx.retained < room_for_all
    }

    fn hand_over(&mut self, ctx: &Context) -> Option<Handover> {
        let leg = ctx.ovm().and_then(|(slot, server)| self.legs.get(slot, server))?;
        if ctx.plane.is_none() || self.passing == ctx.plane || !self.may_pass(ctx, 1) {
            return None;
        }
        let flow = Flow {
            seq_delta: self.told.iss.wrapping_sub(leg.iss),
            ts_delta: leg.ts_delta,
            ts_floor: leg.ts_floor,
            server_tsval: leg.tsval,
            told_tsval: self.told.tsval,
            ts_recent: self.client.ts_recent,
            up_nxt: seq_of(self.client.iss, self.up.end()),
            told_acked: seq_of(self.client.iss, self.told.acked),
            told_edge: seq_of(self.client.iss, self.told.edge),
            down_nxt: seq_of(self.told.iss, self.down.end()),
            client_acked: seq_of(self.told.iss, self.client.acked),
            client_edge: seq_of(self.told.iss, self.client.edge),
            client_shift: self.client.shift.unwrap_or(0),
            server_shift: leg.shift,
            told_shift: self.told.shift,
            timestamps: self.client.timestamps,
        };
        self.passing = ctx.plane;
        Some(Handover { client: self.key.client, psc: self.key.psc, link: self.link, flow })
    }

    /// Takes the conversation back from the plane, if that has it.
    pub(crate) fn stop_passing(&mut self, ctx: &mut Context) {
        if self.passing.take().is_some() {
            ctx.effect(Effect::TakeBack { client: self.key.client, psc: self.key.psc });
        }
    }

    /// The plane has passed what is not recorded: no RVM can carry the conversation on.
    pub(crate) fn uncover(&mut self, ctx: &mut Context) {
        ctx.counters.passed_unrecorded += 1;
        let ovm = ctx.queue.ovm();
        for (slot, server) in ctx.roster().filter(|(slot, _)| Some(*slot) != ovm) {
            if let Some(leg) = self.legs.take(slot, server) {
                self.drop_leg(slot, &leg, Uncovered::Unrecorded, ctx);
            }
        }
    }

    /// What the plane has passed to the OVM must be recorded, or no RVM can follow.
    pub(crate) fn check_passed_to_ovm(&mut self, segment: &Segment<'_>, ctx: &mut Context) {
        if ctx.passage == Passage::Passed {
            let end = position_of(self.client.iss, segment.seq, self.up.end())
                .map(|start| start + segment.payload.len() as u64);
            if let Some(end) = end.filter(|end| *end > self.up.highest()) {
                self.uncover(ctx);
                // It goes on, alone.
                self.up = Stream::new(end);
            }
        }
    }

    /// What the plane has passed to the client must be recorded, or no RVM can go on from there.
    pub(crate) fn check_passed_to_client(
        &mut self,
        server_iss: u32,
        segment: &Segment<'_>,
        ctx: &mut Context,
    ) {
        if ctx.passage == Passage::Passed {
            let end = position_of(server_iss, segment.seq, self.down.end())
                .map(|start| start + segment.payload.len() as u64);
            if let Some(end) = end.filter(|end| *end > self.down.highest()) {
                self.uncover(ctx);
                self.down = Stream::new(end);
            }
        }
    }
}
