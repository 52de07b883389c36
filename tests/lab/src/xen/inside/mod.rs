//! What the Xen lab does inside dom0, where this program is run again: so that faults, dom0d's events
//! and the clients' receipts are on one clock, and clients and stories are those of the other lab.

mod command;
pub(super) mod demo;
mod guests;
mod stage;
pub(super) mod stories;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Subcommand;

use super::UpArguments;
use crate::host::{Service, domain_name, psc_addresses};
use guests::Guests;
use stage::Stage;

/// What `cargo lab xen` orders in dom0.
#[derive(Debug, Subcommand)]
pub(crate) enum Order {
    /// Create the domUs and start dom0d
    Up(UpArguments),
    /// Play one story
    Play { name: String },
    /// Play the demo
    Demo(demo::Options),
}

impl Order {
    pub(super) fn carry_out(self) -> Result<ExitCode> {
        crate::supervise::settle()?;
        match self {
            Order::Up(arguments) => up(&arguments)?,
            Order::Play { name } => {
                let story = stories::all().into_iter().find(|story| story.name == name);
                story.with_context(|| format!("no story is named {name}"))?.play("")?;
            }
            Order::Demo(options) => return demo::run(&options),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn up(arguments: &UpArguments) -> Result<()> {
    let begun = Instant::now();
    let progress = |line: &str| println!("  [{:5.1} s] {line}", begun.elapsed().as_secs_f64());
    let guests =
        Guests { kind: arguments.guests, replicas: usize::from(arguments.replicas), postgresql: false };
    stage::forget()?;
    guests.prepare(&progress)?;
    if arguments.no_dom0d {
        println!("  {} serves at {}", domain_name(1), crate::host::guest_addresses(1, false)[0]);
        return Ok(());
    }
    let services = [Service::Redis, Service::Http];
    let stage = Stage::start(guests, stage::config(guests.replicas, &services))?;
    stage.operator.wait_ready(&stage.config)?;
    progress("every replica is promotable");
    for service in services {
        println!("  {} is served at {}", service.name(), psc_addresses(service, false)[0]);
    }
    Ok(())
}
