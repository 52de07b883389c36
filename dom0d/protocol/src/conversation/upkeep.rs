//! What is due in a conversation, and when: it feeds servers, notices laggards, and releases memory.

use crate::config::LagPolicy;
use crate::conversation::Conversation;
use crate::conversation::turn::Turn;
use crate::follower::leg::GONE_GRACE;
use crate::follower::mask;
use crate::rules::rule;
use crate::time::Instant;

/// How often the service looks at a closed conversation in which a new OVM still has to catch up.
const AWAITED_INTERVAL: core::time::Duration = core::time::Duration::from_secs(1);

/// Time in which an RVM must make progress while the room for what it lacks runs out: longer than a retransmission
/// timeout.
const STANDSTILL: core::time::Duration = core::time::Duration::from_millis(500);

/// An RVM that stops clients is evicted when the time for which it did so reaches [`crate::Timing::lag_limit`] divided
/// by this.
const SLOWED_SHARE: u32 = 2;

/// Client or OVM counts as stopped once less than one part in this many is left of the room for what RVMs lack: a
/// sender that finds no room retransmits only after a timeout, in which an RVM takes more than one segment.
const NEARLY_FULL_SHARE: u64 = 8;

/// Longer than any delayed ACK of a client on a usable path.
const CLIENT_SILENCE: core::time::Duration = core::time::Duration::from_millis(500);

impl Conversation {
    /// Prepares the conversation for the present epoch, if it was last prepared for an older one.
    pub(crate) fn follow_epoch(&mut self, turn: &mut Turn<'_>) {
        if self.epoch != turn.epoch {
            self.enter_epoch(turn);
        }
    }

    /// Does whatever is due: feeds servers, recuperates, judges the OVM, releases memory. The service calls it after
    /// each segment and at the deadline. False if the service is to forget the conversation.
    pub(crate) fn work(&mut self, turn: &mut Turn<'_>) -> bool {
        self.legs.retain(|index, server| {
            turn.queue.iter().any(|known| known.id == server && known.slot.index() == index)
        });
        self.follow_epoch(turn);
        if self.client.acked < self.down.end() {
            let (since, _) = *self.client_owes.get_or_insert((turn.now, self.down.end()));
            self.is_client_silent = turn.now.since(since) >= CLIENT_SILENCE;
        } else {
            self.client_owes = None;
            self.is_client_silent = false;
        }
        for (slot, server) in turn.roster() {
            if let Some(mut leg) = self.legs.take(slot, server) {
                match self.tend(slot, &mut leg, turn) {
                    Ok(()) => self.legs.put(slot, leg),
                    Err(reason) => self.drop_leg(slot, &leg, reason, turn),
                }
            }
        }
        self.review_pace(turn);
        self.recuperate(turn);
        if self.is_open() {
            self.review_hold(turn);
            self.judge(turn);
            self.close_if_finished(turn);
        } else if self.is_awaited(turn) {
            self.judge(turn);
        }
        self.release(turn);
        self.is_wanted(turn)
    }

    /// Forgets bytes that no server and no client needs any more (rules 2 and 6).
    fn release(&mut self, turn: &mut Turn<'_>) {
        let mut up = self.up.end();
        let (mut lacking, mut covers) = (self.up.end(), true);
        let mut down = if self.state.was_reset() { self.down.end() } else { self.client.acked };
        for (slot, server) in turn.roster() {
            if let Some(leg) = self.legs.get(slot, server).filter(|leg| leg.gone.is_none()) {
                up = up.min(leg.rcv_nxt);
                if leg.through {
                    covers &= leg.covers();
                } else {
                    lacking = lacking.min(leg.rcv_nxt.max(1));
                }
                if !leg.through && leg.covers() {
                    down = down.min(leg.said.compared);
                }
            }
        }
        if self.is_open() {
            let recorded = self.told.acked <= self.up_end();
            rule!(turn.counters, broken_rule_2, recorded, "the client was sent an ACK of unrecorded bytes");
            rule!(
                turn.counters,
                broken_rule_2,
                lacking >= self.up.base(),
                "a server lacks bytes that were released"
            );
            rule!(turn.counters, broken_rule_7, covers, "a conversation continues with a diverged OVM");
        }
        self.up.release(up);
        let lookback = if turn.config.masks.is_empty() { 0 } else { mask::LOOKBACK };
        self.down.release(if !self.is_open() { down } else { down.saturating_sub(lookback) });
        let mut retained = self.up.retained() + self.down.retained();
        for (slot, server) in turn.roster() {
            retained += self.legs.get(slot, server).map_or(0, |leg| leg.said.answers.retained());
        }
        self.retained = retained as u64;
        self.beyond = (self.up.beyond() + self.down.beyond()) as u64;
    }

    /// Looks for RVMs that stop the client or the OVM, or soon will.
    fn review_pace(&mut self, turn: &mut Turn<'_>) {
        let is_pressed = self.retained >= u64::from(turn.config.limits.conversation_bytes) / 2;
        if is_pressed || self.is_held_back(turn) || self.is_slowed {
            self.blame_laggards(turn);
        }
    }

    /// Names the laggards when the room for what RVMs lack runs out. Unless the operator chose so, an RVM that hardly
    /// moves must not stop the client, and an RVM that follows more slowly must not slow the client for long (rule 4).
    pub(crate) fn blame_laggards(&mut self, turn: &mut Turn<'_>) {
        if turn.config.on_lag == LagPolicy::Wait {
            return;
        }
        let ovm = turn.queue.ovm();
        let limits = turn.config.limits;
        let much = if self.is_held_back(turn) {
            u64::from(limits.ahead_bytes) / 4 * 3
        } else {
            u64::from(limits.conversation_bytes) / 2
        };
        let least = much / 32;
        let (taken, acked) = (self.told.acked, self.client.acked);
        let (now, tolerated) = (turn.now, turn.config.timing.lag_limit / SLOWED_SHARE);
        let room = u64::from(limits.conversation_bytes);
        let full = self.retained >= room - room / NEARLY_FULL_SHARE;
        let stops = full || self.is_held_back(turn);
        let (up_end, down_end) = (self.up.end(), self.down.end());
        let mut is_slowed = false;
        self.for_each_leg(turn, |slot, leg, turn| {
            let lacks = taken.saturating_sub(leg.rcv_nxt);
            let unsaid = if leg.covers() { acked.saturating_sub(leg.said.compared) } else { 0 };
            let blamed = Some(slot) != ovm && !leg.through && leg.gone.is_none() && lacks.max(unsaid) >= much;
            // Progress in any conversation counts: in this one the RVM may wait for its turn in the record (rule 3).
            let progress = turn.followed(slot, leg.behind(up_end, down_end));
            let (since, before) = *leg.waits.paced.get_or_insert((now, progress));
            if !blamed || progress - before >= least {
                leg.waits.paced = blamed.then_some((now, progress));
            } else if now.since(turn.excuses.unstarved(since)) >= STANDSTILL {
                turn.note_laggard(slot);
            }
            leg.waits.pace.note(turn.excuses.unstarved(leg.waits.pace.at), now, blamed && stops);
            if leg.waits.pace.slowed >= tolerated {
                turn.note_laggard(slot);
            }
            is_slowed |= blamed || !leg.waits.pace.slowed.is_zero();
        });
        self.is_slowed = is_slowed;
    }

    /// When the service must look at the conversation again.
    pub(crate) fn next_deadline(&self, turn: &Turn<'_>) -> Instant {
        let mut next = match self.state.closed_at() {
            Some(closed) => (closed + turn.config.timing.linger).max(turn.now + AWAITED_INTERVAL),
            None => self.idle_deadline(turn),
        };
        let mut consider = |deadline: Option<Instant>| {
            if let Some(deadline) = deadline {
                next = next.min(deadline);
            }
        };
        for (slot, server) in turn.roster() {
            if let Some(leg) = self.legs.get(slot, server) {
                consider(leg.sender.deadline());
                let is_refused = self.refused_from(slot, turn).is_some();
                consider(self.refusable_until.filter(|until| is_refused && turn.now < *until));
                if leg.gone.is_some() && !leg.through && self.is_open() {
                    consider(leg.gone.map(|gone| gone + GONE_GRACE));
                }
                if leg.is_open() && !leg.covers() && self.up_rst.is_some() {
                    let grace = self.state.closed_at().map(|closed| closed + GONE_GRACE);
                    consider(grace.filter(|grace| *grace > turn.now));
                }
            }
        }
        if !self.is_open() && self.is_awaited(turn) {
            consider(
                self.suspicion.deadline(&turn.config.timing, turn.now, |since| turn.measured_from(since)),
            );
        }
        if self.is_open() {
            consider(self.state.recuperating().and_then(|recuperating| recuperating.sender.deadline()));
            consider(
                self.client_owes
                    .filter(|_| !self.is_client_silent && turn.queue.rvms().next().is_some())
                    .map(|(since, _)| since + CLIENT_SILENCE),
            );
            consider(self.state.held().map(|held| held.review.unwrap_or(held.ends(turn))));
            consider(
                self.suspicion.deadline(&turn.config.timing, turn.now, |since| turn.measured_from(since)),
            );
        }
        next
    }
}
