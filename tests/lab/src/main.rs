//! `cargo lab`: Understudy's labs. This file only reads the command line and hands over.

mod host;
mod xenstored;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "lab", about = "Understudy's labs")]
struct CommandLine {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Take a lab down, also what a killed run left behind.
    Down,
}

fn main() -> Result<()> {
    match CommandLine::parse().verb {
        Verb::Down => host::Lab::remove(&host::instance_name()?),
    }
}
