//! Conversations that a data plane passes between client and OVM by itself (see [`crate::Flow`]), so that the engine
//! only gets copies of their segments: which those are, and when passing begins and ends.
//!
//! The engine hands over one conversation at a time ([`Rule::HandOver`]), at a moment when the plane has nothing more
//! to report ([`crate::Input::PlaneIdle`]). The plane gives it back by itself with the first segment that advances it
//! and can't be passed. Passing ends for all conversations at once when the plane is stopped, as it must be before a
//! cutover: the engine first receives everything that the plane passed under the old epoch (rules 1 and 2).

use core::net::SocketAddr;

use crate::event::{EventKind, Evidence, LinkAddress, Release, ServerId, StaleReason, Uncovered};
use crate::input::Passage;
use crate::key::{ConversationId, Key};
use crate::output::{Output, Rule};
use crate::rules::rule;
use crate::service::Service;
use crate::time::Instant;
use crate::wire::{self, Parsed, Segment};

impl Service {
    /// The data plane can pass conversations by itself.
    pub(crate) fn set_plane_passes(&mut self) {
        self.ctx.plane.set_passes();
    }

    /// Like [`Service::handle_client`], for a packet that the plane may have passed.
    pub(crate) fn handle_tapped_client(
        &mut self,
        now: Instant,
        link: LinkAddress,
        packet: &[u8],
        passage: Passage,
    ) {
        if passage == Passage::Unattended {
            return self.lose_sight(now, packet, |_, segment| Some((segment.src, segment.dst)));
        }
        self.ctx.plane.begin(passage);
        self.handle_client(now, link, packet);
        self.end_passage();
    }

    /// Like [`Service::handle_server`], for a packet that the plane may have passed.
    pub(crate) fn handle_tapped_server(
        &mut self,
        now: Instant,
        server: ServerId,
        packet: &[u8],
        passage: Passage,
    ) {
        if passage == Passage::Unattended {
            return self.lose_sight(now, packet, |service, segment| {
                service.psc_of(segment.src).map(|psc| (segment.dst, psc))
            });
        }
        self.ctx.plane.begin(passage);
        self.handle_server(now, server, packet);
        self.end_passage();
    }

    /// If the plane passed the packet and no conversation has accounted for it, its receiver may have accepted bytes
    /// that no RVM gets (rule 10).
    fn end_passage(&mut self) {
        if self.ctx.plane.end() {
            self.ctx.counters.passed_unrecorded += 1;
            self.ctx.mark_all_stale(StaleReason::UncoveredConversation);
            self.settle();
        }
    }

    /// The plane continues a conversation without the engine: no RVM can follow it (rules 8 and 10).
    fn lose_sight(
        &mut self,
        now: Instant,
        packet: &[u8],
        parties: impl FnOnce(&Self, &Segment<'_>) -> Option<(SocketAddr, SocketAddr)>,
    ) {
        self.begin(now);
        let Ok(Parsed::Tcp(segment)) = wire::parse(packet) else { return };
        let Some((client, psc)) = parties(self, &segment) else { return };
        let key = Key { client, psc };
        self.handshakes.forget(&key);
        if let Some(id) = self.table.find(&key) {
            self.ctx.event(EventKind::Unprotected { client, reason: Uncovered::Unrecorded });
            self.end(id, |conversation, turn| conversation.leave_to_plane(turn));
        }
        self.ctx.mark_all_stale(StaleReason::UncoveredConversation);
        self.release_for(Release::Unattended);
        self.settle();
    }

    /// The plane passes nothing any more, and the engine has received everything that it had passed.
    pub(crate) fn handle_plane_stopped(&mut self) {
        self.ctx.plane.note_stopped();
    }

    /// The plane passed something that it could not report: no RVM can follow.
    pub(crate) fn handle_untold(&mut self) {
        self.ctx.mark_all_stale(StaleReason::MissedBytes);
        self.release_for(Release::Unattended);
    }

    /// The answer to [`Output::StopPlane`]: acts on the evidence if the `accused` is still the OVM.
    pub(crate) fn handle_confirmed(&mut self, now: Instant, accused: ServerId, evidence: Evidence) {
        self.ctx.now = self.ctx.now.max(now);
        if self.ovm() == Some(accused) {
            self.accuse(evidence);
        }
        self.settle();
    }

    /// The plane has nothing more to report, and no output waits.
    pub(crate) fn handle_plane_idle(&mut self) {
        self.idle = true;
    }

    /// The next conversation that the plane may pass by itself, at a moment when the engine has processed everything
    /// that the plane has seen.
    pub(crate) fn next_handover(&mut self) -> Option<Output> {
        while self.idle {
            let id = self.passable.pop_front()?;
            let Some(conversation) = self.table.get_mut(id) else { continue };
            conversation.is_passable_queued = false;
            if let Some(handover) = self.ctx.act(|turn| conversation.hand_over(turn)) {
                return Some(Output::Rule(Rule::HandOver(Box::new(handover))));
            }
        }
        None
    }

    /// Whether a conversation waits for [`crate::Input::PlaneIdle`] to be handed over.
    pub fn wants_to_hand_over(&self) -> bool {
        !self.passable.is_empty()
    }

    /// Acts on evidence against the OVM, after stopping a plane that passes conversations by itself (rule 2).
    pub(crate) fn suspect(&mut self, evidence: Evidence) {
        let of_silence = matches!(evidence, Evidence::UnacknowledgedSegment | Evidence::NoProgress);
        let was_asked = !of_silence || self.ctx.signs.was_asked();
        rule!(self.ctx.counters, broken_rule_11, was_asked, "the OVM was accused but never asked");
        match self.ctx.ovm() {
            Some((_, accused)) if self.ctx.plane.stops().is_some() => {
                self.ctx.outbox.push(Output::StopPlane { accused, evidence });
            }
            _ => self.accuse(evidence),
        }
    }

    /// Forgets a conversation that waited to be handed over and ends.
    pub(crate) fn forget_passable(&mut self, id: ConversationId) {
        self.passable.retain(|queued| *queued != id);
    }
}
