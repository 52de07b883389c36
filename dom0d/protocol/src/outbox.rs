//! The engine's outputs, in order, until its caller polls them.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::event::{Event, ServerId};
use crate::output::{Destination, Output, Transmit};

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outbox {
    queue: VecDeque<Output>,
    /// Events among them.
    events: u32,
}

impl Outbox {
    /// Adds a packet; `segment` as [`crate::wire::Segment::emit_large`] gave it, 0 for a packet of one segment.
    pub(crate) fn send(&mut self, to: Destination, packet: Vec<u8>, segment: u16) {
        self.push(Output::Transmit(Transmit { to, packet, segment }));
    }

    pub(crate) fn push(&mut self, output: Output) {
        self.queue.push_back(output);
    }

    /// Adds an event. If `limit` events wait already, drops it and returns `false` (rule 6).
    #[must_use]
    pub(crate) fn event(&mut self, event: Event, limit: u32) -> bool {
        let fits = self.events < limit;
        if fits {
            self.events += 1;
            self.queue.push_back(Output::Event(event));
        }
        fits
    }

    /// Adds a cutover. It overtakes the packets that wait; of these, the packets to clients are dropped, because they
    /// are the deposed OVM's voice (rule 1).
    pub(crate) fn cut_over(&mut self, epoch: u64, from: Option<ServerId>, to: ServerId) {
        let waiting = core::mem::take(&mut self.queue);
        let (packets, mut before): (VecDeque<_>, VecDeque<_>) =
            waiting.into_iter().partition(|output| matches!(output, Output::Transmit(_)));
        before.push_back(Output::Cutover { epoch, from, to });
        before.extend(packets.into_iter().filter(|output| !is_for_client(output)));
        self.queue = before;
    }

    pub(crate) fn pop(&mut self) -> Option<Output> {
        let output = self.queue.pop_front();
        if matches!(output, Some(Output::Event(_))) {
            self.events = self.events.saturating_sub(1);
        }
        output
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

fn is_for_client(output: &Output) -> bool {
    matches!(output, Output::Transmit(Transmit { to: Destination::Client(_), .. }))
}
