//! Where a conversation is, from the client's third segment on. Before that it is a handshake ([`super::handshake`]).
//!
//! ```text
//!            promotion (rule 2)            counts reached (rule 2)
//!     Open ────────────────────▶ Recuperating ────────────────▶ Open
//!       │                             │
//!       │ both FINs acknowledged, or the client's RST (RFC 9293 §3.10.7.4); a RST of the OVM (§3.5.3);
//!       │ nobody can carry it on (rule 7)
//!       ▼                             ▼
//!     Closed ◀────────────────────────┘
//! ```
//!
//! Which sides have said FIN is no state of its own: each FIN is a position in a stream, which servers reach at different
//! times.

use serde::{Deserialize, Serialize};

use crate::conversation::turn::Turn;
use crate::tcp::sender::Sender;
use crate::time::Instant;

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum State {
    /// The OVM speaks with the client itself.
    Open {
        /// Its FIN or RST, if that waits for an RVM to do the same.
        held: Option<Held>,
    },
    /// The OVM has yet to follow to where its predecessors were; the daemon plays it towards the client.
    Recuperating {
        /// How.
        playing: Box<Recuperating>,
        /// As in [`State::Open`].
        held: Option<Held>,
    },
    /// Ended for client and OVM.
    Closed {
        /// When.
        at: Instant,
        /// By the daemon, or a RST that it passed: whatever the client still sends is answered with a RST.
        was_reset: bool,
    },
}

/// A FIN or RST of the OVM that is not passed on yet.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) position: u64,
    pub(crate) rst: bool,
    /// What the OVM had of the client's bytes when it closed.
    pub(crate) had: u64,
    /// When RVMs are asked (`None`: they were), so that the opinions on all conversations are there when the
    /// first hold ends.
    pub(crate) review: Option<Instant>,
    pub(crate) until: Instant,
    /// A covering RVM has had the chance to do the same, and goes on.
    pub(crate) is_disputed: bool,
}

impl Held {
    /// RVMs get the time that a late daemon did not hear them.
    pub(crate) fn ends(&self, turn: &Turn<'_>) -> Instant {
        self.until.max(turn.excuses.heard_since() + turn.config.timing.close_hold)
    }
}

/// How the daemon plays the OVM towards the client.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Recuperating {
    /// What the daemon sends the client.
    pub(crate) sender: Sender,
    /// The client must be sent an ACK.
    pub(crate) ack_due: bool,
    /// The segment at SND.UNA must be sent again at once.
    pub(crate) resend: bool,
}

impl Recuperating {
    /// Whatever the client lacks from `acked` on, of what it was sent up to `sent`, is due at once: nobody waits for a
    /// retransmission timer.
    pub(crate) fn from(acked: u64, sent: u64) -> Self {
        let mut sender = Sender::new(acked);
        sender.highest = sent;
        Self { sender, ack_due: false, resend: false }
    }

    /// The client acknowledged `newly` bytes up to `ack`, or repeated itself.
    pub(crate) fn acknowledged(&mut self, ack: u64, newly: u64, duplicate: bool, now: Instant) {
        if newly > 0 {
            self.resend |= self.sender.acknowledged(ack, newly, now);
        } else if duplicate {
            self.resend |= self.sender.duplicate(ack);
        }
    }
}

impl State {
    /// The handshake is complete.
    pub(crate) const OPENED: Self = Self::Open { held: None };

    /// Open for client and OVM.
    pub(crate) fn is_open(&self) -> bool {
        !matches!(self, Self::Closed { .. })
    }

    /// When it ended.
    pub(crate) fn closed_at(&self) -> Option<Instant> {
        match self {
            Self::Closed { at, .. } => Some(*at),
            _ => None,
        }
    }

    pub(crate) fn was_reset(&self) -> bool {
        matches!(self, Self::Closed { was_reset: true, .. })
    }

    pub(crate) fn recuperating(&self) -> Option<&Recuperating> {
        match self {
            Self::Recuperating { playing, .. } => Some(playing),
            _ => None,
        }
    }

    pub(crate) fn recuperating_mut(&mut self) -> Option<&mut Recuperating> {
        match self {
            Self::Recuperating { playing, .. } => Some(playing),
            _ => None,
        }
    }

    /// A close of the OVM's that waits.
    pub(crate) fn held(&self) -> Option<Held> {
        match self {
            Self::Open { held } | Self::Recuperating { held, .. } => *held,
            Self::Closed { .. } => None,
        }
    }

    // ---- transitions --------------------------------------------------------------------------

    /// A close of the OVM's waits (rule 11: nobody is accused for it before RVMs had the time to do the same).
    pub(crate) fn hold(&mut self, close: Held) {
        if let Self::Open { held } | Self::Recuperating { held, .. } = self {
            *held = Some(close);
        }
    }

    /// No close waits any more: it was passed on, or its sender was deposed.
    pub(crate) fn let_go(&mut self) {
        if let Self::Open { held } | Self::Recuperating { held, .. } = self {
            *held = None;
        }
    }

    /// From now on the daemon plays the OVM: another server was promoted, or the one that answered the handshake was deposed
    /// (rule 2).
    pub(crate) fn recuperate(&mut self, playing: Box<Recuperating>) {
        if let Self::Open { held } | Self::Recuperating { held, .. } = self {
            *self = Self::Recuperating { playing, held: held.take() };
        }
    }

    /// The OVM speaks for itself, from now on or until [`State::recuperate`] puts back what this gives.
    pub(crate) fn take_recuperating(&mut self) -> Option<Box<Recuperating>> {
        match core::mem::replace(self, Self::OPENED) {
            Self::Recuperating { playing, held } => {
                *self = Self::Open { held };
                Some(playing)
            }
            other => {
                *self = other;
                None
            }
        }
    }

    /// Both FINs are acknowledged, or the client sent a RST (RFC 9293 §3.10.7.4).
    pub(crate) fn close(&mut self, now: Instant) {
        if self.is_open() {
            *self = Self::Closed { at: now, was_reset: false };
        }
    }

    /// The client is, or will be, sent a RST: the OVM's own (RFC 9293 §3.5.3), or since nobody can carry the conversation on
    /// (rule 7).
    pub(crate) fn reset(&mut self, now: Instant) {
        *self = Self::Closed { at: self.closed_at().unwrap_or(now), was_reset: true };
    }
}
