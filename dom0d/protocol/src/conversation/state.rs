//! A conversation's state from the client's third segment on. Before that it is a handshake ([`super::handshake`]).
//!
//! ```text
//!            promotion (rule 2)            counts reached (rule 2)
//!     Open ────────────────────▶ Recuperating ────────────────▶ Open
//!       │                             │
//!       │ both FINs acknowledged, or the client's RST (RFC 9293 §3.10.7.4); a RST of the OVM (§3.5.3);
//!       │ no server can continue it (rule 7)
//!       ▼                             ▼
//!     Closed ◀────────────────────────┘
//! ```
//!
//! No state says which sides have sent FIN: each FIN is a position in a stream, and servers reach it at different
//! times.

use serde::{Deserialize, Serialize};

use crate::conversation::turn::Turn;
use crate::tcp::sender::Sender;
use crate::time::Instant;

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum State {
    /// Client and OVM exchange their own segments.
    Open {
        /// The OVM's FIN or RST, if it waits for an RVM to do the same.
        held: Option<Held>,
    },
    /// The new OVM has not yet reached the positions of its predecessors; the daemon plays the OVM towards the client.
    Recuperating {
        /// What the daemon still owes the client.
        playing: Box<Recuperating>,
        /// As in [`State::Open`].
        held: Option<Held>,
    },
    /// The conversation has ended for client and OVM.
    Closed {
        /// When.
        at: Instant,
        /// The daemon reset it, or passed on a RST of the OVM: the daemon answers whatever the client still sends with
        /// a RST.
        was_reset: bool,
    },
}

/// A FIN or RST of the OVM that the daemon has not passed on yet.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) position: u64,
    pub(crate) rst: bool,
    /// RCV.NXT of the OVM when it closed: an up position.
    pub(crate) had: u64,
    /// When the daemon asks the RVMs (`None`: it has), early enough that their opinions on all conversations are known
    /// when the first hold ends.
    pub(crate) review: Option<Instant>,
    pub(crate) until: Instant,
    /// A covering RVM could have done the same by now, and keeps the conversation open.
    pub(crate) is_disputed: bool,
}

impl Held {
    /// When the hold ends. It is extended by the time in which a late daemon may not have processed what RVMs sent.
    pub(crate) fn ends(&self, turn: &Turn<'_>) -> Instant {
        self.until.max(turn.excuses.heard_since() + turn.config.timing.close_hold)
    }
}

/// How the daemon plays the OVM towards the client.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Recuperating {
    /// What the daemon sends the client.
    pub(crate) sender: Sender,
    /// The daemon must send the client an ACK.
    pub(crate) ack_due: bool,
    /// The daemon must retransmit the segment at SND.UNA at once.
    pub(crate) resend: bool,
}

impl Recuperating {
    /// Recuperation from SND.UNA `acked` and SND.NXT `sent` on: the daemon resends at once whatever lies between,
    /// without waiting for a retransmission timer.
    pub(crate) fn from(acked: u64, sent: u64) -> Self {
        let mut sender = Sender::new(acked);
        sender.highest = sent;
        Self { sender, ack_due: false, resend: false }
    }

    /// The client acknowledged `newly` bytes up to `ack`, or sent a duplicate ACK.
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

    /// When the conversation ended.
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

    /// The OVM's FIN or RST that waits.
    pub(crate) fn held(&self) -> Option<Held> {
        match self {
            Self::Open { held } | Self::Recuperating { held, .. } => *held,
            Self::Closed { .. } => None,
        }
    }

    // ---- transitions --------------------------------------------------------------------------

    /// The OVM's FIN or RST waits: before the daemon accuses the OVM of a close, RVMs get the time to do the same (rule
    /// 11).
    pub(crate) fn hold(&mut self, close: Held) {
        if let Self::Open { held } | Self::Recuperating { held, .. } = self {
            *held = Some(close);
        }
    }

    /// Nothing waits any more: the FIN or RST was passed on, or the OVM that sent it was deposed.
    pub(crate) fn let_go(&mut self) {
        if let Self::Open { held } | Self::Recuperating { held, .. } = self {
            *held = None;
        }
    }

    /// From now on the daemon plays the OVM: another server was promoted, or the server that answered the handshake was
    /// deposed (rule 2).
    pub(crate) fn recuperate(&mut self, playing: Box<Recuperating>) {
        if let Self::Open { held } | Self::Recuperating { held, .. } = self {
            *self = Self::Recuperating { playing, held: held.take() };
        }
    }

    /// Ends recuperation, for good or until the caller gives the value back to [`State::recuperate`].
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

    /// The daemon sends the client a RST: the OVM's own (RFC 9293 §3.5.3), or its own because no server can continue
    /// the conversation (rule 7).
    pub(crate) fn reset(&mut self, now: Instant) {
        *self = Self::Closed { at: self.closed_at().unwrap_or(now), was_reset: true };
    }
}
