//! Understudy's simulator: the protocol engine between real TCP stacks, in virtual time.
//!
//! A run is a function of its seed: hosts, links, traffic and faults are drawn from it ([`run`]). Checkers compare what an
//! observer at dom0's devices sees with the rules of `ARCHITECTURE.md`.

mod application;
mod checkers;
mod client;
mod coverage;
mod disguise;
mod fault;
mod forge;
mod guest;
mod hostile;
mod knobs;
mod link;
mod observer;
mod prng;
mod segment;
mod stack;
mod trace;
mod verdict;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use coverage::Coverage;

/// The result of one run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The run's seed.
    pub seed: u64,
    /// The broken rule and how it was broken, if any was.
    pub failure: Option<String>,
    /// What the run exercised.
    pub coverage: Coverage,
    /// Changes with every packet and event of the run: two runs of one seed have the same.
    pub digest: u64,
    /// Virtual time at the end, microseconds.
    pub ended_at_us: u64,
}

/// The knobs that a seed stands for, as text.
pub fn knobs(seed: u64, hostile: bool) -> String {
    let draw = if hostile { knobs::Knobs::draw_hostile } else { knobs::Knobs::draw };
    format!("{:#?}", draw(seed))
}

/// How packets get from clients to servers and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// All through the engine.
    Daemon,
    /// The plane passes conversations where the engine lets it, as on the `bpf` plane, and the engine hears copies.
    Kernel,
    /// Without the engine and without faults, to find the simulator's own mistakes.
    Bare,
}

/// Runs a seed; `verbose` prints every packet and event.
pub fn run(seed: u64, verbose: bool, path: Path) -> Report {
    run_with(knobs::Knobs::draw(seed), seed, verbose, path)
}

/// As [`run`], with hostile clients beside the others, and hostile replicas.
pub fn run_hostile(seed: u64, verbose: bool, path: Path) -> Report {
    run_with(knobs::Knobs::draw_hostile(seed), seed, verbose, path)
}

/// As [`run`], with one engine from beginning to end, which is never restored from a saved state.
pub fn run_unbroken(seed: u64, path: Path) -> Report {
    let knobs = knobs::Knobs { restores_per_million: 0, ..knobs::Knobs::draw(seed) };
    run_with(knobs, seed, false, path)
}

fn run_with(knobs: knobs::Knobs, seed: u64, verbose: bool, path: Path) -> Report {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut world = world::World::new(seed, knobs, trace::Trace::new(verbose), path);
        let failure = world.run();
        let mut coverage = world.coverage.clone();
        coverage.hit(&format!("theme.{:?}", world.knobs.theme));
        coverage.hit(fault::policy_name(world.knobs.candidate));
        Report {
            seed,
            failure: failure
                .map(|f| format!("{} at {}.{:06} s: {}", f.rule, f.at / 1_000_000, f.at % 1_000_000, f.text)),
            coverage,
            digest: world.trace.digest(),
            ended_at_us: world.now,
        }
    }));
    outcome.unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_default();
        Report {
            seed,
            failure: Some(format!("panic: {text}")),
            coverage: Coverage::default(),
            digest: 0,
            ended_at_us: 0,
        }
    })
}
