//! Which faults may harm connections by design, as far as that is known when they strike.

use super::World;
use crate::fault::Fault;
use crate::guest::Health;
use crate::observer::{Conversation, Seen};

impl World {
    /// Promotable replicas that no fault struck.
    fn healthy_replicas(&self) -> Vec<usize> {
        self.promotable_replicas()
            .into_iter()
            .filter(|&g| !self.impaired.contains_key(&self.guests[g].id))
            .collect()
    }

    fn promotable_replicas(&self) -> Vec<usize> {
        let status = self.service.status();
        let promotable = status.servers.iter().filter(|s| s.not_promotable.is_none());
        promotable.filter_map(|s| self.guest_of(s.server)).collect()
    }

    /// Whether the last healthy replica, or the majority that evidence needs, may be lost before the OVM's fault
    /// is found.
    pub(super) fn excuse_of_loss(&mut self) {
        let ovm = self.service.ovm().and_then(|id| self.guest_of(id));
        let Some(health) = ovm.map(|g| self.guests[g].health).filter(|h| *h != Health::Running) else {
            return;
        };
        let healthy = self.healthy_replicas().len();
        if healthy == 0 {
            self.excuse.get_or_insert("no healthy replica");
        } else if health == Health::Hung && healthy * 2 <= self.promotable_replicas().len() {
            self.excuse.get_or_insert("no majority of healthy replicas");
        }
    }

    /// Whether a fault of the OVM may harm connections by design: no healthy replica can take over, or the fault
    /// leaves no evidence.
    pub(super) fn excuse_of_blow(&mut self, fault: Fault) {
        if let (Fault::Kill { .. }, Some(ovm)) = (fault, self.service.ovm()) {
            self.died.insert(ovm);
            self.see(&Seen::Killed(ovm));
        }
        let healthy = self.healthy_replicas();
        if healthy.is_empty() {
            self.excuse.get_or_insert("no healthy replica");
            return;
        }
        if let Fault::Kill { .. } = fault {
            let half_open = |c: &&Conversation| !c.established;
            self.refused
                .extend(self.observer.conversations.iter().filter(half_open).map(|c| (c.client, c.isn)));
            // Evidence (e) needs RVMs that have kept up to dispute closes in several conversations, within the hold.
            let mut prompt = false;
            for g in healthy {
                let (guest, link) = (&self.knobs.guests[g], &self.knobs.guest_links.get(g));
                let quick = guest.think_us.1 <= 1000
                    && link.is_none_or(|l| l.delay_us + l.jitter_us <= 500 && l.faithful());
                let id = self.guests[g].id;
                let conversations = self.observer.conversations.iter();
                let kept_up = conversations.filter(|c| quick && c.is_open() && c.kept_up(id));
                let kept_up: Vec<_> = kept_up.map(|c| (c.client, c.isn)).collect();
                prompt |= kept_up.len() > 2;
                self.disputable.extend(kept_up);
            }
            if !prompt {
                self.excuse.get_or_insert("a close that nobody could dispute");
            }
        }
    }
}
