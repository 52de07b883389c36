//! A conversation that the data plane passes between client and OVM by itself (see [`crate::Flow`]): when that begins
//! and ends, and how far both sides may get ahead of the RVMs meanwhile.

use crate::conversation::Conversation;
use crate::conversation::state::State;
use crate::conversation::turn::Turn;
use crate::event::{EventKind, StaleReason, Uncovered};
use crate::input::Passage;
use crate::key::Key;
use crate::output::{Handover, Output, Rule};
use crate::plane::Plane;
use crate::tcp::seq::{position_of, seq_of};
use crate::tcp::stream::Stream;
use crate::tcp::translate::{Bounds, Flow};
use crate::wire::Segment;

/// Conversations are handed over while the daemon keeps less than this part of [`crate::Limits::retained_bytes`], and
/// taken back at twice that.
const HANDOVER_SHARE: u64 = 4;

/// Bounds advance by at least this part of [`crate::Limits::ahead_bytes`].
const STEP_SHARE: u64 = 32;

/// Distance of the bounds when no RVM lacks anything: less than half of the sequence space.
const FAR: u64 = 1 << 30;

/// A side whose window has less room than this counts as stopped by it.
const NEARLY_SHUT: u64 = 64 << 10;

/// Bounds of a conversation that the plane does not pass.
pub(crate) const UNBOUNDED: (u64, u64) = (u64::MAX, u64::MAX);

impl Conversation {
    /// Notes whether the plane gave the conversation back with the segment at hand.
    pub(crate) fn note_passage(&mut self, plane: &Plane) {
        if plane.passage() == Passage::HandedOver && self.passing == plane.stops() {
            // The plane still has an entry, which must be removed in the end: mark it as one from before the plane was
            // last stopped.
            self.passing = self.passing.map(|times| times.wrapping_sub(1));
        }
    }

    /// Called after all other work: extends the bounds of a passed conversation, or takes it back. True if the caller
    /// must queue the conversation for the handover to the plane.
    pub(crate) fn review_passing(&mut self, turn: &mut Turn<'_>) -> bool {
        let Some(times) = turn.plane.stops() else { return false };
        let mut is_queued_now = false;
        if self.passing == Some(times) {
            if self.may_pass(turn, 2) {
                self.extend(turn);
            } else {
                self.stop_passing(turn);
            }
        } else {
            self.bounds = UNBOUNDED;
            is_queued_now = !self.is_passable_queued && self.may_begin_to_pass(turn);
            self.is_passable_queued |= is_queued_now;
        }
        self.reopen_windows(turn);
        is_queued_now
    }

    /// Whether the plane may pass the conversation: only new segments are to be expected, and the engine has room for
    /// them.
    pub(crate) fn may_pass(&self, turn: &Turn<'_>, shares: u64) -> bool {
        let room_for_all = turn.config.limits.retained_bytes / HANDOVER_SHARE * shares;
        let through = turn
            .ovm()
            .and_then(|(slot, server)| self.legs.get(slot, server))
            .is_some_and(|leg| leg.through && leg.gone.is_none());
        through
            && matches!(self.state, State::Open { held: None })
            && (self.up_fin, self.up_rst, self.down_fin) == (None, None, None)
            && turn.retained(self.retained) < room_for_all
    }

    /// Not while gaps are being repaired: the plane would return most segments to the engine.
    pub(crate) fn may_begin_to_pass(&self, turn: &Turn<'_>) -> bool {
        self.up.highest() == self.up.end() && self.down.highest() == self.down.end() && self.may_pass(turn, 1)
    }

    pub(crate) fn hand_over(&mut self, turn: &Turn<'_>) -> Option<Handover> {
        if turn.plane.stops().is_none() || self.passing == turn.plane.stops() || !self.may_begin_to_pass(turn)
        {
            return None;
        }
        // Whatever was told already holds.
        let (up, down) = self.reach(turn);
        self.bounds = (up.max(self.told.edge), down.max(self.client.edge).max(self.shown.1));
        let leg = turn.ovm().and_then(|(slot, server)| self.legs.get(slot, server))?;
        let flow = Flow {
            seq_delta: self.told.iss.wrapping_sub(leg.numbers.iss),
            ts_delta: leg.numbers.ts_delta,
            ts_floor: leg.numbers.ts_floor,
            server_tsval: leg.numbers.tsval,
            told_tsval: self.told.tsval,
            ts_recent: self.client.ts_recent,
            up_nxt: seq_of(self.client.iss, self.up.end()),
            told_acked: seq_of(self.client.iss, self.told.acked),
            server_edge: seq_of(self.client.iss, self.told.edge.max(leg.edge)),
            down_nxt: seq_of(self.told.iss, self.down.end()),
            client_acked: seq_of(self.told.iss, self.client.acked),
            client_edge: seq_of(self.told.iss, self.client.edge),
            client_shift: self.client.shift.unwrap_or(0),
            server_shift: leg.numbers.shift,
            told_shift: self.told.shift,
            timestamps: self.client.timestamps,
            bounds: self.bounds_as_told(),
        };
        self.passing = turn.plane.stops();
        let Key { client, psc } = self.key;
        Some(Handover { client, psc, link: self.link, entry: self.id.index, flow })
    }

    fn bounds_as_told(&self) -> Bounds {
        let (up, down) = self.bounds;
        Bounds { up: seq_of(self.client.iss, up), down: seq_of(self.told.iss, down) }
    }

    /// The up and down positions that client and OVM may reach, so that the engine can keep whatever RVMs then lack
    /// (rule 6).
    fn reach(&self, turn: &Turn<'_>) -> (u64, u64) {
        let room = u64::from(turn.config.limits.ahead_bytes);
        let (mut up, mut down) = (self.up.end() + FAR, self.down.end() + FAR);
        for (slot, server) in turn.roster() {
            let leg = self.legs.get(slot, server).filter(|leg| !leg.through && leg.gone.is_none());
            if let Some(leg) = leg {
                up = up.min(leg.rcv_nxt + room);
                down = if leg.covers() { down.min(leg.said.compared + room) } else { down };
            }
        }
        (up, down)
    }

    /// Advances the plane's bounds as RVMs advance, if the step is large enough.
    pub(crate) fn extend(&mut self, turn: &mut Turn<'_>) {
        let step = u64::from(turn.config.limits.ahead_bytes) / STEP_SHARE;
        let (up, down) = self.reach(turn);
        if up >= self.bounds.0 + step || down >= self.bounds.1 + step {
            self.bounds = (up.max(self.bounds.0), down.max(self.bounds.1));
            let rule = Rule::Extend { entry: self.id.index, bounds: self.bounds_as_told() };
            turn.outbox.push(Output::Rule(rule));
        }
    }

    /// Client or OVM will soon stop at the plane's bounds, because RVMs are behind.
    pub(crate) fn is_held_back(&self, turn: &Turn<'_>) -> bool {
        let near = NEARLY_SHUT.min(u64::from(turn.config.limits.ahead_bytes) / 4);
        self.up.end() + near >= self.bounds.0 || self.down.end() + near >= self.bounds.1
    }

    /// Sends window updates to a client or OVM that stopped at a window which has opened since. Nothing else would tell
    /// them if the opposite side has nothing to send.
    pub(crate) fn reopen_windows(&mut self, turn: &mut Turn<'_>) {
        let Some((slot, server)) = turn.ovm().filter(|_| self.is_open()) else { return };
        let Some(ovm) = self.legs.get(slot, server).filter(|leg| leg.through && leg.gone.is_none()) else {
            return;
        };
        let is_stopped = |end: u64, shown: u64, edge: u64| edge > shown && end + NEARLY_SHUT > shown;
        let up = ovm.edge.min(self.bounds.0).min(self.room_up(turn));
        let down = self.client.edge.min(self.bounds.1);
        if is_stopped(self.down.end(), self.shown.1, down)
            && let Some(guest) = turn.guest(slot, self.key.psc)
        {
            turn.send_to_server(server, self.segment_to_leg(ovm, guest).emit());
            turn.counters.ahead_bytes += 1;
            self.shown.1 = down;
        }
        if is_stopped(self.up.end(), self.shown.0, up) {
            self.told.edge = self.told.edge.max(up);
            let update = self.segment_to_client();
            self.send_to_client(&update, turn);
            turn.counters.ahead_bytes += 1;
            self.shown.0 = up;
        }
    }

    /// Takes the conversation back from the plane, if the plane passes it.
    pub(crate) fn stop_passing(&mut self, turn: &mut Turn<'_>) {
        if self.passing.take().is_some() {
            let Key { client, psc } = self.key;
            turn.outbox.push(Output::Rule(Rule::TakeBack { client, psc }));
        }
    }

    /// The engine forgets the conversation, which continues between client and OVM through the plane: no RVM covers it
    /// any more.
    pub(crate) fn leave_to_plane(&mut self, turn: &mut Turn<'_>) {
        self.passing = None;
        let ovm = turn.queue.ovm();
        for (slot, server) in turn.roster() {
            match self.legs.take(slot, server) {
                Some(leg) if ovm != Some(slot) => self.drop_leg(slot, &leg, Uncovered::Unrecorded, turn),
                _ => {}
            }
        }
    }

    /// The plane has passed what is not recorded: no RVM can continue the conversation (rule 10).
    pub(crate) fn uncover(&mut self, turn: &mut Turn<'_>) {
        turn.counters.passed_unrecorded += 1;
        let ovm = turn.queue.ovm();
        for (slot, server) in turn.roster().filter(|(slot, _)| Some(*slot) != ovm) {
            if let Some(leg) = self.legs.take(slot, server) {
                self.drop_leg(slot, &leg, Uncovered::Unrecorded, turn);
            }
        }
    }

    /// The OVM has, or may have, bytes of the client up to `end` that are not recorded: every RVM becomes stale at once
    /// (rule 10).
    pub(crate) fn go_on_alone(&mut self, end: u64, turn: &mut Turn<'_>) {
        self.uncover(turn);
        // A server without a leg in this conversation lacks these bytes, too.
        turn.mark_all_stale(StaleReason::UncoveredConversation);
        turn.event(EventKind::Unprotected { client: self.key.client, reason: Uncovered::Unrecorded });
        self.up = Stream::new(end);
        self.up_fin = None;
    }

    /// If the plane has passed bytes to the OVM that are not recorded, no RVM can follow.
    pub(crate) fn check_passed_to_ovm(&mut self, segment: &Segment<'_>, turn: &mut Turn<'_>) {
        turn.then.looked_at = true;
        if turn.passed() && !segment.payload.is_empty() {
            let end = position_of(self.client.iss, segment.seq, self.up.end())
                .map(|start| start + segment.payload.len() as u64);
            if let Some(end) = end.filter(|end| *end > self.up.highest()) {
                self.go_on_alone(end, turn);
            }
        }
    }

    /// If the plane has passed bytes to the client that are not recorded, no RVM can continue from there.
    pub(crate) fn check_passed_to_client(
        &mut self,
        server_iss: u32,
        segment: &Segment<'_>,
        turn: &mut Turn<'_>,
    ) {
        turn.then.looked_at = true;
        if turn.passed() && !segment.payload.is_empty() {
            let end = position_of(server_iss, segment.seq, self.down.end())
                .map(|start| start + segment.payload.len() as u64);
            if let Some(end) = end.filter(|end| *end > self.down.highest()) {
                self.uncover(turn);
                self.down = Stream::new(end);
            }
        }
    }
}
