//! dom0d as a process of the lab.

use std::path::{Path, PathBuf};
use std::process::Child;

use anyhow::{Result, bail};

use super::Lab;

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
    pub(crate) fn start(_lab: &Lab, _config_toml: &str) -> Result<Daemon> {
        bail!("dom0d could not be started")
    }

    /// Its control socket, for `understudy --socket`.
    pub(crate) fn control_socket(&self) -> &Path {
        &self.control_socket
    }

    /// Its configuration file.
    pub(crate) fn config(&self) -> &Path {
        &self.config
    }

    /// What it wrote to standard output and error.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to stop (SIGTERM) and waits; an error if it does not within 10 s, or exits non-zero.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.keep = true;
        self.child.wait()?;
        Ok(())
    }

    /// SIGKILL, so that it can clean nothing up.
    pub(crate) fn kill9(mut self) -> Result<()> {
        self.keep = true;
        self.child.kill()?;
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
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
