//! Control's end of the two shared-memory regions.
//!
//! In: the rows each kernel wants. Out: those rows in the `desired` region, one batch for one kernel,
//! and what the dataplane answers in `observed`. Invariants: one task owns the writer; rows of a
//! kernel change only by `publish` and `withdraw`; what the firewall decides is the same in all rows, also in those of
//! an earlier life, and waits for nobody; rows found at start stay until `settle` is called
//! with the kernels that exist, so no port row is withdrawn before Docker has been listed once. For the
//! same reason a region that begins anew says nothing before: the dataplane gives up what runs some time
//! after a region that speaks does not name it.

mod bell;
mod owner;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shared::desired::{ContainerRow, DesiredWriter, NodeRow, PortKey, PortRow};
use shared::doorbell::{Doorbell, DoorbellError, Ringer};
use shared::ids::{ContainerId, Generation, KernelId, RegionId};
use shared::lock::LockLost;
use shared::observed::{ContainerSample, ObservedReader, ObservedSnapshot, PortState};
use shared::run_dir::{RunDir, RunDirError};
use shared::{BatchError, OpenError, ReadError, Sizes};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Requests waiting for the owner.
const QUEUE: usize = 256;
/// A dataplane that has shown no sign of life for this long is not running. It beats every second.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(4);
/// How long a batch is tried again while a removal of the same port is not acknowledged.
const REMOVAL_PENDING: Duration = Duration::from_secs(3);

/// Why the regions could not be opened.
#[derive(Debug, Error)]
pub enum LinkOpenError {
    /// The run directory is unusable.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The region could not be written, for one because another control holds it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What the region says could not be read back.
    #[error("cannot read back the desired region")]
    ReadBack(#[source] ReadError),
    /// The doorbell could not be put up.
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
    /// The doorbell could not be watched.
    #[error("cannot watch the doorbell")]
    Watch(#[source] std::io::Error),
}

/// Why rows are not in service.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum LinkError {
    /// Nobody serves ports.
    #[error(
        "no dataplane is running for this agent (looked for {} s in {}); start bai-dataplane with \
         the same configuration",
        waited.as_secs_f32(), directory.display()
    )]
    NoDataplane {
        /// How long was waited.
        waited: Duration,
        /// Where its region should be.
        directory: PathBuf,
    },
    /// The dataplane runs and has not answered.
    #[error("the dataplane has not served {port} within {} s (its state: {state})", waited.as_secs_f32())]
    Unanswered {
        /// The first port without an answer.
        port: PortKey,
        /// What it says of it.
        state: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The dataplane cannot serve a port.
    #[error("the dataplane cannot serve {port}: {reason}")]
    Refused {
        /// The port.
        port: PortKey,
        /// In the dataplane's words.
        reason: String,
    },
    /// The rows could not be written.
    #[error("cannot write the rows of the kernel")]
    Batch(#[source] BatchError),
    /// The agent is stopping.
    #[error("the agent is stopping")]
    Stopping,
}

/// The rows of one kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelRows {
    /// Its container.
    pub container: Option<ContainerRow>,
    /// Its ports.
    pub ports: Vec<PortRow>,
}

/// What the dataplane says now.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// Its rows, once it has written any.
    pub snapshot: Option<Arc<ObservedSnapshot>>,
    /// Age of its last sign of life.
    pub heartbeat_age: Option<Duration>,
    /// Its life.
    pub epoch: u64,
}

impl Observed {
    /// Whether the dataplane runs.
    pub fn is_alive(&self) -> bool {
        self.heartbeat_age.is_some_and(|age| age < HEARTBEAT_LIMIT)
    }
}

/// Why a port is not served yet, or that it is.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Served,
    Waiting(PortKey, String),
    Refused(PortKey, String),
}

fn standing(
    observed: &Observed,
    keys: &[PortKey],
    region: RegionId,
    generation: Generation,
) -> Standing {
    for key in keys {
        let status = observed
            .snapshot
            .as_ref()
            .and_then(|snapshot| snapshot.port(*key));
        match status {
            Some(status) if status.answers(region, generation) => match status.state {
                PortState::Serving => {}
                PortState::Refused => return Standing::Refused(*key, status.reason.clone()),
                other => {
                    let words = match status.reason.as_str() {
                        "" => format!("{other:?}").to_lowercase(),
                        reason => format!("{other:?}, {reason}").to_lowercase(),
                    };
                    return Standing::Waiting(*key, words);
                }
            },
            _ => return Standing::Waiting(*key, "not seen yet".into()),
        }
    }
    Standing::Served
}

#[derive(Debug)]
enum Command {
    Publish {
        kernel: KernelId,
        rows: Box<KernelRows>,
        reply: oneshot::Sender<Result<Generation, BatchError>>,
    },
    Withdraw {
        kernel: KernelId,
        reply: oneshot::Sender<Withdrawn>,
    },
    HonourFirewall {
        decides: bool,
        reply: oneshot::Sender<Result<bool, BatchError>>,
    },
    Settle {
        keep: HashSet<KernelId>,
        reply: oneshot::Sender<usize>,
    },
}

/// Rows that were removed.
#[derive(Debug, Default)]
struct Withdrawn {
    keys: Vec<PortKey>,
    generation: Generation,
}

/// A withdrawal under way.
#[derive(Debug)]
pub struct Withdrawal(oneshot::Receiver<Withdrawn>);

/// The handle everybody has.
#[derive(Clone, Debug)]
pub struct Link {
    commands: mpsc::Sender<Command>,
    observed: watch::Receiver<Observed>,
    lock_lost: watch::Receiver<Option<LockLost>>,
    region: RegionId,
    epoch: u64,
    run_dir: RunDir,
}

impl Link {
    /// Becomes the writer of the desired region and starts the task that owns it.
    ///
    /// # Errors
    /// Another process is the writer, the region cannot be made, or its doorbell not be watched.
    pub fn open(
        run_dir: RunDir,
        sizes: Sizes,
        node: NodeRow,
        stopping: CancellationToken,
    ) -> Result<Link, LinkOpenError> {
        let directory = run_dir.create_control()?;
        let writer = DesiredWriter::open(&directory, sizes)?;
        let found = writer.snapshot().map_err(LinkOpenError::ReadBack)?;
        let doorbell = Doorbell::bind(&directory)?;
        let ringer = Ringer::of(run_dir.dataplane())?;
        // Also one that an earlier life has made and not come to fill.
        let is_silent = writer.committed() == Generation(0);
        let region = writer.region_id();
        let epoch = writer.epoch();
        let (commands, requests) = mpsc::channel(QUEUE);
        let (seen, observed) = watch::channel(Observed::default());
        let reader = ObservedReader::at(run_dir.dataplane());
        let mut owner = owner::Owner::new(writer, reader, ringer, seen, &found, node);
        if !is_silent {
            owner.write_node();
        }
        owner.look();
        owner.ring();
        let lock_lost = owner.lock_lost();
        let rung = bell::listen(doorbell, stopping.clone()).map_err(LinkOpenError::Watch)?;
        tokio::spawn(owner.run(rung, requests, stopping));
        Ok(Link {
            commands,
            observed,
            lock_lost,
            region,
            epoch,
            run_dir,
        })
    }

    /// This life of the desired region's writer.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Where the regions are.
    pub fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    /// Waits until another process has become the writer of the region, which this one then leaves
    /// alone: it is to end. Else for ever.
    pub fn lock_lost(&self) -> impl Future<Output = LockLost> + use<> {
        let mut lock_lost = self.lock_lost.clone();
        async move {
            loop {
                if let Some(lock_lost) = lock_lost.borrow_and_update().clone() {
                    return lock_lost;
                }
                if lock_lost.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        }
    }

    /// What the dataplane says now.
    pub fn observed(&self) -> Observed {
        self.observed.borrow().clone()
    }

    /// Follows what the dataplane says.
    pub fn subscribe(&self) -> watch::Receiver<Observed> {
        self.observed.clone()
    }

    /// The last sample of a container.
    pub fn sample(&self, container: ContainerId) -> Option<ContainerSample> {
        self.observed().snapshot?.container(container).cloned()
    }

    /// Waits until a dataplane runs, at most `limit`.
    ///
    /// # Errors
    /// None shows signs of life by then, or the agent is stopping.
    pub async fn require_dataplane(&self, limit: Duration) -> Result<(), LinkError> {
        let mut observed = self.observed.clone();
        match tokio::time::timeout(limit, observed.wait_for(Observed::is_alive)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(LinkError::Stopping),
            Err(_) => Err(LinkError::NoDataplane {
                waited: limit,
                directory: self.run_dir.dataplane(),
            }),
        }
    }

    /// Replaces all rows of a kernel, as one generation.
    ///
    /// # Errors
    /// The rows cannot be written, or the agent is stopping.
    pub async fn publish(
        &self,
        kernel: KernelId,
        rows: KernelRows,
    ) -> Result<Generation, LinkError> {
        let give_up = tokio::time::Instant::now() + REMOVAL_PENDING;
        loop {
            let (reply, answer) = oneshot::channel();
            let command = Command::Publish {
                kernel,
                rows: Box::new(rows.clone()),
                reply,
            };
            self.commands
                .send(command)
                .await
                .map_err(|_| LinkError::Stopping)?;
            match answer.await.map_err(|_| LinkError::Stopping)? {
                Ok(generation) => return Ok(generation),
                Err(BatchError::RemovalPending { .. }) if tokio::time::Instant::now() < give_up => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(err) => return Err(LinkError::Batch(err)),
            }
        }
    }

    /// Says in all rows, those to come too, whether the host's firewall decides about new clients: it does until
    /// this says something else. Answers whether that is a change.
    ///
    /// # Errors
    /// The rows there are cannot be written (those to come carry it all the same), or the agent is stopping.
    pub async fn honour_firewall(&self, decides: bool) -> Result<bool, LinkError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(Command::HonourFirewall { decides, reply })
            .await
            .map_err(|_| LinkError::Stopping)?;
        let said = answer.await.map_err(|_| LinkError::Stopping)?;
        said.map_err(LinkError::Batch)
    }

    /// Waits until the dataplane serves all `keys` of the generation, at most `limit`.
    ///
    /// # Errors
    /// The dataplane refused one of them or did not serve all by then, none runs, or the agent is stopping.
    pub async fn await_serving(
        &self,
        keys: &[PortKey],
        generation: Generation,
        limit: Duration,
    ) -> Result<(), LinkError> {
        let mut observed = self.observed.clone();
        let mut last = Standing::Served;
        let outcome = tokio::time::timeout(limit, async {
            observed
                .wait_for(|observed| {
                    last = standing(observed, keys, self.region, generation);
                    !matches!(last, Standing::Waiting(..))
                })
                .await
                .map(drop)
        })
        .await;
        match (outcome, last) {
            (Ok(Err(_)), _) => Err(LinkError::Stopping),
            (_, Standing::Served) => Ok(()),
            (_, Standing::Refused(port, reason)) => Err(LinkError::Refused { port, reason }),
            (_, Standing::Waiting(port, state)) if self.observed.borrow().is_alive() => {
                Err(LinkError::Unanswered {
                    port,
                    state,
                    waited: limit,
                })
            }
            (_, Standing::Waiting(..)) => Err(LinkError::NoDataplane {
                waited: limit,
                directory: self.run_dir.dataplane(),
            }),
        }
    }

    /// Removes all rows of a kernel. The order of calls is the order of batches.
    pub async fn withdraw(&self, kernel: KernelId) -> Withdrawal {
        let (reply, answer) = oneshot::channel();
        // A stopped owner drops the reply; the rows then stay for the next start to settle.
        let _ = self
            .commands
            .send(Command::Withdraw { kernel, reply })
            .await;
        Withdrawal(answer)
    }

    /// Waits until the dataplane has let go of withdrawn ports, at most `limit`; whether it has.
    pub async fn await_removed(&self, withdrawal: Withdrawal, limit: Duration) -> bool {
        let Ok(withdrawn) = withdrawal.0.await else {
            return false;
        };
        if withdrawn.keys.is_empty() {
            return true;
        }
        let mut observed = self.observed.clone();
        let removed = |observed: &Observed| {
            let Some(snapshot) = &observed.snapshot else {
                return false;
            };
            let applied = snapshot.applied.is_some_and(|applied| {
                applied.region_id == self.region && applied.generation >= withdrawn.generation
            });
            applied
                && withdrawn.keys.iter().all(|key| {
                    snapshot.port(*key).is_none_or(|status| {
                        matches!(status.state, PortState::Removed | PortState::Draining)
                    })
                })
        };
        matches!(
            tokio::time::timeout(limit, observed.wait_for(removed)).await,
            Ok(Ok(_))
        )
    }

    /// Removes the rows of all kernels that are not in `keep`: to be called once Docker has been
    /// listed. Answers of how many kernels rows were removed.
    pub async fn settle(&self, keep: HashSet<KernelId>) -> usize {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Settle { keep, reply }).await;
        answer.await.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use shared::desired::{DesiredReader, PortRow, Protocol};

    use super::*;

    #[tokio::test]
    async fn a_new_region_says_nothing_before_docker_has_been_listed() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::choose(Some(base.path()), "i-link").unwrap();
        run_dir.create_dataplane().unwrap();
        let node = NodeRow {
            sample_interval_ms: 1234,
            ..NodeRow::default()
        };
        // The second life finds what the first has made, and still knows nothing.
        for life in 0..2 {
            let stopping = CancellationToken::new();
            let link = loop {
                match Link::open(run_dir.clone(), Sizes::default(), node, stopping.clone()) {
                    Ok(link) => break link,
                    // The owner of the first life lets go when it notices that nobody has a handle.
                    Err(LinkOpenError::Open(OpenError::Lock { .. })) => {
                        tokio::task::yield_now().await;
                    }
                    Err(err) => panic!("{err:?}"),
                }
            };
            let mut reader = DesiredReader::at(run_dir.control());
            assert_eq!(reader.snapshot().unwrap().committed, Generation(0));
            if life == 1 {
                assert_eq!(link.settle(HashSet::new()).await, 0);
                assert_eq!(reader.snapshot().unwrap().node, Some(node));
            }
            stopping.cancel();
        }
    }

    #[tokio::test]
    async fn a_region_that_another_process_writes_is_left_to_it() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::choose(Some(base.path()), "i-link").unwrap();
        run_dir.create_dataplane().unwrap();
        let stopping = CancellationToken::new();
        let node = NodeRow::default();
        let link = Link::open(run_dir.clone(), Sizes::default(), node, stopping).unwrap();
        std::fs::remove_file(run_dir.control().join("lock")).unwrap();
        let other = DesiredWriter::open(run_dir.control(), Sizes::default()).unwrap();
        let lock_lost = tokio::time::timeout(Duration::from_secs(60), link.lock_lost());
        assert_eq!(lock_lost.await.unwrap().pid, Some(std::process::id()));
        let refused = link.publish(KernelId([1; 16]), KernelRows::default()).await;
        assert_eq!(refused, Err(LinkError::Stopping));
        let mut reader = DesiredReader::at(run_dir.control());
        assert_eq!(reader.snapshot().unwrap().committed, other.committed());
        assert_eq!(reader.writer().unwrap().epoch, other.epoch());
    }

    #[tokio::test]
    async fn what_the_firewall_decides_is_in_all_rows_at_once() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::choose(Some(base.path()), "i-link").unwrap();
        run_dir.create_dataplane().unwrap();
        let node = NodeRow::default();
        let key = |host_port| PortKey {
            protocol: Protocol::Tcp,
            host_port,
        };
        // As they were made before the firewall was looked at last.
        let row = |number: u8, host_port| {
            let (kernel, container) = (KernelId([number; 16]), ContainerId([number; 32]));
            let address = std::net::Ipv4Addr::LOCALHOST.into();
            PortRow::new(key(host_port), kernel, container, address, 8080)
        };
        let rows = |number: u8, ports: &[u16]| KernelRows {
            container: None,
            ports: ports.iter().map(|port| row(number, *port)).collect(),
        };
        let mut reader = DesiredReader::at(run_dir.control());
        let mut decides = || -> Vec<(u16, bool)> {
            let snapshot = reader.snapshot().unwrap();
            let all = snapshot.ports.iter();
            let mut all: Vec<_> = all
                .map(|row| (row.host_port, row.honour_firewall))
                .collect();
            all.sort_unstable();
            all
        };
        {
            // The writer of an earlier life, which let clients pass the firewall by.
            let directory = run_dir.create_control().unwrap();
            let mut writer = DesiredWriter::open(directory, Sizes::default()).unwrap();
            writer.batch(|batch| batch.put_port(row(1, 30001))).unwrap();
        }
        assert_eq!(decides(), [(30001, false)]);
        let stopping = CancellationToken::new();
        let link = Link::open(run_dir.clone(), Sizes::default(), node, stopping).unwrap();
        link.publish(KernelId([2; 16]), rows(2, &[30002, 30003]))
            .await
            .unwrap();
        assert_eq!(
            decides(),
            [(30001, false), (30002, true), (30003, true)],
            "it decides until it is looked at"
        );
        for (word, is_change) in [(true, false), (false, true), (true, true), (true, false)] {
            assert_eq!(link.honour_firewall(word).await, Ok(is_change));
            let all = [30001, 30002, 30003].map(|port| (port, word));
            assert_eq!(decides(), all);
        }
        link.publish(KernelId([2; 16]), rows(2, &[30002]))
            .await
            .unwrap();
        assert_eq!(decides(), [(30001, true), (30002, true)]);
    }

    /// On the host's network a service has the port it is used to, and may so have another's.
    #[tokio::test]
    async fn a_port_that_is_only_looked_at_takes_no_row_of_another_kernel() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::choose(Some(base.path()), "i-link").unwrap();
        run_dir.create_dataplane().unwrap();
        let stopping = CancellationToken::new();
        let link = Link::open(
            run_dir.clone(),
            Sizes::default(),
            NodeRow::default(),
            stopping,
        )
        .unwrap();
        let rows = |number: u8, observe_only: bool, ports: &[u16]| KernelRows {
            container: None,
            ports: ports
                .iter()
                .map(|port| PortRow {
                    observe_only,
                    ..PortRow::new(
                        PortKey {
                            protocol: Protocol::Tcp,
                            host_port: *port,
                        },
                        KernelId([number; 16]),
                        ContainerId([number; 32]),
                        std::net::Ipv4Addr::LOCALHOST.into(),
                        8080,
                    )
                })
                .collect(),
        };
        let mut reader = DesiredReader::at(run_dir.control());
        let mut owners = |expected: &[(u16, u8)]| {
            let snapshot = reader.snapshot().unwrap();
            let mut found: Vec<_> = snapshot
                .ports
                .iter()
                .map(|row| (row.host_port, row.kernel_id.0[0]))
                .collect();
            found.sort_unstable();
            assert_eq!(found, expected);
        };
        for (number, observe_only, ports) in [
            (1, false, &[30080][..]),
            (2, true, &[8081]),
            (3, true, &[30080, 8081, 8082]),
        ] {
            let rows = rows(number, observe_only, ports);
            link.publish(KernelId([number; 16]), rows).await.unwrap();
        }
        owners(&[(8081, 2), (8082, 3), (30080, 1)]);
        let _ = link.withdraw(KernelId([3; 16])).await.0.await;
        owners(&[(8081, 2), (30080, 1)]);
        // The other way round the row changes hands, and the end of the one before leaves it.
        let served = rows(4, false, &[8081]);
        link.publish(KernelId([4; 16]), served).await.unwrap();
        let _ = link.withdraw(KernelId([2; 16])).await.0.await;
        owners(&[(8081, 4), (30080, 1)]);
    }
}
