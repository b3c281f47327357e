//! Keeps glibc's allocator from holding memory nobody uses (ADR 10).
//!
//! Both programs do something big at their start (loading kernel programs takes 15 MB for a moment)
//! and little afterwards. glibc keeps what it got once, per thread in arenas of their own, of which
//! a node with many processors has hundreds. Other C libraries keep less and offer nothing; there
//! these functions do nothing.

/// Lets all threads allocate from one arena, the only one that [`trim`] can shrink. To be called
/// before other threads allocate. Threads rarely meet in it: each has a cache of its own before it.
pub fn one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes two numbers, and refuses those it doesn't know.
    let _accepted = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives unused memory back to the kernel: after something big, and now and then. Takes less than a
/// millisecond for a heap of a few megabytes.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) takes no pointer, may be called at any time from any thread, and leaves
    // every allocation where it is.
    let _released = unsafe { libc::malloc_trim(0) };
}

/// Does something big, and gives back what it took for as long as it lasted.
pub fn trimmed<T>(work: impl FnOnce() -> T) -> T {
    let done = work();
    trim();
    done
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    /// Resident memory in pages (proc_pid_statm(5), second field).
    fn resident() -> u64 {
        let text = std::fs::read_to_string("/proc/self/statm").expect("proc");
        let words: Vec<u64> = text.split(' ').flat_map(str::parse).collect();
        words[1]
    }

    #[test]
    fn what_was_freed_goes_back() {
        // Blocks too small to be mapped on their own, with survivors between them and at the end.
        let mut blocks: Vec<Option<Vec<u8>>> = (0..1024).map(|_| Some(vec![1; 65_536])).collect();
        let held = resident();
        for (number, block) in blocks.iter_mut().enumerate() {
            if number % 64 != 63 {
                *block = None;
            }
        }
        super::trim();
        let left = resident();
        assert!(left + 12_000 < held, "{held} pages, {left} after the trim");
        assert_eq!(blocks.iter().flatten().count(), 16);
    }
}
