//! dom0d as a process of the lab.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use super::{Lab, setup};

/// How long it may take until its control socket answers.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long a clean shutdown may take.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A running dom0d. Dropping it kills it (SIGKILL), unless [`Daemon::leave_running`] was called.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    control_socket: PathBuf,
    config: PathBuf,
    log: PathBuf,
    keep: bool,
}

impl Daemon {
    pub(crate) fn start(lab: &Lab, config_toml: &str) -> Result<Daemon> {
        let directory = lab.directory();
        let (control_socket, config) = (directory.join("control.sock"), directory.join("dom0d.toml"));
        // Top-level keys come before the first table.
        let text = format!("control_socket = \"{}\"\n\n{config_toml}", control_socket.display());
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let log = directory.join("log/dom0d.log");
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("writing {}", log.display()))?;
        let begin_of_log = output.metadata()?.len();
        let program = setup::built("dom0d");
        ensure!(
            program.exists(),
            "{} is missing: `cargo build --release -p dom0d` makes it",
            program.display()
        );
        let dom0 = lab.dom0();
        let mut command = dom0.command("nice");
        command
            // As its unit has it.
            .args(["-n", "-10"])
            .arg(&program)
            .arg("--config")
            .arg(&config)
            .arg("--lab")
            .arg(directory)
            .env("XENSTORED_PATH", directory.join("xenstored.sock"))
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0);
        let child = dom0.spawn(&mut command)?;
        let mut daemon = Daemon { child, control_socket, config, log, keep: false };
        daemon.wait_ready(begin_of_log)?;
        Ok(daemon)
    }

    fn wait_ready(&mut self, begin_of_log: u64) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while UnixStream::connect(&self.control_socket).is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("dom0d ended at once ({status}): {}", self.said_since(begin_of_log));
            }
            if Instant::now() >= deadline {
                bail!(
                    "dom0d does not answer on {}: {}",
                    self.control_socket.display(),
                    self.said_since(begin_of_log)
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The end of what it logged since then.
    fn said_since(&self, begin: u64) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let new = text.get(usize::try_from(begin).unwrap_or(0)..).unwrap_or_default();
        let new = String::from_utf8_lossy(new);
        let lines: Vec<&str> = new.trim_end().lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Its control socket, for `understudy --socket`.
    pub(crate) fn control_socket(&self) -> &Path {
        &self.control_socket
    }

    /// Its configuration file.
    pub(crate) fn config(&self) -> &Path {
        &self.config
    }

    /// What it wrote to standard output and error, this one and those before it.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to stop (SIGTERM) and waits; an error if it does not within 10 s, or exits non-zero.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + STOP_LIMIT;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.keep = true;
                ensure!(status.success(), "dom0d stopped with {status}; see {}", self.log.display());
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "dom0d did not stop within {STOP_LIMIT:?} and was killed; see {}",
                self.log.display()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.pid())?), signal)
            .with_context(|| format!("sending dom0d {signal}"))
    }

    /// SIGSTOP and, after this time, SIGCONT.
    pub(crate) fn suspend_for(&self, time: Duration) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        std::thread::sleep(time);
        self.signal(Signal::SIGCONT)
    }

    /// SIGKILL, so that it can clean nothing up.
    pub(crate) fn kill9(mut self) -> Result<()> {
        self.keep = true;
        // With it an nft that it is about to start, which still has its control socket: so does systemd with a unit.
        let group = Pid::from_raw(i32::try_from(self.pid())?);
        killpg(group, Signal::SIGKILL).context("killing dom0d")?;
        self.child.wait().context("waiting for dom0d's end")?;
        // And waits for both: whoever connects meanwhile would take what is left of the socket for the successor's.
        let deadline = Instant::now() + STOP_LIMIT;
        while killpg(group, None).is_ok() {
            ensure!(Instant::now() < deadline, "a child of the killed dom0d is there after {STOP_LIMIT:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Leaves it running when this handle is gone.
    pub(crate) fn leave_running(mut self) {
        self.keep = true;
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !self.keep {
            // Fails only for one that has ended.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
