//! Maps a region's file into memory as a slice of atomic words.
//!
//! In: an open file and the length that was checked against it. Out: `&[AtomicU64]` for as long as
//! the mapping lives. Invariant: nobody gets a plain reference into the mapped bytes; every access
//! is an atomic load or store of one aligned 64-bit word, so whatever the other process does to the
//! bytes, a reader sees numbers, never undefined behaviour.
//!
//! A file made *shorter* under a mapping faults (SIGBUS). Regions are allocated up front and never
//! shrunk by their writer; should anybody do it, `guard` puts zeros in the place of a mapping that
//! is only read, and its reader finds that the region has lost its head. A writer whose own file is
//! taken away ends, and its next life makes a new one.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags};

/// A whole file mapped shared.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
    /// Whether zeros take its place when the file is too short.
    guarded: Option<guard::Place>,
}

// SAFETY: the mapping is plain memory owned by this value and is only reached through atomics.
unsafe impl Send for Mapping {}
// SAFETY: shared access is through `&[AtomicU64]`, which is `Sync`.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `words` 64-bit words of `file` for reading. Storing to them would fault.
    pub(crate) fn read_only(file: impl AsFd, words: usize) -> rustix::io::Result<Self> {
        let mut mapping = Self::map(file, words, ProtFlags::READ)?;
        let bytes = words * size_of::<u64>();
        mapping.guarded = Some(guard::Place::take(mapping.start.addr().get(), bytes));
        Ok(mapping)
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
        Ok(Self {
            start,
            words,
            guarded: None,
        })
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
        // Before the range may be anybody else's.
        self.guarded = None;
        // SAFETY: exactly the range that was mapped; no borrow of it can outlive `self`.
        let unmapped = unsafe {
            rustix::mm::munmap(self.start.as_ptr().cast(), self.words * size_of::<u64>())
        };
        debug_assert!(unmapped.is_ok(), "the range was mapped by us");
    }
}

mod guard {
    //! What happens when a mapped file has become too short: a handler of SIGBUS puts zeros in the place of
    //! the mapping that faulted.
    //!
    //! In: the places of mappings that are only read. Out: nothing; the load that faulted is repeated and
    //! yields zero, like every later one. Invariants: a fault anywhere else ends the process as before; the
    //! handler takes no lock and allocates nothing; a place is given back before its range is unmapped.

    use std::sync::Once;
    use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

    /// A range of addresses, or free (`start` 0). Never freed, for the handler may be looking at it.
    struct Slot {
        start: AtomicUsize,
        bytes: AtomicUsize,
        next: AtomicPtr<Slot>,
    }

    /// All slots there ever were: as many as mappings at once.
    static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(std::ptr::null_mut());

    /// A range the handler looks after, until this is dropped.
    #[derive(Debug)]
    pub(super) struct Place(&'static AtomicUsize);

    impl Place {
        /// Looks after `bytes` bytes from `start`, a mapping of the caller's that nobody stores to.
        pub(super) fn take(start: usize, bytes: usize) -> Self {
            static INSTALLED: Once = Once::new();
            INSTALLED.call_once(install);
            for slot in slots() {
                // Half taken: the address alone would be a range with the length of the one before.
                if (slot.start)
                    .compare_exchange(0, usize::MAX, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
                {
                    slot.bytes.store(bytes, Ordering::Relaxed);
                    slot.start.store(start, Ordering::Release);
                    return Self(&slot.start);
                }
            }
            let slot: &'static Slot = Box::leak(Box::new(Slot {
                start: AtomicUsize::new(start),
                bytes: AtomicUsize::new(bytes),
                next: AtomicPtr::default(),
            }));
            let own = std::ptr::from_ref(slot).cast_mut();
            let mut head = SLOTS.load(Ordering::Relaxed);
            loop {
                slot.next.store(head, Ordering::Relaxed);
                match SLOTS.compare_exchange_weak(head, own, Ordering::Release, Ordering::Relaxed) {
                    Ok(_) => return Self(&slot.start),
                    Err(now) => head = now,
                }
            }
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            self.0.store(0, Ordering::Release);
        }
    }

    fn slots() -> impl Iterator<Item = &'static Slot> {
        let mut next = SLOTS.load(Ordering::Acquire);
        std::iter::from_fn(move || {
            // SAFETY: null, or a slot that was leaked and linked after it was whole (the release stores
            // to `SLOTS`, a sequence of exchanges, meet the acquire load above).
            let slot = unsafe { next.as_ref() }?;
            next = slot.next.load(Ordering::Relaxed);
            Some(slot)
        })
    }

    fn install() {
        // SAFETY: a sigaction of zeros is one without flags and with an empty mask (POD of numbers).
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `action` is whole and outlives the call; the handler does only what signal-safety(7)
        // allows. It takes the place of the standard library's, which tells of overflown stacks: on
        // Linux these are SIGSEGV. Should it fail, a fault ends the process as it did before.
        let _installed =
            unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    }

    extern "C" fn on_fault(
        signal: libc::c_int,
        information: *mut libc::siginfo_t,
        _context: *mut libc::c_void,
    ) {
        // SAFETY: the kernel gives a handler with SA_SIGINFO a whole siginfo of its own.
        let information = unsafe { &*information };
        // Signals that were sent (kill(2)) have no address.
        let of_kernel = information.si_code > 0;
        // SAFETY: of a fault, which has one; of another signal it is a number nobody looks at.
        let address = unsafe { information.si_addr() }.addr();
        let hit = slots().find_map(|slot| {
            let start = slot.start.load(Ordering::Acquire);
            let bytes = slot.bytes.load(Ordering::Acquire);
            // Both of one mapping, not of two that had the slot one after the other.
            let taken = start != 0 && start != usize::MAX;
            let same = slot.start.load(Ordering::Relaxed) == start;
            let within = (start..start.saturating_add(bytes)).contains(&address);
            (taken && same && within).then_some((start, bytes))
        });
        if let Some((start, bytes)) = hit.filter(|_| of_kernel) {
            // SAFETY: the range is a mapping of this process that the thread that faulted borrows, so it
            // stays one until that thread goes on; it is only read, by atomic loads, to which zeros are
            // as good as anything. mmap(2) is a plain system call.
            let zeros = unsafe {
                libc::mmap(
                    std::ptr::with_exposed_provenance_mut(start),
                    bytes,
                    libc::PROT_READ,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                    -1,
                    0,
                )
            };
            if zeros != libc::MAP_FAILED {
                return;
            }
        }
        // Not ours: what faulted faults again, and that ends the process.
        // SAFETY: signal(2) is signal-safe and takes no pointer of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        if !of_kernel {
            // SAFETY: raise(3) is signal-safe; the signal waits until this handler has returned.
            unsafe { libc::raise(signal) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::Ordering;

    use super::Mapping;

    const PAGE_WORDS: usize = 512;

    fn file(pages: usize) -> std::fs::File {
        let mut file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all(&vec![0x55; pages * 8 * PAGE_WORDS]).unwrap();
        file
    }

    #[test]
    fn a_file_made_shorter_is_read_as_zeros_from_then_on() {
        let files = [file(4), file(4)];
        let maps = |file| Mapping::read_only(file, 4 * PAGE_WORDS).unwrap();
        let [short, whole] = files.each_ref().map(maps);
        let value = u64::from_ne_bytes([0x55; 8]);
        let load = |mapping: &Mapping, word: usize| mapping.words()[word].load(Ordering::Relaxed);
        assert_eq!(load(&short, 0), value);
        files[0].set_len(100).unwrap();
        assert_eq!(load(&short, 3 * PAGE_WORDS), 0);
        // All of it: nobody takes a part for the whole.
        assert_eq!(load(&short, 0), 0);
        // And nothing else.
        assert_eq!(load(&whole, 3 * PAGE_WORDS), value);
        drop(short);
        files[1].set_len(0).unwrap();
        assert_eq!(load(&whole, PAGE_WORDS), 0);
    }

    #[test]
    fn many_mappings_of_many_threads_are_looked_after_each() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let file = file(2);
                        let mapping = Mapping::read_only(&file, 2 * PAGE_WORDS).unwrap();
                        file.set_len(0).unwrap();
                        let words = mapping.words().iter();
                        assert_eq!(
                            words.map(|word| word.load(Ordering::Relaxed)).max(),
                            Some(0)
                        );
                    }
                });
            }
        });
    }
}
