//! The Xen lab: the real hypervisor, a real dom0 and real domUs, in QEMU without KVM. This file is
//! its command line.
//!
//! [`machine`] is the emulated host, [`dom0`] the way into it, [`guests`] its domUs, [`product`] what
//! is under test there. All of a lab's state is in `/run/understudy-lab/<NAME>.xen`.

mod dom0;
mod guests;
mod machine;
mod patience;
mod product;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::{Args, Subcommand};

use crate::host::instance_name;
use dom0::Dom0;
use guests::Guests;
use machine::Machine;
use patience::Patience;

/// What can be asked of the Xen lab.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Boot Xen, create an OVM and its replicas, start dom0d, and leave it all running
    Up(UpArguments),
    /// A shell in dom0, on the client (a network namespace of dom0) or, by its console, in a domU
    Shell {
        /// dom0, client, or a domU's name
        #[arg(default_value = "dom0")]
        host: String,
    },
    /// Run a program in dom0, on the client or in a domU, e.g. `exec dom0 -- xl list`
    Exec {
        /// dom0, client, or a domU's name
        host: String,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show the machine, its domains and dom0d's view of them
    Status,
    /// Take the lab down, also what a killed run left behind
    Down,
}

/// What `up` makes.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArguments {
    /// Number of replicas, 0 to 3
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=3))]
    replicas: u8,
    /// How the domUs are virtualised
    #[arg(long, value_enum, default_value = "pv")]
    guests: guests::Kind,
    /// Leave dom0d to be started by hand (it is copied all the same)
    #[arg(long)]
    no_dom0d: bool,
}

impl Verb {
    /// Does it; the exit code is that of `exec`'s program, else success.
    pub(crate) fn run(self) -> Result<ExitCode> {
        let name = instance_name()?;
        match self {
            Verb::Up(arguments) => up(&name, &arguments)?,
            Verb::Shell { host } => return Dom0::find(&name)?.shell(&host),
            Verb::Exec { host, command } => return Dom0::find(&name)?.exec(&host, &command),
            Verb::Status => status(&name)?,
            Verb::Down => Machine::remove(&name)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn up(name: &str, arguments: &UpArguments) -> Result<()> {
    let begun = Instant::now();
    let progress = |line: &str| println!("[{:5.1} s] {line}", begun.elapsed().as_secs_f64());
    if Machine::find(name).is_ok() {
        bail!(
            "Xen lab \"{name}\" is up already; `cargo lab xen down` ends it, and with LAB_NAME=... \
             another one can run beside it"
        );
    }
    // Ctrl-C ends this program as ever until there is something to take down.
    product::prepare(&progress)?;
    let patience = Patience::begin()?;
    let images = machine::images(&patience, &progress)?;
    // From here on a failure takes the machine down, and leaves its logs.
    let machine = Machine::boot(name, &images, &patience, &progress)?;
    let dom0 = machine.dom0();
    product::copy(dom0, &patience, &progress)?;
    let guests = Guests { kind: arguments.guests, replicas: arguments.replicas };
    guests.create(dom0, &patience, &progress)?;
    if !arguments.no_dom0d {
        product::start(dom0, &guests, &patience, &progress)?;
    }
    progress("the lab is up");
    println!(
        "try\n  cargo lab xen exec client -- redis-cli -h {}\n  cargo lab xen exec dom0 -- xl pause guest-1\n  \
         cargo lab xen status\n  cargo lab xen shell\n  cargo lab xen down",
        if arguments.no_dom0d { guests::address(1) } else { product::PSC.to_owned() }
    );
    machine.leave_running();
    Ok(())
}

fn status(name: &str) -> Result<()> {
    let machine = Machine::find(name)?;
    println!("{machine}");
    let patience = Patience::begin()?;
    let shown = machine.dom0().run(
        &patience,
        "asking dom0 for its domains",
        "xl list; echo; systemctl is-active --quiet dom0d && understudy status || echo 'dom0d does not run'",
        Duration::from_secs(60),
    )?;
    print!("{shown}");
    Ok(())
}
