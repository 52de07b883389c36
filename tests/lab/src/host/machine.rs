//! One machine of the lab: a network namespace and a control group, and how to run things in them.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::OFlag;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::SigSet;
use nix::sys::stat::Mode;

use super::cgroup::Group;
use super::plan;

/// Joins the control group `$0`, then becomes the command. A shell does it, since nothing between
/// fork and exec can be done safely in Rust, and done by the parent it would come too late for what
/// the child itself forks.
const JOIN: &str = "ulimit -n 100000 2>/dev/null; echo 0 > \"$0\" && exec \"$@\"";

/// dom0, the client or a domU's inside.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    /// `dom0`, `client`, `d1`, ...
    pub(crate) name: String,
    /// The namespace's name, as `ip netns` knows it.
    pub(crate) netns: String,
    /// What `/sys/fs/bpf` is on it.
    bpffs: PathBuf,
    /// All that runs on it.
    pub(crate) cgroup: Group,
    /// Where [`Host::command`] puts what it starts.
    pub(crate) processes: Group,
}

impl Host {
    /// The host `dom0`, `client` or `dN` of a lab whose control group is `lab_group`. It need not
    /// exist.
    pub(crate) fn new(lab: &str, lab_group: &Group, name: &str) -> Self {
        let cgroup = lab_group.inside(name);
        Host {
            name: name.to_owned(),
            netns: format!("{lab}-{name}"),
            bpffs: plan::bpffs(lab),
            processes: cgroup.inside("shell"),
            cgroup,
        }
    }

    /// A command that, started by [`Host::spawn`], runs on this host in its control group; add
    /// arguments, environment and standard streams as to any [`Command`].
    pub(crate) fn command(&self, program: &str) -> Command {
        in_group(&self.processes, program)
    }

    /// Starts a command made by [`Host::command`] in the namespace, with `/sys` showing it.
    pub(crate) fn spawn(&self, command: &mut Command) -> Result<Child> {
        let program = command.get_args().nth(2).map(|name| name.to_string_lossy().into_owned());
        ensure!(!self.cgroup.is_frozen(), "{} is paused: nothing can run there; thaw it first", self.name);
        self.enter(|| {
            show_own_sys(&self.bpffs)?;
            hear_signals()?;
            command.spawn().context("starting /bin/sh")
        })?
        .with_context(|| format!("{}: starting {}", self.name, program.unwrap_or_default()))
    }

    /// Runs a program to its end; fails with what it wrote to standard error unless it exits with 0.
    pub(crate) fn run(&self, command_line: &[&str]) -> Result<Output> {
        let [program, arguments @ ..] = command_line else { bail!("no command given") };
        let mut command = self.command(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.spawn(&mut command)?.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "{}: {} failed ({}): {}",
                self.name,
                command_line.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(output)
    }

    /// Runs a closure on a fresh thread inside the network namespace: sockets that it opens stay
    /// there. Not stopped by a freeze (its packets are).
    pub(crate) fn enter<T, F>(&self, work: F) -> Result<T>
    where
        T: Send,
        F: FnOnce() -> T + Send,
    {
        let path = Path::new("/run/netns").join(&self.netns);
        let namespace = File::open(&path)
            .with_context(|| format!("{} is not up: opening {}", self.name, path.display()))?;
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    setns(&namespace, CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
                    Ok(work())
                })
                .join()
                .map_err(|_| anyhow!("{}: the work inside panicked", self.name))?
        })
    }
}

/// A command that joins `group` before it becomes `program`.
pub(crate) fn in_group(group: &Group, program: &str) -> Command {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(JOIN).arg(group.procs()).arg(program);
    command
}

/// Starts a command that is to outlive this process, on this machine itself.
pub(super) fn spawn_detached(command: &mut Command) -> Result<Child> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                hear_signals()?;
                command.process_group(0).spawn().context("starting /bin/sh")
            })
            .join()
            .map_err(|_| anyhow!("starting a process panicked"))?
    })
}

/// Children inherit which signals this thread blocks; they must hear theirs.
pub(crate) fn hear_signals() -> Result<()> {
    SigSet::all().thread_unblock().context("unblocking signals")
}

/// Gives this thread, which must be in its network namespace, mounts of its own, with a `/sys` that
/// shows the namespace's interfaces and the lab's bpffs; and System V IPC of its own,
/// so that what a killed PostgreSQL leaves goes away with it.
fn show_own_sys(bpffs: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC).context("unsharing mounts")?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).context("making mounts private")?;
    let shown =
        [("/sys/fs/cgroup", Path::new("/sys/fs/cgroup")), ("/sys/fs/bpf", bpffs)].map(|(path, source)| {
            let directory = nix::fcntl::open(source, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
            directory.ok().map(|directory| (path, directory))
        });
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).context("mounting /sys")?;
    for (path, directory) in shown.iter().flatten() {
        let source = format!("/proc/thread-self/fd/{}", directory.as_raw_fd());
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(source.as_str()), *path, none, bind, none).with_context(|| format!("showing {path}"))?;
    }
    Ok(())
}
