//! The rules of `ARCHITECTURE.md` that an observer at dom0's devices can check, one per file.

mod accusation;
mod bounded;
mod clock;
mod delivery;
mod hero;
mod one_stream;
mod one_voice;
mod order;
mod staleness;
mod window;

use crate::observer::{Observer, Seen};

/// Compares what happens with what may happen.
pub(crate) trait Checker {
    /// Names the rule in a report.
    fn rule(&self) -> &'static str;

    /// Looks at what happens, before the observer has taken it in; an error ends the run.
    fn see(&mut self, observer: &Observer, at: u64, seen: &Seen<'_>) -> Result<(), String>;
}

/// Facts about a run that widen what the checkers allow.
#[derive(Clone, Debug, Default)]
pub(crate) struct Licence {
    /// dom0 gets the servers' frames in the order sent, each once, and sends clients theirs in that order.
    pub(crate) servers_in_order: bool,
    /// How long an RVM may hold bytes back, microseconds.
    pub(crate) lag_limit_us: u64,
    /// Largest `retained_bytes`.
    pub(crate) retained_limit: u64,
    /// Replicas' windows equal the OVM's.
    pub(crate) equal_windows: bool,
    /// Only clients misbehave, and servers that are blemished.
    pub(crate) hostile: bool,
}

pub(crate) fn all(licence: &Licence) -> Vec<Box<dyn Checker>> {
    let mut all: Vec<Box<dyn Checker>> = vec![
        Box::new(one_voice::OneVoice),
        Box::new(one_stream::OneStream),
        Box::new(order::CauseBeforeEffect::new(licence)),
        Box::new(clock::Clock::new(licence)),
        Box::new(window::Window::new(licence)),
        Box::new(delivery::Delivery),
        Box::new(hero::StaleHero::default()),
        Box::new(accusation::Accusation::default()),
        Box::new(bounded::Bounded::new(licence)),
    ];
    if licence.hostile {
        all.push(Box::new(staleness::Staleness::default()));
    }
    all
}
