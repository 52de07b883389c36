//! Runs one verb of this program as a process of its own, with a time limit, and takes its lab down
//! however it ends: by itself, by Ctrl-C, by the limit, or killed.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::host::{Lab, instance_name};
use crate::stage::logs::{KEEP_LOGS, keep};

/// How a supervised process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It exited with 0.
    Passed,
    /// It exited otherwise, or a signal ended it.
    Failed,
    /// It was killed because its time was over.
    TimedOut,
    /// The operator wants everything to stop.
    Interrupted,
}

/// What to run.
#[derive(Debug)]
pub(crate) struct Task<'a> {
    /// Command line of this program.
    pub(crate) words: &'a [&'a str],
    /// Name of the lab that it may build.
    pub(crate) lab: &'a str,
    pub(crate) limit: Duration,
    /// Where its output goes; `None`: to the terminal.
    pub(crate) output: Option<PathBuf>,
    /// Where the lab's logs are kept.
    pub(crate) logs: Option<PathBuf>,
}

/// SIGINT, SIGTERM and SIGHUP of this process, as something that can be waited for.
#[derive(Debug)]
pub(crate) struct Interrupts(SignalFd);

impl Interrupts {
    /// From now on these signals are delivered here and nowhere else. Must be called before any
    /// other thread starts.
    pub(crate) fn take() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Self(SignalFd::with_flags(&set, flags)?))
    }

    /// Whether one comes within `limit`; it stays pending for the next caller.
    pub(crate) fn within(&self, limit: Duration) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        matches!(poll(&mut fds, timeout), Ok(n) if n > 0)
    }
}

impl Task<'_> {
    /// Runs it to its end.
    pub(crate) fn run(&self, interrupts: &Interrupts) -> Result<Ending> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(self.words)
            .env("LAB_NAME", self.lab)
            .env(SUPERVISED, "1")
            .stdin(Stdio::null())
            // Ctrl-C reaches this process only, which then ends the child in order.
            .process_group(0);
        if let Some(path) = &self.output {
            let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
            command.stderr(file.try_clone()?).stdout(file);
        }
        if let Some(path) = &self.logs {
            command.env(KEEP_LOGS, path);
        }
        let mut child = command.spawn().context("cannot start this program again")?;
        let begun = Instant::now();
        let ending = loop {
            if let Some(status) = child.try_wait()? {
                if status.success() {
                    return Ok(Ending::Passed);
                }
                break Ending::Failed;
            }
            if interrupts.within(Duration::from_millis(20)) {
                break Ending::Interrupted;
            }
            if begun.elapsed() > self.limit {
                break Ending::TimedOut;
            }
        };
        if matches!(ending, Ending::Interrupted | Ending::TimedOut) {
            child.kill()?;
            child.wait()?;
            self.keep_logs();
        }
        // What ended by itself took its lab down; this is for what could not.
        Lab::remove(self.lab)?;
        Ok(ending)
    }

    fn keep_logs(&self) {
        let from = Path::new("/run/understudy-lab").join(self.lab).join("log");
        if let Some(to) = &self.logs
            && let Err(error) = keep(&from, to)
        {
            eprintln!("the logs in {} could not be kept: {error}", from.display());
        }
    }
}

/// Set in the environment of supervised processes.
const SUPERVISED: &str = "UNDERSTUDY_LAB_SUPERVISED";

/// Runs `work` supervised: this process starts itself again with the same command line. The child does the
/// work and prints to the same terminal; this process watches it.
pub(crate) fn supervised(limit: Duration, work: impl FnOnce() -> Result<ExitCode>) -> Result<ExitCode> {
    if std::env::var_os(SUPERVISED).is_some() {
        settle()?;
        return work();
    }
    let words: Vec<String> = std::env::args().skip(1).collect();
    verb(&words.iter().map(String::as_str).collect::<Vec<_>>(), limit)
}

/// Runs a verb of this program supervised, its output to the terminal.
pub(crate) fn verb(words: &[&str], limit: Duration) -> Result<ExitCode> {
    let interrupts = Interrupts::take()?;
    let lab = instance_name()?;
    let task = Task { words, lab: &lab, limit, output: None, logs: None };
    Ok(match task.run(&interrupts)? {
        Ending::Passed => ExitCode::SUCCESS,
        Ending::Failed => ExitCode::FAILURE,
        Ending::TimedOut => {
            eprintln!("it was not done after {limit:?} and was ended; the lab is taken down");
            ExitCode::FAILURE
        }
        Ending::Interrupted => {
            eprintln!("interrupted; the lab is taken down");
            ExitCode::from(130)
        }
    })
}

/// More open files than the largest crowd of clients, or a server of it, needs.
const FILES: u64 = 131_072;

/// Prepares a supervised process: it ends with its supervisor, and may open as many files as it needs, or as
/// many as the machine lets it.
pub(crate) fn settle() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // Root may raise both.
    if setrlimit(Resource::RLIMIT_NOFILE, hard.max(FILES), hard.max(FILES)).is_err() && soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(())
}
