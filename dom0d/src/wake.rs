//! Wakes the data-path thread from its poll(2).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// A cloneable eventfd: other threads write it, the data path polls it.
#[derive(Clone, Debug)]
pub(crate) struct Waker(Arc<EventFd>);

impl Waker {
    /// A waker that nobody has used yet.
    pub(crate) fn new() -> nix::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(Arc::new(EventFd::from_value_and_flags(0, flags)?)))
    }

    /// Makes the next (or current) poll return.
    pub(crate) fn wake(&self) {
        // The only error is a counter at its maximum, and then the reader is awake anyhow.
        let _ = self.0.write(1);
    }

    /// Forgets all wake-ups so far.
    pub(crate) fn clear(&self) {
        // The only error is that there was none.
        let _ = self.0.read();
    }

    /// What to poll for reading.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
