//! Checks whether dom0d can work on this host, before it touches anything: a refusal leaves no trace.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use nix::unistd::geteuid;

/// How long to retry a lock that another process holds. If dom0d is killed while it starts nft, its child holds the lock
/// until it has become nft.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Why dom0d does not start; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// Not root.
    #[error(
        "dom0d must run as root: it captures packets and controls domains (start it with systemctl start dom0d, or sudo)"
    )]
    NotRoot,
    /// Packet sockets are refused or missing.
    #[error("packets can't be captured: {0}; dom0d needs CAP_NET_RAW and a kernel with CONFIG_PACKET")]
    NoPacketSockets(Errno),
    /// nft is missing.
    #[error("the tool nft can't be run ({0}); install the package nftables")]
    NoNft(io::Error),
    /// nft does not work on this kernel.
    #[error(
        "nft can't keep rules for bridges: {0}; dom0d needs a kernel with CONFIG_NF_TABLES_BRIDGE and CAP_NET_ADMIN"
    )]
    NoBridgeRules(String),
    /// Another dom0d runs.
    #[error("another dom0d runs already: {} is locked{}; stop it first (systemctl stop dom0d)", .path.display(), holder(.pid))]
    AlreadyRunning {
        /// The lock file.
        path: PathBuf,
        /// Who holds it, as it wrote.
        pid: Option<u32>,
    },
    /// The lock can't be taken.
    #[error("the lock {} can't be taken: {error}", .path.display())]
    NoLock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

fn holder(pid: &Option<u32>) -> String {
    pid.map(|pid| format!(" by process {pid}")).unwrap_or_default()
}

/// Held as long as this dom0d runs; the kernel releases it however it ends.
pub(crate) struct Lock {
    _file: Flock<File>,
}

/// What every start needs: privilege, packet sockets, nft.
pub(crate) fn check() -> Result<(), Refusal> {
    if !geteuid().is_root() {
        return Err(Refusal::NotRoot);
    }
    // Closed again at once: only whether it may be opened matters.
    let packet = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None::<SockProtocol>);
    packet.map_err(Refusal::NoPacketSockets)?;
    let output = Command::new("nft")
        .args(["--check", "add table bridge understudy { chain c { type filter hook prerouting priority -300; policy accept; }; }"])
        .output()
        .map_err(Refusal::NoNft)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Refusal::NoBridgeRules(said.trim().to_owned()));
    }
    Ok(())
}

/// Makes sure that there is one dom0d per directory, which only root may enter, and so lock something in.
pub(crate) fn lock(directory: &Path) -> Result<Lock, Refusal> {
    let path = directory.join("dom0d.lock");
    let failed = |error: io::Error| Refusal::NoLock { path: path.clone(), error };
    DirBuilder::new().recursive(true).mode(0o750).create(directory).map_err(failed)?;
    std::fs::set_permissions(directory, Permissions::from_mode(0o750)).map_err(failed)?;
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(&path)
        .map_err(failed)?;
    file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => {
                let pid = std::process::id().to_string();
                // Only for the message that a second dom0d gives.
                let _ = std::fs::write(&path, pid);
                return Ok(Lock { _file: file });
            }
            Err((same, Errno::EWOULDBLOCK)) if Instant::now() < deadline => file = same,
            Err((_, Errno::EWOULDBLOCK)) => {
                let pid = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse().ok());
                return Err(Refusal::AlreadyRunning { path, pid });
            }
            Err((_, errno)) => return Err(failed(errno.into())),
        }
        sleep(LOCK_PATIENCE / 100);
    }
}

/// What works worse on this host than it could, each with a remedy.
pub(crate) fn warnings() -> Vec<String> {
    let mut found = Vec::new();
    for (name, family) in [("iptables", "IPv4"), ("ip6tables", "IPv6")] {
        let path = format!("/proc/sys/net/bridge/bridge-nf-call-{name}");
        let on = std::fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1");
        if on {
            found.push(format!(
                "bridged {family} packets pass dom0's {name} rules and connection tracking, which may drop a service's segments after a promotion; sysctl net.bridge.bridge-nf-call-{name}=0"
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_told_who_holds_the_lock() {
        let directory = std::env::temp_dir().join(format!("dom0d-lock-{}", std::process::id()));
        let first = lock(&directory).unwrap();
        let refusal = lock(&directory).err().unwrap();
        let text = refusal.to_string();
        assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
        drop(first);
        lock(&directory).unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn nobody_but_root_can_lock_anything_there() {
        let directory = std::env::temp_dir().join(format!("dom0d-lock-open-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("dom0d.lock");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let nobody_locks = |path: &Path| {
            let words = ["--reuid=65534", "--regid=65534", "--clear-groups", "flock", "--nonblock"];
            let output = Command::new("setpriv").args(words).arg(path).arg("true").output().unwrap();
            output.status.success()
        };
        // As an earlier dom0d, or somebody's umask, may have left it.
        assert!(nobody_locks(&directory) && nobody_locks(&path), "this check sees nothing");
        let first = lock(&directory).unwrap();
        assert!(!nobody_locks(&directory) && !nobody_locks(&path));
        drop(first);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_lock_that_is_held_for_a_moment_is_waited_for() {
        let directory = std::env::temp_dir().join(format!("dom0d-lock-held-{}", std::process::id()));
        let first = lock(&directory).unwrap();
        let holder = std::thread::spawn(move || {
            sleep(LOCK_PATIENCE / 10);
            drop(first);
        });
        lock(&directory).unwrap();
        holder.join().unwrap();
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
