//! New clients wait until nothing changes the OVM's state any more. Then a server is taken as equal to the OVM, or made
//! equal to it (rule 12).

use core::time::Duration;
use std::collections::VecDeque;

use crate::event::{EventKind, Release, ServerId};
use crate::input::OperatorError;
use crate::rules::rule;
use crate::service::{Drain, Purpose, Service};
use crate::time::Instant;

impl Service {
    /// See [`crate::Command::Hold`].
    pub(crate) fn hold(&mut self, deadline: Instant, limit: Duration) -> Result<(), OperatorError> {
        if self.ctx.queue.ovm().is_none() {
            return Err(OperatorError::NothingLeft);
        }
        if self.drain.is_some() {
            return Err(OperatorError::DrainUnderWay);
        }
        self.begin_drain(Purpose::Hold { limit }, deadline);
        Ok(())
    }

    /// Clients are held: nothing that they send reaches the OVM.
    pub fn is_held(&self) -> bool {
        self.drain.as_ref().is_some_and(|drain| matches!(drain.purpose, Purpose::Held))
    }

    pub(crate) fn release_for(&mut self, reason: Release) {
        if let Some(drain) = self.drain.take_if(|drain| !matches!(drain.purpose, Purpose::Seed(_))) {
            self.ctx.event(EventKind::Released { reason });
            self.let_in(drain);
        }
    }

    pub(crate) fn begin_drain(&mut self, purpose: Purpose, deadline: Instant) {
        self.drain = Some(Drain { purpose, epoch: self.ctx.epoch, deadline, held: VecDeque::new() });
        self.end_drain();
    }

    pub(crate) fn end_drain(&mut self) {
        let Some(Drain { purpose, epoch, deadline, .. }) = self.drain else {
            return;
        };
        let open = self.unsettled();
        let is_late = self.ctx.now >= deadline;
        let reason = match purpose {
            _ if epoch != self.ctx.epoch => Release::OvmChanged,
            Purpose::Hold { limit } if open == 0 => {
                if let Some(drain) = &mut self.drain {
                    drain.purpose = Purpose::Held;
                    drain.deadline = self.ctx.now + limit;
                }
                return self.ctx.event(EventKind::Held);
            }
            Purpose::Seed(_) if open == 0 => Release::Seeded,
            Purpose::Held if is_late => Release::Limit,
            Purpose::Seed(_) | Purpose::Hold { .. } if is_late => Release::ConversationsOpen,
            _ => return,
        };
        let Purpose::Seed(server) = purpose else {
            return self.release_for(reason);
        };
        match reason {
            Release::Seeded => self.mark_seeded(server),
            _ => self.ctx.event(EventKind::DrainFailed { server, open, reason }),
        }
        if let Some(drain) = self.drain.take() {
            self.let_in(drain);
        }
    }

    fn let_in(&mut self, drain: Drain) {
        for (link, packet) in drain.held {
            self.handle_client(self.ctx.now, link, &packet);
        }
    }

    /// Conversations that may still change the OVM's state: open ones, and those whose last bytes the OVM still lacks.
    pub(crate) fn unsettled(&mut self) -> u64 {
        while self.sweep.is_some() {
            self.sweep();
        }
        self.ctx.accounts.unsettled()
    }

    pub(crate) fn mark_seeded(&mut self, id: ServerId) {
        let is_settled = self.ctx.accounts.unsettled() == 0;
        rule!(
            self.ctx.counters,
            broken_rule_12,
            is_settled,
            "a server was seeded while conversations were open"
        );
        if let Some(slot) = self.ctx.queue.slot_of(id) {
            self.ctx.record.start(slot);
            if let Some(server) = self.ctx.queue.get_mut(slot) {
                server.stale = None;
                server.lagging = false;
                server.recovering = None;
                server.sums.behind = 0;
            }
            self.ctx.event(EventKind::Seeded { server: id });
        }
    }
}
