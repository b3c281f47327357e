//! Maps a region's file into memory as a slice of atomic words.
//!
//! In: an open file and the length that was checked against it. Out: `&[AtomicU64]` for as long as
//! the mapping lives. Invariant: nobody gets a plain reference into the mapped bytes; every access
//! is an atomic load or store of one aligned 64-bit word, so whatever the other process does to the
//! bytes, a reader sees numbers, never undefined behaviour.
//!
//! What a mapping cannot defend against is a file made *shorter* under it (SIGBUS): regions are
//! allocated up front and never shrunk, and only the region's writer has permission to.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

/// A whole file mapped shared.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is plain memory owned by this value and is only reached through atomics.
unsafe impl Send for Mapping {}
// SAFETY: shared access is through `&[AtomicU64]`, which is `Sync`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `words` 64-bit words of `file` for reading. Storing to them would fault.
    pub(crate) fn read_only(file: impl AsFd, words: usize) -> rustix::io::Result<Self> {
        Self::map(file, words, ProtFlags::READ)
    }

    /// Maps `words` 64-bit words of `file` for reading and writing.
    pub(crate) fn writable(file: impl AsFd, words: usize) -> rustix::io::Result<Self> {
        Self::map(file, words, ProtFlags::READ | ProtFlags::WRITE)
    }

    fn map(file: impl AsFd, words: usize, protection: ProtFlags) -> rustix::io::Result<Self> {
        let bytes = words
            .checked_mul(size_of::<u64>())
            .filter(|bytes| *bytes > 0)
            .ok_or(rustix::io::Errno::INVAL)?;
        // SAFETY: a null hint lets the kernel choose the place, so no existing mapping is touched.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast::<AtomicU64>()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { start, words })
    }

    /// The mapped words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned and maps `words` words until drop, which the borrow of
        // `self` outlives; every bit pattern is a valid AtomicU64. Read-only pages are fine for
        // atomic loads of this width (std::sync::atomic, "Atomic accesses to read-only memory").
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that was mapped; no borrow of it can outlive `self`.
        let unmapped = unsafe {
            rustix::mm::munmap(self.start.as_ptr().cast(), self.words * size_of::<u64>())
        };
        debug_assert!(unmapped.is_ok(), "the range was mapped by us");
    }
}
