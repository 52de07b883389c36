//! `cargo lab xen test`: plays the stories on one booted host, one after the other.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::dom0::Dom0;
use super::inside::stories;
use super::machine::Machine;
use super::patience::Patience;
use super::{boot, find_or_boot, product};
use crate::scenarios::Scenario;
use crate::stage::logs;
use crate::supervise::Ending;
use crate::tally::{Played, Tally, list, log_directory};

/// How often a story is played at most if the emulator lost one of its guests, or its machine, each time.
const PLAYS: usize = 4;

/// How long dom0 may take to answer an empty command.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// Names the latest guest that ended in a triple fault. Nothing that dom0 does causes one: QEMU entered the guest with wrong
/// registers (`vm-images/README.md`).
const LOST_GUEST: &str = "xl dmesg | grep 'Triple fault' | tail -n 1 || :";

/// How `cargo lab xen test` is called.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Play only stories whose name contains one of these
    filters: Vec<String>,
    /// Print the names and play nothing
    #[arg(long)]
    list: bool,
    /// Go on after a failure
    #[arg(long)]
    keep_going: bool,
}

/// Plays what `options` select, on the host that is up, else on one that it boots and takes down; the
/// last line says how many passed and failed.
pub(super) fn run(name: &str, options: &Options) -> Result<ExitCode> {
    let wanted: Vec<_> = stories::all()
        .into_iter()
        .filter(|story| {
            options.filters.is_empty() || options.filters.iter().any(|part| story.name.contains(part))
        })
        .collect();
    if options.list {
        return list(wanted.iter().map(|story| story.name.as_str()));
    }
    ensure!(
        !wanted.is_empty(),
        "no story's name contains \"{}\"; `cargo lab xen test --list` shows them",
        options.filters.join("\" or \"")
    );
    let begun = Instant::now();
    let progress = |line: &str| println!("[{:5.1} s] {line}", begun.elapsed().as_secs_f64());
    product::prepare(&progress)?;
    let patience = Patience::begin()?;
    let mut machine = find_or_boot(name, &patience, &progress)?;
    let again = || boot(name, &patience, &progress);
    let directory = log_directory(&format!("{name}.xen"))?;
    let (tally, lost) = play_all(&wanted, options, (&mut machine, &again), &patience, &directory);
    progress("played");
    println!(
        "{} hosts and {} guests were lost by the emulator, and their stories played again",
        lost.hosts, lost.guests
    );
    Ok(tally.conclude(wanted.len()))
}

/// How the emulator made stories fail. QEMU is known for these two failures; a story is played again for nothing else.
#[derive(Clone, Copy, Debug, Default)]
struct Lost {
    /// Dom0 answered no more.
    hosts: u32,
    /// A guest ended in a triple fault.
    guests: u32,
}

/// Plays stories. Failures of the emulator are reported, counted, and the stories played again.
fn play_all(
    stories: &[Scenario],
    options: &Options,
    (machine, boot): (&mut Machine, &dyn Fn() -> Result<Machine>),
    patience: &Patience,
    directory: &Path,
) -> (Tally, Lost) {
    let (mut tally, mut blame) = (Tally::default(), Lost::default());
    let mut lost_before = lost_guest(machine, patience);
    for story in stories {
        let mut played = play(story, machine, patience, directory);
        for _ in 1..PLAYS {
            if !played.as_ref().is_ok_and(Played::has_failed) {
                break;
            }
            if machine.is_ours_to_end() && !answers(machine, patience) {
                println!("{}: dom0 answers no more; QEMU boots anew, and once more", story.name);
                blame.hosts += 1;
                let lost = directory.join("lost-machine");
                if let Err(error) = logs::keep(&machine.log(), &lost) {
                    eprintln!("its logs could not be kept in {}: {error}", lost.display());
                }
                match boot() {
                    Ok(new) => std::mem::replace(machine, new).leave_running(),
                    Err(error) => {
                        println!("{error:#}");
                        break;
                    }
                }
                lost_before = lost_guest(machine, patience);
            } else {
                let lost = lost_guest(machine, patience);
                if lost == lost_before {
                    break;
                }
                println!("{}: QEMU lost a guest in a triple fault; once more", story.name);
                blame.guests += 1;
                lost_before = lost;
            }
            played = play(story, machine, patience, directory);
        }
        if !tally.count(&story.name, played, options.keep_going) {
            break;
        }
    }
    (tally, blame)
}

fn play(story: &Scenario, machine: &Machine, patience: &Patience, directory: &Path) -> Result<Played> {
    Played::of(&story.name, directory, |logs, output| {
        let ending = machine.dom0().order(patience, &["play", &story.name], Some(output), story.limit)?;
        if matches!(ending, Ending::Failed | Ending::TimedOut) {
            keep_host_log(machine.dom0(), patience, logs);
        }
        Ok(ending)
    })
}

fn answers(machine: &Machine, patience: &Patience) -> bool {
    machine.dom0().run(patience, "asking dom0", "true", ANSWER_LIMIT).is_ok() || patience.is_over()
}

fn lost_guest(machine: &Machine, patience: &Patience) -> Option<String> {
    machine.dom0().run(patience, "asking Xen", LOST_GUEST, ANSWER_LIMIT).ok()
}

/// What dom0d, the hypervisor, dom0's kernel and the guests said.
pub(super) fn keep_host_log(dom0: &Dom0, patience: &Patience, logs: &Path) {
    let script = "xl list -v; understudy status; understudy events | tail -n 200; understudy status --json
                  for service in redis http postgresql; do understudy conversations $service --json; done
                  ip netns exec client ss -tinom
                  journalctl --no-pager -u dom0d | tail -n 500; xl dmesg | tail -n 100; dmesg | tail -n 100
                  for file in /var/log/xen/console/*; do echo \"== $file\"; tail -n 30 \"$file\"; done";
    let said = dom0.run(patience, "collecting logs", script, Duration::from_secs(120));
    let text = said.unwrap_or_else(|error| format!("{error:#}\n"));
    if let Err(error) = fs::write(logs.join("host.log"), text) {
        eprintln!("the host's log could not be kept in {}: {error}", logs.display());
    }
}
