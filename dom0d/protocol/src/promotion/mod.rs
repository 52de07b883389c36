//! An RVM becomes the OVM: choice of the candidate, cutover, and the fate of the old OVM.
//!
//! The cutover costs the same for one conversation and for fifty thousand: the epoch and the OVM change, nothing else.
//! Each conversation follows at its next turn.

use core::cmp::Reverse;
use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::config::CandidatePolicy;
use crate::context::Context;
use crate::epoch::Recuperation;
use crate::event::{EventKind, Evidence, NotPromotable, ServerId, StaleReason};
use crate::follower::queue::Follower;
use crate::input::OperatorError;
use crate::key::Slot;
use crate::output::Output;
use crate::rules::rule;
use crate::time::Instant;

/// What becomes of the old OVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deposed {
    /// It leaves the queue and is fenced.
    Fenced,
    /// It was deposed but its domain lives: it stays as an RVM, which is promotable once it has caught up.
    Recovering,
    /// It stays as a promotable RVM: its state equals the new OVM's.
    Rvm,
}

/// Unplanned promotions of the recent past.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Unplanned(VecDeque<Instant>);

impl Unplanned {
    /// Whether one more is allowed now (rule 6); counts it if so.
    pub(crate) fn admit(&mut self, ctx: &Context) -> bool {
        let window = ctx.config.timing.promotion_window;
        self.0.retain(|at| ctx.now.since(*at) < window);
        let admitted = self.0.len() < ctx.config.limits.promotions as usize;
        if admitted {
            self.0.push_back(ctx.now);
        }
        admitted
    }
}

/// The best promotable RVM by the service's policy (rule 5).
pub(crate) fn candidate(ctx: &Context) -> Option<Slot> {
    let mut promotable = ctx.queue.iter().filter(|server| ctx.queue.not_promotable(server).is_none());
    match ctx.config.candidate {
        CandidatePolicy::Queue => promotable.next(),
        // `min_by_key` takes the first of equals, in queue order.
        CandidatePolicy::Progress => {
            promotable.min_by_key(|server| (Reverse(server.sums.covered), server.sums.behind))
        }
    }
    .map(|server| server.slot)
}

/// Why nothing was promoted.
pub(crate) fn obstacles(ctx: &Context) -> Vec<(ServerId, NotPromotable)> {
    let obstacle = |server: &Follower| ctx.queue.not_promotable(server).map(|why| (server.id, why));
    ctx.queue.iter().filter_map(obstacle).filter(|(_, why)| *why != NotPromotable::IsOvm).collect()
}

/// The RVM that an operator named, or the best one.
pub(crate) fn named_or_best(ctx: &Context, to: Option<ServerId>, force: bool) -> Result<Slot, OperatorError> {
    let Some(to) = to else { return candidate(ctx).ok_or(OperatorError::NothingLeft) };
    let slot = ctx.queue.slot_of(to).ok_or(OperatorError::UnknownServer)?;
    let server = ctx.queue.get(slot).ok_or(OperatorError::UnknownServer)?;
    match ctx.queue.not_promotable(server) {
        Some(NotPromotable::IsOvm) => Err(OperatorError::IsOvm),
        Some(_) if !force => Err(OperatorError::NotPromotable),
        _ => Ok(slot),
    }
}

/// Cuts over to `slot`. From here on nothing that the old OVM sends reaches a client (rule 1).
pub(crate) fn cut_over(slot: Slot, evidence: Option<Evidence>, deposed: Deposed, ctx: &mut Context) {
    let Some(to) = ctx.queue.get(slot).map(|server| server.id) else { return };
    let unasked = evidence.is_some_and(|evidence| evidence != Evidence::Operator);
    let is_equal = ctx.queue.get(slot).is_some_and(|server| server.stale.is_none());
    rule!(ctx.counters, broken_rule_5, is_equal || !unasked, "a stale server was promoted unasked");
    let old = ctx.ovm();
    let was_behind = ctx.is_catching_up();
    for (conversation, highest) in ctx.accounts.take_gaps() {
        ctx.record.answered(conversation, highest);
    }
    ctx.epoch += 1;
    ctx.counters.promotions += 1;
    ctx.queue.set_ovm(slot);
    let from = old.map(|(_, server)| server);
    ctx.outbox.cut_over(ctx.epoch, from, to);
    match (old, deposed) {
        (Some((old, server)), Deposed::Fenced) => {
            ctx.queue.remove(old);
            ctx.outbox.push(Output::Fence(server));
        }
        // An old OVM that has not caught up itself still owes its predecessor's answers.
        (Some((old, _)), Deposed::Recovering | Deposed::Rvm) if !was_behind => ctx.record.start(old),
        (Some(_), Deposed::Recovering | Deposed::Rvm) => {}
        (None, _) => {}
    }
    let mark = ctx.record.length();
    ctx.recuperation = Recuperation { first_byte_due: true, mark, ..Recuperation::default() };
    ctx.pending.evidence = None;
    ctx.signs.forget();
    ctx.closes.clear();
    let conversations = ctx.accounts.open();
    ctx.event(EventKind::CutOver { epoch: ctx.epoch, from, to, evidence, conversations });
    if let Some((old, server)) = old.filter(|_| deposed == Deposed::Recovering) {
        begin_to_recover(old, server, ctx);
    }
}

fn begin_to_recover(slot: Slot, server: ServerId, ctx: &mut Context) {
    let now = ctx.now;
    if let Some(server) = ctx.queue.get_mut(slot) {
        (server.recovering, server.goal) = (Some(now), None);
    }
    ctx.event(EventKind::Recovering { server });
}

/// Takes an RVM out of the queue (rule 4). Each conversation releases its memory at its next turn. A deposed OVM that
/// is recovering is fenced, unless it is evicted only for falling behind a limit.
pub(crate) fn evict(slot: Slot, reason: StaleReason, ctx: &mut Context) {
    if ctx.queue.ovm() == Some(slot) {
        return;
    }
    if let Some(server) = ctx.queue.remove(slot) {
        ctx.counters.evictions += 1;
        ctx.record.start(slot);
        ctx.event(EventKind::Evicted { server: server.id, reason });
        if server.recovering.is_some() && reason != StaleReason::Lagged {
            ctx.outbox.push(Output::Fence(server.id));
        }
    }
}
