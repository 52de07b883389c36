//! The control socket: one daemon per path, root only, nothing left behind.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::{Mode, umask};
use tokio::net::UnixListener;

/// Why the control API can't listen.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    /// Another daemon answers there.
    #[error(
        "another dom0d listens on {}: stop it first, or give this one another `control_socket`", .path.display()
    )]
    Taken {
        /// The control socket.
        path: PathBuf,
    },
    /// Something else is in the way.
    #[error(
        "{} exists and is no socket: remove it, or choose another `control_socket`", .path.display()
    )]
    NoSocket {
        /// The control socket.
        path: PathBuf,
    },
    /// The system refuses.
    #[error("control socket {}: can't {action}: {error}", .path.display())]
    System {
        /// The control socket, or its directory.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        error: io::Error,
    },
}

/// The listening control socket. Its file is removed when this is dropped.
pub(crate) struct ControlSocket {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
}

/// The socket's file, recognised by device and inode: a successor's is left alone.
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|now| identity(&now) == self.identity) {
            // What can't be removed is taken for stale by the next daemon.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl ControlSocket {
    /// Listens on `path` (in a Tokio runtime). A socket that nobody listens on is replaced.
    pub(crate) fn listen(path: &Path) -> Result<Self, ListenError> {
        let system = |path: &Path, action| {
            let path = path.to_owned();
            move |error: io::Error| ListenError::System { path, action, error }
        };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        if !directory.exists() {
            let mut made = fs::DirBuilder::new();
            let made = made.recursive(true).mode(0o750).create(directory);
            made.map_err(system(directory, "create its directory"))?;
        }

        // Of two daemons that start at once, each could find the other's socket not yet listening; a host's daemons
        // exclude each other by `preflight::lock`, which nobody else can take.
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(system(path, "look at it")(error)),
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ListenError::NoSocket { path: path.into() });
            }
            Ok(_) => {
                if answers(path).map_err(system(path, "ask who listens on it"))? {
                    return Err(ListenError::Taken { path: path.into() });
                }
                tracing::info!(socket = %path.display(), "removing the control socket of a daemon that is gone");
                fs::remove_file(path).map_err(system(path, "remove the stale socket"))?;
            }
        }

        // Nobody but root may connect, not even in the moment between bind(2) and chmod(2).
        let mask = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(mask);
        let listener = bound.map_err(system(path, "bind it"))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(system(path, "set its mode"))?;
        let found = fs::symlink_metadata(path).map_err(system(path, "look at it"))?;
        Ok(Self { listener, file: SocketFile { path: path.to_owned(), identity: identity(&found) } })
    }
}

fn identity(file: &fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Whether somebody listens on a socket. Never blocks: a daemon that is alive and does not accept
/// counts as listening.
fn answers(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path)?;
    match connect(std::os::fd::AsRawFd::as_raw_fd(&probe), &address) {
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
