//! Memory that outlives the process: a mapped file of a tmpfs. The next process finds what was stored, however this one
//! ends.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::posix_fallocate;

use crate::shared::Mapping;

/// See the module. Only one process may have a file's pages at a time.
pub struct Pages(Mapping);

impl Pages {
    /// Maps the file at `path`, created or resized to `length` bytes, with all of them allocated: a full tmpfs is an error
    /// here and no signal later.
    pub fn create(path: &Path, length: usize) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        file.set_len(length as u64)?;
        posix_fallocate(&file, 0, i64::try_from(length).map_err(io::Error::other)?)?;
        Ok(Self(Mapping::new::<u64>(&file, length / size_of::<u64>())?))
    }

    /// Maps the file at `path` as it is.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if length < size_of::<u64>() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self(Mapping::new::<u64>(&file, length / size_of::<u64>())?))
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping is that long and lives as long as `self`; this process is the only one that has it, and
        // changes it only through `&mut self` or, words at a time and atomically, by `set_word`.
        unsafe { std::slice::from_raw_parts(self.0.address().cast().as_ptr(), self.0.length()) }
    }

    /// All of it, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed for change.
        unsafe { std::slice::from_raw_parts_mut(self.0.address().cast().as_ptr(), self.0.length()) }
    }

    /// Stores a number, little-endian, at an index in words of 8 bytes, after everything that was stored before. Beyond the
    /// end it does nothing.
    pub fn set_word(&mut self, place: usize, value: u64) {
        if place < self.0.length() / size_of::<u64>() {
            // SAFETY: within the mapping and aligned, as that begins with a page.
            let word = unsafe { AtomicU64::from_ptr(self.0.address().cast::<u64>().as_ptr().add(place)) };
            word.store(value.to_le(), Ordering::Release);
        }
    }

    /// The number at an index in words of 8 bytes; 0 beyond the end.
    pub fn word(&self, place: usize) -> u64 {
        let at = place.saturating_mul(size_of::<u64>());
        let bytes = self.bytes().get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}
