//! Iterators over cgroups and tasks, and maps shared with the kernel.
//!
//! In: a loaded iterator program, a directory of a cgroup file system, a mappable array map. Out: a
//! link that can be run, and the map's words. Invariant: shared words are only reached as atomics.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

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

#[repr(C)]
struct IteratorCreate {
    link: u32,
    flags: u32,
}

fn raw(fd: impl AsFd) -> io::Result<u32> {
    u32::try_from(fd.as_fd().as_raw_fd()).map_err(io::Error::other)
}

fn owned(answer: libc::c_long) -> io::Result<OwnedFd> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(answer).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Ties a loaded iterator program to the cgroup of an open directory, and no other.
///
/// # Errors
/// The kernel's refusal.
pub fn cgroup_iterator(program: impl AsFd, directory: impl AsFd) -> io::Result<OwnedFd> {
    let mut iterator = CgroupIterator {
        order: BPF_CGROUP_ITER_SELF_ONLY,
        directory: raw(&directory)?,
        id: 0,
    };
    attach(program, Some(&mut iterator))
}

/// Ties a loaded iterator program to all tasks of the pid namespace of whoever runs it.
///
/// # Errors
/// The kernel's refusal.
pub fn task_iterator(program: impl AsFd) -> io::Result<OwnedFd> {
    attach(program, None)
}

fn attach(program: impl AsFd, over: Option<&mut CgroupIterator>) -> io::Result<OwnedFd> {
    let (iterator, iterator_length) = match over {
        Some(over) => ((&raw mut *over).addr() as u64, 16),
        None => (0, 0),
    };
    let mut attributes = LinkCreate {
        program: raw(&program)?,
        target: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        iterator,
        iterator_length,
        zero: [0; 9],
    };
    // SAFETY: `attributes` and the structure it points to, if any, have the kernel's layout and live
    // through the call (`over` is borrowed until then); the kernel copies from them only.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_LINK_CREATE,
            &raw mut attributes,
            size_of::<LinkCreate>(),
        )
    };
    owned(answer)
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
    // SAFETY: `attributes` has the kernel's layout and lives through the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_ITER_CREATE,
            &raw mut attributes,
            size_of::<IteratorCreate>(),
        )
    };
    let iterator = owned(answer)?;
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
