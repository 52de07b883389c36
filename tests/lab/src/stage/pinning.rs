//! Pins processes to CPUs: round trips of two processes differ tenfold by where the scheduler puts them, so
//! measurements decide it, and say how.

use std::fs;

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
        Self { client_and_ovm: 0, dom0d_and_rvms: usize::from(cpus > 1) }
    }

    /// In words, for reports.
    pub(crate) fn describe(&self) -> String {
        format!(
            "client and OVM on CPU {}, dom0d and replicas on CPU {}, and what guests receive (RPS) where they are",
            self.client_and_ovm, self.dom0d_and_rvms
        )
    }
}

/// Keeps every process of a host, those that they start, and what its network stack does with what arrives, on one CPU.
pub(crate) fn pin_host(host: &Host, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    receive_on(host, 1 << cpu)?;
    pin_all(host, &set)
}

/// Lets every process of a host run anywhere again.
pub(crate) fn release_host(host: &Host) -> Result<()> {
    let mut set = CpuSet::new();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    for cpu in 0..cpus {
        set.set(cpu)?;
    }
    receive_on(host, 0)?;
    pin_all(host, &set)
}

/// A guest's network stack runs on the guest's CPUs. A namespace's runs where the sender is, so that answers to
/// different senders overtake each other; receive packet steering moves it. `cpus` is a bit mask, 0 for off.
fn receive_on(host: &Host, cpus: u64) -> Result<()> {
    let steer = format!("echo {cpus:x} | tee /sys/class/net/eth0/queues/rx-*/rps_cpus");
    host.run(&["sh", "-c", &steer]).map(drop)
}

/// Keeps every thread of a process on one CPU.
pub(crate) fn pin_process(pid: u32, cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    pin_threads(pid, &set)
}

fn pin_all(host: &Host, set: &CpuSet) -> Result<()> {
    for pid in host.cgroup.processes() {
        pin_threads(pid.unsigned_abs(), set)?;
    }
    Ok(())
}

fn pin_threads(pid: u32, set: &CpuSet) -> Result<()> {
    // A process that has ended meanwhile needs no place.
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Ok(());
    };
    for thread in threads.filter_map(Result::ok) {
        let Ok(thread) = thread.file_name().to_string_lossy().parse() else {
            continue;
        };
        match sched_setaffinity(Pid::from_raw(thread), set) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot pin thread {thread}"));
            }
        }
    }
    Ok(())
}
