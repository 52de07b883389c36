//! Memory that kernel and daemon share: a store takes effect at once, without a system call.
#![allow(unsafe_code)]

use std::num::NonZero;
use std::os::fd::AsFd;
use std::ptr::{NonNull, addr_of, addr_of_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use nix::libc::c_void;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{SysconfVar, sysconf};

use crate::layout::{Bounds, Control, Server};

/// A mapping of a memory-mappable array map, or of a file.
pub(crate) struct Mapping {
    address: NonNull<c_void>,
    length: NonZero<usize>,
}

// SAFETY: the mapping belongs to this value alone, and references into it borrow the value that owns it.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `count` values of a type whose size is a multiple of 8, as the map's stride is.
    pub(crate) fn new<T>(map: impl AsFd, count: usize) -> nix::Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8)) }
        Self::with(map, size_of::<T>() * count, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    fn with(map: impl AsFd, length: usize, protection: ProtFlags) -> nix::Result<Self> {
        let length = NonZero::new(length).unwrap_or(NonZero::<usize>::MIN);
        // SAFETY: a new mapping, at an address of the kernel's choice, of a map whose values are at least that long.
        let address = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { address, length })
    }

    pub(crate) fn address(&self) -> NonNull<c_void> {
        self.address
    }

    /// Its length in bytes.
    pub(crate) fn length(&self) -> usize {
        self.length.get()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and not used after.
        let _ = unsafe { munmap(self.address, self.length.get()) };
    }
}

/// How far conversations may go on, by the index of their bounds.
pub(crate) struct SharedBounds(Mapping);

impl SharedBounds {
    /// Maps the array map of this many [`Bounds`].
    pub(crate) fn map(map: impl AsFd, count: u32) -> nix::Result<Self> {
        Ok(Self(Mapping::new::<Bounds>(map, count as usize)?))
    }

    /// Takes effect before anything that the caller does next. Beyond the end it does nothing.
    pub(crate) fn set(&self, place: u32, bounds: Bounds) {
        let place = place as usize;
        if place < self.0.length.get() / size_of::<Bounds>() {
            // SAFETY: within the mapping, aligned, and only ever accessed atomically, here, or by a program.
            let (up, down) = unsafe {
                let bounds = self.0.address.cast::<Bounds>().as_ptr().add(place);
                (
                    AtomicU32::from_ptr(addr_of_mut!((*bounds).up)),
                    AtomicU32::from_ptr(addr_of_mut!((*bounds).down)),
                )
            };
            up.store(bounds.up, Ordering::SeqCst);
            down.store(bounds.down, Ordering::SeqCst);
        }
    }
}

/// How far a ring was read and written: kernel/bpf/ringbuf.c keeps each position in a page that may be mapped for reading.
pub(crate) struct RingPositions {
    mapping: Mapping,
    page: usize,
}

impl RingPositions {
    /// Maps the positions of a ring map.
    pub(crate) fn map(ring: impl AsFd) -> nix::Result<Self> {
        let page =
            sysconf(SysconfVar::PAGE_SIZE)?.and_then(|size| usize::try_from(size).ok()).unwrap_or(4_096);
        Ok(Self { mapping: Mapping::with(ring, 2 * page, ProtFlags::PROT_READ)?, page })
    }

    /// Everything before this position was read, and its room given back.
    pub(crate) fn consumed(&self) -> u64 {
        self.at(0)
    }

    /// Everything that was reserved lies before this position.
    pub(crate) fn reserved(&self) -> u64 {
        self.at(self.page)
    }

    fn at(&self, offset: usize) -> u64 {
        // An earlier store, such as that of the active server, must take effect first.
        fence(Ordering::SeqCst);
        // SAFETY: the mapping is two pages long, a page begins with its position, and that changes atomically only.
        let position = unsafe { AtomicU64::from_ptr(self.mapping.address.byte_add(offset).cast().as_ptr()) };
        position.load(Ordering::Relaxed)
    }
}

/// The control block.
pub(crate) struct SharedControl(Mapping);

impl SharedControl {
    /// Maps the single entry of an array map of [`Control`].
    pub(crate) fn map(map: impl AsFd) -> nix::Result<Self> {
        Ok(Self(Mapping::new::<Control>(map, 1)?))
    }

    fn at(&self) -> *mut Control {
        self.0.address.cast().as_ptr()
    }

    fn word(&self, field: impl FnOnce(*mut Control) -> *mut u64) -> &AtomicU64 {
        // SAFETY: the field is aligned (the block begins a page), lives as long as `self`, and is only ever
        // accessed atomically, here, or by a program in the kernel.
        unsafe { AtomicU64::from_ptr(field(self.at())) }
    }

    /// Sets who may speak; takes effect before anything that the caller does next.
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

    /// How long the daemon may be silent, and what counts then.
    pub(crate) fn set_policy(&self, grace_ns: u64, policy: u16) {
        // SAFETY: a field's address within the mapping.
        self.word(|control| unsafe { addr_of_mut!((*control).grace_ns) }).store(grace_ns, Ordering::Relaxed);
        // SAFETY: within the mapping, and half a word is never seen half changed.
        unsafe { addr_of_mut!((*self.at()).policy).write_volatile(policy) }
    }

    pub(crate) fn unrecorded(&self) -> u64 {
        // SAFETY: a field's address within the mapping.
        self.word(|control| unsafe { addr_of_mut!((*control).unrecorded) }).load(Ordering::Relaxed)
    }

    /// Changes a server's entry, which is more than a word: programs may see it half changed, so it must not be in use.
    pub(crate) fn set_server(&self, slot: usize, server: Server) {
        if let Some(place) = self.get().servers.get(slot).map(|_| slot) {
            // SAFETY: `place` is within the array.
            unsafe { addr_of_mut!((*self.at()).servers[place]).write_volatile(server) }
        }
    }

    /// A copy of the control block.
    pub(crate) fn get(&self) -> Control {
        // SAFETY: the mapping is that long; all bit patterns are values.
        unsafe { addr_of!(*self.at()).read_volatile() }
    }
}
