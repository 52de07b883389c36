//! The events so far: a bounded ring that any number of readers read at their own pace.
//!
//! A reader holds nothing but its position. A reader that is slower than the ring misses the oldest events and is told how
//! many ([`EVENTS_LOST`]); it never slows down the daemon.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch;
use understudy_api::{EVENTS_LOST, Event, time};

use super::view;
use crate::report::TimedEvent;

/// Events kept. With some 500 bytes each this is about 2 MiB.
pub(super) const HISTORY_KEPT: usize = 4_096;

/// The ring.
pub(super) struct History {
    ring: Mutex<Ring>,
    /// The `seq` that the next event gets; followers wait for it to change.
    next: watch::Sender<u64>,
}

struct Ring {
    kept: VecDeque<Kept>,
    limit: usize,
}

/// An event, ready to be sent: its line of JSON.
struct Kept {
    seq: u64,
    unix_us: u64,
    line: Arc<str>,
}

impl History {
    /// An empty ring for `limit` events.
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            ring: Mutex::new(Ring { kept: VecDeque::new(), limit }),
            next: watch::Sender::new(1),
        })
    }

    /// Keeps what `events` brings until its sender is gone.
    pub(super) async fn record(&self, mut events: broadcast::Receiver<Arc<TimedEvent>>) {
        let mut last_us = (0, 0);
        loop {
            match events.recv().await {
                Ok(event) => {
                    last_us = (event.unix_us, event.monotonic_us);
                    self.push(event.unix_us, |seq| view::event(seq, &event));
                }
                Err(RecvError::Lagged(count)) => {
                    self.push(last_us.0, |seq| lost(seq, last_us, count));
                }
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn push(&self, unix_us: u64, event: impl FnOnce(u64) -> Event) {
        let mut ring = self.ring();
        let seq = *self.next.borrow();
        let Some(line) = line(&event(seq)) else {
            return;
        };
        if ring.kept.len() == ring.limit {
            ring.kept.pop_front();
        }
        ring.kept.push_back(Kept { seq, unix_us, line });
        drop(ring);
        self.next.send_replace(seq + 1);
    }

    /// The place of the first event at or after `unix_us`.
    pub(super) fn since(&self, unix_us: u64) -> u64 {
        let ring = self.ring();
        // Not a binary search: the wall clock may have been set back between two events.
        let first = ring.kept.iter().find(|kept| kept.unix_us >= unix_us);
        match first {
            Some(kept) => kept.seq,
            None => ring.kept.back().map_or(1, |kept| kept.seq + 1),
        }
    }

    /// The place of the oldest event that is still there.
    pub(super) fn oldest(&self) -> u64 {
        self.ring().kept.front().map_or(1, |kept| kept.seq)
    }

    /// Up to `limit` lines from `place` on, and the place after them.
    pub(super) fn read(&self, place: u64, limit: usize) -> (Vec<Arc<str>>, u64) {
        let ring = self.ring();
        let Some(oldest) = ring.kept.front() else {
            return (Vec::new(), place);
        };
        let mut lines = Vec::new();
        let mut from = place;
        if place < oldest.seq {
            let gap = lost(oldest.seq - 1, (oldest.unix_us, 0), oldest.seq - place);
            lines.extend(line(&gap));
            from = oldest.seq;
        }
        let skip = usize::try_from(from - oldest.seq).unwrap_or(usize::MAX);
        let rest = ring.kept.iter().skip(skip).take(limit);
        lines.extend(rest.map(|kept| Arc::clone(&kept.line)));
        let taken = (ring.kept.len().saturating_sub(skip)).min(limit) as u64;
        (lines, from + taken)
    }

    /// Waits until there is something at `place`.
    pub(super) async fn wait(&self, place: u64) {
        let mut next = self.next.subscribe();
        // An error means that the sender is gone, and it is a field of `self`.
        let _ = next.wait_for(|next| *next > place).await;
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // Nothing in here can leave the ring half changed.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn line(event: &Event) -> Option<Arc<str>> {
    match serde_json::to_string(event) {
        Ok(mut line) => {
            line.push('\n');
            Some(line.into())
        }
        Err(error) => {
            tracing::error!(seq = event.seq, %error, "an event can't be written as JSON and is lost");
            None
        }
    }
}

fn lost(seq: u64, (unix_us, monotonic_us): (u64, u64), count: u64) -> Event {
    Event {
        seq,
        time: time::rfc3339(unix_us),
        monotonic_us,
        service: None,
        domains: Default::default(),
        what: Map::from_iter([
            ("event".to_owned(), Value::from(EVENTS_LOST)),
            ("count".to_owned(), Value::from(count)),
        ]),
    }
}
