//! The verbs for trying things by hand: up, down, status, exec, fault, thaw, link and their kin.

use std::fs;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::host::{Domain, Fault, Lab, LabConfig, Link, Service, instance_name, setup};
use crate::supervise;

/// How long `up` may take: packages and a build from nothing are in it.
const UP_LIMIT: Duration = Duration::from_secs(45 * 60);

/// What can be asked of a lab.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Install the Debian packages that the lab needs, and build the product
    Setup,
    /// Build the lab and leave it running, with dom0d started
    Up(UpArguments),
    /// Take the lab down, also what a killed run left behind
    Down,
    /// Show the lab's domains
    Status {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Run a program on the client, dom0 or a domU, e.g. `exec client -- redis-cli -h 10.77.0.100`
    Exec {
        /// client, dom0, or a domain's name, domid or UUID
        host: String,
        /// The program and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Make a fault happen to a domain
    Fault {
        kind: Fault,
        /// Name, domid or UUID
        domain: String,
        /// hang and kill: only this service's processes
        #[arg(long)]
        service: Option<Service>,
    },
    /// Undo freeze, spin, hang and pause
    Thaw {
        /// Name, domid or UUID
        domain: String,
    },
    /// Create a domain again after it was destroyed
    Create {
        /// Its name, e.g. guest-1
        name: String,
    },
    /// Copy the state of all services from one domain to another, before it is seeded again
    CopyState { from: String, to: String },
    /// Impair a link, both ways; without an option, restore it
    Link(LinkArguments),
    /// The background process of a lab
    #[command(hide = true)]
    Hypervisor { name: String },
}

/// What `up` builds.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArguments {
    /// Number of replicas, 0 to 3
    #[arg(long, default_value_t = 2)]
    replicas: usize,
    /// What runs in each domU
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Service::ALL)]
    services: Vec<Service>,
    /// dom0d's configuration instead of one that covers the services (without `control_socket`)
    #[arg(long)]
    config: Option<PathBuf>,
    /// IPv4 only
    #[arg(long)]
    no_ipv6: bool,
    /// Leave dom0d to be started by hand
    #[arg(long)]
    no_dom0d: bool,
}

/// How a link is impaired.
#[derive(Debug, Clone, Args)]
pub(crate) struct LinkArguments {
    /// client, or a domain's name, domid or UUID
    host: String,
    /// Frames lost, in percent
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// Frames that arrive twice, in percent
    #[arg(long, default_value_t = 0.0)]
    duplicate: f64,
    /// Frames overtaken by later ones, in percent
    #[arg(long, default_value_t = 0.0)]
    reorder: f64,
    /// One-way delay, in milliseconds
    #[arg(long, default_value_t = 0.0)]
    delay: f64,
    /// Megabits per second
    #[arg(long)]
    rate: Option<f64>,
}

impl Verb {
    /// Does it; the exit code is that of `exec`'s program, else success.
    pub(crate) fn run(self) -> Result<ExitCode> {
        let name = instance_name()?;
        match self {
            Verb::Setup => {
                let progress = |line: &str| println!("{line}");
                setup::install(&Service::ALL, &progress)?;
                setup::build(&progress)?;
            }
            Verb::Up(arguments) => return up(&name, arguments),
            Verb::Down => Lab::remove(&name)?,
            Verb::Status { json } => status(&Lab::find(&name)?, json)?,
            Verb::Exec { host, command } => return exec(&Lab::find(&name)?, &host, &command),
            Verb::Fault { kind, domain, service } => {
                let at = Lab::find(&name)?.fault_of_service(kind, &domain, service)?;
                println!("{kind:?} of {domain} at {} ns (CLOCK_MONOTONIC)", at.monotonic_ns);
            }
            Verb::Thaw { domain } => Lab::find(&name)?.thaw(&domain)?,
            Verb::Create { name: domain } => {
                let domain = Lab::find(&name)?.create(&domain)?;
                println!("{}: domid {}", domain.name, domain.domid);
            }
            Verb::CopyState { from, to } => Lab::find(&name)?.copy_state(&from, &to)?,
            Verb::Link(arguments) => {
                let link = arguments.link()?;
                Lab::find(&name)?.link(&arguments.host, link)?;
            }
            Verb::Hypervisor { name } => crate::hypervisor::run(&name)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl LinkArguments {
    fn link(&self) -> Result<Link> {
        let (delay, rate) = (self.delay, self.rate.unwrap_or(1.0));
        ensure!(delay >= 0.0 && delay.is_finite(), "--delay must be a number of milliseconds");
        ensure!(rate > 0.0 && rate.is_finite(), "--rate must be a number of Mbit/s");
        let link = Link {
            loss: self.loss / 100.0,
            duplicate: self.duplicate / 100.0,
            reorder: self.reorder / 100.0,
            delay: Duration::try_from_secs_f64(delay / 1e3)?,
            rate_bits: self.rate.map(|megabits| (megabits * 1e6).max(1.0) as u64),
        };
        link.check()?;
        Ok(link)
    }
}

/// Builds it in a process that can be interrupted anywhere.
fn up(name: &str, arguments: UpArguments) -> Result<ExitCode> {
    // Its failure must not make the supervisor take a lab down that runs already.
    ensure!(
        Lab::find(name).is_err(),
        "lab \"{name}\" is up already; `cargo lab down` ends it, and with LAB_NAME=... another one \
         can run beside it"
    );
    supervise::supervised(UP_LIMIT, || {
        build(name, arguments)?;
        Ok(ExitCode::SUCCESS)
    })
}

fn build(name: &str, arguments: UpArguments) -> Result<()> {
    let begun = Instant::now();
    let progress = |line: &str| println!("[{:5.1} s] {line}", begun.elapsed().as_secs_f64());
    let config = LabConfig {
        replicas: arguments.replicas,
        services: arguments.services,
        ipv6: !arguments.no_ipv6,
        build: !arguments.no_dom0d,
        ..LabConfig::new(name.to_owned())
    };
    let given = arguments
        .config
        .map(|path| fs::read_to_string(&path).with_context(|| format!("reading {}", path.display())))
        .transpose()?;
    let lab = Lab::up(config, &progress)?;
    println!();
    if arguments.no_dom0d {
        let (program, directory) = (setup::built("dom0d"), lab.directory().display());
        println!(
            "dom0d is left to you:\n  cargo lab exec dom0 -- env XENSTORED_PATH={directory}/xenstored.sock \\\n    \
             {} --lab {directory} --config ...",
            program.display()
        );
    } else {
        let dom0d = lab.start_dom0d(&given.unwrap_or_else(|| lab.default_config()))?;
        println!(
            "dom0d runs: {}\n  log      {}\n  status   {} --socket {} status",
            dom0d.config().display(),
            dom0d.log().display(),
            setup::built("understudy").display(),
            dom0d.control_socket().display(),
        );
        dom0d.leave_running();
    }
    println!(
        "the lab is up; try\n  cargo lab exec client -- redis-cli -h 10.77.0.100\n  \
         cargo lab fault freeze guest-1\n  cargo lab thaw guest-1\n  cargo lab down"
    );
    std::io::stdout().flush()?;
    lab.leave_running();
    Ok(())
}

fn status(lab: &Lab, as_json: bool) -> Result<()> {
    let domains = lab.domains()?;
    if as_json {
        let entry = |domain: &Domain| {
            json!({
                "name": domain.name, "domid": domain.domid, "uuid": domain.uuid,
                "state": domain.state, "addresses": domain.addresses, "mac": domain.mac,
                "vif": domain.vif, "netns": domain.netns, "data": domain.data,
            })
        };
        let domains: Vec<_> = domains.iter().map(entry).collect();
        let report = json!({
            "name": lab.config().name, "directory": lab.directory(),
            "services": lab.config().services, "domains": domains,
        });
        println!("{report:#}");
        return Ok(());
    }
    println!("lab {} in {}", lab.config().name, lab.directory().display());
    println!("NAME       DOMID  VIF       ADDRESSES                STATE");
    for domain in domains {
        let addresses: Vec<String> = domain.addresses.iter().map(ToString::to_string).collect();
        println!(
            "{:<10} {:>5}  {:<9} {:<24} {}",
            domain.name,
            domain.domid,
            domain.vif,
            addresses.join(" "),
            domain.state
        );
    }
    Ok(())
}

fn exec(lab: &Lab, host: &str, words: &[String]) -> Result<ExitCode> {
    let host = match host {
        "client" | "dom0" => lab.host(host)?,
        which => {
            let domain = lab.domain(which)?;
            ensure!(
                domain.state == "running" || domain.state.ends_with("hung"),
                "{} is {}: nothing can run in it; `cargo lab thaw {}` first",
                domain.name,
                domain.state,
                domain.name
            );
            domain.host
        }
    };
    let [program, arguments @ ..] = words else { return Ok(ExitCode::FAILURE) };
    let mut command = host.command(program);
    command.args(arguments).env("XENSTORED_PATH", lab.directory().join("xenstored.sock"));
    let status = host.spawn(&mut command)?.wait()?;
    // As a shell tells of a signal.
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
