//! One server's part in one conversation.

use serde::{Deserialize, Serialize};

use crate::event::{ServerId, Uncovered};
use crate::key::Slot;
use crate::tcp::sender::Sender;
use crate::tcp::stream::Stream;
use crate::tcp::translate::{latest_tsval, tsecr_for_server};
use crate::time::Instant;

/// How long a server that reset a conversation may be ahead of the OVM, which may be about to do the same.
pub(crate) const GONE_GRACE: core::time::Duration = core::time::Duration::from_millis(500);

/// With fewer segments than this in flight, a server's congestion window does not stop it (RFC 6928 allows ten).
const IN_FLIGHT: u64 = 4;

/// The state of the handshake with a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// The daemon sent the client's SYN; the server has not answered.
    SynSent,
    /// Both SYNs are known.
    Open,
}

/// Time in which a server stops nobody makes up for stopped time, divided by this. So a server that stops clients for
/// less than a third of the time only slows the transfer, as busy machines do.
const FORGIVEN_SHARE: u32 = 2;

/// For how long a server's lack of progress has stopped the client or the OVM.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pace {
    /// When this was last updated; `stops` tells whether the server stopped them then.
    pub(crate) at: Instant,
    stops: bool,
    /// The time for which they were stopped, less the time made up for.
    pub(crate) slowed: core::time::Duration,
}

impl Pace {
    /// Adds the time from `since`, the last update, to `now`; `stops` tells whether the server stops them now.
    pub(crate) fn note(&mut self, since: Instant, now: Instant, stops: bool) {
        let time = now.since(since);
        self.slowed = match self.stops {
            true => self.slowed + time,
            false => self.slowed.saturating_sub(time / FORGIVEN_SHARE),
        };
        (self.at, self.stops) = (now, stops);
    }
}

/// The numbers that a server gave its connection. Positions as in [`crate::tcp::seq`]: up is client to server, down is server
/// to client.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Numbers {
    /// ISS of the server.
    pub(crate) iss: u32,
    /// Shift of the windows it advertises.
    pub(crate) shift: u8,
    /// Largest segment that it accepts, options included.
    pub(crate) mss: u16,
    /// Its last TSval: the TS.Recent of segments towards it.
    pub(crate) tsval: u32,
    /// Added to its TSval on the way to the client, subtracted from the client's TSecr on the way back.
    pub(crate) ts_delta: u32,
    /// Its TSval when it was promoted: a TSecr below this would echo another server's clock.
    pub(crate) ts_floor: u32,
}

/// What a server has sent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Said {
    /// Its answers that were not compared yet. The end of the stream is the server's SND.NXT, as far as received.
    pub(crate) answers: Stream,
    /// Answers are compared up to here.
    pub(crate) compared: u64,
    /// It has acknowledged new client bytes since it last sent new answer bytes.
    pub(crate) asked: bool,
    /// Position of its FIN.
    pub(crate) fin: Option<u64>,
    /// Position of its first answer byte that differs from what the client was sent.
    pub(crate) diverged_at: Option<u64>,
    /// When it last sent new answer bytes, or was last told of room to send some.
    pub(crate) answered_at: Instant,
    /// When it was last told that everything it had sent is acknowledged: Nagle's algorithm (RFC 9293 §3.7.4) may have
    /// held back the rest of an answer until then.
    pub(crate) acknowledged_at: Instant,
}

/// What the daemon and the clients wait for from a server, and since when.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Waits {
    /// When it was last handed bytes that it may not have had before.
    pub(crate) handed_at: Instant,
    /// While the room for what it lacks runs out: a moment, and the progress that it had made by then.
    pub(crate) paced: Option<(Instant, u64)>,
    pub(crate) pace: Pace,
    /// Since when it has owed an acknowledgment, a SYN-ACK or an open window without progress.
    pub(crate) owes_since: Option<Instant>,
    /// Right edge of the OVM's window at that time.
    pub(crate) ovm_edge: u64,
}

/// A server's connection that stands for the client's.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Leg {
    pub(crate) server: ServerId,
    pub(crate) phase: Phase,
    /// The server exchanges segments with the client itself: it is the OVM, outside recuperation. Otherwise the daemon
    /// plays the client.
    pub(crate) through: bool,
    pub(crate) numbers: Numbers,
    /// RCV.NXT of the server: the up position that it has acknowledged.
    pub(crate) rcv_nxt: u64,
    /// Right edge of its window, an up position.
    pub(crate) edge: u64,
    /// The daemon's sending side towards it.
    pub(crate) sender: Sender,
    /// End of the bytes that the client itself sent it while it was the OVM, perhaps beyond a gap: it may acknowledge
    /// up to here.
    pub(crate) direct: u64,
    pub(crate) said: Said,
    /// When it reset the connection or refused the SYN.
    pub(crate) gone: Option<Instant>,
    /// Down position and right edge that the daemon last told it.
    pub(crate) told: (u64, u64),
    /// It must be sent an ACK.
    pub(crate) ack_due: bool,
    /// It has sent more than its SYN, or the client's own third segment reached it.
    pub(crate) has_spoken: bool,
    pub(crate) waits: Waits,
}

impl Leg {
    /// A leg whose SYN is to be sent.
    pub(crate) fn opening(server: ServerId) -> Self {
        Self {
            server,
            phase: Phase::SynSent,
            through: false,
            numbers: Numbers::default(),
            rcv_nxt: 0,
            edge: 1,
            sender: Sender::new(0),
            direct: 0,
            said: Said {
                answers: Stream::new(1),
                compared: 1,
                asked: false,
                fin: None,
                diverged_at: None,
                answered_at: Instant::default(),
                acknowledged_at: Instant::default(),
            },
            gone: None,
            told: (0, 0),
            ack_due: false,
            has_spoken: false,
            waits: Waits::default(),
        }
    }

    /// The server covers the conversation: it has not diverged.
    pub(crate) fn covers(&self) -> bool {
        self.said.diverged_at.is_none()
    }

    /// Bytes that the server is behind: client bytes up to `up_end` that it has not acknowledged, and answer bytes up
    /// to `down_end` that it has not produced. The latter do not count once it has diverged.
    pub(crate) fn behind(&self, up_end: u64, down_end: u64) -> u64 {
        let measured = !self.through && self.covers();
        let down = if measured { down_end.saturating_sub(self.said.answers.end()) } else { 0 };
        up_end.saturating_sub(self.rcv_nxt.max(1)) + down
    }

    /// The daemon may send it segments.
    pub(crate) fn is_open(&self) -> bool {
        self.phase == Phase::Open && self.gone.is_none()
    }

    /// The server has shown that it has the connection. A server that answered the SYN with a cookie (RFC 4987 §3.6)
    /// has no state until it has processed the third segment, which it drops silently while its service accepts too
    /// slowly. Until then it recognises the cookie only in a segment at the client's ISS + 1, and answers any other
    /// with a RST.
    pub(crate) fn is_established(&self) -> bool {
        self.through || self.has_spoken
    }

    /// Its SND.NXT as received, FIN counted.
    pub(crate) fn produced(&self) -> u64 {
        self.said.answers.end() + u64::from(self.said.fin == Some(self.said.answers.end()))
    }

    /// The server may have more to send and wait for an acknowledgment, or for room for a segment: of `mss` bytes, or
    /// of half the window if that is less.
    pub(crate) fn is_stopped(&self, mss: u16) -> bool {
        let (end, mss, (acked, edge)) = (self.said.answers.end(), u64::from(mss), self.told);
        edge < end + mss.min(edge.saturating_sub(acked) / 2) || end.saturating_sub(acked) >= IN_FLIGHT * mss
    }

    /// Notes the acknowledgment and right window edge that the server is told.
    pub(crate) fn tell(&mut self, told: (u64, u64), mss: u16, now: Instant) {
        let was_stopped = self.is_stopped(mss);
        if self.told.0 < self.said.answers.end() && told.0 >= self.said.answers.end() {
            self.said.acknowledged_at = now;
        }
        self.told = told;
        if was_stopped && !self.is_stopped(mss) {
            self.said.answered_at = now;
        }
    }

    /// Remembers the server's TSval.
    pub(crate) fn note_tsval(&mut self, tsval: u32) {
        self.numbers.tsval = latest_tsval(self.numbers.tsval, tsval);
    }

    /// The client's TSecr, translated to what this server must see: one of its own TSvals since its promotion.
    pub(crate) fn translated_tsecr(&self, tsecr: u32) -> u32 {
        tsecr_for_server(tsecr, self.numbers.ts_delta, self.numbers.ts_floor, self.numbers.tsval)
    }
}

/// A server's leg in a conversation, or the reason why it has none.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Place {
    /// The server does not cover the conversation, for this reason.
    Absent(Uncovered),
    Present(Box<Leg>),
}

/// The legs of one conversation by slot. Slots after the last one ever used take no memory.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Legs(Vec<Place>);

impl Legs {
    /// The leg in `slot` if it belongs to `server`.
    pub(crate) fn get(&self, slot: Slot, server: ServerId) -> Option<&Leg> {
        match self.0.get(slot.index())? {
            Place::Present(leg) if leg.server == server => Some(leg),
            _ => None,
        }
    }

    pub(crate) fn get_mut(&mut self, slot: Slot, server: ServerId) -> Option<&mut Leg> {
        match self.0.get_mut(slot.index())? {
            Place::Present(leg) if leg.server == server => Some(leg),
            _ => None,
        }
    }

    pub(crate) fn put(&mut self, slot: Slot, leg: Box<Leg>) {
        self.set(slot, Place::Present(leg));
    }

    /// Takes the leg out to work on it.
    pub(crate) fn take(&mut self, slot: Slot, server: ServerId) -> Option<Box<Leg>> {
        let place = self.0.get_mut(slot.index())?;
        match core::mem::replace(place, Place::Absent(Uncovered::AttachedLater)) {
            Place::Present(leg) if leg.server == server => Some(leg),
            other => {
                *place = other;
                None
            }
        }
    }

    /// Why `slot` is empty.
    pub(crate) fn absence(&self, slot: Slot) -> Uncovered {
        match self.0.get(slot.index()) {
            Some(Place::Absent(reason)) => *reason,
            Some(Place::Present(_)) | None => Uncovered::AttachedLater,
        }
    }

    pub(crate) fn set_absent(&mut self, slot: Slot, reason: Uncovered) {
        self.set(slot, Place::Absent(reason));
    }

    fn set(&mut self, slot: Slot, place: Place) {
        let index = slot.index();
        if index >= self.0.len() {
            self.0.reserve_exact(index + 1 - self.0.len());
            self.0.resize_with(index + 1, || Place::Absent(Uncovered::AttachedLater));
        }
        self.0[index] = place;
    }

    /// Frees the legs for which `lives`, called with slot index and server, is false.
    pub(crate) fn retain(&mut self, mut lives: impl FnMut(usize, ServerId) -> bool) {
        for (index, place) in self.0.iter_mut().enumerate() {
            if let Place::Present(leg) = place
                && !lives(index, leg.server)
            {
                *place = Place::Absent(Uncovered::AttachedLater);
            }
        }
    }
}
