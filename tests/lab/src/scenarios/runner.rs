//! Plays the scenarios one by one, each in a process of its own so that none can hang or hurt
//! another, and keeps the logs of those that failed.

use std::collections::VecDeque;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::{Scenario, all};
use crate::host::{Service, instance_name, setup};
use crate::supervise::{Interrupts, Task};
use crate::tally::{Played, Tally, list, log_directory};

/// How `cargo lab test` is called.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Play only scenarios whose name contains one of these
    filters: Vec<String>,
    /// Print the names and play nothing
    #[arg(long)]
    list: bool,
    /// Scenarios played at the same time: as many as there are CPUs, at most four, unless stated
    #[arg(long, default_value_t = default_jobs())]
    jobs: usize,
    /// Go on after a failure
    #[arg(long)]
    keep_going: bool,
}

/// Most of a scenario's time is waiting, but its clients and guests must get CPU when they need it.
fn default_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(4))
}

/// Plays what `options` select; the last line says how many passed and failed.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let wanted: VecDeque<Scenario> = all()
        .into_iter()
        .filter(|s| options.filters.is_empty() || options.filters.iter().any(|part| s.name.contains(part)))
        .collect();
    if options.list {
        return list(wanted.iter().map(|scenario| scenario.name.as_str()));
    }
    ensure!(
        !wanted.is_empty(),
        "no scenario's name contains \"{}\"; `cargo lab test --list` shows them",
        options.filters.join("\" or \"")
    );
    let interrupts = Interrupts::take()?;
    // Once for all: the scenarios' labs take what is there.
    setup::install(&Service::ALL, &|line| println!("{line}"))?;
    setup::build(&|line| println!("{line}"))?;
    let directory = log_directory(&instance_name()?)?;
    // Names only: a story can't be sent to another thread, and it is played in another process.
    let mut queue = VecDeque::new();
    for scenario in wanted {
        match (scenario.obstacle)()? {
            Some(obstacle) => println!("NOT PLAYED {}: {obstacle}", scenario.name),
            None => queue.push_back((scenario.name, scenario.limit)),
        }
    }
    let total = queue.len();
    Ok(play_all(queue, options, &directory, &interrupts).conclude(total))
}

/// Plays what is in `queue`.
fn play_all(
    queue: VecDeque<(String, Duration)>,
    options: &Options,
    directory: &Path,
    interrupts: &Interrupts,
) -> Tally {
    let (queue, tally) = (Mutex::new(queue), Mutex::new(Tally::default()));
    let jobs = options.jobs;
    std::thread::scope(|scope| {
        for job in 0..jobs.max(1) {
            let (queue, tally) = (&queue, &tally);
            scope.spawn(move || {
                loop {
                    let next = lock(queue).pop_front();
                    let Some((name, limit)) = next else { break };
                    let verdict =
                        lab_name(jobs, job).and_then(|lab| play(&name, limit, &lab, directory, interrupts));
                    if !lock(tally).count(&name, verdict, options.keep_going) {
                        lock(queue).clear();
                    }
                }
            });
        }
    });
    tally.into_inner().unwrap_or_else(|e| e.into_inner())
}

/// Plays the scenario of exactly this name in this process.
pub(crate) fn play_one(name: &str) -> Result<()> {
    crate::supervise::settle()?;
    let Some(scenario) = all().into_iter().find(|s| s.name == name) else {
        bail!("no scenario is named {name}");
    };
    scenario.play(&instance_name()?)
}

fn play(name: &str, limit: Duration, lab: &str, directory: &Path, interrupts: &Interrupts) -> Result<Played> {
    Played::of(name, directory, |logs, output| {
        Task { words: &["play", name], lab, limit, output: Some(output.into()), logs: Some(logs.into()) }
            .run(interrupts)
    })
}

/// Each job has a lab of its own; their names differ in the last character.
fn lab_name(jobs: usize, job: usize) -> Result<String> {
    let name = instance_name()?;
    if jobs <= 1 {
        return Ok(name);
    }
    ensure!(
        name.len() <= 3 && jobs <= 9,
        "with --jobs (at most 9), LAB_NAME may have 3 characters at most, since each job adds one"
    );
    Ok(format!("{name}{job}"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
