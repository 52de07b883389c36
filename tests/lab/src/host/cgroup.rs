//! Control groups of the version 2 hierarchy: how the lab stops, ends and finds its processes.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount, umount};

/// Where the lab mounts the hierarchy if nobody has.
const OWN_MOUNT: &str = "/run/understudy-lab/.cgroup2";

/// A control group; it need not exist.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    path: PathBuf,
}

impl Group {
    /// The group of a whole lab.
    pub(crate) fn of_lab(name: &str) -> Result<Group> {
        Ok(Group { path: hierarchy()?.join(format!("understudy-lab-{name}")) })
    }

    /// A group inside this one.
    pub(crate) fn inside(&self, name: &str) -> Group {
        Group { path: self.path.join(name) }
    }

    /// The file that a process writes `0` to in order to join.
    pub(crate) fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Makes it, with the groups around it.
    pub(crate) fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.path)
            .with_context(|| format!("making the control group {}", self.path.display()))
    }

    /// Nothing inside runs.
    pub(crate) fn is_frozen(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
    }

    /// Stops every process inside, or lets them run on. Takes effect within microseconds, a process
    /// in a system call first has to be woken.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<()> {
        let file = self.path.join("cgroup.freeze");
        fs::write(&file, if frozen { "1" } else { "0" })
            .with_context(|| format!("writing {}", file.display()))
    }

    /// CPU time that its processes have used, in nanoseconds; 0 if it can't be read.
    pub(crate) fn cpu_time_ns(&self) -> u64 {
        fs::read_to_string(self.path.join("cpu.stat"))
            .ok()
            .and_then(|stat| stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok()))
            .map_or(0, |usec: u64| usec.saturating_mul(1000))
    }

    /// SIGKILL to every process inside, also to frozen ones.
    pub(crate) fn kill(&self) -> Result<()> {
        let file = self.path.join("cgroup.kill");
        match fs::write(&file, "1") {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.with_context(|| format!("writing {}", file.display())),
        }
    }

    /// The processes inside, those of inner groups included.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut all: Vec<i32> = fs::read_to_string(self.procs())
            .map(|text| text.lines().filter_map(|line| line.parse().ok()).collect())
            .unwrap_or_default();
        for inner in self.inner() {
            all.extend(inner.processes());
        }
        all
    }

    /// Kills what runs inside, waits for its end, and removes the group. Nothing there is no error.
    pub(crate) fn remove(&self) -> Result<()> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.populated() {
            ensure!(
                Instant::now() < deadline,
                "processes of {} do not end though they were killed: {:?}",
                self.path.display(),
                self.processes()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        self.remove_directories()
    }

    /// Waits until no process is left inside; false if that takes longer than `limit`.
    pub(crate) fn wait_empty(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.populated() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Whether a process lives inside.
    pub(crate) fn populated(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events"))
            .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
    }

    fn remove_directories(&self) -> Result<()> {
        for inner in self.inner() {
            inner.remove_directories()?;
        }
        // A process that has just been reaped may still keep it busy for a moment.
        let mut left = 200;
        loop {
            match fs::remove_dir(&self.path) {
                Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) && left > 0 => {
                    left -= 1;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                other => {
                    return other
                        .with_context(|| format!("removing the control group {}", self.path.display()));
                }
            }
        }
    }

    fn inner(&self) -> Vec<Group> {
        let Ok(entries) = fs::read_dir(&self.path) else { return Vec::new() };
        entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| Group { path: entry.path() })
            .collect()
    }
}

/// Undoes the mount that [`hierarchy`] may have made, once no lab uses it.
pub(super) fn unmount_own() -> Result<()> {
    let own = Path::new(OWN_MOUNT);
    let Ok(entries) = fs::read_dir(own) else { return Ok(()) };
    let labs = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("understudy-lab-"));
    if labs.count() == 0 {
        umount(own).with_context(|| format!("unmounting {OWN_MOUNT}"))?;
        fs::remove_dir(own).with_context(|| format!("removing {OWN_MOUNT}"))?;
    }
    Ok(())
}

/// The mount point of the version 2 hierarchy.
fn hierarchy() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        if let (Some(point), Some("cgroup2")) = (fields.next(), fields.next()) {
            return Ok(PathBuf::from(point));
        }
    }
    fs::create_dir_all(OWN_MOUNT).with_context(|| format!("making {OWN_MOUNT}"))?;
    mount(Some("none"), Path::new(OWN_MOUNT), Some("cgroup2"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mounting a cgroup2 hierarchy on {OWN_MOUNT}"))?;
    Ok(PathBuf::from(OWN_MOUNT))
}
