//! Accelerators: a thread per driver that is there, each with the last whole answer of its driver.
//!
//! In: the drivers (NVML; AMD's and Google's by sysfs). Out: rows for the `observed` region, with
//! their age, the containers that use each device, and what processes use. Invariants: nobody ever
//! waits for a driver but its own thread, so a call that never returns makes its own numbers old
//! and nothing else late; old numbers are dropped, not shown as new; where there is no driver there
//! is no thread.

pub mod attribution;
mod files;
pub mod nvml;
pub mod rocm;
pub mod tpu;

use std::collections::HashMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::Sizes;
use shared::observed::{AcceleratorCounters, AcceleratorKind, AcceleratorRow};

use crate::mailbox::Mailbox;

/// Distance between two looks at a driver.
const INTERVAL: Duration = Duration::from_secs(2);
/// A device that has told nothing for so long, or whose driver has answered nothing, counts as faulty,
/// and its numbers are dropped.
const STALE: Duration = Duration::from_secs(10);
/// A look may take longer than that where each answer takes long; numbers that are so old are dropped.
const OLDEST: Duration = Duration::from_secs(60);
/// The log tells of looks that take so long.
const SLOW: Duration = Duration::from_secs(5);

/// A device can be divided into seven parts.
const ROWS_PER_DEVICE: u32 = 8;

/// How many rows the devices of this host may need: by what is on its PCI bus, since drivers take
/// seconds to start. Those that are no accelerators are room for what is plugged in later.
pub fn room(root: &Path) -> u32 {
    let bus = root.join("sys/bus/pci/devices");
    let devices = files::names(&bus).filter(|name| files::is_accelerator(&bus.join(name)));
    let devices = u32::try_from(devices.count()).unwrap_or(u32::MAX);
    let wanted = devices.saturating_mul(ROWS_PER_DEVICE);
    wanted.clamp(Sizes::default().accelerators, Sizes::LIMIT.accelerators)
}

/// Leaves out what a table has no room for: parts first, then the last whole devices. How many.
pub(crate) fn fit(rows: &mut Vec<AcceleratorRow>, room: usize) -> usize {
    let left_out = rows.len().saturating_sub(room);
    if left_out > 0 {
        rows.sort_unstable_by_key(|row| (row.part_of.is_some(), row.key));
        rows.truncate(room);
        rows.sort_unstable_by_key(|row| row.key);
    }
    left_out
}

/// What a driver told in one look.
#[derive(Debug, Default)]
pub struct Reading {
    /// Its devices; the tick is set when they are published, and the age of the reading added.
    pub devices: Vec<AcceleratorRow>,
    /// What each process uses, summed over the devices.
    pub processes: HashMap<u32, ProcessUse>,
}

/// What all drivers told.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct DriverReports {
    /// Their devices, sorted by key.
    pub rows: Vec<AcceleratorRow>,
    /// Kinds whose driver is there and has told nothing yet ([`AcceleratorKind::bit`]).
    pub silent: u64,
    /// One of those may still answer in time.
    pub waits: bool,
}

/// What a process uses of accelerators.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessUse {
    /// Device memory, bytes.
    pub memory_bytes: Option<u64>,
    /// Busy share, thousandths.
    pub utilisation_permille: Option<u32>,
    /// Share of the encoders, thousandths.
    pub encoder_permille: Option<u32>,
    /// Share of the decoders, thousandths.
    pub decoder_permille: Option<u32>,
}

impl ProcessUse {
    /// Percents of processors, encoders and decoders that a driver has sampled.
    fn busy(&mut self, percents: [u32; 3]) {
        let [processors, encoders, decoders] = percents.map(|it| Some(it.min(100) * 10));
        self.utilisation_permille = processors;
        self.encoder_permille = encoders;
        self.decoder_permille = decoders;
    }

    /// Adds another use; an unknown amount makes the sum unknown.
    fn add(&mut self, other: Self) {
        let sum = |a: Option<u32>, b: Option<u32>| Some(a?.saturating_add(b?));
        let memory = self.memory_bytes.zip(other.memory_bytes);
        self.memory_bytes = memory.map(|(a, b)| a.saturating_add(b));
        self.utilisation_permille = sum(self.utilisation_permille, other.utilisation_permille);
        self.encoder_permille = sum(self.encoder_permille, other.encoder_permille);
        self.decoder_permille = sum(self.decoder_permille, other.decoder_permille);
    }
}

/// Which drivers to look for.
#[derive(Debug, Clone)]
pub struct Options {
    /// NVML's library: a name the loader knows or a path.
    pub nvml_library: OsString,
    /// Where `sys` is.
    pub root: PathBuf,
    /// Where the runtime of TPUs serves its metrics.
    pub tpu_runtime: Option<SocketAddr>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nvml_library: nvml::LIBRARY.into(),
            root: PathBuf::from("/"),
            tpu_runtime: None,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    /// `false` until the driver has answered, or has turned out not to be there.
    looked: bool,
    reading: Option<(Instant, Arc<Reading>)>,
    /// It is there and does not start.
    failed: bool,
    /// When the driver last answered anything, at first when it was asked first.
    heard: Option<Instant>,
    stop: bool,
}

/// Where a driver's thread leaves its answers.
#[derive(Debug)]
pub(crate) struct Slot {
    /// What the driver's devices are.
    kind: AcceleratorKind,
    state: Mailbox<State>,
}

impl State {
    /// How old the last whole answer is, and for how long the driver has been silent.
    fn ages(&self, at: Instant) -> (Duration, Duration) {
        (at.elapsed(), self.heard.unwrap_or(at).elapsed())
    }
}

impl Slot {
    fn new(kind: AcceleratorKind) -> Self {
        let state = State {
            heard: Some(Instant::now()),
            ..State::default()
        };
        Self {
            kind,
            state: Mailbox::new(state),
        }
    }

    /// Looks again and again, until told to end.
    fn repeat(&self, look: impl Fn() -> Reading) {
        loop {
            self.put(look());
            if !self.pause(INTERVAL) {
                return;
            }
        }
    }

    /// Leaves an answer.
    pub(crate) fn put(&self, reading: Reading) {
        let mut state = self.state.lock();
        state.looked = true;
        state.failed = false;
        let now = Instant::now();
        state.heard = Some(now);
        state.reading = Some((now, Arc::new(reading)));
    }

    /// The driver has answered something.
    pub(crate) fn heard(&self) {
        self.state.lock().heard = Some(Instant::now());
    }

    /// The driver does not start; these devices were known. Where none were, nothing is known of them.
    pub(crate) fn put_failed(&self, known: Reading) {
        match known.devices.is_empty() {
            true => self.state.lock().failed = true,
            false => self.put(known),
        }
    }

    /// There is no such driver, or it has no devices.
    pub(crate) fn put_none(&self) {
        let mut state = self.state.lock();
        state.looked = true;
        state.reading = None;
    }

    pub(crate) fn stopped(&self) -> bool {
        self.state.lock().stop
    }

    /// Waits; `false` when the thread has to end.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        let until = Instant::now() + time;
        let mut state = self.state.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if state.stop || left.is_zero() {
                return !state.stop;
            }
            state = self.state.wait_for(state, left);
        }
    }
}

/// All drivers' last answers. Dropping it tells the threads to end and does not wait for them: one
/// may be inside a driver call that never returns.
#[derive(Debug)]
pub struct Accelerators {
    slots: Vec<Arc<Slot>>,
}

impl Accelerators {
    /// Starts a thread per driver; one whose library is not there ends at once.
    ///
    /// # Errors
    /// No thread.
    pub fn start(options: &Options) -> std::io::Result<Self> {
        let mut slots = Vec::new();
        let mut start = |name: &str, kind, run: Box<dyn FnOnce(&Slot) + Send>| {
            let slot = Arc::new(Slot::new(kind));
            let own = Arc::clone(&slot);
            slots.push(slot);
            let thread = std::thread::Builder::new().name(name.to_owned());
            thread.spawn(move || run(&own)).map(drop)
        };
        let (library, root) = (options.nvml_library.clone(), options.root.clone());
        start(
            "nvml",
            AcceleratorKind::Cuda,
            Box::new(move |slot| nvml::run(&library, &root, slot)),
        )?;
        if rocm::is_there(&options.root) {
            let root = options.root.clone();
            start(
                "rocm",
                AcceleratorKind::Rocm,
                Box::new(move |slot| slot.repeat(|| rocm::look(&root))),
            )?;
        }
        if tpu::is_there(&options.root) {
            let (root, runtime) = (options.root.clone(), options.tpu_runtime);
            start(
                "tpu",
                AcceleratorKind::Tpu,
                Box::new(move |slot| slot.repeat(|| tpu::look_and_ask(&root, runtime))),
            )?;
        }
        Ok(Self { slots })
    }

    /// No accelerators, for benches and tests of other parts.
    pub fn none() -> Self {
        Self { slots: Vec::new() }
    }

    /// The devices as they are to be published, of all drivers that have answered.
    pub fn told(&self, tick: u64) -> DriverReports {
        let mut told = DriverReports::default();
        let rows = &mut told.rows;
        for slot in &self.slots {
            let state = slot.state.lock();
            if !state.looked {
                told.silent |= slot.kind.bit();
                let silence = state.heard.map_or(Duration::ZERO, |at| at.elapsed());
                told.waits |= !state.failed && silence < STALE;
                continue;
            }
            let Some((at, reading)) = &state.reading else {
                continue;
            };
            let (ages, reading) = (state.ages(*at), Arc::clone(reading));
            drop(state);
            rows.extend(reading.devices.iter().map(|row| aged(row, ages, tick)));
        }
        rows.sort_unstable_by_key(|row| row.key);
        told
    }

    /// What processes use, by host pid; empty when the numbers are old.
    pub fn processes(&self) -> HashMap<u32, ProcessUse> {
        let mut all = HashMap::new();
        for slot in &self.slots {
            let state = slot.state.lock();
            let Some((at, reading)) = state.reading.clone() else {
                continue;
            };
            let (age, silence) = state.ages(at);
            drop(state);
            if age < OLDEST && silence < STALE {
                all.extend(reading.processes.iter().map(|(pid, used)| (*pid, *used)));
            }
        }
        all
    }
}

impl Drop for Accelerators {
    fn drop(&mut self) {
        for slot in &self.slots {
            slot.state.change(|state| state.stop = true);
        }
    }
}

/// Texts of a driver are bounded like everybody's: one that is too long for its field is cut.
fn clip(row: &mut AcceleratorRow) {
    for (text, limit) in [
        (&mut row.id, 80),
        (&mut row.model, 64),
        (&mut row.pci, 32),
        (&mut row.profile, 32),
        (&mut row.driver, 32),
        (&mut row.runtime, 16),
    ] {
        if text.len() > limit {
            let end = (0..=limit)
                .rev()
                .find(|end| text.is_char_boundary(*end))
                .unwrap_or(0);
            text.truncate(end);
        }
    }
}

/// A row as it is published, when the whole answer is so old and the driver has been silent for so long.
fn aged(row: &AcceleratorRow, (age, silence): (Duration, Duration), tick: u64) -> AcceleratorRow {
    // How old it was in that answer.
    let own = Duration::from_millis(row.age_ms.into());
    let age = age.saturating_add(own);
    let mut row = AcceleratorRow {
        tick,
        age_ms: u32::try_from(age.as_millis()).unwrap_or(u32::MAX),
        ..row.clone()
    };
    let is_silent = silence >= STALE || own >= STALE;
    row.healthy &= !is_silent;
    if is_silent || age >= OLDEST {
        row.users_unknown = true;
        // What does not change is still true.
        row.counters = AcceleratorCounters {
            memory_total_bytes: row.counters.memory_total_bytes,
            ..AcceleratorCounters::default()
        };
        for user in &mut row.users {
            user.memory_bytes = None;
            user.utilisation_permille = None;
            user.encoder_permille = None;
            user.decoder_permille = None;
        }
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::ids::ContainerId;
    use shared::observed::{AcceleratorKind, AcceleratorUse};

    fn row() -> AcceleratorRow {
        AcceleratorRow {
            users: vec![AcceleratorUse {
                container_id: ContainerId([1; 32]),
                memory_bytes: Some(5),
                utilisation_permille: Some(7),
                encoder_permille: Some(8),
                decoder_permille: Some(9),
            }],
            counters: AcceleratorCounters {
                memory_total_bytes: Some(100),
                memory_used_bytes: Some(50),
                ..AcceleratorCounters::default()
            },
            ..AcceleratorRow::new(AcceleratorKind::Cuda, 0, "GPU-1")
        }
    }

    #[test]
    fn old_numbers_are_dropped_and_the_device_is_faulty() {
        let ages = |age: u64, silence: u64| {
            let of = Duration::from_millis;
            (of(age), of(silence))
        };
        let fresh = aged(&row(), ages(1500, 1500), 7);
        assert_eq!(
            (fresh.tick, fresh.age_ms, fresh.healthy),
            (7, 1500, true),
            "{fresh:?}"
        );
        assert_eq!(fresh.counters, row().counters);
        let old = aged(&row(), (STALE, STALE), 8);
        assert!(!old.healthy && old.users_unknown);
        assert_eq!(old.counters.memory_total_bytes, Some(100));
        assert_eq!(old.counters.memory_used_bytes, None);
        assert_eq!(old.users.len(), 1);
        let user = old.users[0];
        assert_eq!(user.memory_bytes, None);
        assert_eq!((user.encoder_permille, user.decoder_permille), (None, None));
        // A driver that takes long and answers: its numbers are as old as they are.
        let slow = aged(&row(), ages(19_000, 3_000), 9);
        assert_eq!((slow.age_ms, slow.healthy), (19_000, true));
        assert_eq!(slow.counters, row().counters);
        let slower = aged(&row(), (OLDEST, Duration::ZERO), 9);
        assert!(slower.healthy && slower.counters.memory_used_bytes.is_none());
        // A device that has not answered for a while, among others that do.
        let kept = |age_ms: u32| {
            let before = AcceleratorRow { age_ms, ..row() };
            aged(&before, ages(1_000, 1_000), 10)
        };
        assert_eq!((kept(4_000).age_ms, kept(4_000).healthy), (5_000, true));
        assert!(!kept(10_000).healthy && kept(10_000).counters.memory_used_bytes.is_none());
    }

    #[test]
    fn whole_devices_of_every_kind_have_room_before_parts() {
        let part = |whole: u32, index: u32| AcceleratorRow {
            part_of: Some(whole),
            ..AcceleratorRow::new(AcceleratorKind::Cuda, index, format!("MIG-{index}"))
        };
        let all = || {
            vec![
                row(),
                part(0, 1000),
                part(0, 1001),
                AcceleratorRow::new(AcceleratorKind::Rocm, 0, "a"),
            ]
        };
        let fitted = |room: usize| {
            let mut rows = all();
            let left_out = fit(&mut rows, room);
            let ids: Vec<String> = rows.into_iter().map(|row| row.id).collect();
            (left_out, ids.join(" "))
        };
        assert_eq!(fitted(4), (0, "GPU-1 MIG-1000 MIG-1001 a".to_owned()));
        assert_eq!(fitted(3), (1, "GPU-1 MIG-1000 a".to_owned()));
        assert_eq!(fitted(2), (2, "GPU-1 a".to_owned()));
        assert_eq!(fitted(1), (3, "GPU-1".to_owned()));
        assert_eq!(fitted(0), (4, String::new()));
    }

    #[test]
    fn there_is_room_for_every_part_of_what_the_bus_has() {
        let tree = tempfile::tempdir().unwrap();
        assert_eq!(room(tree.path()), 64);
        let put = |number: u32, class: &str| {
            let device = format!("sys/bus/pci/devices/0000:{number:02x}:00.0");
            let device = tree.path().join(device);
            std::fs::create_dir_all(&device).unwrap();
            std::fs::write(device.join("class"), class).unwrap();
        };
        for number in 0..16 {
            put(number, "0x030200\n");
        }
        put(16, "0x120000\n");
        put(17, "0x020000\n");
        put(18, "");
        assert_eq!(room(tree.path()), 17 * 8);
        for number in 19..200 {
            put(number, "0x030000\n");
        }
        assert_eq!(room(tree.path()), 1024);
    }

    #[test]
    fn a_driver_that_has_told_nothing_hides_no_other_and_is_waited_for_not_for_ever() {
        let slot = |kind| Arc::new(Slot::new(kind));
        let (first, second) = (slot(AcceleratorKind::Cuda), slot(AcceleratorKind::Rocm));
        let all = Accelerators {
            slots: vec![Arc::clone(&first), Arc::clone(&second)],
        };
        let told = || {
            let told = all.told(1);
            (told.rows.len(), told.silent, told.waits)
        };
        let reading = || Reading {
            devices: vec![row()],
            processes: HashMap::new(),
        };
        assert_eq!(told(), (0, 1 | 2, true));
        second.put(reading());
        assert_eq!(told(), (1, 1, true));
        // It has answered nothing for so long; then it begins to, one device after the other.
        let long_ago = Instant::now().checked_sub(STALE);
        first.state.lock().heard = Some(long_ago.expect("the clock runs for longer"));
        assert_eq!(told(), (1, 1, false));
        first.heard();
        assert_eq!(told(), (1, 1, true));
        // It does not start, which is known at once.
        first.put_failed(Reading::default());
        assert_eq!(told(), (1, 1, false));
        first.put(reading());
        assert_eq!(told(), (2, 0, false));
        // What is known of its devices stays, when it does not start again.
        first.put_failed(Reading::default());
        assert_eq!(told(), (2, 0, false));
        second.put_none();
        assert_eq!(told(), (1, 0, false));
        assert_eq!(Accelerators::none().told(1), DriverReports::default());
        drop(all);
        assert!(first.stopped() && !second.pause(Duration::from_secs(60)));
    }
}
