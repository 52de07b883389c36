//! Closes of the OVM that wait for an RVM to do the same, in all conversations: several that nobody shares are evidence (e)
//! if the OVM also refuses the daemon's own SYN (rule 11).
//!
//! A service may close connections on purpose before its replicas do, by a clock of its own: then it still listens.

use core::net::SocketAddr;
use core::time::Duration;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::key::{ConversationId, Key};
use crate::time::Instant;
use crate::wire::{Flags, Options, Segment};

/// Refused handshakes counted while closes are held; more tell no more.
const REFUSALS: usize = 16;

/// Closes wait for the OVM's answer to the daemon's SYN for at most this many holds: a service that dies with
/// 50,000 conversations has closed them, and its listening socket, by then.
const WAIT: u32 = 50;

/// The OVM closes on purpose if it accepts a connection this many holds after the last close. A process that dies may lose
/// its listening socket last, and a busy machine may stop it in between.
const SURE: u32 = 5;

/// Ports that are drawn for the daemon's SYN until one is free.
const DRAWS: u64 = 16;

/// They are drawn from this one up.
const FIRST_PORT: u16 = 0x8000;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Closes {
    /// Conversations in which a FIN or RST of the OVM is held.
    held: BTreeSet<ConversationId>,
    /// Those among them whose close RVMs dispute.
    disputed: BTreeSet<ConversationId>,
    /// Handshakes that the OVM refused meanwhile.
    refused: BTreeSet<Key>,
    /// When RVMs first disputed one of those closes, or the OVM refused one of those handshakes.
    first: Instant,
    /// When the OVM last closed a conversation, or RVMs last disputed that, or the OVM last refused a handshake.
    last: Instant,
    /// Whether the OVM accepted the daemon's last SYN, and when the daemon heard so.
    listens: Option<(bool, Instant)>,
    /// The daemon's SYNs: at most one for each socket of the PSC.
    probes: Vec<Probe>,
    /// When the last of them was sent.
    probed: Instant,
}

/// A SYN of the daemon's own.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Probe {
    key: Key,
    iss: u32,
}

impl Closes {
    /// No close is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Conversations whose close RVMs dispute.
    pub(crate) fn disputed(&self) -> usize {
        self.disputed.len()
    }

    /// Conversations beside this one whose close RVMs dispute, and handshakes that were refused: each is a conversation too.
    pub(crate) fn unshared_beside(&self, id: ConversationId) -> usize {
        self.disputed() - usize::from(self.disputed.contains(&id)) + self.refused.len()
    }

    /// RVMs dispute the close of this conversation, as far as is known since its last turn.
    pub(crate) fn is_disputed(&self, id: ConversationId) -> bool {
        self.disputed.contains(&id)
    }

    /// The OVM refused a handshake.
    pub(crate) fn note_refusal(&mut self, key: Key, now: Instant) {
        if self.refused.len() < REFUSALS && self.refused.insert(key) {
            self.note_unshared(now);
        }
    }

    /// A conversation's close is held now, or no longer.
    pub(crate) fn set(&mut self, id: ConversationId, is_held: bool, is_disputed: bool, now: Instant) {
        let (held, disputed) = (self.held.len(), self.disputed());
        set(&mut self.held, id, is_held);
        set(&mut self.disputed, id, is_disputed);
        if self.disputed() > disputed {
            self.note_unshared(now);
        }
        if self.held.len() > held {
            self.last = now;
        }
        if self.held.is_empty() {
            self.refused.clear();
        }
    }

    fn note_unshared(&mut self, now: Instant) {
        if self.unshared() == 1 {
            self.first = now;
            self.listens = None;
        }
        self.last = now;
    }

    fn unshared(&self) -> usize {
        self.disputed() + self.refused.len()
    }

    /// Whether the OVM closes several conversations on purpose: it accepts a connection [`SURE`] holds after the last close.
    /// Only a refusal speaks against it: a client can fill a backlog, so that a living service does not answer. `None`
    /// while the answer is still to come. `heard_since` is when the daemon last was late: what it heard until then the OVM
    /// may have said long before.
    pub(crate) fn are_on_purpose(&self, hold: Duration, heard_since: Instant, now: Instant) -> Option<bool> {
        match self.listens {
            Some((false, _)) => Some(false),
            Some((true, at)) if at >= self.last.max(heard_since) + hold * SURE => Some(true),
            _ => (now >= self.first.max(heard_since) + hold * WAIT).then_some(true),
        }
    }

    /// When the daemon must send the OVM a SYN, because RVMs dispute several closes: not at once, since a process that
    /// dies may lose its connections before its listening socket; and again while the answer is not conclusive.
    pub(crate) fn probe_due(&self, hold: Duration, heard_since: Instant, now: Instant) -> Option<Instant> {
        let is_wanted = self.unshared() > 1 && self.are_on_purpose(hold, heard_since, now).is_none();
        is_wanted.then(|| self.probed.max(self.first) + hold / 2)
    }

    /// The conversation in whose client's name the SYN is sent: the OVM can reach that one.
    pub(crate) fn begin_probe(&mut self, now: Instant) -> Option<ConversationId> {
        self.probed = now;
        self.disputed.first().or(self.held.first()).copied()
    }

    /// The SYN to the socket `guest` of the OVM, in the name of `client`'s host, from a port that is `free` and that no
    /// client can foresee. It is the same SYN each time, so that a late answer is known as such.
    pub(crate) fn probe(
        &mut self,
        client: Key,
        guest: SocketAddr,
        seed: u64,
        free: impl Fn(&Key) -> bool,
    ) -> Option<Vec<u8>> {
        if self.probes.iter().all(|probe| probe.key.psc != client.psc) {
            let mut draws = (0..DRAWS).map(|n| scatter(seed ^ self.probed.as_micros() << 8 ^ n));
            self.probes.extend(draws.find_map(|drawn| {
                let port = FIRST_PORT | (drawn >> 32) as u16;
                let key = Key { client: SocketAddr::new(client.client.ip(), port), ..client };
                free(&key).then_some(Probe { key, iss: drawn as u32 })
            }));
        }
        let probe = self.probes.iter().find(|probe| probe.key.psc == client.psc)?;
        let syn = Segment {
            src: probe.key.client,
            dst: guest,
            seq: probe.iss,
            ack: 0,
            flags: Flags::SYN,
            window: u16::MAX,
            urgent: 0,
            options: Options::default(),
            ecn: 0,
            payload: &[],
        };
        Some(syn.emit())
    }

    /// True if the OVM's segment answers the daemon's SYN.
    pub(crate) fn hear_probed(&mut self, key: &Key, segment: &Segment<'_>, now: Instant) -> bool {
        let answers = self.probes.iter().any(|probe| {
            probe.key == *key && segment.flags.has(Flags::ACK) && segment.ack == probe.iss.wrapping_add(1)
        });
        if answers {
            self.listens = Some((!segment.flags.has(Flags::RST), now));
        }
        answers
    }

    /// A client needs these addresses itself.
    pub(crate) fn give_up_probe(&mut self, key: &Key) {
        self.probes.retain(|probe| probe.key != *key);
    }

    /// What the former OVM wanted to close is its successor's to decide.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

fn set(list: &mut BTreeSet<ConversationId>, id: ConversationId, belongs: bool) {
    if belongs {
        list.insert(id);
    } else {
        list.remove(&id);
    }
}

/// SplitMix64's finalizer.
fn scatter(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}
