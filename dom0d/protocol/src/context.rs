//! Everything of a service except its conversations. A conversation sees it through its [`Turn`]; [`Context::follow`]
//! then carries out what the turn's [`Consequences`] name.

use core::net::SocketAddr;
use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::accounts::{Accounts, Share};
use crate::config::ServiceConfig;
use crate::conversation::turn::{Consequences, Turn};
use crate::counters::Counters;
use crate::epoch::Recuperation;
use crate::event::{Event, EventKind, Evidence, LinkAddress, ServerId, StaleReason};
use crate::follower::queue::Queue;
use crate::key::{ConversationId, MAX_SERVERS, Slot};
use crate::outbox::Outbox;
use crate::output::Destination;
use crate::plane::Plane;
use crate::record::Record;
use crate::suspicion::closes::Closes;
use crate::suspicion::excuses::Excuses;
use crate::suspicion::signs::Signs;
use crate::time::Instant;

/// See the module.
#[derive(Serialize, Deserialize)]
pub(crate) struct Context {
    pub(crate) now: Instant,
    pub(crate) config: ServiceConfig,
    pub(crate) queue: Queue,
    pub(crate) record: Record,
    pub(crate) epoch: u64,
    pub(crate) recuperation: Recuperation,
    pub(crate) counters: Counters,
    pub(crate) outbox: Outbox,
    pub(crate) accounts: Accounts,
    pub(crate) signs: Signs,
    pub(crate) excuses: Excuses,
    pub(crate) closes: Closes,
    pub(crate) plane: Plane,
    pub(crate) pending: Pending,
}

/// Consequences of turns that the service has not carried out yet.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pending {
    /// Conversations whose clients must be sent a RST.
    pub(crate) resets: VecDeque<ConversationId>,
    /// Slots whose server produced something: its mark in the record may advance.
    pub(crate) progressed: [bool; MAX_SERVERS],
    /// Conversations in which an RVM's answer is acknowledged once its mark has advanced: at the end of the input at
    /// hand.
    #[serde(skip)]
    pub(crate) unacknowledged: Vec<ConversationId>,
    /// Evidence against the OVM.
    pub(crate) evidence: Option<Evidence>,
    /// RVMs that fell behind a limit.
    pub(crate) laggards: Vec<Slot>,
}

impl Context {
    pub(crate) fn new(config: ServiceConfig) -> Self {
        Self {
            now: Instant::default(),
            config,
            queue: Queue::default(),
            record: Record::default(),
            epoch: 0,
            recuperation: Recuperation { reported: true, ..Recuperation::default() },
            counters: Counters::default(),
            outbox: Outbox::default(),
            accounts: Accounts::default(),
            signs: Signs::default(),
            excuses: Excuses::default(),
            closes: Closes::default(),
            plane: Plane::default(),
            pending: Pending::default(),
        }
    }

    /// A turn of the conversation whose share is `before`.
    pub(crate) fn turn(&mut self, before: Share) -> Turn<'_> {
        Turn {
            now: self.now,
            config: &self.config,
            queue: &self.queue,
            record: &mut self.record,
            counters: &mut self.counters,
            outbox: &mut self.outbox,
            epoch: self.epoch,
            recuperation: &self.recuperation,
            accounts: &self.accounts,
            signs: &self.signs,
            excuses: &self.excuses,
            closes: &self.closes,
            plane: &self.plane,
            before,
            then: Consequences { progressed: self.pending.progressed, ..Consequences::default() },
        }
    }

    /// The turn of conversation `id` is over, and its share is `after` now: carries out what follows, or notes it in
    /// [`Pending`].
    pub(crate) fn follow(
        &mut self,
        id: ConversationId,
        (before, then): (Share, Consequences),
        after: &Share,
    ) {
        self.queue.settle(&before, after);
        self.accounts.settle(id, &before, after);
        if before.is_held || after.is_held {
            self.closes.set(id, after.is_held, after.is_disputed, self.now);
        }
        if before.is_recuperating || after.is_recuperating {
            self.recuperation.set_pending(id, after.is_recuperating);
        }
        self.recuperation.recuperated += u64::from(then.recuperated);
        if then.reset {
            self.recuperation.reset += 1;
            self.pending.resets.push_back(id);
        }
        if then.unacknowledged {
            self.pending.unacknowledged.push(id);
        }
        self.heed(then);
    }

    /// When the daemon must send the OVM a SYN of its own.
    pub(crate) fn probe_due(&self) -> Option<Instant> {
        self.closes.probe_due(self.config.timing.close_hold, self.excuses.heard_since(), self.now)
    }

    /// Carries out or notes what follows from any turn, a conversation's or not.
    fn heed(&mut self, then: Consequences) {
        for (slot, reason) in Slot::all().zip(then.stale) {
            if let (Some(reason), Some(server)) = (reason, self.queue.get_mut(slot)) {
                server.stale = Some(reason);
            }
        }
        self.pending.progressed = then.progressed;
        self.pending.evidence = self.pending.evidence.or(then.evidence);
        self.pending.laggards.extend(then.laggards);
        self.recuperation.first_byte_due &= !then.first_byte;
        if then.answered {
            self.signs.note_answer(self.now);
        }
        if then.taken {
            self.signs.note_taken(self.now);
        }
        if then.asked {
            self.signs.note_asked(self.now);
        }
        if then.looked_at {
            self.plane.note_accounted();
        }
    }

    /// Runs `act`, which belongs to no conversation but needs a [`Turn`].
    pub(crate) fn act<R>(&mut self, act: impl FnOnce(&mut Turn<'_>) -> R) -> R {
        let mut turn = self.turn(Share::default());
        let done = act(&mut turn);
        let (_, then) = turn.end();
        self.heed(then);
        done
    }

    pub(crate) fn send_to_client(&mut self, link: LinkAddress, packet: Vec<u8>) {
        self.send(Destination::Client(link), packet, 0);
    }

    pub(crate) fn send_to_server(&mut self, server: ServerId, packet: Vec<u8>) {
        self.send(Destination::Server(server), packet, 0);
    }

    /// Sends a packet that [`crate::wire::Segment::emit_large`] made.
    pub(crate) fn send(&mut self, to: Destination, packet: Vec<u8>, segment: u16) {
        self.outbox.send(to, packet, segment);
    }

    pub(crate) fn event(&mut self, kind: EventKind) {
        let event = Event { at: self.now, kind };
        self.counters.events += u64::from(!self.outbox.event(event, self.config.limits.events));
    }

    /// Every RVM missed something.
    pub(crate) fn mark_all_stale(&mut self, reason: StaleReason) {
        self.act(|turn| turn.mark_all_stale(reason));
    }

    /// The OVM's slot and id.
    pub(crate) fn ovm(&self) -> Option<(Slot, ServerId)> {
        self.queue.ovm_server().map(|server| (server.slot, server.id))
    }

    /// The address that `psc` has on the server in `slot`.
    pub(crate) fn guest(&self, slot: Slot, psc: SocketAddr) -> Option<SocketAddr> {
        self.queue.guest(slot, psc)
    }

    /// The OVM has not produced every answer that clients were sent before it was promoted.
    pub(crate) fn is_catching_up(&self) -> bool {
        self.recuperation.is_catching_up(&self.queue, &self.record)
    }

    /// Forgets entries of the record that every follower has produced.
    pub(crate) fn release_record(&mut self) {
        let behind = self.queue.ovm().filter(|_| self.is_catching_up());
        self.record.release(self.queue.rvms().chain(behind));
    }

    /// All conversations of the epoch have ended recuperation: reports that once.
    pub(crate) fn report_recuperated(&mut self) {
        self.recuperation.reported = true;
        let (recuperated, reset) = (self.recuperation.recuperated, self.recuperation.reset);
        self.event(EventKind::Recuperated { epoch: self.epoch, recuperated, reset });
    }
}
