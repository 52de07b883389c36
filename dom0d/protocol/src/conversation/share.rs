//! A conversation's share in the sums and lists of its service.

use crate::accounts::{ServerShare, Share};
use crate::conversation::Conversation;
use crate::follower::queue::Queue;

impl Conversation {
    /// The conversation's present share, with what it means to each server in the queue.
    pub(crate) fn share(&self, queue: &Queue) -> Share {
        let is_open = self.is_open();
        let mut share = Share {
            is_open,
            retained: self.retained,
            beyond: self.beyond,
            is_held: self.state.held().is_some(),
            is_disputed: self.state.held().is_some_and(|held| held.is_disputed),
            is_owed: self.is_open_at_ovm(queue),
            is_recuperating: self.is_recuperating(),
            gap: Some(self.down.highest()).filter(|highest| is_open && *highest > self.down.end()),
            servers: Default::default(),
        };
        for server in queue.iter() {
            if let Some(leg) = self.legs.get(server.slot, server.id) {
                share.servers[server.slot.index()] = ServerShare {
                    covered: is_open && leg.covers() && leg.gone.is_none(),
                    diverged: is_open && !leg.covers(),
                    behind: leg.behind(self.up.end(), self.down.end()),
                    kept: leg.said.answers.retained() as u64,
                };
            }
        }
        share
    }
}
