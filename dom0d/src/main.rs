//! dom0d: keeps TCP services of domUs alive. This file starts the daemon and ends it, leaving nothing behind.

mod clock;
mod command;
mod containment;
mod control;
mod datapath;
mod discovery;
mod domain;
mod host;
mod link;
mod message;
mod notify;
mod placement;
mod plane;
mod preflight;
mod report;
mod service;
mod store;
mod wake;

use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;
use clap::Parser;
use rtnetlink::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{broadcast, oneshot, watch};
use tracing_subscriber::EnvFilter;
use understudy_api::config::{Config, ConfigError, DEFAULT_PATH};

use crate::control::ControlSocket;
use crate::datapath::{DataPath, Outboxes};
use crate::discovery::{Found, Relist};
use crate::host::{HostKind, fencing};
use crate::link::anchor;
use crate::link::changes::Changes;
use crate::link::frame::Mac;
use crate::message::{LostInterface, Message, Requests, Source};
use crate::notify::Notifier;
use crate::placement::Placement;
use crate::report::{EVENTS_KEPT, Events, Reporter};
use crate::service::{Service, leave_nothing, remove_strays};
use crate::store::durable;
use crate::store::memory::Memory;
use crate::wake::Waker;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Where a real host has the lock, and what a killed dom0d leaves to its successor.
const RUN_DIRECTORY: &str = "/run/understudy";

/// Where a real host has the memory that outlives a reboot.
const STATE_DIRECTORY: &str = "/var/lib/understudy";

/// Which boot of dom0 this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Log filter when nothing is said: xenstore-rs warns of every watch that ends with its domain.
const DEFAULT_LOG: &str = "info,xenstore_rs=error";

/// A data path that has not begun a round for this long is stuck, and dom0d stops telling systemd that all is well.
const STUCK: Duration = Duration::from_secs(2);

/// Keeps TCP services of domUs alive when the domU that serves them freezes or dies.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration.
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Work in the namespace lab of this directory instead of on Xen.
    #[arg(long, value_name = "DIR")]
    lab: Option<PathBuf>,
    /// Check the configuration and this host, change nothing.
    #[arg(long)]
    check: bool,
    /// Listen here instead of on the configuration's `control_socket`.
    #[arg(long, value_name = "PATH")]
    control_socket: Option<PathBuf>,
    /// What to log, as in RUST_LOG: info, debug, dom0d::liveness=trace, ...
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match start(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // An operator at a terminal and the journal both read this.
            eprintln!("dom0d: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<()> {
    let filter = match &arguments.log {
        Some(text) => EnvFilter::try_new(text).context("--log")?,
        None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG)),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    let config = Config::load(&arguments.config).map_err(|error| match error {
        ConfigError::Unreadable { .. } => anyhow::Error::new(error),
        other => anyhow::anyhow!("{}: {other}", arguments.config.display()),
    })?;
    preflight::check()?;
    if let Some(lab) = &arguments.lab {
        find_xenstored(lab)?;
    }
    let hypervisor = arguments.lab.clone().map_or(HostKind::Xen, HostKind::Lab);
    hypervisor.open()?;
    if arguments.check {
        println!("configuration and host are fit for dom0d");
        for warning in preflight::warnings() {
            println!("but: {warning}");
        }
        return Ok(());
    }
    let places = Places::of(arguments.lab.as_deref());
    let _lock = preflight::lock(&places.run)?;
    let socket = arguments.control_socket.clone().unwrap_or_else(|| config.control_socket.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Little happens here; the data path has a thread of its own.
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start threads")?;
    runtime.block_on(run((Arc::new(config), &arguments.config), &hypervisor, &socket, &places))
}

/// Where this dom0d keeps its files.
struct Places {
    /// Emptied by a reboot.
    run: PathBuf,
    /// Outlives it.
    state: PathBuf,
    boot: String,
}

impl Places {
    fn of(lab: Option<&Path>) -> Self {
        let boot = |path: &Path| std::fs::read_to_string(path).map(|id| id.trim().to_owned());
        let real = || boot(Path::new(BOOT_ID)).unwrap_or_default();
        match lab {
            None => Self { run: RUN_DIRECTORY.into(), state: STATE_DIRECTORY.into(), boot: real() },
            Some(lab) => Self {
                run: lab.join("run"),
                state: lab.join("state"),
                // Its dom0 may reboot.
                boot: boot(&lab.join("boot_id")).unwrap_or_else(|_| real()),
            },
        }
    }
}

/// xenstore-rs finds xenstored by an environment variable, which a process sets safely only for its
/// successor: so dom0d starts itself again, once.
fn find_xenstored(lab: &Path) -> anyhow::Result<()> {
    let socket = lab.join("xenstored.sock");
    if std::env::var_os("XENSTORED_PATH").is_some_and(|path| path == *socket) {
        return Ok(());
    }
    let error = again().env("XENSTORED_PATH", &socket).exec();
    Err(error).context("can't start dom0d again with XENSTORED_PATH")
}

/// This program as it was called.
fn again() -> std::process::Command {
    let mut arguments = std::env::args_os();
    let mut again = std::process::Command::new(arguments.next().unwrap_or_default());
    again.args(arguments);
    again
}

/// The threads around the data path; they end when the data path has ended.
struct Threads {
    datapath: JoinHandle<()>,
    others: Vec<JoinHandle<()>>,
    /// Resolves when the data path ends, however it does.
    ended: oneshot::Receiver<()>,
    messages: mpsc::Sender<Message>,
    waker: Waker,
    heartbeat: Arc<AtomicU64>,
}

async fn run(
    (config, config_path): (Arc<Config>, &Path),
    hypervisor: &HostKind,
    socket: &Path,
    places: &Places,
) -> anyhow::Result<()> {
    let notifier = Notifier::from_environment().context("NOTIFY_SOCKET")?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let hangup = signal(SignalKind::hangup())?;
    let socket = ControlSocket::listen(socket)?;
    let (connection, netlink, _) = rtnetlink::new_connection().context("netlink")?;
    tokio::spawn(connection);
    let macs: Vec<_> = config.services.iter().map(|s| s.psc_mac).collect();
    anchor::remove_leftovers(&netlink, &macs).await?;

    let (events, _) = broadcast::channel(EVENTS_KEPT);
    let (lost, lost_interfaces) = tokio::sync::mpsc::unbounded_channel();
    let memory = remember(&config, &places.state);
    let mut services = Vec::with_capacity(config.services.len());
    let mut beginnings = Vec::with_capacity(config.services.len());
    for (index, service) in config.services.iter().enumerate() {
        let memory = memory.of(&service.engine.name, &places.boot);
        let (service, programs) = Service::begin(index, service.clone(), memory, &places.run);
        beginnings.push((programs, service.arrivals()));
        services.push(service);
    }
    // The programs of a killed dom0d would go on passing for services that this one does not have, or has on plane `pcap`.
    let begun = macs.iter().zip(&beginnings).filter(|(_, (programs, _))| programs.is_some());
    let begun: Vec<_> = begun.map(|(&mac, _)| mac).collect();
    let left = anchor::remove_programs(&netlink, &begun).await?;
    anchor::remove_clsact(&netlink, &left).await?;
    remove_strays(&config.services, &places.run);
    let can_be_followed = services.iter().all(|service| service.engine.is_journaled());
    let (containment, holds) = match understudy_bpf::load_containment() {
        Ok((containment, holds)) => (Some(containment), Some(holds)),
        Err(error) => {
            tracing::warn!(%error, "nft alone holds back what replicas send");
            (None, None)
        }
    };
    let mut threads =
        start_threads(&config, hypervisor, &events, lost, (places.state.clone(), memory), (services, holds))?;
    let requests = Requests::new(threads.messages.clone(), threads.waker.clone());
    let relist = Relist::default();
    let control = tokio::spawn(control::serve(socket, requests, relist.clone(), &events));
    let (found, domains) = watch::channel(Found::default());
    let discovery = tokio::spawn(discovery::watch_domains(found, relist));
    let (messages, waker) = (threads.messages.clone(), threads.waker.clone());
    let placement =
        Placement::new(Arc::clone(&config), netlink.clone(), messages, waker, containment, beginnings);
    let changes = Changes::listen(macs.clone()).unwrap_or_else(|error| {
        tracing::error!(%error, "changes of interfaces are not told; they are looked at every few seconds");
        Changes::default()
    });
    let placement = tokio::spawn(placement.run(domains, lost_interfaces, changes));
    for warning in preflight::warnings() {
        tracing::warn!("{warning}");
    }
    if let Some(notifier) = &notifier {
        notifier.tell("READY=1");
    }
    tracing::info!(services = config.services.len(), "dom0d runs");

    let result = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        _ = &mut threads.ended => Err(anyhow::anyhow!("the data path ended; this is a bug in dom0d, see the log")),
        () = watchdog(notifier.as_ref(), &threads.heartbeat) => Ok(()),
        error = make_way(hangup, config_path, can_be_followed) => Err(error),
    };
    if let Some(notifier) = &notifier {
        notifier.tell("STOPPING=1");
    }
    tracing::info!("dom0d stops");
    placement.abort();
    discovery.abort();
    control.abort();
    // An anchor that is being made at this moment must not be made after it was removed.
    for task in [placement, discovery] {
        let _ = task.await;
    }
    let _ = control.await;
    stop_threads(threads);
    clean_up(&netlink, &macs).await;
    for service in &config.services {
        leave_nothing(service, &places.run);
    }
    result
}

/// What earlier dom0ds remembered; doubt, if that can't be read.
fn remember(config: &Config, directory: &Path) -> Memory {
    durable::load(directory).unwrap_or_else(|error| {
        let reason = format!("what was written down in {} can't be used: {error}", directory.display());
        tracing::error!(kept = ?durable::set_aside(directory).ok(), "{reason}");
        Memory::lost(config.services.iter().map(|service| service.engine.name.as_str()), &reason)
    })
}

fn start_threads(
    config: &Config,
    hypervisor: &HostKind,
    events: &Events,
    lost: tokio::sync::mpsc::UnboundedSender<LostInterface>,
    (state, memory): (PathBuf, Memory),
    (services, holds): (Vec<Service>, Option<understudy_bpf::Holds>),
) -> anyhow::Result<Threads> {
    let waker = Waker::new().context("eventfd")?;
    let (messages, inbox) = mpsc::channel();
    let tell = |messages: &mpsc::Sender<Message>, waker: &Waker| {
        let (messages, waker) = (messages.clone(), waker.clone());
        move |message| {
            // Without a data path there is nobody to tell.
            let _ = messages.send(message);
            waker.wake();
        }
    };
    let tell_outcome = tell(&messages, &waker);
    let (jobs, fencing) = fencing::spawn(hypervisor.open()?, move |outcome| {
        tell_outcome(Message::Outcome(outcome));
    })?;
    let tell_rules = tell(&messages, &waker);
    let (rules, rules_writer) =
        containment::spawn_writer(holds, move |news| tell_rules(Message::Rules(news)))?;
    let tell_memory = tell(&messages, &waker);
    let (memory_sender, memory_writer) = durable::spawn_writer(state, move |problem| {
        let problems = problem.into_iter().collect();
        tell_memory(Message::Problems { source: Source::Memory, problems });
    })?;
    if !memory.services.is_empty() {
        // Also doubt is remembered.
        let _ = memory_sender.send(memory.clone());
    }
    let heartbeat = Arc::new(AtomicU64::new(clock::now().as_micros()));
    let datapath = DataPath::new(
        services,
        (hypervisor.name(), hypervisor.open()?),
        (inbox, waker.clone()),
        config.liveness_poll,
        memory,
        Outboxes {
            reporter: Reporter::new(events.clone()),
            jobs,
            rules,
            memory: memory_sender,
            lost,
            heartbeat: Arc::clone(&heartbeat),
        },
    );
    let (ends, ended) = oneshot::channel();
    let datapath = std::thread::Builder::new().name("datapath".to_owned()).spawn(move || {
        // Dropped when the thread ends, also by a panic.
        let _ends: oneshot::Sender<()> = ends;
        datapath.run();
    })?;
    Ok(Threads {
        datapath,
        others: vec![fencing, rules_writer, memory_writer],
        ended,
        messages,
        waker,
        heartbeat,
    })
}

/// Tells the service manager that all is well as long as the data path begins rounds; never returns.
async fn watchdog(notifier: Option<&Notifier>, heartbeat: &AtomicU64) {
    let Some((notifier, interval)) =
        notifier.and_then(|notifier| Some((notifier, notifier.watchdog_interval()?)))
    else {
        return std::future::pending().await;
    };
    loop {
        tokio::time::sleep(interval).await;
        let last = understudy_protocol::Instant::from_micros(heartbeat.load(Ordering::Relaxed));
        let age = clock::now().since(last);
        if age < STUCK {
            notifier.tell("WATCHDOG=1");
        } else {
            tracing::error!(?age, "the data path does not come round");
        }
    }
}

/// On a hangup, becomes the dom0d that is installed now, with the configuration that is there now: conversations go
/// on, and replicas stay promotable. Returns only if that fails for good.
async fn make_way(mut hangup: Signal, config: &Path, can_be_followed: bool) -> anyhow::Error {
    loop {
        if hangup.recv().await.is_none() {
            return std::future::pending().await;
        }
        if let Err(error) = Config::load(config) {
            tracing::error!(path = %config.display(), %error, "goes on as it is: the configuration is wrong");
        } else if !can_be_followed {
            tracing::error!(
                "goes on as it is: not every service is on the plane bpf, and on pcap conversations would end; restart dom0d when that does not matter"
            );
        } else {
            tracing::info!("becomes the dom0d that is installed now");
            return anyhow::Error::new(again().exec()).context("can't start dom0d again");
        }
    }
}

fn stop_threads(threads: Threads) {
    // If it has ended already, there is nobody to tell.
    let _ = threads.messages.send(Message::Stop);
    threads.waker.wake();
    for thread in std::iter::once(threads.datapath).chain(threads.others) {
        if thread.join().is_err() {
            tracing::error!("a thread ended by a panic");
        }
    }
}

async fn clean_up(netlink: &Handle, macs: &[Mac]) {
    for &mac in macs {
        if let Err(error) = anchor::remove(netlink, mac).await {
            tracing::error!(%error, "an anchor stays; the next dom0d removes it");
        }
    }
    // Also what a killed dom0d left on interfaces that this one never used.
    let mut interfaces = anchor::remove_programs(netlink, &[]).await.unwrap_or_else(|error| {
        tracing::error!(%error, "programs may stay; the next dom0d removes them");
        Vec::new()
    });
    interfaces.extend(understudy_bpf::prepared_interfaces());
    if let Err(error) = anchor::remove_clsact(netlink, &interfaces).await {
        tracing::error!(%error, "a clsact qdisc stays; remove it with: tc qdisc del dev INTERFACE clsact");
    }
    if let Err(error) = containment::remove() {
        tracing::error!(%error, "rules stay; remove them with: nft delete table bridge understudy");
    }
}
