//! What follows for the service from its conversations' turns: cursors advance in the record, laggards are evicted, the
//! OVM is accused. And after a cutover the service visits every conversation.

use core::time::Duration;

use crate::config::LagPolicy;
use crate::event::{EventKind, Evidence, NotPromotable, StaleReason};
use crate::key::{Key, MAX_SERVERS, Slot};
use crate::promotion::{self, Deposed};
use crate::rules::rule;
use crate::service::{SWEEP, Service};

/// For want of memory the service evicts an RVM only if it keeps at least [`crate::Limits::retained_bytes`] divided by
/// this for that RVM: otherwise the eviction would free too little.
const LEAST_FREED_SHARE: u64 = 16;

impl Service {
    /// Carries out what conversations' turns left pending: evidence, laggards, the record.
    pub(crate) fn settle(&mut self) {
        self.probe_service();
        if let Some(evidence) = self.ctx.pending.evidence.take() {
            self.suspect(evidence);
        }
        while let Some(slot) = self.ctx.pending.laggards.pop() {
            promotion::evict(slot, StaleReason::Lagged, &mut self.ctx);
        }
        self.advance_record();
        if self.sweep.is_none() && self.ctx.recuperation.is_to_be_reported() {
            self.ctx.report_recuperated();
        }
    }

    /// If RVMs dispute several closes of the OVM, sends the OVM a SYN of the daemon's own: did its service die, or does
    /// it close on purpose, perhaps by timers of its own? (rule 11)
    fn probe_service(&mut self) {
        let Self { ctx, table, handshakes, .. } = self;
        if ctx.probe_due().is_none_or(|due| due > ctx.now) {
            return;
        }
        let conversation = ctx.closes.begin_probe(ctx.now).and_then(|id| table.get_awake(id));
        if let Some(client) = conversation.map(|conversation| conversation.key)
            && let Some((slot, ovm)) = ctx.ovm()
            && let Some(guest) = ctx.guest(slot, client.psc)
        {
            let free = |key: &Key| table.find(key).is_none() && !handshakes.knows(key);
            if let Some(syn) = ctx.closes.probe(client, guest, ctx.config.seed, free) {
                ctx.counters.questions += 1;
                ctx.send_to_server(ovm, syn);
            }
        }
    }

    fn advance_record(&mut self) {
        if !self.ctx.pending.progressed.contains(&true) {
            return;
        }
        let Self { ctx, table, work, .. } = self;
        let was_catching_up = ctx.is_catching_up();
        let mut woken = core::mem::take(&mut ctx.pending.unacknowledged);
        for (slot, server) in ctx.queue.roster() {
            if !core::mem::take(&mut ctx.pending.progressed[slot.index()]) {
                continue;
            }
            let moved = ctx.record.advance(
                slot,
                |id, position| {
                    table
                        .get_awake(id)
                        .is_none_or(|conversation| conversation.has_produced(slot, server, position))
                },
                |id| woken.push(id),
            );
            if moved && let Some(server) = ctx.queue.get_mut(slot) {
                server.waiting_since = None;
            }
            // Wake them once, when the OVM has caught up: otherwise each segment of the OVM would wake all
            // conversations in recuperation.
            if ctx.queue.ovm() == Some(slot) && was_catching_up && !ctx.is_catching_up() {
                woken.extend(ctx.recuperation.pending.iter().copied());
            }
        }
        for id in woken {
            if let Some(conversation) = table.get_mut(id).filter(|conversation| !conversation.queued) {
                conversation.queued = true;
                work.push_back(id);
            }
        }
        ctx.pending.progressed = [false; MAX_SERVERS];
        ctx.release_record();
    }

    /// Acts on evidence against the OVM: promotes the best candidate (rule 5), or reports why it can't.
    pub(crate) fn accuse(&mut self, evidence: Evidence) {
        let Some((_, ovm)) = self.ctx.ovm() else { return };
        self.ctx.event(EventKind::Suspected { server: ovm, evidence });
        let candidate = promotion::candidate(&self.ctx);
        let mut because = promotion::obstacles(&self.ctx);
        if let Some(slot) = candidate {
            if self.unplanned.admit(&self.ctx) {
                let deposed = self.fate(evidence);
                promotion::cut_over(slot, Some(evidence), deposed, &mut self.ctx);
                return self.after_cutover();
            }
            self.ctx.counters.promotions_limited += 1;
            if let Some(server) = self.ctx.queue.get(slot) {
                because.push((server.id, NotPromotable::PromotionLimit));
            }
        }
        // The OVM is not accused of the same silence again before the limits have passed once more.
        self.ctx.excuses.excuse_ovm(self.ctx.now);
        self.ctx.event(EventKind::NoCandidate { server: Some(ovm), evidence, because });
    }

    /// What becomes of an OVM after this evidence. An OVM that was merely silent may have stalled for a moment, and may
    /// recover.
    fn fate(&self, evidence: Evidence) -> Deposed {
        let lives = matches!(evidence, Evidence::UnacknowledgedSegment | Evidence::NoProgress);
        let may_recover = !self.ctx.config.timing.recover_limit.is_zero();
        if lives && may_recover { Deposed::Recovering } else { Deposed::Fenced }
    }

    /// Queues all conversations for the new epoch: those with something in flight first, then the others.
    pub(crate) fn after_cutover(&mut self) {
        self.ctx.act(|turn| self.handshakes.reopen(turn));
        self.ctx.pending.progressed = [true; MAX_SERVERS];
        let busy: Vec<_> = self.table.busy().collect();
        for id in busy {
            if let Some(conversation) = self.table.get_mut(id).filter(|conversation| !conversation.queued) {
                conversation.queued = true;
                self.work.push_back(id);
            }
        }
        self.sweep = Some(0);
    }

    pub(crate) fn sweep(&mut self) {
        let Some(first) = self.sweep else { return };
        for index in first..first + SWEEP {
            match self.table.at(index) {
                Some(Some(id))
                    if self.table.get_mut(id).is_some_and(|known| known.epoch != self.ctx.epoch) =>
                {
                    self.with(id, |_, _| {});
                }
                Some(_) => {}
                None => {
                    self.sweep = None;
                    return;
                }
            }
        }
        self.sweep = Some(first + SWEEP);
    }

    pub(crate) fn send_resets(&mut self) {
        if self.ctx.pending.resets.is_empty() || self.ctx.now < self.next_resets {
            return;
        }
        self.next_resets = self.ctx.now + Duration::from_millis(1);
        for _ in 0..self.ctx.config.limits.resets_per_ms.max(1) {
            let Some(id) = self.ctx.pending.resets.pop_front() else { break };
            self.with(id, |conversation, turn| conversation.send_reset(turn));
        }
    }

    pub(crate) fn check_limits(&mut self) {
        let limits = self.ctx.config.limits;
        let is_bounded = self.table.places() <= u64::from(limits.conversations);
        rule!(self.ctx.counters, broken_rule_6, is_bounded, "more conversations than the limit");
        let evicts = self.ctx.config.on_lag == LagPolicy::Evict;
        let slots: Vec<Slot> = self.ctx.queue.rvms().collect();
        for slot in slots {
            self.review_follower(slot);
            let outstanding = self.ctx.record.outstanding(slot);
            let Some(server) = self.ctx.queue.get(slot) else { continue };
            if evicts && server.sums.behind > limits.lag_bytes {
                self.ctx.counters.lag_bytes += 1;
                promotion::evict(slot, StaleReason::Lagged, &mut self.ctx);
            } else if outstanding > u64::from(limits.order_entries) {
                self.ctx.counters.order_entries += 1;
                promotion::evict(slot, StaleReason::Lagged, &mut self.ctx);
            }
        }
        // Not while a sweep is under way: an earlier eviction may not have freed its memory yet.
        if self.ctx.accounts.retained() >= limits.retained_bytes && self.sweep.is_none() {
            let keeps = |slot: &Slot| {
                self.ctx.queue.get(*slot).map_or(0, |server| server.sums.behind + server.sums.kept)
            };
            let least = limits.retained_bytes / LEAST_FREED_SHARE;
            let worst = self.ctx.queue.rvms().max_by_key(keeps).filter(|slot| keeps(slot) >= least);
            if let Some(slot) = worst {
                self.ctx.counters.retained_bytes += 1;
                promotion::evict(slot, StaleReason::Lagged, &mut self.ctx);
            }
        }
        self.ctx.release_record();
    }
}
