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
        troubles: Troubles::default(),
    };
    let mut counts = node.active_containers.subscribe();
    counts.mark_changed();
    let [mut standing, mut commits, mut abuse] = [DISCOVERY.0, COMMITS.0, ABUSE].map(every);
    loop {
        let (notice, written) = tokio::select! {
            _ = standing.tick() => {
                let written = notices.slots().await;
                notices.told(Notice::Slots, written);
                (Notice::Discovery, notices.discovery().await)
            }
            Ok(()) = counts.changed() => {
                let count = *counts.borrow_and_update();
                (Notice::Count, notices.count(count).await)
            }
            _ = commits.tick() => (Notice::Commits, notices.commits().await),
            _ = abuse.tick() => (Notice::Abuse, notices.abuse().await),
            () = node.stopping.cancelled() => return,
        };
        notices.told(notice, written);
    }
}

fn every(period: Duration) -> Interval {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Whether anything was there to be written, and was.
type Written = Result<bool, NoticeError>;

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Notice {
    Slots,
    Discovery,
    Count,
    Commits,
    Abuse,
}

/// Where it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Statistics,
    Discovery,
    Etcd,
}

/// What keeps a notice from being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    /// A place does not answer: it concerns all that is written there.
    Silent(Place),
    /// Of this notice alone.
    Refused(Notice),
}

/// The troubles that have been reported and last, so that each is reported once. One is over when something
/// was written in spite of it.
#[derive(Debug, Default)]
struct Troubles(BTreeSet<Trouble>);

impl Troubles {
    /// Takes what has become of a notice; whether it is a trouble that is to be reported.
    fn takes(&mut self, notice: Notice, place: Place, written: &Written) -> bool {
        let (silent, refused) = (Trouble::Silent(place), Trouble::Refused(notice));
        match written {
            Ok(true) => {
                self.0.remove(&silent);
                self.0.remove(&refused);
                false
            }
            Ok(false) => false,
            Err(NoticeError::Store(err)) if err.is_final() => {
                self.0.remove(&silent);
                self.0.insert(refused)
            }
            Err(_) => self.0.insert(silent),
        }
    }
}

struct Notices<'a> {
    node: &'a Node,
    cluster: &'a Cluster,
    entry: Entry,
    /// Kernels that may have a field in the hash of reports.
    reported: BTreeSet<KernelId>,
    troubles: Troubles,
}

impl Notices<'_> {
    fn told(&mut self, notice: Notice, written: Written) {
        let place = match (notice, self.node.config.service_discovery) {
            (Notice::Discovery, DiscoveryType::Redis) => Place::Discovery,
            (Notice::Discovery, DiscoveryType::Etcd) => Place::Etcd,
            _ => Place::Statistics,
        };
        let report = self.troubles.takes(notice, place, &written);
        match written {
            Ok(_) => {}
            Err(err) if report => tracing::warn!(
                err = chain(&err),
                "what the cluster shows of this node is old; it is written again"
            ),
            Err(err) => tracing::debug!(err = chain(&err), "a notice is not written either"),
        }
    }

    /// How slots are shown.
    async fn slots(&self) -> Written {
        let shown = self.node.ledger.metadata().into_iter().filter_map(|slot| {
            let text = serde_json::to_string(&slot).ok()?;
            Some((slot.slot_name, Bytes::from(text)))
        });
        let shown: Vec<_> = shown.collect();
        let some = !shown.is_empty();
        let statistics = self.cluster.bus.statistics();
        statistics
            .set_fields("computer.metadata", shown, None)
            .await?;
        Ok(some)
    }

    /// Where metrics are.
    async fn discovery(&self) -> Written {
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
        Ok(true)
    }

    async fn count(&self, count: Option<usize>) -> Written {
        let Some(count) = count else {
            return Ok(false);
        };
        let key = format!("container_count.{}", self.node.agent_id());
        let statistics = self.cluster.bus.statistics();
        statistics.put(key, count.to_string(), COUNT_LIFE).await?;
        Ok(true)
    }

    async fn commits(&self) -> Written {
        let committing: BTreeSet<KernelId> =
            self.node.background.committing().into_iter().collect();
        let some = !committing.is_empty();
        for kernel in committing {
            let key = format!("kernel.{kernel}.commit");
            let statistics = self.cluster.bus.statistics();
            statistics.put(key, "ongoing", COMMITS.1).await?;
        }
        Ok(some)
    }

    async fn abuse(&mut self) -> Written {
        if self.node.config.agent.abuse_report_path.is_none() {
            return Ok(false);
        }
        let statuses = self.node.abuse.statuses();
        let reported: BTreeSet<KernelId> = statuses.keys().copied().collect();
        let over = self.reported.difference(&reported);
        let over: Vec<_> = over.map(KernelId::to_string).collect();
        let fields: Vec<_> = statuses
            .iter()
            .map(|(kernel, status)| (kernel.to_string(), Bytes::from(status.as_str())))
            .collect();
        let some = !fields.is_empty() || !over.is_empty();
        let statistics = self.cluster.bus.statistics();
        statistics
            .change_fields("abuse_report", fields, over)
            .await?;
        self.reported = reported;
        Ok(some)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn silent() -> Written {
        Err(StoreError::Resting.into())
    }

    fn refused() -> Written {
        let message = "WRONGTYPE Operation against a key".to_owned();
        let step = "change fields";
        Err(StoreError::Refused { step, message }.into())
    }

    #[test]
    fn an_outage_is_reported_once_whatever_has_nothing_to_write_meanwhile() {
        let mut troubles = Troubles::default();
        let mut reports = |notice, place, written: Written| troubles.takes(notice, place, &written);
        for round in 0..3 {
            let first = round == 0;
            assert_eq!(reports(Notice::Slots, Place::Statistics, silent()), first);
            assert!(!reports(Notice::Commits, Place::Statistics, Ok(false)));
            assert!(!reports(Notice::Abuse, Place::Statistics, Ok(false)));
            assert!(!reports(Notice::Discovery, Place::Etcd, Ok(true)));
            assert!(!reports(Notice::Count, Place::Statistics, silent()));
        }
        assert!(!reports(Notice::Count, Place::Statistics, Ok(true)));
        assert!(reports(Notice::Slots, Place::Statistics, silent()));
        assert!(reports(Notice::Discovery, Place::Discovery, silent()));
    }

    #[test]
    fn what_a_server_refuses_is_reported_once_though_it_takes_the_rest() {
        let mut troubles = Troubles::default();
        let mut reports =
            |notice, written: Written| troubles.takes(notice, Place::Statistics, &written);
        for round in 0..3 {
            assert_eq!(reports(Notice::Abuse, refused()), round == 0);
            assert!(!reports(Notice::Slots, Ok(true)));
        }
        assert!(!reports(Notice::Abuse, Ok(true)));
        assert!(reports(Notice::Abuse, refused()));
        // It has answered, so what comes is another outage.
        assert!(reports(Notice::Slots, silent()));
        assert!(!reports(Notice::Abuse, refused()));
        assert!(reports(Notice::Slots, silent()));
    }
}
