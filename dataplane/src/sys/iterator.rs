//! Iterators over cgroups and tasks, and maps shared with the kernel.
//!
//! In: a loaded iterator program, a directory of a cgroup file system, a mappable array map. Out: a
//! link that can be run, and the map's words. Invariant: shared words are only reached as atomics.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

use super::bpf;

/// linux/bpf.h.
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_ITER_CREATE: libc::c_long = 33;
const BPF_TRACE_ITER: u32 = 28;
const BPF_CGROUP_ITER_SELF_ONLY: u32 = 1;

/// The `link_create` member of `union bpf_attr`, as far as iterators use it.
#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    iterator: u64,
    iterator_length: u32,
    zero: [u32; 9],
}

const _: () = assert!(size_of::<LinkCreate>() == 64);

/// The `cgroup` member of `union bpf_iter_link_info`.
#[repr(C)]
struct CgroupIterator {
    order: u32,
    directory: u32,
    id: u64,
}

const _: () = assert!(size_of::<CgroupIterator>() == 16);

/// The `iter_create` member of `union bpf_attr`.
#[repr(C)]
struct IteratorCreate {
    link: u32,
    flags: u32,
}

fn raw(fd: impl AsFd) -> io::Result<u32> {
    u32::try_from(fd.as_fd().as_raw_fd()).map_err(io::Error::other)
}

/// Ties a loaded iterator program to the cgroup of an open directory, and no other.
///
/// # Errors
/// The kernel's refusal.
pub fn cgroup_iterator(program: impl AsFd, directory: impl AsFd) -> io::Result<OwnedFd> {
    let iterator = CgroupIterator {
        order: BPF_CGROUP_ITER_SELF_ONLY,
        directory: raw(&directory)?,
        id: 0,
    };
    attach(program, Some(&iterator))
}

/// Ties a loaded iterator program to all tasks of the pid namespace of whoever runs it.
///
/// # Errors
/// The kernel's refusal.
pub fn task_iterator(program: impl AsFd) -> io::Result<OwnedFd> {
    attach(program, None)
}

fn attach(program: impl AsFd, over: Option<&CgroupIterator>) -> io::Result<OwnedFd> {
    let length = over.as_ref().map_or(0, |_| size_of::<CgroupIterator>());
    let mut attributes = LinkCreate {
        program: raw(&program)?,
        target: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        iterator: over.map_or(0, |over| (&raw const *over).expose_provenance() as u64),
        iterator_length: u32::try_from(length).map_err(io::Error::other)?,
        zero: [0; 9],
    };
    // SAFETY: the kernel only reads the structure pointed to, if any, which is as long as stated and
    // lives through the call: `over` is borrowed by the caller.
    unsafe { bpf::open(BPF_LINK_CREATE, &mut attributes) }
}

/// Runs an iterator to its end. What it prints is dropped: these programs write to maps.
///
/// # Errors
/// The kernel's refusal.
pub fn run_iterator(link: impl AsFd) -> io::Result<()> {
    let mut attributes = IteratorCreate {
        link: raw(&link)?,
        flags: 0,
    };
    // SAFETY: the `iter_create` member, which has no addresses.
    let iterator = unsafe { bpf::open(BPF_ITER_CREATE, &mut attributes) }?;
    let mut nothing = [0_u8; 64];
    loop {
        match rustix::io::read(&iterator, &mut nothing) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The values of an array map, mapped into this process.
#[derive(Debug)]
pub struct SharedArray {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: plain memory owned by this value and reached through atomics only.
unsafe impl Send for SharedArray {}

impl SharedArray {
    /// Maps `words` 64-bit words of a map made mappable.
    ///
    /// # Errors
    /// The kernel's refusal: the map is another kind or smaller.
    pub fn new(map: impl AsFd, words: usize) -> io::Result<Self> {
        // The kernel takes whole pages only, and rounds the map's own size up to them.
        let bytes = (words * size_of::<u64>()).next_multiple_of(rustix::param::page_size());
        // SAFETY: a null hint lets the kernel choose the place, so no existing mapping is touched.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                map,
                0,
            )
        }?;
        let start = NonNull::new(start.cast::<AtomicU64>())
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self {
            start,
            words: bytes / size_of::<u64>(),
        })
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is page-aligned and maps `words` words until drop, which the borrow of
        // `self` outlives; every bit pattern is a valid AtomicU64.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SharedArray {
    fn drop(&mut self) {
        // SAFETY: exactly the range that was mapped; no borrow of it can outlive `self`.
        let unmapped = unsafe {
            rustix::mm::munmap(self.start.as_ptr().cast(), self.words * size_of::<u64>())
        };
        debug_assert!(unmapped.is_ok(), "the range was mapped by us");
    }
}
