//! The keys by which a cluster finds this node.
//!
//! In: addresses. Out: status, `ip` and `watcher_port` in the node's scope. Invariant: they are written
//! in the original's order and again whenever they have gone (etcd restored or made anew); like the
//! original's they stay when the agent stops.

use std::time::Duration;

use config::Config;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::causes::chain;
use crate::etcd::{Etcd, EtcdError, Scope};

/// Status before the RPC is served.
pub const STARTING: &str = "starting";
/// Status from then on.
const RUNNING: &str = "running";
/// Pause before keys are written again: two agents with one id must not fight at full speed.
const AGAIN: Duration = Duration::from_secs(5);

/// What is written, in order.
fn keys(config: &Config) -> [(&'static str, String); 3] {
    let listen = &config.agent.rpc_listen_addr;
    // The original writes a wildcard as it is, which nobody can reach.
    let ip = if listen.is_unspecified() {
        &config.agent.advertised_rpc_addr.host
    } else {
        &listen.host
    };
    [
        ("ip", ip.clone()),
        ("watcher_port", config.watcher.service_addr.port.to_string()),
        ("", RUNNING.to_owned()),
    ]
}

async fn write(etcd: &Etcd, keys: &[(&'static str, String)]) -> Result<(), EtcdError> {
    for (key, value) in keys {
        etcd.put(Scope::Node, key, value).await?;
    }
    Ok(())
}

/// Registers, and keeps the node registered until told to stop. `stand` tells whether the keys stood
/// when last looked.
pub(super) async fn register(
    etcd: Etcd,
    config: &Config,
    stand: watch::Sender<bool>,
    stopping: CancellationToken,
) {
    let keys = keys(config);
    match write(&etcd, &keys).await {
        Ok(()) => {
            stand.send_replace(true);
            tracing::info!("registered in etcd");
        }
        Err(err) => tracing::warn!(
            err = chain(&err),
            "cannot register in etcd yet; it is tried again"
        ),
    }
    tokio::spawn(async move {
        tokio::select! {
            () = keep(&etcd, &keys, &stand) => {}
            () = stopping.cancelled() => {}
        }
    });
}

async fn keep(etcd: &Etcd, keys: &[(&'static str, String)], stand: &watch::Sender<bool>) {
    let mut followed = etcd.follow(etcd.physical(Scope::Node, ""));
    loop {
        let seen = followed.now();
        let stands = keys
            .iter()
            .all(|(key, value)| seen.entries.get(&etcd.physical(Scope::Node, key)) == Some(value));
        if seen.readings > 0 {
            stand.send_if_modified(|known| std::mem::replace(known, stands) != stands);
        }
        if seen.readings > 0 && seen.live && !stands {
            match write(etcd, keys).await {
                Ok(()) => tracing::warn!(
                    "this node's keys in etcd had gone or changed; they are written again"
                ),
                Err(err) => tracing::debug!(err = chain(&err), "cannot register in etcd"),
            }
            tokio::time::sleep(AGAIN).await;
            continue;
        }
        followed.changed().await;
    }
}
