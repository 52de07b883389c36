//! The control block, in memory that kernel and daemon share: a store is in force at once, without a system call.
#![allow(unsafe_code)]

use std::num::NonZero;
use std::os::fd::AsFd;
use std::ptr::{NonNull, addr_of, addr_of_mut};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::layout::{Control, Server};

/// See the module.
pub(crate) struct SharedControl(NonNull<Control>);

// SAFETY: the mapping belongs to this value alone, and no reference into it ever leaves.
unsafe impl Send for SharedControl {}

const LENGTH: NonZero<usize> = match NonZero::new(size_of::<Control>()) {
    Some(length) => length,
    None => NonZero::<usize>::MIN,
};

impl SharedControl {
    /// Maps the only entry of a memory-mappable array map of [`Control`].
    pub(crate) fn map(map: impl AsFd) -> nix::Result<Self> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, at an address of the kernel's choice, of a map whose value is at least that long.
        let address = unsafe { mmap(None, LENGTH, protection, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self(address.cast()))
    }

    fn word(&self, field: impl FnOnce(*mut Control) -> *mut u64) -> &AtomicU64 {
        // SAFETY: the field is aligned (the block begins a page), lives as long as `self`, and is only ever
        // accessed atomically, here, or by a program in the kernel.
        unsafe { AtomicU64::from_ptr(field(self.0.as_ptr())) }
    }

    /// Who may speak; in force before anything that the caller does next.
    pub(crate) fn set_active(&self, active: u64) {
        // SAFETY: a field's address within the mapping.
        self.word(|control| unsafe { addr_of_mut!((*control).active) }).store(active, Ordering::SeqCst);
    }

    pub(crate) fn active(&self) -> u64 {
        // SAFETY: a field's address within the mapping.
        self.word(|control| unsafe { addr_of_mut!((*control).active) }).load(Ordering::SeqCst)
    }

    pub(crate) fn set_heartbeat(&self, now_ns: u64) {
        // SAFETY: a field's address within the mapping.
        self.word(|control| unsafe { addr_of_mut!((*control).heartbeat_ns) })
            .store(now_ns, Ordering::Relaxed);
    }

    pub(crate) fn unrecorded(&self) -> u64 {
        // SAFETY: a field's address within the mapping.
        self.word(|control| unsafe { addr_of_mut!((*control).unrecorded) }).load(Ordering::Relaxed)
    }

    /// Changes what is not a word; programs may see it half changed, so nothing that is in use.
    pub(crate) fn set_server(&self, slot: usize, server: Server) {
        if let Some(place) = self.get().servers.get(slot).map(|_| slot) {
            // SAFETY: `place` is within the array.
            unsafe { addr_of_mut!((*self.0.as_ptr()).servers[place]).write_volatile(server) }
        }
    }

    /// A copy of all.
    pub(crate) fn get(&self) -> Control {
        // SAFETY: the mapping is that long; all bit patterns are values.
        unsafe { addr_of!(*self.0.as_ptr()).read_volatile() }
    }
}

impl Drop for SharedControl {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and not used after.
        let _ = unsafe { munmap(self.0.cast(), LENGTH.get()) };
    }
}
