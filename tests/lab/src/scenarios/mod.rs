//! `cargo lab test`: stories that the whole of Understudy must pass, with real services.

mod bridge;
mod containment;
mod copying;
mod daemon;
pub(crate) mod database;
mod hostile;
mod links;
mod matrix;
mod numbering;
mod options;
mod order;
mod own;
mod plain;
mod reboot;
mod refusals;
mod repeated;
mod replica;
mod runner;
mod shared;
mod stale;
mod stall;
mod succession;
mod transfer;
mod vlan;
mod witness;

pub(crate) use runner::{Options, play_one, run};

use std::time::Duration;

use anyhow::Result;

/// Fails by an error that says what was seen.
type Story = Box<dyn Fn(&str) -> Result<()>>;

/// One story: gets a lab's name, builds what it needs under it, and fails by an error.
pub(crate) struct Scenario {
    /// Unique; slashes form groups.
    pub(crate) name: String,
    /// The scenario fails if it takes longer.
    pub(crate) limit: Duration,
    /// Why this machine can't play it, if it can't.
    pub(crate) obstacle: fn() -> Result<Option<&'static str>>,
    play: Story,
}

impl Scenario {
    pub(crate) fn new(name: impl Into<String>, play: impl Fn(&str) -> Result<()> + 'static) -> Self {
        Self {
            name: name.into(),
            limit: Duration::from_secs(60),
            obstacle: || Ok(None),
            play: Box::new(play),
        }
    }

    pub(crate) fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    pub(crate) fn unless(mut self, obstacle: fn() -> Result<Option<&'static str>>) -> Self {
        self.obstacle = obstacle;
        self
    }

    /// Plays it in this process.
    pub(crate) fn play(&self, lab: &str) -> Result<()> {
        (self.play)(lab)
    }
}

/// Every scenario, in the order in which they are played.
fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    all.extend(plain::scenarios());
    all.extend(matrix::scenarios());
    all.extend(database::scenarios());
    all.extend(repeated::scenarios());
    all.extend(order::scenarios());
    all.extend(stale::scenarios());
    all.extend(stall::scenarios());
    all.extend(succession::scenarios());
    all.extend(replica::scenarios());
    all.extend(bridge::scenarios());
    all.extend(shared::scenarios());
    all.extend(own::scenarios());
    all.extend(options::scenarios());
    all.extend(containment::scenarios());
    all.extend(links::scenarios());
    all.extend(numbering::scenarios());
    all.extend(hostile::scenarios());
    all.extend(refusals::scenarios());
    all.extend(vlan::scenarios());
    all.extend(witness::scenarios());
    all.extend(daemon::scenarios());
    all.extend(reboot::scenarios());
    all.extend(copying::scenarios());
    all
}
