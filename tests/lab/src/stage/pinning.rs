//! Which CPU what runs on: round trips of two processes differ tenfold by where the scheduler puts
//! them, so measurements say and decide it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::host::Host;

/// Where client, servers and daemon run while something is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pinning {
    /// The client and the OVM: each waits while the other works.
    pub(crate) client_and_ovm: usize,
    /// dom0d and the replicas, which work beside them.
    pub(crate) dom0d_and_rvms: usize,
}

impl Pinning {
    /// CPU 0 and CPU 1, or CPU 0 for all on a machine with one CPU.
    pub(crate) fn choose() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            client_and_ovm: 0,
            dom0d_and_rvms: usize::from(cpus > 1),
        }
    }

    /// In words, for reports.
    pub(crate) fn describe(&self) -> String {
        format!(
            "client and OVM on CPU {}, dom0d and replicas on CPU {}",
            self.client_and_ovm, self.dom0d_and_rvms
        )
    }
}

/// Keeps every process of a host, and those that they start, on one CPU.
pub(crate) fn pin_host(host: &Host, cpu: usize) -> Result<()> {
    pin_group(&host.cgroup, &one(cpu)?)
}

/// Lets every process of a host run anywhere again.
pub(crate) fn release_host(host: &Host) -> Result<()> {
    let mut set = CpuSet::new();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    for cpu in 0..cpus {
        set.set(cpu)?;
    }
    pin_group(&host.cgroup, &set)
}

/// Keeps every thread of a process on one CPU.
pub(crate) fn pin_process(pid: u32, cpu: usize) -> Result<()> {
    let set = one(cpu)?;
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Ok(thread) = entry?.file_name().to_string_lossy().parse() {
            pin(thread, &set)?;
        }
    }
    Ok(())
}

fn one(cpu: usize) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(set)
}

fn pin_group(group: &Path, set: &CpuSet) -> Result<()> {
    let list = group.join("cgroup.threads");
    let threads = fs::read_to_string(&list).or_else(|_| {
        // A group that holds others' groups may not be read as threads.
        fs::read_to_string(group.join("cgroup.procs"))
    });
    let threads = threads.with_context(|| format!("cannot read {}", list.display()))?;
    for thread in threads.lines().filter_map(|line| line.parse().ok()) {
        pin(thread, set)?;
    }
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            pin_group(&entry.path(), set)?;
        }
    }
    Ok(())
}

fn pin(thread: i32, set: &CpuSet) -> Result<()> {
    match sched_setaffinity(Pid::from_raw(thread), set) {
        // It ended meanwhile.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot pin thread {thread}")),
    }
}
