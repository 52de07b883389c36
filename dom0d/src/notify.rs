//! Tells systemd how the daemon is: sd_notify(3) by plain datagrams; nothing without NOTIFY_SOCKET.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// A way to the service manager.
pub(crate) struct Notifier {
    socket: UnixDatagram,
    address: SocketAddr,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// The service manager that started this process, if one did and wants to hear.
    pub(crate) fn from_environment() -> io::Result<Option<Self>> {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
            return Ok(None);
        };
        let watchdog =
            std::env::var("WATCHDOG_USEC").ok().and_then(|text| text.parse().ok()).map(Duration::from_micros);
        Ok(Some(Self { socket: UnixDatagram::unbound()?, address: address(&path)?, watchdog }))
    }

    /// How often to tell the manager that the daemon is well, if it watches. Often enough that systemd kills the daemon only
    /// if it was stuck for nearly the whole limit, not because a starved host did not run it for a moment.
    pub(crate) fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|limit| limit / 10)
    }

    /// Tells the manager something: `READY=1`, `WATCHDOG=1`, `STOPPING=1`, ...
    pub(crate) fn tell(&self, what: &str) {
        if let Err(error) = self.socket.send_to_addr(what.as_bytes(), &self.address) {
            tracing::warn!(%error, what, "the service manager can't be told");
        }
    }
}

fn address(path: &OsStr) -> io::Result<SocketAddr> {
    match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(path),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn both_kinds_of_address_are_understood() {
        assert!(address(OsStr::new("/run/systemd/notify")).unwrap().as_pathname().is_some());
        let address = address(OsStr::new("@abstract")).unwrap();
        assert_eq!(address.as_abstract_name(), Some(&b"abstract"[..]));
    }

    #[test]
    fn a_daemon_that_was_not_run_for_half_of_the_limit_lives() {
        let limit = Duration::from_secs(10);
        let address = address(OsStr::new("@abstract")).unwrap();
        let notifier = Notifier { socket: UnixDatagram::unbound().unwrap(), address, watchdog: Some(limit) };
        // Told just before, and told again at the first look after it.
        assert!(limit / 2 + notifier.watchdog_interval().unwrap() * 2 < limit);
    }
}
