//! The Xen lab: the real hypervisor, a real dom0 and real domUs, in QEMU without KVM. This file is
//! its command line.
//!
//! [`machine`] is the emulated host, [`dom0`] the way into it, [`product`] what is copied there, [`inside`]
//! what is done there: domUs and stories. All of a lab's state is in `/run/understudy-lab/<NAME>.xen`.

mod dom0;
mod inside;
mod machine;
mod patience;
mod product;
mod test;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};

use crate::host::{Service, guest_addresses, instance_name, psc_addresses};
use crate::supervise::Ending;
use dom0::Dom0;
use machine::Machine;
use patience::Patience;

/// Until the domUs serve: each took 10 to 27 s to create.
const GUESTS_LIMIT: Duration = Duration::from_secs(15 * 60);

/// The demo's, domUs included.
const DEMO_LIMIT: Duration = Duration::from_secs(15 * 60);
const FETCH_LIMIT: Duration = Duration::from_secs(60);

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
    /// Show a Redis losing its domU in mid-conversation while its clients notice nothing
    Demo(inside::demo::Options),
    /// Play the stories that must be true on a real hypervisor, on the host that is up or a fresh one
    Test(test::Options),
    /// Show the machine, its domains and dom0d's view of them
    Status,
    /// Take the lab down, also what a killed run left behind
    Down,
    /// What the other verbs do in dom0
    #[command(hide = true, subcommand)]
    Inside(inside::Order),
}

/// How a domU is virtualised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Paravirtualised.
    Pv,
    /// Paravirtualised in a hardware-virtualised container, through QEMU's emulated SVM.
    Pvh,
}

impl Kind {
    /// Its name in xl.cfg and on this command line.
    fn name(self) -> &'static str {
        match self {
            Kind::Pv => "pv",
            Kind::Pvh => "pvh",
        }
    }
}

/// What `up` makes.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArguments {
    /// Number of replicas, 0 to 3
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=3))]
    replicas: u8,
    /// How the domUs are virtualised
    #[arg(long, value_enum, default_value = "pv")]
    guests: Kind,
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
            Verb::Demo(options) => return demo(&name, &options),
            Verb::Test(options) => return test::run(&name, &options),
            Verb::Inside(order) => return order.carry_out(),
            Verb::Status => status(&name)?,
            Verb::Down => Machine::remove(&name)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Boots a host with everything that is needed in it.
fn boot(name: &str, patience: &Patience, progress: &dyn Fn(&str)) -> Result<Machine> {
    let images = machine::images(patience, progress)?;
    // From here on a failure takes the machine down, and leaves its logs.
    let machine = Machine::boot(name, &images, patience, progress)?;
    product::copy(machine.dom0(), patience, progress)?;
    Ok(machine)
}

/// The host that is up, with this program's newest build, else a fresh one.
fn find_or_boot(name: &str, patience: &Patience, progress: &dyn Fn(&str)) -> Result<Machine> {
    let Ok(machine) = Machine::find(name) else { return boot(name, patience, progress) };
    product::copy(machine.dom0(), patience, progress)?;
    Ok(machine)
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
    let machine = boot(name, &patience, &progress)?;
    let (replicas, kind) = (arguments.replicas.to_string(), arguments.guests.name());
    let mut order = vec!["up", "--replicas", &replicas, "--guests", kind];
    if arguments.no_dom0d {
        order.push("--no-dom0d");
    }
    let ending = machine.dom0().order(&patience, &order, None, GUESTS_LIMIT)?;
    if matches!(ending, Ending::Failed | Ending::TimedOut) {
        test::keep_host_log(machine.dom0(), &patience, &machine.log());
    }
    ensure!(ending == Ending::Passed, "the domUs could not be made: {ending:?}");
    progress("the lab is up");
    println!(
        "try\n  cargo lab xen exec client -- redis-cli -h {}\n  cargo lab xen exec dom0 -- xl pause guest-1\n  \
         cargo lab xen status\n  cargo lab xen shell\n  cargo lab xen down",
        if arguments.no_dom0d { guest_addresses(1, false) } else { psc_addresses(Service::Redis, false) }[0]
    );
    machine.leave_running();
    Ok(())
}

/// Plays it on a host of its own, or on the one that is up.
fn demo(name: &str, options: &inside::demo::Options) -> Result<ExitCode> {
    let begun = Instant::now();
    let progress = |line: &str| println!("[{:5.1} s] {line}", begun.elapsed().as_secs_f64());
    product::prepare(&progress)?;
    let patience = Patience::begin()?;
    let machine = find_or_boot(name, &patience, &progress)?;
    let (replicas, report) = (options.replicas.to_string(), "/run/lab/report.json");
    let fault = format!("{:?}", options.fault).to_lowercase();
    let kind = options.guests.name();
    let order = ["demo", "--replicas", &replicas, "--guests", kind, "--fault", &fault, "--json", report];
    let ending = machine.dom0().order(&patience, &order, None, DEMO_LIMIT)?;
    if matches!(ending, Ending::Failed | Ending::TimedOut) {
        test::keep_host_log(machine.dom0(), &patience, &machine.log());
    }
    if let Some(path) = &options.json {
        let fetch = format!("cat {report}");
        let text = machine.dom0().run(&patience, "fetching the report", &fetch, FETCH_LIMIT)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(match ending {
        Ending::Passed => ExitCode::SUCCESS,
        Ending::Interrupted => ExitCode::from(130),
        Ending::Failed | Ending::TimedOut => ExitCode::FAILURE,
    })
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
