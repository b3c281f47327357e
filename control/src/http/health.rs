//! Whether the node is well: the dataplane alive, its samples fresh, the engine answering.
//!
//! Invariant: nothing is asked while somebody waits for the answer; the engine is asked now and then
//! by a task of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;

use crate::kernel::node::Node;
use crate::metrics::{EngineState, NodeSnapshot, patience};
use crate::runner::RUNNER_VERSION;

/// Between two questions to the engine.
const ENGINE_INTERVAL: Duration = Duration::from_secs(10);
/// How long the engine may take.
const ENGINE_PATIENCE: Duration = Duration::from_secs(5);

/// What the engine said lately.
#[derive(Clone, Debug)]
pub struct EngineWatch(watch::Receiver<(bool, Option<Instant>)>);

impl EngineWatch {
    /// Begins to ask, until the agent stops. It has just answered: the agent waits for it at start.
    pub fn begin(node: &Arc<Node>) -> EngineWatch {
        let (seen, watch) = watch::channel((true, Some(Instant::now())));
        let node = node.clone();
        tokio::spawn(async move {
            let mut clock = tokio::time::interval(ENGINE_INTERVAL);
            clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = clock.tick() => {}
                    () = node.stopping.cancelled() => return,
                }
                let asked = tokio::time::timeout(ENGINE_PATIENCE, node.docker.ping()).await;
                let answers = matches!(asked, Ok(Ok(())));
                seen.send_modify(|(before, at)| {
                    *before = answers;
                    if answers {
                        *at = Some(Instant::now());
                    }
                });
            }
        });
        EngineWatch(watch)
    }

    /// The last answer.
    pub fn state(&self) -> EngineState {
        let (answers, at) = *self.0.borrow();
        EngineState {
            answers,
            age: at.map(|at| at.elapsed()),
        }
    }
}

/// The health of the node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Health {
    dataplane: bool,
    heartbeat: Option<Duration>,
    samples: bool,
    sample_age: Option<Duration>,
    engine: EngineState,
}

impl Health {
    /// Judges what is seen; `interval` is that of the samples.
    pub fn of(node_snapshot: &NodeSnapshot, interval: Duration) -> Health {
        let sample_age = node_snapshot.sample_age();
        Health {
            dataplane: node_snapshot.observed.is_alive(),
            heartbeat: node_snapshot.observed.heartbeat_age,
            samples: sample_age.is_some_and(|age| age <= patience(interval)),
            sample_age,
            engine: node_snapshot.engine,
        }
    }

    /// Whether every part is well.
    pub fn is_healthy(&self) -> bool {
        self.dataplane && self.samples && self.engine.answers
    }

    /// The original's document, and why.
    pub fn document(&self) -> Value {
        let seconds = |age: Option<Duration>| age.map(|age| age.as_secs_f64());
        json!({
            "status": if self.is_healthy() { "healthy" } else { "degraded" },
            "version": RUNNER_VERSION,
            "component": "agent",
            "checks": {
                "dataplane": {"ok": self.dataplane, "heartbeat_age_s": seconds(self.heartbeat)},
                "samples": {"ok": self.samples, "age_s": seconds(self.sample_age)},
                "docker": {"ok": self.engine.answers, "answered_ago_s": seconds(self.engine.age)},
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Observed;
    use shared::observed::{NodeSample, ObservedSnapshot};

    fn node_snapshot(sample_age: Duration) -> NodeSnapshot {
        let now_ns = 1_000_000_000_000;
        let node = NodeSample {
            taken_monotonic_ns: now_ns - u64::try_from(sample_age.as_nanos()).unwrap(),
            ..NodeSample::default()
        };
        NodeSnapshot {
            now_ns,
            observed: Observed {
                snapshot: Some(Arc::new(ObservedSnapshot {
                    node: Some(node),
                    ..ObservedSnapshot::default()
                })),
                heartbeat_age: Some(Duration::from_secs(1)),
                epoch: 1,
            },
            engine: EngineState {
                answers: true,
                age: Some(Duration::ZERO),
            },
            ..NodeSnapshot::default()
        }
    }

    #[test]
    fn each_part_that_fails_shows() {
        let interval = Duration::from_secs(5);
        assert!(Health::of(&node_snapshot(interval), interval).is_healthy());

        let stale = Health::of(&node_snapshot(Duration::from_secs(18)), interval);
        assert!(!stale.is_healthy());
        let document = stale.document();
        assert_eq!(document["status"], "degraded");
        assert_eq!(document["checks"]["samples"]["ok"], false);
        assert_eq!(document["checks"]["dataplane"]["ok"], true);

        let mut dead = node_snapshot(interval);
        dead.observed.heartbeat_age = Some(Duration::from_secs(60));
        assert!(!Health::of(&dead, interval).is_healthy());

        let mut silent = node_snapshot(interval);
        silent.engine.answers = false;
        assert!(!Health::of(&silent, interval).is_healthy());
        assert!(!Health::of(&NodeSnapshot::default(), interval).is_healthy());
    }
}
