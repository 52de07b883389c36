//! Where a workload runs: in which network namespace, on which CPU.

use std::fs::File;
use std::path::PathBuf;
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;

/// A network namespace, and optionally one CPU to stay on.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The namespace's name under `/run/netns`.
    netns: String,
    cpu: Option<usize>,
}

impl Place {
    pub(crate) fn new(netns: impl Into<String>) -> Self {
        Self { netns: netns.into(), cpu: None }
    }

    /// The same namespace, pinned to `cpu`.
    pub(crate) fn pinned(&self, cpu: Option<usize>) -> Self {
        Self { netns: self.netns.clone(), cpu }
    }

    /// Runs `work` on a thread of its own that entered the namespace first. Threads that it starts
    /// inherit the namespace; the rest of the process stays where it is.
    pub(crate) fn spawn<T, F>(&self, name: &str, work: F) -> Result<JoinHandle<Result<T>>>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        let place = self.clone();
        Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                place.enter()?;
                work()
            })
            .with_context(|| format!("cannot start the thread {name}"))
    }

    /// Runs `work` there and waits for it.
    pub(crate) fn run<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        join(self.spawn("placed", work)?)
    }

    fn enter(&self) -> Result<()> {
        let path = PathBuf::from("/run/netns").join(&self.netns);
        let handle = File::open(&path)
            .with_context(|| format!("no network namespace {}: is the lab up?", path.display()))?;
        setns(handle, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter network namespace {}", self.netns))?;
        if let Some(cpu) = self.cpu {
            pin(cpu)?;
        }
        Ok(())
    }
}

/// Keeps the calling thread, and threads that it starts, on one CPU.
pub(crate) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot pin to CPU {cpu}"))
}

/// The thread's result; a panic of it is an error like any other.
pub(crate) fn join<T>(handle: JoinHandle<Result<T>>) -> Result<T> {
    let name = handle.thread().name().unwrap_or("thread").to_owned();
    handle.join().map_err(|panic| {
        let said = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        anyhow!("the thread {name} panicked: {said}")
    })?
}
