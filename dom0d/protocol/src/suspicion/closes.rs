//! Closes of the OVM that wait for an RVM to do the same, over all conversations. Several closes that no RVM shares are
//! evidence (e), if the OVM also refuses the daemon's own SYN (rule 11).
//!
//! A service may also close connections on purpose, by timers of its own, before its replicas do. Then it still
//! listens.

use core::net::SocketAddr;
use core::time::Duration;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::key::{ConversationId, Key};
use crate::time::Instant;
use crate::wire::{Flags, Options, Segment};

/// Most refused handshakes that are remembered while closes are held; more would add nothing.
const REFUSALS: usize = 16;

/// Closes wait for the OVM's answer to the daemon's SYN for at most this many times [`crate::Timing::close_hold`]: by
/// then a service that dies with 50,000 conversations has closed them, and its listening socket.
const WAIT: u32 = 50;

/// The OVM closes on purpose if it accepts a connection at least this many times [`crate::Timing::close_hold`] after
/// the last close. A dying process may close its listening socket last, and a busy machine may stop it in between.
const SURE: u32 = 5;

/// How many ports are drawn, at most, to find a free one for the daemon's SYN.
const DRAWS: u64 = 16;

/// The lowest port that is drawn.
const FIRST_PORT: u16 = 0x8000;

/// See the module.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Closes {
    /// Conversations in which a FIN or RST of the OVM is held.
    held: BTreeSet<ConversationId>,
    /// Those of them whose close RVMs dispute.
    disputed: BTreeSet<ConversationId>,
    /// Handshakes that the OVM refused while closes are held.
    refused: BTreeSet<Key>,
    /// When RVMs first disputed one of those closes, or the OVM refused one of those handshakes.
    first: Instant,
    /// When the OVM last closed a conversation, or RVMs last disputed that, or the OVM last refused a handshake.
    last: Instant,
    /// Whether the OVM accepted the daemon's last SYN, and when its answer arrived.
    listens: Option<(bool, Instant)>,
    /// The daemon's SYNs: at most one for each socket of the PSC.
    probes: Vec<Probe>,
    /// When the daemon sent the last of them.
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

    /// Number of other conversations whose close RVMs dispute, plus refused handshakes, which count as conversations.
    pub(crate) fn unshared_beside(&self, id: ConversationId) -> usize {
        self.disputed() - usize::from(self.disputed.contains(&id)) + self.refused.len()
    }

    /// RVMs disputed the close of this conversation as of its last turn.
    pub(crate) fn is_disputed(&self, id: ConversationId) -> bool {
        self.disputed.contains(&id)
    }

    /// The OVM refused a handshake.
    pub(crate) fn note_refusal(&mut self, key: Key, now: Instant) {
        if self.refused.len() < REFUSALS && self.refused.insert(key) {
            self.note_unshared(now);
        }
    }

    /// Notes whether a conversation's close is held and disputed.
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

    /// Whether the OVM closes several conversations on purpose: true if it accepts a connection [`SURE`] holds after
    /// the last close. Only a refusal counts against it, because a client can fill the backlog of a living service so
    /// that it does not answer (rule 11). `None` while the answer is still to come. `heard_since` is when the daemon
    /// was last late: the OVM may have sent long before whatever arrived until then.
    pub(crate) fn are_on_purpose(&self, hold: Duration, heard_since: Instant, now: Instant) -> Option<bool> {
        match self.listens {
            Some((false, _)) => Some(false),
            Some((true, at)) if at >= self.last.max(heard_since) + hold * SURE => Some(true),
            _ => (now >= self.first.max(heard_since) + hold * WAIT).then_some(true),
        }
    }

    /// When the daemon must send the OVM a SYN, because RVMs dispute several closes. Not at once: a dying process may
    /// close its connections before its listening socket. And again while the answer is not conclusive.
    pub(crate) fn probe_due(&self, hold: Duration, heard_since: Instant, now: Instant) -> Option<Instant> {
        let is_wanted = self.unshared() > 1 && self.are_on_purpose(hold, heard_since, now).is_none();
        is_wanted.then(|| self.probed.max(self.first) + hold / 2)
    }

    /// The conversation in whose client's name the daemon sends the SYN: the OVM can reach that client.
    pub(crate) fn begin_probe(&mut self, now: Instant) -> Option<ConversationId> {
        self.probed = now;
        self.disputed.first().or(self.held.first()).copied()
    }

    /// The SYN to the socket `guest` of the OVM, in the name of `client`'s host, from a port that is `free` and that no
    /// client can predict. Each repetition is the same SYN, so that the daemon recognises a late answer.
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

    /// Closes that the former OVM began are for its successor to decide.
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

#[cfg(test)]
mod tests {
    use super::*;

    const HOLD: Duration = Duration::from_millis(20);

    fn at(ms: u64) -> Instant {
        Instant::from_micros(ms * 1_000)
    }

    /// RVMs disputed two closes of the OVM at 10 ms, and the OVM accepted the daemon's SYN at `accepted` ms.
    fn disputed(accepted: u64) -> Closes {
        let mut closes = Closes::default();
        for n in [1, 2] {
            closes.set(ConversationId::for_tests(n), true, true, at(10));
        }
        closes.listens = Some((true, at(accepted)));
        closes
    }

    #[test]
    fn closes_are_on_purpose_if_the_service_accepts_a_connection_long_enough_after_the_last() {
        for (accepted, expected) in [(109, None), (110, Some(true))] {
            assert_eq!(
                disputed(accepted).are_on_purpose(HOLD, at(0), at(accepted)),
                expected,
                "{accepted} ms"
            );
        }
    }

    #[test]
    fn a_further_close_counts_before_anybody_disputes_it() {
        for (accepted, expected) in [(150, None), (200, Some(true))] {
            let mut closes = disputed(accepted);
            closes.set(ConversationId::for_tests(3), true, false, at(100));
            assert_eq!(closes.are_on_purpose(HOLD, at(0), at(accepted)), expected, "{accepted} ms");
        }
    }

    #[test]
    fn what_a_late_daemon_hears_may_have_been_said_long_before() {
        for (late, expected) in [(10, Some(true)), (11, None)] {
            assert_eq!(disputed(110).are_on_purpose(HOLD, at(late), at(110)), expected, "late at {late} ms");
        }
        let mut silent = disputed(0);
        silent.listens = None;
        for (late, expected) in [(10, Some(true)), (500, None)] {
            assert_eq!(silent.are_on_purpose(HOLD, at(late), at(1_010)), expected, "late at {late} ms");
        }
    }
}
