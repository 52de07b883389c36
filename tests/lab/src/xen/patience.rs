//! All waits of the Xen lab: each has a limit, and Ctrl-C ends it.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::supervise::Interrupts;

/// How often a condition is checked.
const PERIOD: Duration = Duration::from_millis(100);

/// Lets SIGINT, SIGTERM and SIGHUP end a wait instead of the process, so that what was begun is
/// taken down in order.
#[derive(Debug)]
pub(super) struct Patience(Interrupts);

impl Patience {
    /// To be called before any thread is started.
    pub(super) fn begin() -> Result<Self> {
        Ok(Self(Interrupts::take()?))
    }

    /// Waits until `ready` gives something.
    pub(super) fn until<T>(
        &self,
        what: &str,
        limit: Duration,
        mut ready: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        loop {
            if let Some(there) = ready()? {
                return Ok(there);
            }
            if begun.elapsed() > limit {
                bail!("{what}: not done after {} s", limit.as_secs());
            }
            if self.0.within(PERIOD) {
                bail!("{what}: interrupted");
            }
        }
    }

    /// Runs a program to its end, with `input`, and kills it when its time is over. The caller judges whether
    /// it succeeded.
    pub(super) fn run(
        &self,
        what: &str,
        command: &mut Command,
        input: &[u8],
        limit: Duration,
    ) -> Result<Output> {
        let mut child = command
            // Ctrl-C is for this process, which then ends the program.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{what}: cannot start {}", command.get_program().to_string_lossy()))?;
        let input = input.to_owned();
        let stdin = child.stdin.take();
        let writer = thread::spawn(move || {
            // A program that stops reading says why by its exit code.
            stdin.map(|mut stdin| stdin.write_all(&input))
        });
        let stdout = reader(child.stdout.take());
        let stderr = reader(child.stderr.take());
        let status = self.finish(what, &mut child, limit)?;
        let _ = writer.join();
        let collect = |from: thread::JoinHandle<Vec<u8>>| from.join().unwrap_or_default();
        Ok(Output { status, stdout: collect(stdout), stderr: collect(stderr) })
    }

    /// Runs a program to its own end, its output where the caller put it: one that may leave a process
    /// behind, or whose output is to be seen as it comes.
    pub(super) fn follow(&self, what: &str, command: &mut Command, limit: Duration) -> Result<ExitStatus> {
        let mut child =
            command.process_group(0).stdin(Stdio::null()).spawn().with_context(|| {
                format!("{what}: cannot start {}", command.get_program().to_string_lossy())
            })?;
        self.finish(what, &mut child, limit)
    }

    /// Whether everything is to stop.
    pub(super) fn is_over(&self) -> bool {
        self.0.within(Duration::ZERO)
    }

    fn finish(&self, what: &str, child: &mut Child, limit: Duration) -> Result<ExitStatus> {
        let ended = self.until(what, limit, || Ok(child.try_wait()?));
        if ended.is_err() {
            end(child)?;
        }
        ended
    }
}

/// Ends a program with its process group: by SIGTERM, so that it can remove what it made, and then by SIGKILL.
fn end(child: &mut Child) -> Result<()> {
    let group = Pid::from_raw(i32::try_from(child.id())?);
    for (signal, periods) in [(Signal::SIGTERM, 50), (Signal::SIGKILL, 50)] {
        // Fails if it has ended by itself.
        let _ = killpg(group, signal);
        for _ in 0..periods {
            if child.try_wait()?.is_some() {
                return Ok(());
            }
            thread::sleep(PERIOD);
        }
    }
    bail!("process {group} does not end")
}

fn reader(from: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut from) = from {
            // What came before an error is all that there is.
            let _ = from.read_to_end(&mut all);
        }
        all
    })
}
