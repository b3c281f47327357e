//! Hands the records to the manager's store, once per interval.
//!
//! In: the observed region, the kernels in service, the host. Out: one batch of entries with the
//! life of each. Invariants: nothing here asks the engine; records are made off the async workers,
//! because a node may have thousands of processes; a store that does not answer costs one interval
//! and no more; the last record of a kernel is handed over even when the store comes back after the
//! kernel's end, because the manager's reports read it later.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use shared::ids::KernelId;
use shared::observed::{ObservedReader, ObservedSnapshot, Processes};
use thiserror::Error;

use super::kernels::{KernelFacts, Kernels, Moment};
use super::node::{HostReading, NodeMetrics};
use super::processes::ProcessTable;
use super::record::pack;
use crate::blocking::blocking;
use crate::events::bus;
use crate::kernel::node::Node;
use crate::kernel::registry::Kernel;
use crate::metrics::{Round, count_round};

/// How long the record of the node is kept by the store.
const NODE_LIFE: Duration = Duration::from_secs(120);
/// How long the record of a kernel is kept: long after its end.
const KERNEL_LIFE: Duration = Duration::from_secs(86_400);
/// The least time records of processes are kept.
const PROCESS_LIFE: Duration = Duration::from_secs(8);
/// The longest a batch may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Records of ended kernels that wait for the store.
const WAITING: usize = 4096;

/// One value for the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// Its bytes.
    pub value: Vec<u8>,
    /// How long it is kept.
    pub life: Duration,
}

/// A batch did not reach the store.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The store refused it or could not be reached.
    #[error("the statistics could not be stored; is the Redis server of the cluster reachable?")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It did not answer in time.
    #[error("the statistics were not stored within {} s", .0.as_secs())]
    Late(Duration),
}

/// Where the manager looks for records: database 0 of the cluster's Redis.
pub trait RecordStore: Debug + Send + Sync {
    /// Sets all entries, each with its life.
    fn put(&self, entries: Vec<Entry>) -> BoxFuture<'_, Result<(), StoreError>>;
}

impl RecordStore for bus::Store {
    fn put(&self, entries: Vec<Entry>) -> BoxFuture<'_, Result<(), StoreError>> {
        let puts = entries
            .into_iter()
            .map(|entry| bus::Put {
                key: entry.key,
                value: entry.value.into(),
                expires: entry.life,
            })
            .collect();
        Box::pin(async move {
            self.put_all(puts)
                .await
                .map_err(|err| StoreError::Refused(Box::new(err)))
        })
    }
}

/// What one pass works on.
#[derive(Debug)]
pub struct Pass<'a> {
    /// The agent's id, the key of the node's record.
    pub agent_id: &'a str,
    /// Kernels in service.
    pub kernels: &'a [KernelFacts],
    /// Those that are there for now without being in service: they start, or start again.
    pub away: &'a HashSet<KernelId>,
    /// The dataplane's last words, if it ever spoke.
    pub snapshot: Option<&'a ObservedSnapshot>,
    /// Its processes; `None` when they could not be read.
    pub processes: Option<&'a Processes>,
    /// The host.
    pub reading: &'a HostReading,
    /// The interval of passes, or of samples where that is longer.
    pub interval: Duration,
}

/// The state behind the records.
#[derive(Debug, Default)]
pub struct Records {
    node: NodeMetrics,
    kernels: Kernels,
    processes: ProcessTable,
}

impl Records {
    /// Takes in a pass; answers what is to be stored: node, kernels, processes.
    pub fn observe(&mut self, pass: &Pass<'_>) -> [Vec<Entry>; 3] {
        // A dataplane that has just begun has not heard of any driver.
        let heard = |snapshot: &&ObservedSnapshot| {
            let node = snapshot.node.as_ref();
            node.is_some_and(|node| node.counters.accelerators_found.is_some())
        };
        let accelerators = pass
            .snapshot
            .filter(heard)
            .map(|snapshot| snapshot.accelerators.as_slice());
        let moment = Moment {
            now_ns: pass.reading.at_ns,
            interval: pass.interval,
        };
        let patience = moment.patience();
        let node = self.node.observe(pass.reading, accelerators, patience);
        // Without a dataplane nothing is known of any kernel, which is told as well.
        let nothing = ObservedSnapshot::default();
        let snapshot = pass.snapshot.unwrap_or(&nothing);
        let kernels = pass.kernels;
        let of_kernels = self.kernels.observe(kernels, pass.away, snapshot, moment);
        let named = kernels.iter();
        let named = named.filter_map(|kernel| Some((kernel.container, kernel.accelerator()?)));
        let processes = pass.processes.map_or_else(Vec::new, |processes| {
            self.processes.observe(processes, &named.collect())
        });
        // A record must not run out between two passes.
        let process_life = PROCESS_LIFE.max(pass.interval.mul_f64(1.6));
        [
            entries([(pass.agent_id.to_owned(), node)], NODE_LIFE),
            entries(of_kernels, KERNEL_LIFE),
            entries(processes, process_life),
        ]
    }
}

fn entries<K: ToString, R: serde::Serialize>(
    records: impl IntoIterator<Item = (K, R)>,
    life: Duration,
) -> Vec<Entry> {
    let packed = |(key, record): (K, R)| match pack(&record) {
        Ok(value) => Some(Entry {
            key: key.to_string(),
            value,
            life,
        }),
        Err(err) => {
            tracing::error!(%err, key = key.to_string(), "a record cannot be packed");
            None
        }
    };
    records.into_iter().filter_map(packed).collect()
}

/// Names of the scopes in the counters, in the order of [`Records::observe`].
const SCOPES: [&str; 3] = ["node", "container", "process"];

/// Publishes until the agent stops.
pub async fn run(node: Arc<Node>, store: Arc<dyn RecordStore>) {
    let limits = &node.config.node.dataplane;
    let interval = limits.records_interval.max(Duration::from_millis(100));
    // Samples that are further apart than records are no silence.
    let slower = interval.max(limits.stats_interval);
    let born = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64();
    let mut clock = tokio::time::interval(interval);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut publisher = Publisher::of(&node.link.run_dir().dataplane());
    loop {
        tokio::select! {
            _ = clock.tick() => publisher.pass(&node, &*store, born, slower).await,
            () = node.stopping.cancelled() => return,
        }
    }
}

/// What a pass works on, beside the processes in the region.
#[derive(Default)]
struct PassInputs {
    agent_id: String,
    kernels: Vec<KernelFacts>,
    away: HashSet<KernelId>,
    snapshot: Option<Arc<ObservedSnapshot>>,
    reading: HostReading,
    interval: Duration,
}

/// Makes records of what the region and a look at the node tell.
struct Maker {
    reader: ObservedReader,
    records: Records,
}

impl Maker {
    /// Reads processes and makes all records, which takes a while. Blocks.
    fn make(&mut self, inputs: &PassInputs) -> [Vec<Entry>; 3] {
        let processes = self.reader.processes();
        self.records.observe(&Pass {
            agent_id: &inputs.agent_id,
            kernels: &inputs.kernels,
            away: &inputs.away,
            snapshot: inputs.snapshot.as_deref(),
            processes: processes.as_ref().ok(),
            reading: &inputs.reading,
            interval: inputs.interval,
        })
    }
}

struct Publisher {
    /// Taken while it works on another thread.
    maker: Option<Maker>,
    /// Kernels' entries that did not reach the store.
    waiting: BTreeMap<String, Entry>,
    /// So that an outage is reported once.
    trouble: bool,
}

impl Publisher {
    /// With the region in the dataplane's directory.
    fn of(dataplane: &Path) -> Self {
        Self {
            maker: Some(Maker {
                reader: ObservedReader::at(dataplane),
                records: Records::default(),
            }),
            waiting: BTreeMap::new(),
            trouble: false,
        }
    }

    async fn pass(&mut self, node: &Node, store: &dyn RecordStore, born: f64, interval: Duration) {
        count_round(node.agent_id(), &SCOPES, Round::Begun);
        let reading = HostReading::now().await;
        let snapshot = node.link.observed().snapshot;
        let registered = node.registry.all();
        let away = registered.iter().filter(|kernel| !kernel.is_running());
        let kernels = registered.iter().filter_map(|kernel| facts(kernel, born));
        let entries = self
            .records(PassInputs {
                agent_id: node.agent_id().to_owned(),
                away: away.map(|kernel| kernel.id).collect(),
                kernels: kernels.collect(),
                reading: reading.with_observed(snapshot.as_deref()),
                snapshot,
                interval,
            })
            .await;
        let patience = PATIENCE.min(interval.max(Duration::from_secs(1)));
        let round = match self.hand_over(entries, store, patience).await {
            Ok(()) => Round::Stored,
            Err(StoreError::Refused(_)) => Round::Failed("Refused"),
            Err(StoreError::Late(_)) => Round::Failed("Late"),
        };
        count_round(node.agent_id(), &SCOPES, round);
    }

    /// Makes the records of a pass, off the async workers.
    async fn records(&mut self, inputs: PassInputs) -> [Vec<Entry>; 3] {
        let Some(mut maker) = self.maker.take() else {
            return Default::default();
        };
        let (maker, entries) = blocking(move || {
            let entries = maker.make(&inputs);
            (maker, entries)
        })
        .await;
        self.maker = Some(maker);
        entries
    }

    /// Gives the store the entries of node, kernels and processes, and what kernels' it has missed.
    async fn hand_over(
        &mut self,
        entries: [Vec<Entry>; 3],
        store: &dyn RecordStore,
        patience: Duration,
    ) -> Result<(), StoreError> {
        let [of_node, of_kernels, of_processes] = entries;
        for entry in of_kernels {
            if self.waiting.len() < WAITING || self.waiting.contains_key(&entry.key) {
                self.waiting.insert(entry.key.clone(), entry);
            }
        }
        let batch: Vec<Entry> = of_node
            .into_iter()
            .chain(self.waiting.values().cloned())
            .chain(of_processes)
            .collect();
        let stored = match tokio::time::timeout(patience, store.put(batch)).await {
            Ok(stored) => stored,
            Err(_) => Err(StoreError::Late(patience)),
        };
        match &stored {
            Ok(()) => {
                self.waiting.clear();
                if std::mem::take(&mut self.trouble) {
                    tracing::info!("statistics reach the store again");
                }
            }
            Err(err) => {
                if !std::mem::replace(&mut self.trouble, true) {
                    tracing::warn!(
                        err = err as &dyn std::error::Error,
                        "the manager gets no statistics; they are kept for it"
                    );
                }
            }
        }
        stored
    }
}

/// What the records need to know of a kernel in service; `None` of any other.
fn facts(kernel: &Kernel, born: f64) -> Option<KernelFacts> {
    kernel
        .is_running()
        .then(|| kernel.with_record(|record| KernelFacts::of(record, born)))?
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use shared::ids::{ContainerId, KernelId};
    use shared::observed::{
        ContainerSample, CpuCounters, Measured, MemoryCounters, ObservedWriter, ProcessCounters,
        ProcessSample, Source,
    };

    #[test]
    fn each_record_has_its_key_and_its_life() {
        let container = ContainerId([7; 32]);
        let sample = ContainerSample {
            container_id: container,
            taken_monotonic_ns: 1,
            cpu: Measured::now(
                Source::File,
                CpuCounters {
                    usage_ns: Some(1),
                    ..CpuCounters::default()
                },
            ),
            memory: Measured::now(
                Source::File,
                MemoryCounters {
                    current_bytes: Some(1),
                    ..MemoryCounters::default()
                },
            ),
            ..ContainerSample::default()
        };
        let snapshot = ObservedSnapshot {
            containers: vec![sample].into(),
            ..ObservedSnapshot::default()
        };
        let kernel = KernelFacts {
            id: KernelId([1; 16]),
            container,
            ..KernelFacts::default()
        };
        let processes = Processes {
            tick: 1,
            taken_monotonic_ns: 1,
            list: vec![ProcessSample {
                container_id: container,
                pid: 10,
                ..ProcessSample::default()
            }],
            ..Processes::default()
        };
        let batch = Records::default().observe(&Pass {
            agent_id: "i-node01",
            kernels: &[kernel],
            away: &HashSet::new(),
            snapshot: Some(&snapshot),
            processes: Some(&processes),
            reading: &HostReading::default(),
            interval: Duration::from_secs(10),
        });
        let shown: Vec<(String, u64)> = batch
            .iter()
            .flatten()
            .map(|entry| (entry.key.clone(), entry.life.as_secs()))
            .collect();
        assert_eq!(
            shown,
            [
                ("i-node01".to_owned(), 120),
                ("01010101-0101-0101-0101-010101010101".to_owned(), 86_400),
                ("07".repeat(32), 16),
            ]
        );
    }

    /// Listings are 4 s apart, passes 5 s.
    #[test]
    fn rates_of_processes_are_over_the_time_between_listings() {
        let mut records = Records::default();
        let mut look = |at_s: u64, taken_s: u64, used: u64, readable: bool| {
            let counters = ProcessCounters {
                user_ns: Some(used * 1_000_000),
                system_ns: Some(0),
                read_bytes: Some(used),
                ..ProcessCounters::default()
            };
            let processes = Processes {
                tick: taken_s,
                taken_monotonic_ns: taken_s * 1_000_000_000,
                list: vec![ProcessSample {
                    container_id: ContainerId([7; 32]),
                    pid: 10,
                    counters,
                    ..ProcessSample::default()
                }],
                ..Processes::default()
            };
            let reading = HostReading {
                at_ns: at_s * 1_000_000_000,
                ..HostReading::default()
            };
            let [_, _, mut entries] = records.observe(&Pass {
                agent_id: "i-node01",
                kernels: &[],
                away: &HashSet::new(),
                snapshot: None,
                processes: readable.then_some(&processes),
                reading: &reading,
                interval: Duration::from_secs(5),
            });
            entries.pop().map(|entry| entry.value)
        };
        // 2 s of CPU time and 2,000 bytes in 4 s.
        look(105, 104, 1000, true);
        // Somebody wrote while it was read, or the region is a new one without a listing.
        assert_eq!(look(106, 104, 1000, false), None);
        assert_eq!(look(107, 0, 1000, true), None);
        let told = look(110, 108, 3000, true).unwrap();
        let told: BTreeMap<u32, serde_json::Value> = rmp_serde::from_slice(&told).unwrap();
        assert_eq!(told[&10]["cpu_util"]["current"], "500", "{told:?}");
        assert_eq!(told[&10]["io_read"]["stats.rate"], "500", "{told:?}");
        assert_eq!(look(115, 108, 3000, true), None);
    }

    /// One worker, which others need too.
    #[tokio::test(flavor = "current_thread")]
    async fn others_go_on_while_the_records_of_many_processes_are_made() {
        const PROCESSES: u32 = 16_384;
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut writer = ObservedWriter::open(base.path(), shared::Sizes::default()).unwrap();
        let processes = Processes {
            tick: 1,
            taken_monotonic_ns: 1,
            list: (1..=PROCESSES)
                .map(|pid| ProcessSample {
                    container_id: ContainerId([7; 32]),
                    pid,
                    counters: ProcessCounters {
                        user_ns: Some(1),
                        system_ns: Some(1),
                        rss_bytes: Some(1),
                        ..ProcessCounters::default()
                    },
                    ..ProcessSample::default()
                })
                .collect(),
            ..Processes::default()
        };
        writer
            .batch(|batch| batch.set_processes(processes))
            .unwrap();
        let mut publisher = Publisher::of(base.path());
        let other = tokio::spawn(async {});
        let [_, _, entries] = publisher.records(PassInputs::default()).await;
        assert!(other.is_finished(), "nothing else was done meanwhile");
        let told: BTreeMap<u32, serde_json::Value> =
            rmp_serde::from_slice(&entries[0].value).unwrap();
        assert_eq!(told.len(), usize::try_from(PROCESSES).unwrap());
    }

    /// A Redis that is away until it is told to answer.
    #[derive(Debug, Default)]
    struct Away {
        hangs: AtomicBool,
        answers: AtomicBool,
        kept: Mutex<BTreeMap<String, Entry>>,
    }

    impl RecordStore for Away {
        fn put(&self, entries: Vec<Entry>) -> BoxFuture<'_, Result<(), StoreError>> {
            Box::pin(async move {
                if self.hangs.load(Ordering::Relaxed) {
                    return std::future::pending().await;
                }
                if !self.answers.load(Ordering::Relaxed) {
                    return Err(StoreError::Refused("no route to host".into()));
                }
                let entries = entries.into_iter().map(|entry| (entry.key.clone(), entry));
                self.kept.lock().unwrap().extend(entries);
                Ok(())
            })
        }
    }

    fn entry(key: &str, value: u8, life: Duration) -> Entry {
        Entry {
            key: key.to_owned(),
            value: vec![value],
            life,
        }
    }

    /// The entries of a pass over these kernels.
    fn pass(value: u8, kernels: &[&str]) -> [Vec<Entry>; 3] {
        let of_kernels = kernels.iter().map(|key| entry(key, value, KERNEL_LIFE));
        [
            vec![entry("i-node01", value, NODE_LIFE)],
            of_kernels.collect(),
            vec![entry("container", value, PROCESS_LIFE)],
        ]
    }

    #[tokio::test]
    async fn the_last_record_of_a_kernel_outlives_an_outage_of_the_store() {
        let mut publisher = Publisher::of(Path::new("/nonexistent"));
        let store = Away::default();
        let patience = Duration::from_secs(5);
        let refused = publisher.hand_over(pass(1, &["ended", "runs"]), &store, patience);
        assert!(matches!(refused.await, Err(StoreError::Refused(_))));
        store.hangs.store(true, Ordering::Relaxed);
        let soon = Duration::from_millis(1);
        let late = publisher.hand_over(pass(2, &["ended", "runs"]), &store, soon);
        assert!(matches!(late.await, Err(StoreError::Late(after)) if after == soon));
        // One has ended, and there is no news of the other.
        let late = publisher.hand_over(pass(3, &[]), &store, soon);
        assert!(matches!(late.await, Err(StoreError::Late(_))));

        store.hangs.store(false, Ordering::Relaxed);
        store.answers.store(true, Ordering::Relaxed);
        let pass_4 = pass(4, &["runs"]);
        publisher.hand_over(pass_4, &store, patience).await.unwrap();
        let kept = std::mem::take(&mut *store.kept.lock().unwrap());
        let kept: Vec<Entry> = kept.into_values().collect();
        let wanted = [
            entry("container", 4, PROCESS_LIFE),
            entry("ended", 2, KERNEL_LIFE),
            entry("i-node01", 4, NODE_LIFE),
            entry("runs", 4, KERNEL_LIFE),
        ];
        assert_eq!(kept, wanted);

        // Nothing is handed over twice: a record that the store has dropped stays away.
        publisher
            .hand_over(pass(5, &[]), &store, patience)
            .await
            .unwrap();
        let kept = std::mem::take(&mut *store.kept.lock().unwrap());
        assert_eq!(
            kept.into_keys().collect::<Vec<_>>(),
            ["container", "i-node01"]
        );
    }

    #[tokio::test]
    async fn so_many_records_wait_for_the_store_and_those_that_wait_are_renewed() {
        let mut publisher = Publisher::of(Path::new("/nonexistent"));
        let store = Away::default();
        let patience = Duration::from_secs(5);
        let names: Vec<String> = (0..=WAITING).map(|number| format!("{number:05}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (last, first) = names.split_last().unwrap();
        for (value, kernels) in [(1, first), (2, &[*last, first[0]][..])] {
            let refused = publisher.hand_over(pass(value, kernels), &store, patience);
            assert!(refused.await.is_err());
        }
        store.answers.store(true, Ordering::Relaxed);
        publisher
            .hand_over(pass(3, &[]), &store, patience)
            .await
            .unwrap();
        let kept = store.kept.lock().unwrap();
        assert!(!kept.contains_key(*last));
        assert_eq!(kept[first[0]].value, [2]);
        assert_eq!(kept[first[1]].value, [1]);
        assert_eq!(kept.len(), WAITING + 2);
    }
}
