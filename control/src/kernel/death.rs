//! What killed a container, as far as it can be known.
//!
//! In: the exit code, the engine's word on memory, the samples: the kernel's own count of kills, and
//! /dev/shm. Out: the cause, its reason for events, and words for people. Invariant: nothing is claimed of memory without a sign of
//! it: SIGKILL and SIGBUS have other senders too.
//!
//! Exit codes are the shell's: 128 and the number of the signal. Sources: signal(7); shm_overview(7)
//! (a page of a full tmpfs that cannot be had is a SIGBUS); the kernel's cgroup memory controller,
//! which kills by SIGKILL.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shared::observed::ContainerSample;

use super::lifecycle::Reason;

/// 128 + SIGBUS.
const BUS_ERROR: i64 = 135;
/// 128 + SIGKILL.
const KILLED: i64 = 137;
/// A container that dies this soon after a kill for memory has died of it.
const RECENT: Duration = Duration::from_secs(10);
/// Less than this is left of a /dev/shm that is full: a page has been refused.
const SHM_SLACK: u64 = 1 << 20;

/// What killed a container or a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Death {
    /// Killed at its memory limit.
    OutOfMemory,
    /// SIGKILL without a sign that memory was the cause.
    Killed,
    /// SIGBUS with a full /dev/shm.
    SharedMemoryFull,
    /// SIGBUS with room in /dev/shm, as far as it was seen.
    BusError,
}

/// The evidence there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Something of the container was killed for memory a moment ago.
    pub out_of_memory: bool,
    /// Its /dev/shm was full when it was last looked at.
    pub shm_full: bool,
}

impl Death {
    /// The cause; `None` when the code says nothing of one.
    pub fn of(exit_code: Option<i64>, evidence: Evidence) -> Option<Death> {
        match exit_code? {
            KILLED if evidence.out_of_memory => Some(Death::OutOfMemory),
            KILLED => Some(Death::Killed),
            BUS_ERROR if evidence.shm_full => Some(Death::SharedMemoryFull),
            BUS_ERROR => Some(Death::BusError),
            _ => None,
        }
    }

    /// The reason of a kernel that ended by itself, when there is a better one than that.
    pub fn reason(self) -> Option<Reason> {
        match self {
            Death::OutOfMemory => Some(Reason::OUT_OF_MEMORY),
            Death::SharedMemoryFull => Some(Reason::SHARED_MEMORY_FULL),
            Death::Killed | Death::BusError => None,
        }
    }

    /// For people: what it means and what to do.
    pub fn words(self) -> &'static str {
        match self {
            Death::OutOfMemory => "killed at its memory limit; the session needs a larger mem slot",
            Death::Killed => "killed by SIGKILL, not for want of memory as far as was seen",
            Death::SharedMemoryFull => {
                "killed by SIGBUS with a full /dev/shm; the session needs a larger shmem"
            }
            Death::BusError => {
                "killed by SIGBUS: a memory map could not be filled; /dev/shm or a disk may be full"
            }
        }
    }
}

/// Bytes and size of a /dev/shm that is full.
pub fn full_shm(sample: &ContainerSample) -> Option<(u64, u64)> {
    let disk = sample.disk.get()?;
    let (used, size) = (disk.shm_bytes?, disk.shm_limit_bytes?);
    // A small one is full when a thirty-second of it is left.
    (size > 0 && size.saturating_sub(used) < SHM_SLACK.min(size / 32 + 1)).then_some((used, size))
}

/// The kills for memory in one container: those the engine told of, and those that Linux counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutOfMemory {
    /// How many the engine told of.
    pub kills: u64,
    /// The last of them.
    pub last: Option<Instant>,
    /// Linux's count in the last sample, and when that was taken, ns of the monotonic clock.
    counted: Option<(u64, u64)>,
    /// When that count was last seen to have grown.
    grew: Option<Instant>,
}

impl OutOfMemory {
    /// Counts one. True when it is worth a line in the log: a container can cause any number.
    pub fn count(&mut self, now: Instant) -> bool {
        let quiet = self
            .last
            .is_none_or(|last| now - last > Duration::from_secs(60));
        self.kills = self.kills.saturating_add(1);
        self.last = Some(now);
        quiet
    }

    /// For a container that is being started, at `start_ns` of the monotonic clock: nothing was
    /// counted before.
    pub fn of_new_container(start_ns: u64) -> Self {
        Self {
            counted: Some((0, start_ns)),
            ..Self::default()
        }
    }

    /// Takes in what Linux has counted up to a sample; one comes every `interval`. The first one of a
    /// container that may be older than this process says nothing of when.
    pub fn sampled(&mut self, sample: &ContainerSample, interval: Duration, now: Instant) {
        let Some(kills) = sample.memory.get().and_then(|it| it.oom_kill_events) else {
            return;
        };
        let taken_ns = sample.taken_monotonic_ns;
        let before = self.counted.replace((kills, taken_ns));
        let grew = before.is_some_and(|(count, then_ns)| {
            // Between samples that are far apart it may have been long ago. A sample that is late is
            // not missed, whatever the interval.
            let apart = Duration::from_nanos(taken_ns.saturating_sub(then_ns));
            kills > count && apart < RECENT.max(interval.saturating_mul(2))
        });
        if grew {
            self.grew = Some(now);
        }
    }

    /// Whether a death at `now` is one of these. `flagged` is the engine's own word, which stands for
    /// any kill in the container's life: it decides only when no earlier kill is known, because then
    /// it may be of that one.
    pub fn explains(&self, now: Instant, flagged: bool) -> bool {
        let recent = [self.last, self.grew]
            .into_iter()
            .flatten()
            .any(|at| now.saturating_duration_since(at) < RECENT);
        let earlier = self.last.is_some() || self.counted.is_some_and(|(kills, _)| kills > 0);
        recent || (flagged && !earlier)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::observed::{DiskCounters, Measured, MemoryCounters, Source};

    #[test]
    fn codes_are_told_apart_by_their_signs() {
        let evidence = |out_of_memory, shm_full| Evidence {
            out_of_memory,
            shm_full,
        };
        for (code, evidence, death) in [
            (Some(137), evidence(true, true), Some(Death::OutOfMemory)),
            (Some(137), evidence(false, true), Some(Death::Killed)),
            (
                Some(135),
                evidence(true, true),
                Some(Death::SharedMemoryFull),
            ),
            (Some(135), evidence(true, false), Some(Death::BusError)),
            (Some(0), evidence(true, true), None),
            (Some(143), evidence(true, true), None),
            (None, evidence(true, true), None),
        ] {
            assert_eq!(Death::of(code, evidence), death, "{code:?} {evidence:?}");
        }
        assert_eq!(Death::Killed.reason(), None, "anybody may kill");
    }

    #[test]
    fn an_old_kill_explains_no_new_death() {
        let now = Instant::now();
        let mut seen = OutOfMemory::default();
        assert!(seen.explains(now, true) && !seen.explains(now, false));
        assert!(seen.count(now));
        assert!(seen.explains(now + RECENT / 2, false));
        assert!(!seen.explains(now + RECENT * 2, true));
        assert!(!seen.count(now + RECENT), "told a moment ago");
        assert_eq!(seen.kills, 2);
    }

    const SECOND: Duration = Duration::from_secs(1);

    fn counted(kills: u64, taken_s: u64) -> ContainerSample {
        let memory = MemoryCounters {
            oom_kill_events: Some(kills),
            ..MemoryCounters::default()
        };
        ContainerSample {
            taken_monotonic_ns: taken_s * 1_000_000_000,
            memory: Measured::now(Source::File, memory),
            ..ContainerSample::default()
        }
    }

    /// The engine's flag stays for the container's life, this process is younger than that.
    #[test]
    fn a_kill_before_the_agent_s_start_explains_no_new_death() {
        let now = Instant::now();
        let mut seen = OutOfMemory::default();
        seen.sampled(&counted(2, 100), SECOND, now);
        assert!(!seen.explains(now, true));
        // Nothing was killed before: the flag is of this death.
        let mut none = OutOfMemory::default();
        none.sampled(&counted(0, 100), SECOND, now);
        assert!(none.explains(now, true) && !none.explains(now, false));
        // A sample without memory says nothing.
        let mut unread = OutOfMemory::default();
        unread.sampled(&ContainerSample::default(), SECOND, now);
        assert!(unread.explains(now, true));
    }

    #[test]
    fn a_kill_that_only_linux_tells_explains_a_death_right_after_it() {
        let begin = Instant::now();
        let mut seen = OutOfMemory::default();
        // The engine told of one long ago.
        seen.count(begin);
        seen.sampled(&counted(1, 100), SECOND, begin);
        let now = begin + RECENT * 6;
        seen.sampled(&counted(1, 160), SECOND, now);
        assert!(!seen.explains(now, true));
        seen.sampled(&counted(2, 161), SECOND, now);
        assert!(seen.explains(now + RECENT / 2, false));
        assert!(!seen.explains(now + RECENT, true));
        // Nobody knows when, between samples that are far apart.
        seen.sampled(&counted(3, 300), SECOND, now + RECENT * 14);
        assert!(!seen.explains(now + RECENT * 14, true));
    }

    #[test]
    fn samples_that_are_seldom_taken_tell_of_a_kill_too() {
        let now = Instant::now();
        let minute = SECOND * 60;
        let mut seen = OutOfMemory::default();
        seen.sampled(&counted(0, 100), minute, now);
        seen.sampled(&counted(1, 161), minute, now);
        assert!(seen.explains(now, false) && seen.explains(now, true));
        // One was left out.
        seen.sampled(&counted(2, 281), minute, now + minute * 2);
        assert!(!seen.explains(now + minute * 2, true));
    }

    /// It may be killed for memory before its first sample is taken.
    #[test]
    fn a_kill_in_the_first_sample_of_a_new_container_explains_its_death() {
        let now = Instant::now();
        let mut seen = OutOfMemory::of_new_container(99_000_000_000);
        assert!(seen.explains(now, true) && !seen.explains(now, false));
        seen.sampled(&counted(1, 100), SECOND, now);
        assert!(seen.explains(now, false));
        let mut late = OutOfMemory::of_new_container(99_000_000_000);
        late.sampled(&counted(1, 200), SECOND, now);
        assert!(!late.explains(now, true));
    }

    #[test]
    fn a_shm_is_full_when_hardly_anything_is_left() {
        let sample = |used, size| ContainerSample {
            disk: Measured::now(
                Source::File,
                DiskCounters {
                    shm_bytes: Some(used),
                    shm_limit_bytes: Some(size),
                    ..DiskCounters::default()
                },
            ),
            ..ContainerSample::default()
        };
        let mib = 1 << 20;
        assert_eq!(
            full_shm(&sample(64 * mib, 64 * mib)),
            Some((64 * mib, 64 * mib))
        );
        assert_eq!(full_shm(&sample(62 * mib, 64 * mib)), None);
        assert_eq!(full_shm(&sample(0, mib / 16)), None);
        assert_eq!(full_shm(&sample(0, 0)), None);
        assert_eq!(full_shm(&ContainerSample::default()), None);
    }
}
