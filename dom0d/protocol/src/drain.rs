//! A server that is taken as equal to the OVM once nothing changes the OVM's state any more.

use std::collections::VecDeque;

use crate::service::{Drain, Service};
use crate::{EventKind, Instant, ServerId};

impl Service {
    pub(crate) fn begin_drain(&mut self, server: ServerId, deadline: Instant) {
        self.drain = Some(Drain { server, deadline, held: VecDeque::new() });
        self.end_drain();
    }

    pub(crate) fn end_drain(&mut self) {
        if self.drain.is_none() {
            return;
        }
        let open = self.unsettled();
        let Some(drain) = self.drain.take_if(|drain| open == 0 || self.ctx.now >= drain.deadline) else {
            return;
        };
        if open == 0 {
            self.mark_seeded(drain.server);
        } else {
            self.ctx.event(EventKind::DrainFailed { server: drain.server, open });
        }
        for (link, packet) in drain.held {
            self.handle_client(self.ctx.now, link, &packet);
        }
    }

    /// Conversations that may still change the OVM's state: open ones, and those that it has yet to be
    /// given to the end.
    pub(crate) fn unsettled(&mut self) -> u64 {
        while self.sweep.is_some() {
            self.sweep();
        }
        self.ctx.open + self.ctx.owed.len() as u64
    }

    pub(crate) fn mark_seeded(&mut self, id: ServerId) {
        if let Some(slot) = self.ctx.queue.slot_of(id) {
            self.ctx.order.start(slot);
            if let Some(server) = self.ctx.queue.get_mut(slot) {
                server.stale = None;
                server.lagging = false;
                server.recovering = None;
                server.behind = 0;
            }
            self.ctx.event(EventKind::Seeded { server: id });
        }
    }
}
