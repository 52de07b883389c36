//! The sending half of a TCP, for the roles that the daemon plays: the client towards an RVM, and the server towards a
//! client during recuperation (RFC 6298 timer, RFC 5681 windows, NewReno recovery).

use core::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::Instant;

/// First retransmission timeout. Peers acknowledge within a delayed ACK (40 ms on Linux, at most
/// 500 ms by RFC 9293 §3.8.6.3); 200 ms is Linux's own lower bound.
const RTO: Duration = Duration::from_millis(200);
const RTO_MAX: Duration = Duration::from_secs(4);
/// Congestion window at the start and after a timeout, in bytes.
const WINDOW_START: u64 = 64 << 10;
const WINDOW_LOSS: u64 = 16 << 10;
const DUPLICATE_ACKS: u8 = 3;

/// See the module. Positions as in [`crate::tcp::seq`].
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sender {
    /// SND.NXT: the next position to send.
    pub(crate) nxt: u64,
    /// Highest position ever sent, exclusive.
    pub(crate) highest: u64,
    window: u64,
    timer: Option<Instant>,
    backoff: u8,
    duplicates: u8,
    /// In NewReno recovery until this position is acknowledged.
    recover: Option<u64>,
}

impl Sender {
    pub(crate) fn new(nxt: u64) -> Self {
        Self {
            nxt,
            highest: nxt,
            window: WINDOW_START,
            timer: None,
            backoff: 0,
            duplicates: 0,
            recover: None,
        }
    }

    /// End of what may be in flight, given SND.UNA and the configured bound.
    pub(crate) fn limit(&self, una: u64, bound: u32) -> u64 {
        una + self.window.min(u64::from(bound))
    }

    /// Bytes up to `end` were sent.
    pub(crate) fn sent(&mut self, end: u64, now: Instant) {
        self.nxt = self.nxt.max(end);
        self.highest = self.highest.max(self.nxt);
        if self.timer.is_none() {
            self.arm(now);
        }
    }

    /// Starts the timer, to wait for an ACK, an opening window or a SYN-ACK.
    pub(crate) fn arm(&mut self, now: Instant) {
        self.timer = Some(now + (RTO * (1 << self.backoff.min(6))).min(RTO_MAX));
    }

    pub(crate) fn is_armed(&self) -> bool {
        self.timer.is_some()
    }

    pub(crate) fn disarm(&mut self) {
        self.timer = None;
        self.backoff = 0;
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.timer
    }

    /// SND.UNA moved by `bytes` to `una`. True if the next segment was lost, too, and must be retransmitted at once
    /// (NewReno).
    pub(crate) fn acknowledged(&mut self, una: u64, bytes: u64, now: Instant) -> bool {
        self.backoff = 0;
        self.duplicates = 0;
        self.nxt = self.nxt.max(una);
        self.highest = self.highest.max(una);
        self.window = self.window.saturating_add(bytes);
        if una < self.highest {
            self.arm(now);
        } else {
            self.timer = None;
        }
        match self.recover {
            Some(recover) if una < recover => true,
            _ => {
                self.recover = None;
                false
            }
        }
    }

    /// A duplicate ACK arrived. True if the segment at SND.UNA must be retransmitted at once.
    pub(crate) fn duplicate(&mut self, una: u64) -> bool {
        if self.recover.is_some() || una >= self.highest {
            return false;
        }
        self.duplicates = self.duplicates.saturating_add(1);
        if self.duplicates < DUPLICATE_ACKS {
            return false;
        }
        self.recover = Some(self.highest);
        self.window = (self.window.min(self.highest - una) / 2).max(WINDOW_LOSS);
        true
    }

    /// True if the timer has expired: SND.NXT is back at SND.UNA, and everything from there on is sent again.
    pub(crate) fn expired(&mut self, una: u64, now: Instant) -> bool {
        if self.timer.is_none_or(|timer| timer > now) {
            return false;
        }
        self.timer = None;
        self.backoff = self.backoff.saturating_add(1);
        self.recover = None;
        self.duplicates = 0;
        self.nxt = una;
        self.window = WINDOW_LOSS;
        true
    }
}
