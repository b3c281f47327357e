//! What changes in etcd while the node runs: the settings for agents, and the managers.
//!
//! In: the settings in effect. Out: whether etcd's are others now (they are read at start only, so a
//! restart would apply them), and which managers are up. Invariant: while etcd is away the last
//! answer stays.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{MANAGERS, Settings};
use crate::etcd::{Etcd, Scope, unquote};

/// Changes come in groups; they are looked at together.
const SETTLE: Duration = Duration::from_millis(300);

/// What is known of the cluster beyond the settings in effect.
#[derive(Clone, Debug)]
pub struct Changes {
    differ: watch::Receiver<Vec<&'static str>>,
    managers: watch::Receiver<BTreeSet<String>>,
}

impl Changes {
    /// The parts of etcd's settings that differ from those in effect.
    pub fn differing(&self) -> Vec<&'static str> {
        self.differ.borrow().clone()
    }

    /// The managers that are up.
    pub fn managers(&self) -> BTreeSet<String> {
        self.managers.borrow().clone()
    }

    /// Follows etcd until told to stop. A change of the scaling group changes whose settings count.
    pub fn follow(
        etcd: Etcd,
        in_effect: Settings,
        group: watch::Receiver<String>,
        stopping: CancellationToken,
    ) -> Changes {
        let (differ, differing) = watch::channel(Vec::new());
        let (managers, up) = watch::channel(BTreeSet::new());
        tokio::spawn(async move {
            let followed = async {
                tokio::join!(
                    compare(etcd.clone(), in_effect, group, differ),
                    follow_managers(etcd, managers)
                )
            };
            tokio::select! {
                _ = followed => {}
                () = stopping.cancelled() => {}
            }
        });
        Changes {
            differ: differing,
            managers: up,
        }
    }
}

async fn follow_managers(etcd: Etcd, managers: watch::Sender<BTreeSet<String>>) {
    let prefix = etcd.physical(Scope::Global, MANAGERS) + "/";
    let mut followed = etcd.follow(prefix.clone());
    loop {
        let seen = followed.changed().await;
        let up = seen.entries.iter().filter(|(_, value)| *value == "up");
        let names = up
            .filter_map(|(key, _)| key.strip_prefix(&prefix))
            .map(unquote);
        let names: BTreeSet<String> = names.collect();
        managers.send_if_modified(|known| std::mem::replace(known, names.clone()) != names);
    }
}

async fn compare(
    etcd: Etcd,
    in_effect: Settings,
    mut group: watch::Receiver<String>,
    differ: watch::Sender<Vec<&'static str>>,
) {
    loop {
        group.borrow_and_update();
        let mut scopes = [Scope::Global, Scope::ScalingGroup, Scope::Node]
            .map(|scope| etcd.follow(etcd.physical(scope, "config/")));
        let [global, of_group, of_node] = &mut scopes;
        loop {
            if let Ok(now) = Settings::read(&etcd).await {
                let found = differing(&in_effect, &now);
                differ.send_if_modified(|known| {
                    let changed = *known != found;
                    if changed && !found.is_empty() {
                        tracing::warn!(
                            keys = found.join(", "),
                            "the cluster's settings have changed; restart the agent to apply them (kernels go on)"
                        );
                    }
                    *known = found;
                    changed
                });
            }
            tokio::select! {
                _ = global.changed() => {}
                _ = of_group.changed() => {}
                _ = of_node.changed() => {}
                Ok(()) = group.changed() => break,
            }
            tokio::time::sleep(SETTLE).await;
        }
    }
}

fn differing(one: &Settings, other: &Settings) -> Vec<&'static str> {
    let parts = [
        ("config/redis", one.redis.tree == other.redis.tree),
        ("config/agent", one.agent.tree == other.agent.tree),
        (
            "config/container",
            one.container.tree == other.container.tree,
        ),
        (
            "config/network/subnet",
            one.subnet.tree == other.subnet.tree,
        ),
        (
            "config/plugins/accelerator",
            one.accelerator.tree == other.accelerator.tree,
        ),
    ];
    let changed = parts.into_iter().filter(|(_, same)| !same);
    changed.map(|(name, _)| name).collect()
}
