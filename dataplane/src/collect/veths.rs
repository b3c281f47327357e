//! What the links of containers have counted, by the kernel program and without the kernel's interface
//! lock.
//!
//! In: indexes of links in this network namespace, and now and then what the kernel itself says of them
//! ([`crate::sys::netlink`]). Out: after each pass, counters of the links that are believed. Only pairs of
//! virtual Ethernet devices are read so. Invariants: a link is believed once the kernel's answer lay between
//! two readings of it, and again every few minutes; where one differs twice in a row it is never read so
//! again; nothing is believed before a link agreed that had counted something.

#[cfg(test)]
pub(crate) mod host_tests;

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use ebpf::link_records::{LinkRecord, link_layout, link_target};
use shared::heap::trimmed;
use shared::log_limit::LogLimit;

use crate::sys::btf::Types;
use crate::sys::iterator::SharedArray;
use crate::sys::netlink::{LinkCounters, Links};

/// How often all links are compared with what the kernel says.
const COMPARE: Duration = Duration::from_secs(300);

/// Where the types of the kernel are, and those of the driver when it is a module.
const KERNEL: &str = "/sys/kernel/btf/vmlinux";
const DRIVER: &str = "/sys/kernel/btf/veth";

/// How far a link is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// It has not been compared yet.
    New,
    /// It agreed, as its device was found that time.
    Agreed(u64),
    /// It differed once, as its device was found that time.
    Doubted(u64),
    /// It differed again.
    Never,
}

#[derive(Debug)]
struct Veth {
    index: u32,
    place: usize,
    belief: Trust,
    /// What was read before the kernel was asked.
    before: Option<LinkRecord>,
}

/// Whether it is known where the kernel has what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    NotTried,
    /// The driver is not there yet.
    Waiting,
    Known,
    /// This kernel does not tell.
    Never,
}

/// Links that are read by the program.
#[derive(Debug)]
pub struct Veths {
    targets: SharedArray,
    records: SharedArray,
    layout: SharedArray,
    known: Layout,
    /// The kernel tells what its devices count by, or that was tried already.
    kind_known: bool,
    capacity: usize,
    used: usize,
    free: Vec<usize>,
    /// By index.
    links: Vec<Veth>,
    /// There are more than have room.
    crowded: bool,
    /// A link that had counted something agreed.
    proven: bool,
    /// Some links are not believed, and others must tell of them.
    lacking: bool,
    /// There is something to compare.
    undecided: bool,
    comparing: bool,
    compared: Option<Instant>,
    believed: Links,
    log: LogLimit,
}

impl Veths {
    /// Room for so many links in the maps of the program.
    pub(super) fn new(
        targets: SharedArray,
        records: SharedArray,
        layout: SharedArray,
        capacity: usize,
    ) -> Self {
        Self {
            targets,
            records,
            layout,
            known: Layout::NotTried,
            kind_known: false,
            capacity,
            used: 0,
            free: Vec::new(),
            links: Vec::new(),
            crowded: false,
            proven: false,
            lacking: false,
            undecided: false,
            comparing: false,
            compared: None,
            believed: Links::default(),
            log: LogLimit::default(),
        }
    }

    /// How many places of the map are to be read.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Reads these links from now on.
    pub fn follow(&mut self, mut wanted: Vec<u32>) {
        wanted.sort_unstable();
        wanted.dedup();
        if !wanted.is_empty() {
            self.look_for_layout();
        }
        let (targets, free) = (&self.targets, &mut self.free);
        self.links.retain(|it| {
            let stays = wanted.binary_search(&it.index).is_ok();
            if !stays {
                aim(targets, it.place, 0);
                free.push(it.place);
            }
            stays
        });
        self.crowded = false;
        for index in wanted {
            let Err(at) = self.links.binary_search_by_key(&index, |it| it.index) else {
                continue;
            };
            self.lacking = true;
            let place = match self.free.pop() {
                Some(place) => place,
                None if self.used < self.capacity => {
                    self.used += 1;
                    self.used - 1
                }
                None => {
                    self.crowded = true;
                    continue;
                }
            };
            aim(&self.targets, place, index);
            let link = Veth {
                index,
                place,
                belief: Trust::New,
                before: None,
            };
            self.links.insert(at, link);
        }
    }

    /// Whether others must tell of some links in the next pass.
    pub fn lacking(&self) -> bool {
        self.lacking
    }

    /// Whether what is read is to be compared in the next pass: links are to be read once before the kernel is
    /// asked then.
    pub fn compares(&self) -> bool {
        let long_ago = self.compared.is_none_or(|at| at.elapsed() >= COMPARE);
        self.known == Layout::Known && (self.undecided || (long_ago && !self.believed.is_empty()))
    }

    /// Whether what this pass reads is compared.
    pub(super) fn comparing(&self) -> bool {
        self.comparing
    }

    /// Keeps what was read before the kernel was asked.
    pub(super) fn begin_comparing(&mut self) {
        for link in &mut self.links {
            link.before = LinkRecord::read(self.records.words(), link.place);
        }
        self.comparing = true;
    }

    /// Nothing was read in this pass.
    pub(super) fn forget(&mut self) {
        for link in &self.links {
            let first = link.place * LinkRecord::WORDS;
            for word in self
                .records
                .words()
                .iter()
                .skip(first)
                .take(LinkRecord::WORDS)
            {
                word.store(0, Relaxed);
            }
        }
    }

    /// Takes what was read in this pass, and compares it with what the kernel said if that was begun.
    pub fn take(&mut self, told: Option<&Links>) {
        let comparing = std::mem::take(&mut self.comparing);
        let told = told.filter(|_| comparing);
        let mut telling = false;
        if let Some(told) = told {
            self.compared = Some(Instant::now());
            telling = self.compare(told);
        }
        self.believed.clear();
        (self.lacking, self.undecided) = (self.crowded, false);
        let proven = self.proven;
        for link in &mut self.links {
            let record = LinkRecord::read(self.records.words(), link.place).unwrap_or_default();
            if record.filled == 0 {
                if link.belief != Trust::Never {
                    link.belief = Trust::New;
                }
                // What is not in the kernel's table is nowhere.
                self.lacking |= record.absent == 0 || !proven;
                continue;
            }
            match link.belief {
                Trust::Agreed(find) if find == record.filled => {
                    if proven {
                        self.believed.push(link.index, counters(&record));
                    } else {
                        self.lacking = true;
                        self.undecided |= tells(&counters(&record));
                    }
                }
                Trust::Agreed(_) | Trust::Doubted(_) | Trust::New => {
                    if link.belief != Trust::Doubted(record.filled) {
                        link.belief = Trust::New;
                    }
                    self.lacking = true;
                    self.undecided = true;
                }
                Trust::Never => self.lacking = true,
            }
        }
        if telling && !proven {
            tracing::info!("links are read by a kernel program");
        }
    }

    /// What is believed of this pass.
    pub fn believed(&self) -> &Links {
        &self.believed
    }

    /// The same, to add to it.
    pub fn believed_mut(&mut self) -> &mut Links {
        &mut self.believed
    }

    /// Whether a link agreed that had counted something, for the first time.
    fn compare(&mut self, told: &Links) -> bool {
        let mut telling = false;
        for link in &mut self.links {
            let after = LinkRecord::read(self.records.words(), link.place).unwrap_or_default();
            let Some(before) = link.before.take() else {
                continue;
            };
            // Another device, or none: next time.
            if after.filled == 0 || before.filled != after.filled || link.belief == Trust::Never {
                continue;
            }
            let Some(told) = told.get(link.index) else {
                continue;
            };
            if lies_between(&counters(&before), told, &counters(&after)) {
                link.belief = Trust::Agreed(after.filled);
                telling |= tells(told);
                continue;
            }
            if link.belief != Trust::Doubted(after.filled) {
                link.belief = Trust::Doubted(after.filled);
                continue;
            }
            if !self.proven && !self.kind_known {
                // Of the two ways to count, the kernel has the other.
                self.kind_known = true;
                self.retry_with_the_other_kind();
                return false;
            }
            link.belief = Trust::Never;
            if let Some(suppressed) = self.log.pass() {
                tracing::warn!(
                    link = link.index,
                    ?told,
                    read = ?counters(&after),
                    suppressed,
                    "what a kernel program reads of a link is not what the kernel says; \
                     the kernel is asked about it from now on, which takes its interface lock"
                );
            }
        }
        self.proven |= telling;
        telling
    }

    fn retry_with_the_other_kind(&mut self) {
        if let Some(word) = self.layout.words().get(link_layout::SENT_ONLY) {
            word.fetch_xor(1, Relaxed);
        }
        for link in &mut self.links {
            link.belief = Trust::New;
            link.before = None;
            aim(&self.targets, link.place, link.index);
        }
    }

    /// Looks up where the kernel has what, unless that is known. The driver may be loaded with the first link.
    fn look_for_layout(&mut self) {
        let try_now = match self.known {
            Layout::NotTried => true,
            Layout::Waiting => Path::new(DRIVER).exists(),
            Layout::Known | Layout::Never => false,
        };
        if !try_now {
            return;
        }
        let module = std::fs::read(DRIVER).ok();
        let found = trimmed(|| {
            let kernel = std::fs::read(KERNEL).ok()?;
            let types = Types::of(&kernel, module.as_deref())?;
            Some((
                places(&types),
                types.place("net_device", &["pcpu_stat_type"]),
            ))
        });
        self.known = match found {
            Some((Some(places), kind)) => {
                self.kind_known = kind.is_some();
                let first = [1, kind.unwrap_or(0), 0];
                let words = self.layout.words().iter();
                for (word, value) in words.zip(first.into_iter().chain(places)) {
                    word.store(value, Relaxed);
                }
                Layout::Known
            }
            Some((None, _)) if module.is_none() => {
                if self.known == Layout::NotTried {
                    tracing::info!(
                        "the kernel does not tell yet where its links have their counters, \
                         as there is no {DRIVER}; it is asked for them until there is"
                    );
                }
                Layout::Waiting
            }
            _ => {
                tracing::info!(
                    "the kernel does not tell where its links have their counters; it is asked for them"
                );
                Layout::Never
            }
        };
    }
}

/// Where the driver has what the program reads, in its order.
fn places(types: &Types<'_>) -> Option<[u64; link_layout::PLACES_NUMBER]> {
    let queue = |name| types.place("veth_rq", &["stats", "vs", name]);
    // Before there was a member for it, the driver's part began at a round place behind the device
    // (include/linux/netdevice.h, NETDEV_ALIGN).
    let own = match types.place("net_device", &["priv"]) {
        Some(place) => place,
        None => types.size("net_device")?.next_multiple_of(32),
    };
    let own = |name| Some(own + types.place("veth_priv", &[name])?);
    Some([
        own("peer")?,
        own("dropped")?,
        own("rq")?,
        types.size("veth_rq")?,
        types.place("veth_rq", &["napi"])?,
        queue("xdp_packets")?,
        queue("xdp_bytes")?,
        queue("rx_drops")?,
        queue("xdp_tx_err")?,
        queue("peer_tq_xdp_xmit_err")?,
    ])
}

/// Has the program read this link, 0 none, and find its device anew.
fn aim(targets: &SharedArray, place: usize, index: u32) {
    let words = targets.words().iter().skip(place * link_target::WORDS);
    for (at, word) in words.take(link_target::WORDS).enumerate() {
        match at {
            link_target::INDEX => word.store(index.into(), Relaxed),
            // Goes on over all that have the place.
            link_target::FINDS => {}
            _ => word.store(0, Relaxed),
        }
    }
}

fn counters(record: &LinkRecord) -> LinkCounters {
    LinkCounters {
        rx_packets: record.rx_packets,
        tx_packets: record.tx_packets,
        rx_bytes: record.rx_bytes,
        tx_bytes: record.tx_bytes,
        rx_dropped: record.rx_dropped,
        tx_dropped: record.tx_dropped,
        ..LinkCounters::default()
    }
}

fn numbers(of: &LinkCounters) -> [u64; 8] {
    [
        of.rx_packets,
        of.tx_packets,
        of.rx_bytes,
        of.tx_bytes,
        of.rx_errors,
        of.tx_errors,
        of.rx_dropped,
        of.tx_dropped,
    ]
}

fn lies_between(before: &LinkCounters, told: &LinkCounters, after: &LinkCounters) -> bool {
    let all = numbers(before).into_iter().zip(numbers(told));
    all.zip(numbers(after))
        .all(|((before, told), after)| before <= told && told <= after)
}

/// Whether it agrees by no chance: every main counter has counted, and directions differ.
fn tells(of: &LinkCounters) -> bool {
    let [rx_packets, tx_packets, rx_bytes, tx_bytes, ..] = numbers(of);
    rx_packets > 0 && tx_packets > 0 && rx_bytes > 0 && tx_bytes > 0 && rx_bytes != tx_bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(numbers: [u64; 8]) -> LinkCounters {
        let [
            rx_packets,
            tx_packets,
            rx_bytes,
            tx_bytes,
            rx_errors,
            tx_errors,
            ..,
        ] = numbers;
        LinkCounters {
            rx_packets,
            tx_packets,
            rx_bytes,
            tx_bytes,
            rx_errors,
            tx_errors,
            rx_dropped: numbers[6],
            tx_dropped: numbers[7],
            ..LinkCounters::default()
        }
    }

    #[test]
    fn what_the_kernel_tells_must_lie_between_two_readings_in_every_counter() {
        let before = link([1, 2, 3, 4, 0, 0, 7, 8]);
        let after = link([2, 2, 9, 4, 0, 0, 7, 8]);
        assert!(lies_between(&before, &before, &after));
        assert!(lies_between(&before, &after, &after));
        for place in 0..8 {
            let mut more = numbers(&after);
            more[place] += 1;
            assert!(!lies_between(&before, &link(more), &after), "{place}");
        }
        assert!(!lies_between(
            &before,
            &link([1, 2, 2, 4, 0, 0, 7, 8]),
            &after
        ));
    }

    #[test]
    fn counters_that_chance_may_have_made_alike_tell_nothing() {
        assert!(tells(&link([1, 2, 90, 180, 0, 0, 0, 0])));
        assert!(!tells(&link([0; 8])));
        assert!(!tells(&link([0, 2, 0, 180, 0, 0, 0, 0])));
        assert!(
            !tells(&link([2, 2, 180, 180, 0, 0, 0, 0])),
            "both ways alike"
        );
    }
}
