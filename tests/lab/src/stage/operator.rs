//! The operator, who uses the real `understudy` command.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use understudy_api::config::Config;
use understudy_api::{Event, Service, Status};

use crate::host::{hear_signals, setup};

/// How long dom0d may take to find every domain and take it up, in namespaces.
const READY: Duration = Duration::from_secs(15);

/// Least time between two questions.
const PERIOD: Duration = Duration::from_millis(20);

/// Waits four times as long as the question took that was asked then: on an emulated host a process takes 100 ms of
/// CPU, and whoever asks without a pause keeps `xl` from what it asks for.
fn pause_since(asked: Instant) {
    sleep((4 * asked.elapsed()).max(PERIOD));
}

/// An operator at one dom0d's control socket.
#[derive(Clone, Debug)]
pub(crate) struct Operator {
    program: PathBuf,
    socket: PathBuf,
    ready: Duration,
}

impl Operator {
    pub(crate) fn new(socket: &Path) -> Result<Self> {
        Ok(Self { program: program("understudy")?, socket: socket.to_owned(), ready: READY })
    }

    /// An operator who uses an installed `understudy`, and waits this long for dom0d to be ready.
    pub(crate) fn installed(program: &str, socket: &str, ready: Duration) -> Self {
        Self { program: program.into(), socket: socket.into(), ready }
    }

    /// What `understudy status` says.
    pub(crate) fn status(&self) -> Result<Status> {
        let text = self.order(&["--json", "status"])?;
        serde_json::from_str(&text).with_context(|| format!("not a status: {text}"))
    }

    /// One service of the status.
    pub(crate) fn service(&self, name: &str) -> Result<Service> {
        self.status()?
            .services
            .into_iter()
            .find(|service| service.name == name)
            .with_context(|| format!("dom0d has no service {name}"))
    }

    /// Waits until dom0d serves, with every replica that `config` names promotable.
    pub(crate) fn wait_ready(&self, config: &str) -> Result<()> {
        let wanted: Config = config.parse()?;
        self.until("every replica promotable", self.ready, |status| {
            status.ready
                && wanted.services.iter().all(|wanted| {
                    status.services.iter().any(|service| {
                        service.name == wanted.engine.name
                            && service.ovm().is_some()
                            && service.promotable() == wanted.rvms.len()
                    })
                })
        })
    }

    /// Waits until dom0d serves, and states of every replica of `config` that is not promotable that
    /// its state equals the OVM's; whoever calls this has seen to that, and to it that no
    /// conversation is open.
    pub(crate) fn seed_all(&self, config: &str) -> Result<()> {
        let wanted: Config = config.parse()?;
        let deadline = Instant::now() + self.ready;
        while Instant::now() < deadline {
            let asked = Instant::now();
            let status = self.status()?;
            let mut complete = status.ready;
            for service in &status.services {
                let rvms = wanted
                    .services
                    .iter()
                    .find(|wanted| wanted.engine.name == service.name)
                    .map_or(0, |wanted| wanted.rvms.len());
                complete &= service.ovm().is_some() && service.promotable() == rvms;
                let unseeded = service
                    .servers
                    .iter()
                    .filter(|server| !server.promotable && server.queue_state == 3)
                    .filter_map(|server| server.domain.as_ref())
                    .chain(service.known.iter().map(|known| &known.domain));
                for domain in unseeded {
                    // Refused while its vif is not there yet: then again in a moment.
                    let words = ["attach", &service.name, &domain.name, "--assume-identical"];
                    let _ = self.command(&words).output().context("cannot run understudy")?;
                }
            }
            if complete {
                return Ok(());
            }
            pause_since(asked);
        }
        self.wait_ready(config)
    }

    /// Waits until the status is as wanted.
    pub(crate) fn until(&self, what: &str, limit: Duration, wanted: impl Fn(&Status) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let asked = Instant::now();
            let status = self.status()?;
            if wanted(&status) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("not within {limit:?}: {what}; status: {}", serde_json::to_string(&status)?);
            }
            pause_since(asked);
        }
    }

    /// Gives a command that must be carried out; returns what was printed.
    pub(crate) fn order(&self, words: &[&str]) -> Result<String> {
        let output = self.command(words).output().context("cannot run understudy")?;
        ensure!(
            output.status.success(),
            "`understudy {}` failed ({}): {}{}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr),
            String::from_utf8_lossy(&output.stdout),
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a command; its output is kept.
    pub(crate) fn begin(&self, words: &[&str]) -> Result<Child> {
        let mut command = self.command(words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        std::thread::scope(|scope| {
            let begun = scope.spawn(|| {
                // It is told to end by one.
                hear_signals()?;
                command.spawn().context("cannot run understudy")
            });
            begun.join().unwrap_or_else(|_| bail!("starting understudy panicked"))
        })
    }

    /// Gives a command that must be refused with a message in which every one of `saying` appears
    /// (in any case of letters); returns the message.
    pub(crate) fn refused(&self, words: &[&str], saying: &[&str]) -> Result<String> {
        let output = self.command(words).output().context("cannot run understudy")?;
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        let order = words.join(" ");
        ensure!(!output.status.success(), "`understudy {order}` was carried out: {said}");
        explains(&format!("`understudy {order}`"), &said, saying)?;
        Ok(said)
    }

    /// Follows the events from now on (with those still kept).
    pub(crate) fn follow(&self) -> Result<Events> {
        let mut child = self
            .command(&["--json", "events", "--follow"])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot run understudy")?;
        let stdout = child.stdout.take().context("no pipe from understudy")?;
        let shared = Arc::new(Shared::default());
        let writer = shared.clone();
        std::thread::Builder::new().name("events".to_owned()).spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                match serde_json::from_str::<Event>(&line) {
                    Ok(event) => writer.lock().push(event),
                    Err(error) => eprintln!("not an event ({error}): {line}"),
                }
                writer.changed.notify_all();
            }
        })?;
        Ok(Events { child, shared })
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(&self.socket).args(words);
        command.stdin(Stdio::null());
        command
    }
}

/// A program that was built along with this one.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let path = setup::built(name);
    ensure!(
        path.exists(),
        "{} does not exist: build it with `cargo build --release -p {name}`",
        path.display(),
    );
    Ok(path)
}

/// Fails unless every one of `wanted` appears in what was said.
pub(crate) fn explains(who: &str, said: &str, wanted: &[&str]) -> Result<()> {
    let lower = said.to_lowercase();
    for word in wanted {
        ensure!(lower.contains(&word.to_lowercase()), "{who} says nothing of \"{word}\": {}", said.trim());
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Shared {
    seen: Mutex<Vec<Event>>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        // A poisoned list is still a list: events are only ever pushed.
        self.seen.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The events of one dom0d while this value lives.
#[derive(Debug)]
pub(crate) struct Events {
    child: Child,
    shared: Arc<Shared>,
}

impl Events {
    /// Events of this kind and service at or after a moment (microseconds of CLOCK_MONOTONIC).
    pub(crate) fn since(&self, kind: &str, service: &str, from_us: u64) -> Vec<Event> {
        self.shared.lock().iter().filter(|event| matches(event, kind, service, from_us)).cloned().collect()
    }

    /// Waits for the first event of this kind and service at or after a moment.
    pub(crate) fn wait(&self, kind: &str, service: &str, from_us: u64, limit: Duration) -> Result<Event> {
        let deadline = Instant::now() + limit;
        let mut seen = self.shared.lock();
        loop {
            if let Some(event) = seen.iter().find(|e| matches(e, kind, service, from_us)) {
                return Ok(event.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let kinds: Vec<_> = seen
                    .iter()
                    .filter(|e| e.monotonic_us >= from_us)
                    .map(|e| serde_json::Value::Object(e.what.clone()).to_string())
                    .collect();
                bail!(
                    "no event \"{kind}\" of service {service} within {limit:?}; since then there were: [{}]",
                    kinds.join(", ")
                );
            }
            seen = self.shared.changed.wait_timeout(seen, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

fn matches(event: &Event, kind: &str, service: &str, from_us: u64) -> bool {
    event.kind() == kind && event.service.as_deref() == Some(service) && event.monotonic_us >= from_us
}

impl Events {
    /// Stops following; the events seen so far stay.
    pub(crate) fn end(&mut self) {
        // It may have ended with dom0d already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.end();
    }
}
