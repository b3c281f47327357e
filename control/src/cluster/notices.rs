//! What this node leaves in the cluster beside events and statistics, for those who look there.
//!
//! In: the plugins' slots, the count of containers, commits under way, kernels reported for abuse, the
//! address of the HTTP server. Out: `computer.metadata`, `container_count.*`, `kernel.*.commit`,
//! `abuse_report` and `service_discovery.agent.*` (in etcd if so configured). Invariants: nothing
//! waits for it; what could not be written is written at its next turn, also when the server has lost
//! everything meanwhile; of a hash that agents share only this node's fields are touched.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use config::{Config, DiscoveryType};
use serde_json::{Value, json};
use shared::ids::KernelId;
use thiserror::Error;
use tokio::time::{Interval, MissedTickBehavior};
use uuid::Uuid;

use super::Cluster;
use crate::causes::chain;
use crate::etcd::{EtcdError, Scope};
use crate::events::bus::StoreError;
use crate::events::unix_seconds;
use crate::heartbeat::PROTOCOL_VERSION;
use crate::kernel::Node;

/// How often the node is entered for service discovery, and how long an entry is kept.
const DISCOVERY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(180));
/// How long the count of containers is kept; it is written at each comparison with the engine.
const COUNT_LIFE: Duration = Duration::from_secs(86_400);
/// How often a commit under way is told, and how long that is kept.
const COMMITS: (Duration, Duration) = (Duration::from_secs(7), Duration::from_secs(13));
/// How often the reported kernels are told.
const ABUSE: Duration = Duration::from_secs(30);

/// Why something was not written.
#[derive(Debug, Error)]
enum NoticeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Etcd(#[from] EtcdError),
}

/// Writes until the agent stops.
pub async fn run(node: Arc<Node>) {
    let Some(cluster) = &node.cluster else {
        return;
    };
    let mut notices = Notices {
        node: &node,
        cluster,
        entry: Entry::of(&node.config),
        // Whatever an earlier life has told of kernels that are still here.
        reported: node.registry.all().iter().map(|kernel| kernel.id).collect(),
        trouble: false,
    };
    let mut counts = node.active_containers.subscribe();
    counts.mark_changed();
    let [mut standing, mut commits, mut abuse] = [DISCOVERY.0, COMMITS.0, ABUSE].map(every);
    loop {
        let written = tokio::select! {
            _ = standing.tick() => notices.standing().await,
            Ok(()) = counts.changed() => {
                let count = *counts.borrow_and_update();
                notices.count(count).await
            }
            _ = commits.tick() => notices.commits().await,
            _ = abuse.tick() => notices.abuse().await,
            () = node.stopping.cancelled() => return,
        };
        notices.told(written);
    }
}

fn every(period: Duration) -> Interval {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

struct Notices<'a> {
    node: &'a Node,
    cluster: &'a Cluster,
    entry: Entry,
    /// Kernels that may have a field in the hash of reports.
    reported: BTreeSet<KernelId>,
    /// So that an outage is reported once.
    trouble: bool,
}

impl Notices<'_> {
    fn told(&mut self, written: Result<(), NoticeError>) {
        match written {
            Ok(()) => self.trouble = false,
            Err(err) if std::mem::replace(&mut self.trouble, true) => {
                tracing::debug!(err = chain(&err), "a notice is not written either");
            }
            Err(err) => tracing::warn!(
                err = chain(&err),
                "what the cluster shows of this node is old; it is written again"
            ),
        }
    }

    /// How slots are shown, and where metrics are.
    async fn standing(&self) -> Result<(), NoticeError> {
        let shown = self.node.ledger.metadata().into_iter().filter_map(|slot| {
            let text = serde_json::to_string(&slot).ok()?;
            Some((slot.slot_name, Bytes::from(text)))
        });
        let statistics = self.cluster.bus.statistics();
        statistics
            .set_fields("computer.metadata", shown.collect(), None)
            .await?;
        let id = self.entry.id;
        let fields = self.entry.fields(unix_seconds(SystemTime::now()));
        match self.node.config.service_discovery {
            DiscoveryType::Redis => {
                let key = format!("service_discovery.agent.{id}");
                let fields =
                    fields.map(|(name, value)| (name.to_owned(), value.to_string().into()));
                let store = self.cluster.bus.service_discovery();
                store
                    .set_fields(key, fields.into(), Some(DISCOVERY.1))
                    .await?;
            }
            // What is old there is swept by managers and storage proxies.
            DiscoveryType::Etcd => {
                let mut pairs = Vec::new();
                for (name, value) in fields {
                    let key = format!("ai/backend/service_discovery/agent/{id}/{name}");
                    flatten(key, &value, &mut pairs);
                }
                self.cluster.etcd.put_all(Scope::Global, &pairs).await?;
            }
        }
        Ok(())
    }

    async fn count(&self, count: Option<usize>) -> Result<(), NoticeError> {
        let Some(count) = count else { return Ok(()) };
        let key = format!("container_count.{}", self.node.agent_id());
        let statistics = self.cluster.bus.statistics();
        Ok(statistics.put(key, count.to_string(), COUNT_LIFE).await?)
    }

    async fn commits(&self) -> Result<(), NoticeError> {
        let committing: BTreeSet<KernelId> =
            self.node.background.committing().into_iter().collect();
        for kernel in committing {
            let key = format!("kernel.{kernel}.commit");
            let statistics = self.cluster.bus.statistics();
            statistics.put(key, "ongoing", COMMITS.1).await?;
        }
        Ok(())
    }

    async fn abuse(&mut self) -> Result<(), NoticeError> {
        if self.node.config.agent.abuse_report_path.is_none() {
            return Ok(());
        }
        let statuses = self.node.abuse.statuses();
        let reported: BTreeSet<KernelId> = statuses.keys().copied().collect();
        let over = self.reported.difference(&reported);
        let over = over.map(KernelId::to_string).collect();
        let fields = statuses
            .iter()
            .map(|(kernel, status)| (kernel.to_string(), Bytes::from(status.as_str())))
            .collect();
        let statistics = self.cluster.bus.statistics();
        statistics
            .change_fields("abuse_report", fields, over)
            .await?;
        self.reported = reported;
        Ok(())
    }
}

/// What service discovery knows of this process.
struct Entry {
    id: Uuid,
    name: String,
    address: String,
    port: u16,
    registered: f64,
}

impl Entry {
    fn of(config: &Config) -> Entry {
        let announced = &config.agent.announce_addr;
        Entry {
            id: Uuid::new_v4(),
            name: format!("agent-{}", config.agent.id),
            address: announced.to_string(),
            port: announced.port,
            registered: unix_seconds(SystemTime::now()),
        }
    }

    fn fields(&self, now: f64) -> [(&'static str, Value); 6] {
        [
            ("id", json!(self.id)),
            ("display_name", json!(self.name)),
            ("service_group", json!("agent")),
            ("version", json!(PROTOCOL_VERSION)),
            (
                "endpoint",
                json!({
                    "address": self.address,
                    "port": self.port,
                    "protocol": "http",
                    "prometheus_address": self.address,
                }),
            ),
            (
                "health_status",
                json!({"registration_time": self.registered, "last_heartbeat": now}),
            ),
        ]
    }
}

/// The leaves of a value as keys and texts.
fn flatten(key: String, value: &Value, pairs: &mut Vec<(String, String)>) {
    match value {
        Value::Object(members) => {
            for (name, member) in members {
                flatten(format!("{key}/{name}"), member, pairs);
            }
        }
        Value::String(text) => pairs.push((key, text.clone())),
        other => pairs.push((key, other.to_string())),
    }
}
