//! Clients' handshakes with the OVM, until the client's third segment proves its address.
//!
//! Handshakes have a table of their own: a SYN flood fills nothing else, and costs replicas nothing (rule 6).

use core::time::Duration;
use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::conversation::turn::Turn;
use crate::conversation::{Client, Conversation, LEAST_MSS, Told};
use crate::counters::Counters;
use crate::encoding;
use crate::event::{LinkAddress, ServerId};
use crate::follower::leg::Leg;
use crate::follower::queue::Queue;
use crate::key::{ConversationId, Key, Slot};
use crate::suspicion::REMINDERS;
use crate::tcp::seq::{later, position_of};
use crate::time::Instant;
use crate::wire::{Flags, Options, Segment};

/// How long a handshake keeps its entry whatever else arrives: in a flood the SYN-ACK and the third segment queue
/// behind as many SYNs as the plane has room for.
const YOUNG: Duration = Duration::from_secs(1);

/// The OVM's SYN-ACK, as the client saw it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct SynAck {
    /// The server that sent it; `None` if that server has forgotten the handshake since.
    server: Option<ServerId>,
    iss: u32,
    window: u16,
    options: Options,
}

/// A handshake that a client began.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Embryonic {
    /// When the daemon received the SYN.
    begun: Instant,
    link: LinkAddress,
    iss: u32,
    window: u16,
    flags: Flags,
    options: Options,
    answer: Option<SynAck>,
    /// Tells this handshake from an earlier one of the same addresses in the queue of ages.
    number: u64,
}

/// What became of a segment that may complete a handshake.
pub(crate) enum Third {
    /// No such handshake, or the segment does not complete it.
    NotYet,
    /// The client has accepted the OVM's SYN-ACK.
    Complete(Embryonic),
}

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Handshakes {
    #[serde(serialize_with = "encoding::by_key")]
    by_key: HashMap<Key, Embryonic>,
    ages: VecDeque<(u64, Key)>,
    begun: u64,
    /// The first handshake since the daemon last received anything from the OVM.
    unheard: Option<Unheard>,
}

impl Handshakes {
    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// A client's SYN. The daemon forwards it to the OVM without what can't be replicated: Fast Open, MPTCP and data.
    pub(crate) fn handle_syn(&mut self, key: Key, link: LinkAddress, syn: &Segment<'_>, turn: &mut Turn<'_>) {
        let known = self.by_key.get(&key).is_some_and(|embryonic| embryonic.iss == syn.seq);
        if !known {
            if self.is_full_of_young(&key, turn) {
                turn.counters.embryonic += 1;
                return;
            }
            self.begun += 1;
            let embryonic = Embryonic {
                begun: turn.now,
                link,
                iss: syn.seq,
                window: syn.window,
                flags: syn.flags,
                options: Options {
                    timestamps: syn.options.timestamps.map(|(tsval, _)| (tsval, 0)),
                    ..syn.options
                },
                answer: None,
                number: self.begun,
            };
            self.by_key.insert(key, embryonic);
            self.ages.push_back((self.begun, key));
            self.make_room(turn);
        }
        if let (Some(embryonic), Some((slot, ovm))) = (self.by_key.get(&key), turn.ovm()) {
            if let Some(answer) = embryonic.answer.filter(|answer| answer.server != Some(ovm)) {
                // The client may have accepted the deposed OVM's SYN-ACK, so that SYN-ACK stands.
                return embryonic.repeat(&key, &answer, turn);
            }
            embryonic.forward(&key, slot, turn);
            self.unheard.get_or_insert(Unheard { key, since: turn.now, reminders: 0 });
        }
    }

    /// The daemon received something from the OVM: the OVM lives.
    pub(crate) fn note_ovm_heard(&mut self, counters: &mut Counters) {
        if self.unheard.take().is_some_and(|unheard| unheard.reminders > 0) {
            counters.acquittals += 1;
        }
    }

    /// An RVM answered in the OVM's place.
    pub(crate) fn forget_unheard(&mut self) {
        self.unheard = None;
    }

    /// When the daemon must send the silent OVM a SYN again, or send the SYN to RVMs.
    pub(crate) fn question_due(&self, limit: Duration) -> Option<Instant> {
        self.unheard
            .as_ref()
            .filter(|unheard| !unheard.is_asked())
            .map(|unheard| unheard.due(patience(limit)))
    }

    /// Evidence (c) for a SYN: if the OVM answers nothing at all, sends the SYN to the OVM again, asks it for a sign of
    /// life, and then sends the SYN to the promotable RVMs: an RVM that answers is a witness (rule 11).
    pub(crate) fn ask_witnesses(&mut self, turn: &mut Turn<'_>) {
        let limit = patience(turn.config.timing.unacked_limit);
        let Some(unheard) = &mut self.unheard else { return };
        let Some(embryonic) = self.by_key.get(&unheard.key) else {
            self.unheard = None;
            return;
        };
        unheard.since = turn.measured_from(unheard.since);
        while !unheard.is_asked() && turn.now >= unheard.due(limit) {
            unheard.reminders += 1;
            if !unheard.is_asked() {
                if let Some((slot, _)) = turn.ovm() {
                    embryonic.forward(&unheard.key, slot, turn);
                    // An OVM that can't reach that client, or has no room for another handshake, is still alive.
                    turn.ask_ovm();
                }
                continue;
            }
            for (slot, _) in turn.roster() {
                let promotable =
                    turn.queue.get(slot).is_some_and(|server| turn.not_promotable(server).is_none());
                if promotable {
                    embryonic.forward(&unheard.key, slot, turn);
                }
            }
        }
    }

    /// True if the segment is an RVM's answer to the SYN of [`Self::ask_witnesses`], which is evidence against the OVM.
    pub(crate) fn is_witness(&self, key: &Key, segment: &Segment<'_>) -> bool {
        segment.flags.has(Flags::SYN)
            && self.unheard.as_ref().is_some_and(|unheard| unheard.is_asked() && unheard.key == *key)
            && self.acknowledges(key, segment)
    }

    /// The table is full of young handshakes. The daemon drops the SYN, as a listener with a full backlog does, and the
    /// client retransmits it. If a young handshake made room instead, its client's third segment would be refused.
    fn is_full_of_young(&self, key: &Key, turn: &Turn<'_>) -> bool {
        let oldest = self.ages.front().and_then(|(_, key)| self.by_key.get(key));
        self.by_key.len() >= turn.config.limits.embryonic as usize
            && !self.by_key.contains_key(key)
            && oldest.is_some_and(|oldest| turn.now.since(oldest.begun) < YOUNG)
    }

    fn make_room(&mut self, turn: &mut Turn<'_>) {
        let limit = turn.config.limits.embryonic as usize;
        while self.by_key.len() > limit || self.ages.len() > 2 * limit {
            let Some((number, key)) = self.ages.pop_front() else { break };
            if self.by_key.get(&key).is_some_and(|embryonic| embryonic.number == number) {
                self.by_key.remove(&key);
                turn.counters.embryonic += 1;
            }
        }
        while let Some((number, key)) = self.ages.front() {
            if self.by_key.get(key).is_some_and(|embryonic| embryonic.number == *number) {
                break;
            }
            self.ages.pop_front();
        }
    }

    /// Notes the OVM's SYN-ACK; true if it answers a known handshake.
    pub(crate) fn handle_syn_ack(&mut self, key: &Key, server: ServerId, segment: &Segment<'_>) -> bool {
        let Some(embryonic) = self.by_key.get_mut(key) else { return false };
        if segment.ack != embryonic.iss.wrapping_add(1) {
            return false;
        }
        embryonic.answer = Some(SynAck {
            server: Some(server),
            iss: segment.seq,
            window: segment.window,
            options: segment.options,
        });
        true
    }

    /// Another SYN-ACK stands already, from another server or from a handshake that this server has forgotten: the
    /// client may have accepted that one.
    pub(crate) fn is_answered_otherwise(&mut self, key: &Key, server: ServerId, iss: u32) -> bool {
        let Some(answer) = self.by_key.get_mut(key).and_then(|embryonic| embryonic.answer.as_mut()) else {
            return false;
        };
        if answer.server == Some(server) && answer.iss != iss {
            answer.server = None;
        }
        answer.server != Some(server)
    }

    /// Whether a server's segment acknowledges the SYN of a handshake, as a SYN-ACK or a refusing RST does.
    pub(crate) fn acknowledges(&self, key: &Key, segment: &Segment<'_>) -> bool {
        self.by_key.get(key).is_some_and(|embryonic| {
            segment.flags.has(Flags::ACK) && segment.ack == embryonic.iss.wrapping_add(1)
        })
    }

    /// True if a server's segment acknowledges the SYN and nothing more. Its TSval becomes the last one that the client
    /// was sent.
    pub(crate) fn note_acknowledgment(&mut self, key: &Key, segment: &Segment<'_>) -> bool {
        let begins = segment.sequence_length() == 0 && self.acknowledges(key, segment);
        let told = self.by_key.get_mut(key).and_then(|embryonic| embryonic.answer.as_mut());
        if let (Some((told, _)), Some((tsval, _))) =
            (told.and_then(|answer| answer.options.timestamps.as_mut()), segment.options.timestamps)
            && begins
            && later(tsval, *told)
        {
            *told = tsval;
        }
        begins
    }

    /// The OVM refused a handshake; true if the segment refuses a known one.
    pub(crate) fn handle_refusal(&mut self, key: &Key, segment: &Segment<'_>) -> bool {
        self.acknowledges(key, segment) && self.by_key.remove(key).is_some()
    }

    /// A client's segment with an ACK: the third segment of its handshake, or data that overtook the third.
    pub(crate) fn handle_third(&mut self, key: &Key, segment: &Segment<'_>, ovm: Option<ServerId>) -> Third {
        let Some(embryonic) = self.by_key.get(key) else { return Third::NotYet };
        let accepted = embryonic.answer.is_some_and(|answer| {
            // A segment that the OVM would not accept as the third opens nothing at RVMs either. If the server that
            // answered was deposed, the daemon accepts a keepalive, too: its client has a connection.
            let known = ovm == answer.server;
            let window = u64::from(known)..=1 + u64::from(answer.window);
            segment.flags.has(Flags::ACK)
                && segment.ack == answer.iss.wrapping_add(1)
                && position_of(embryonic.iss, segment.seq, 1).is_some_and(|start| window.contains(&start))
        });
        if !accepted || segment.flags.has(Flags::RST) {
            return Third::NotYet;
        }
        self.by_key.remove(key).map_or(Third::NotYet, Third::Complete)
    }

    /// A client has begun this handshake and not completed it.
    pub(crate) fn knows(&self, key: &Key) -> bool {
        self.by_key.contains_key(key)
    }

    /// The client gave up.
    pub(crate) fn forget(&mut self, key: &Key) {
        self.by_key.remove(key);
    }

    /// A new OVM knows no handshake: the daemon sends it at once the SYNs that the old OVM has not answered.
    pub(crate) fn reopen(&mut self, turn: &mut Turn<'_>) {
        self.unheard = None;
        // In order of age, so that the same inputs give the same outputs.
        for (number, key) in &self.ages {
            let embryonic = self.by_key.get(key).filter(|embryonic| embryonic.number == *number);
            if let (Some(embryonic), Some((slot, _))) = (embryonic, turn.ovm())
                && embryonic.answer.is_none()
            {
                embryonic.forward(key, slot, turn);
            }
        }
    }
}

/// A SYN after which the OVM has sent nothing at all.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Unheard {
    key: Key,
    since: Instant,
    reminders: u32,
}

/// How long a SYN may stay unanswered before the daemon sends it to RVMs: longer than the second after which a kernel
/// repeats a lost ARP request or Neighbor Solicitation (RFC 4861 §10).
fn patience(unacked_limit: Duration) -> Duration {
    unacked_limit * 6
}

impl Unheard {
    /// The OVM was reminded often enough, and RVMs were asked.
    fn is_asked(&self) -> bool {
        self.reminders > REMINDERS
    }

    fn due(&self, limit: Duration) -> Instant {
        self.since + limit * (self.reminders + 1) / (REMINDERS + 1)
    }
}

impl Embryonic {
    fn forward(&self, key: &Key, slot: Slot, turn: &mut Turn<'_>) {
        let Some(server) = turn.queue.get(slot).map(|server| server.id) else { return };
        let Some(guest) = turn.guest(slot, key.psc) else { return };
        let syn = Segment {
            src: key.client,
            dst: guest,
            seq: self.iss,
            ack: 0,
            flags: self.flags,
            window: self.window,
            urgent: 0,
            options: self.options,
            ecn: 0,
            payload: &[],
        };
        turn.send_to_server(server, syn.emit());
    }

    /// Retransmits the SYN-ACK to the client.
    fn repeat(&self, key: &Key, answer: &SynAck, turn: &mut Turn<'_>) {
        let syn_ack = Segment {
            src: key.psc,
            dst: key.client,
            seq: answer.iss,
            ack: self.iss.wrapping_add(1),
            flags: Flags::SYN.with(Flags::ACK),
            window: answer.window,
            urgent: 0,
            options: answer.options,
            ecn: 0,
            payload: &[],
        };
        turn.send_to_client(self.link, syn_ack.emit());
    }

    /// The conversation that the handshake leads to, with legs that are yet to be opened on every other server.
    pub(crate) fn open(self, id: ConversationId, key: Key, turn: &mut Turn<'_>) -> Option<Box<Conversation>> {
        let answer = self.answer?;
        let default_mss = if key.psc.is_ipv4() { 536 } else { 1220 };
        let client = Client::agreed(self.iss, self.window, &self.options, &answer.options, default_mss);
        let scales = client.shift.is_some();
        let told = Told::by_syn_ack(answer.iss, answer.window, &answer.options, scales, default_mss);
        let mut conversation =
            Box::new(Conversation::opened((id, key), self.begun, self.link, client, told, turn));
        let mut recuperates = true;
        for (slot, server) in turn.roster() {
            let leg = if Some(server) == answer.server {
                let mut leg = Conversation::through_leg(server, &told, answer.window);
                leg.numbers.mss = leg.numbers.mss.max(LEAST_MSS).min(mtu_mss(slot, &key, turn.queue));
                // A new OVM that has not caught up yet must not see this client's bytes before the answers that the
                // client may have seen (rule 3).
                leg.through = turn.queue.ovm() == Some(slot) && !turn.is_catching_up();
                leg.ack_due = !leg.through;
                recuperates = !leg.through;
                leg
            } else {
                Leg::opening(server)
            };
            conversation.add_leg(slot, leg, turn);
        }
        if recuperates {
            // The daemon plays the OVM: the new OVM is behind, or the server that the client's handshake was with has
            // been deposed.
            conversation.begin_recuperation();
        }
        Some(conversation)
    }
}

/// The MSS that fits the vif's MTU: the MTU less the fixed headers (RFC 9293 §3.7.1).
pub(crate) fn mtu_mss(slot: Slot, key: &Key, queue: &Queue) -> u16 {
    let headers = if key.psc.is_ipv4() { 40 } else { 60 };
    queue.get(slot).map_or(u16::MAX, |server| server.mtu.saturating_sub(headers))
}
