//! `cargo lab`: Understudy's labs, their stories and the benchmark. This file only reads the command line.
//!
//! `host` builds the namespace lab, `hypervisor` and `xenstored` stand for Xen in it, `client` are its clients, `stage` runs
//! dom0d there; `scenarios` are the stories (`cargo lab test`), `bench` measures, `xen` does the same on a real Xen in QEMU.

mod bench;
mod by_hand;
mod client;
mod demo;
mod host;
mod hypervisor;
mod report;
mod scenarios;
mod stage;
mod supervise;
mod tally;
mod xen;
mod xenstored;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab", about = "Understudy's labs")]
struct CommandLine {
    /// dom0d's data plane
    #[arg(long, global = true, value_enum)]
    plane: Option<host::Plane>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Show a Redis losing its machine in mid-conversation while its clients notice nothing
    Demo(demo::Options),
    /// Play the scenarios that must pass
    Test(scenarios::Options),
    /// Measure cost and speed against a plain bridge
    Bench(bench::Options),
    /// The lab on a real Xen, in QEMU
    #[command(subcommand)]
    Xen(xen::Verb),
    /// One scenario, in this process
    #[command(hide = true)]
    Play { name: String },
    #[command(flatten)]
    ByHand(by_hand::Verb),
}

fn main() -> ExitCode {
    let line = CommandLine::parse();
    if let Some(error) = line.plane.and_then(host::Plane::choose) {
        eprintln!("cargo lab: this program can't be started again: {error}");
        return ExitCode::FAILURE;
    }
    let outcome = match line.verb {
        Verb::Demo(options) => supervise::supervised(demo::LIMIT, || demo::run(&options)),
        Verb::Bench(options) => supervise::supervised(bench::LIMIT, || bench::run(&options)),
        Verb::Test(options) => scenarios::run(&options),
        Verb::Play { name } => scenarios::play_one(&name).map(|()| ExitCode::SUCCESS),
        Verb::Xen(verb) => verb.run(),
        Verb::ByHand(verb) => verb.run(),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("cargo lab: {error:#}");
        ExitCode::FAILURE
    })
}
