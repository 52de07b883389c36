//! A packet socket on one interface: sees every frame of it, and sends frames as they are given.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};
use std::os::fd::AsFd;

use super::frames::{Mac, Seen, parse};

/// A packet socket bound to one interface of the calling thread's namespace.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: OwnedFd,
    /// The interface's own MAC.
    pub(crate) mac: Mac,
}

impl Wire {
    pub(crate) fn open(interface: &str) -> Result<Self> {
        let link = link_address(interface)?;
        let mac = link.addr().with_context(|| format!("{interface} has no Ethernet address"))?;
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::EthAll,
        )
        .context("cannot open a packet socket (root is needed)")?;
        bind(socket.as_raw_fd(), &link).with_context(|| format!("cannot bind to {interface}"))?;
        Ok(Self { socket, mac })
    }

    /// Opens the namespace's only interface besides loopback.
    pub(crate) fn open_only() -> Result<Self> {
        let mut names: Vec<_> =
            getifaddrs()?.map(|entry| entry.interface_name).filter(|name| name != "lo").collect();
        names.sort();
        names.dedup();
        match names.as_slice() {
            [only] => Self::open(only),
            _ => bail!("not exactly one interface in this namespace: {names:?}"),
        }
    }

    /// Sends one frame as it is; false if the interface has no room for it now.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<bool> {
        match send(self.socket.as_raw_fd(), frame, MsgFlags::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::ENOBUFS | Errno::EAGAIN) => Ok(false),
            Err(error) => Err(error).context("cannot send a frame"),
        }
    }

    /// The next TCP segment in either direction for which `wanted` holds, if one comes in time.
    pub(crate) fn next(
        &self,
        limit: Duration,
        mut wanted: impl FnMut(&Seen) -> bool,
    ) -> Result<Option<Seen>> {
        self.next_frame(limit, |frame| parse(frame).filter(&mut wanted))
    }

    /// What `read` makes of the next frame in either direction of which it makes something, if one comes in time. The
    /// outer tag of a frame that came is not in it.
    pub(crate) fn next_frame<T>(
        &self,
        limit: Duration,
        mut read: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now() + limit;
        let mut frame = vec![0; 64 << 10];
        while let Some(length) = self.frame(deadline, &mut frame)? {
            if let Some(found) = read(&frame[..length]) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Puts the next frame in either direction into `frame`, and gives its length, if one comes before `deadline`.
    pub(crate) fn frame(&self, deadline: Instant, frame: &mut [u8]) -> Result<Option<usize>> {
        while Instant::now() <= deadline {
            match recv(self.socket.as_raw_fd(), frame, MsgFlags::empty()) {
                Ok(n) => return Ok(Some(n)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
                    let wait = PollTimeout::try_from(left.min(Duration::from_millis(100)))
                        .unwrap_or(PollTimeout::ZERO);
                    poll(&mut fds, wait).or_else(|e| if e == Errno::EINTR { Ok(0) } else { Err(e) })?;
                }
                Err(error) => return Err(error).context("cannot receive frames"),
            }
        }
        Ok(None)
    }
}

fn link_address(interface: &str) -> Result<LinkAddr> {
    getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr().copied())
        .with_context(|| format!("no interface {interface} in this namespace"))
}
