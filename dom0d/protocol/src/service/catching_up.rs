//! An RVM that lagged, and a deposed OVM that recovers, is promotable again once it has caught up.
//!
//! No follower is ever quite at the end of the record. So a follower has caught up when it reaches, within a short
//! time, the end that the record had a moment ago.

use core::time::Duration;

use crate::event::{EventKind, StaleReason};
use crate::follower::queue::Goal;
use crate::key::Slot;
use crate::promotion;
use crate::service::Service;
use crate::time::Instant;

/// A follower that reaches its goal within this time has caught up. The service looks every 100 ms, so this allows a
/// few looks.
const IN_STEP: Duration = Duration::from_millis(500);

impl Service {
    /// Checks whether the RVM in `slot` lags, and whether a lagging or recovering one has caught up.
    pub(crate) fn review_follower(&mut self, slot: Slot) {
        let (now, timing) = (self.ctx.now, self.ctx.config.timing);
        let waiting = self.ctx.record.is_waiting(slot);
        let unstarved = |since: Instant| self.ctx.excuses.unstarved(since);
        let Some(server) = self.ctx.queue.get(slot) else { return };
        let since = waiting.then(|| server.waiting_since.unwrap_or(now));
        let lags =
            since.is_some_and(|since| now.since(unstarved(since).max(server.excused_at)) >= timing.lag_limit);
        let lagging = server.lagging || lags;
        let overdue =
            server.recovering.is_some_and(|since| now.since(unstarved(since)) >= timing.recover_limit);
        let fell_back = lagging || server.recovering.is_some();
        let caught_up = fell_back && self.has_caught_up(slot);
        let Some(server) = self.ctx.queue.get_mut(slot) else { return };
        server.waiting_since = since;
        server.lagging = lagging && !caught_up;
        if !fell_back || caught_up {
            server.goal = None;
        }
        if caught_up && server.recovering.take().is_some() {
            let server = server.id;
            self.ctx.counters.recovered += 1;
            self.ctx.event(EventKind::Recovered { server });
        } else if overdue && !caught_up {
            self.ctx.counters.recover_limit += 1;
            promotion::evict(slot, StaleReason::Deposed, &mut self.ctx);
        }
    }

    /// Whether it has produced every answer, and its kernel has acknowledged every byte, of a moment ago.
    fn has_caught_up(&mut self, slot: Slot) -> bool {
        let Self { ctx, table, sweep, .. } = self;
        // Until each conversation has followed the cutover, the service does not know all that a deposed OVM owes.
        let Some(server) = ctx.queue.get(slot).filter(|_| sweep.is_none()) else { return false };
        let (now, id) = (ctx.now, server.id);
        let reached = server.goal.is_some_and(|goal| {
            let mut busy = table.busy().filter_map(|id| table.get_awake(id));
            ctx.record.cursor(slot) >= goal.mark
                && (server.sums.behind == 0 || server.sums.followed > goal.followed)
                && !busy.any(|conversation| conversation.has_owed_since(slot, id, goal.at, &ctx.queue))
        });
        if server.goal.is_some_and(|goal| reached && now.since(goal.at) <= IN_STEP) {
            return true;
        }
        if reached || server.goal.is_none() {
            let goal = Goal { at: now, mark: ctx.record.length(), followed: server.sums.followed };
            if let Some(server) = ctx.queue.get_mut(slot) {
                server.goal = Some(goal);
            }
        }
        false
    }
}
