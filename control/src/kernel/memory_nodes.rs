//! Containers whose memory is pinned to a NUMA node, when what comes later may fill that node.
//!
//! In: the ledger's word on whose pinning does not hold any more. Out: those containers with all nodes,
//! before the one starts that came later, as far as the engine does it soon, else as soon as it does.
//! Invariants: no creation waits long for it; only what the agent itself has pinned is changed.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use shared::ids::KernelId;
use shared::log_limit::LogLimit;

use super::node::Node;
use crate::causes::chain;
use crate::docker::{Docker, DockerError};
use crate::resource::Pinned;

/// How often what the engine has not done is tried again.
const PERIOD: Duration = Duration::from_secs(30);
/// How long a creation waits.
const PATIENCE: Duration = Duration::from_secs(5);
/// Containers changed at a time.
const AT_ONCE: usize = 8;

/// Widens what was not widened at a creation, or was found so, until the agent stops.
pub async fn watch(node: Arc<Node>) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = node.stopping.cancelled() => return,
        }
        let all = widen_all(&node);
        let _ = node.stopping.run_until_cancelled(all).await;
    }
}

/// Before a container starts: gives those all nodes that it may take the memory of. What cannot be done
/// soon is done later.
pub async fn make_room(node: &Node) {
    // What is cut short is still due.
    if tokio::time::timeout(PATIENCE, widen_all(node))
        .await
        .is_err()
    {
        tracing::warn!(
            "the engine is slow to give containers the memory of all nodes; it is asked again"
        );
    }
}

async fn widen_all(node: &Node) {
    let due = stream::iter(node.ledger.to_widen());
    due.for_each_concurrent(AT_ONCE, |pinned| async move { widen(node, &pinned).await })
        .await;
}

async fn widen(node: &Node, pinned: &Pinned) {
    let id = pinned.kernel_id;
    // One without a container looks itself, before that starts.
    let Some(container) = node.registry.get(id).and_then(|kernel| kernel.container()) else {
        return;
    };
    let container = container.to_string();
    match widen_container(&node.docker, &container, &pinned.node, &pinned.all).await {
        Ok(changed) => {
            node.ledger.widened(pinned);
            if changed {
                tracing::info!(kernel_id = %id, nodes = pinned.all, was = pinned.node,
                    "a kernel may use the memory of all nodes, as its own may not have enough for all");
            }
        }
        // It is forgotten with the kernel, or there is another one soon.
        Err(err) if err.is_not_found() => {}
        Err(err) => say_pinned(id, &err),
    }
}

/// It is tried again at each creation, for each kernel.
fn say_pinned(id: KernelId, err: &DockerError) {
    static LIMIT: Mutex<LogLimit> = Mutex::new(LogLimit::new());
    let passed = LIMIT.lock().unwrap_or_else(PoisonError::into_inner).pass();
    if let Some(suppressed) = passed {
        tracing::warn!(kernel_id = %id, err = chain(err), suppressed,
            "cannot give a kernel the memory of all nodes; its own may be too small, and the kernel then loses processes");
    }
}

/// Whether anything was to be changed: an operator's own nodes stay, and so does one that has all.
async fn widen_container(
    docker: &Docker,
    container: &str,
    node: &str,
    all: &str,
) -> Result<bool, DockerError> {
    let found = docker.inspect(container).await?;
    let nodes = found.host_config.and_then(|host| host.cpuset_mems);
    if nodes.as_deref() != Some(node) {
        return Ok(false);
    }
    docker.set_memory_nodes(container, all).await?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::UnixListener;

    use super::*;
    use crate::docker::DockerOptions;

    /// An engine with one container of these nodes, and what it was asked to change.
    async fn engine(listener: UnixListener, nodes: &'static str, changes: Changes) {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut lines = BufReader::new(&mut client);
            let (mut asked, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                lines.read_line(&mut line).await.unwrap();
                let line = line.trim().to_ascii_lowercase();
                if let Some(told) = line.strip_prefix("content-length:") {
                    length = told.trim().parse().unwrap();
                }
                match line.is_empty() {
                    true => break,
                    false if asked.is_empty() => asked = line,
                    false => {}
                }
            }
            let mut body = vec![0; length];
            lines.read_exact(&mut body).await.unwrap();
            let answer = match asked.as_str() {
                asked if asked.contains("/version") => r#"{"ApiVersion": "1.43"}"#.to_owned(),
                asked if asked.starts_with("get") => {
                    format!(r#"{{"Id": "c", "HostConfig": {{"CpusetMems": "{nodes}"}}}}"#)
                }
                _ => {
                    let body = String::from_utf8(body).unwrap();
                    changes.lock().unwrap().push((asked, body));
                    r#"{"Warnings": null}"#.to_owned()
                }
            };
            let length = answer.len();
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{answer}"
            );
            client.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    type Changes = Arc<std::sync::Mutex<Vec<(String, String)>>>;

    #[tokio::test]
    async fn only_what_the_agent_has_pinned_gets_all_nodes() {
        for (nodes, changed) in [("0", true), ("1", false), ("0,1", false), ("", false)] {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("s");
            let changes = Changes::default();
            let listener = UnixListener::bind(&socket).unwrap();
            let serving = tokio::spawn(engine(listener, nodes, changes.clone()));
            let docker = Docker::new(&DockerOptions {
                host: Some(format!("unix://{}", socket.display())),
                ..DockerOptions::default()
            })
            .unwrap();
            let done = widen_container(&docker, "c", "0", "0,1").await.unwrap();
            serving.abort();
            assert_eq!(done, changed, "{nodes}");
            let changes = changes.lock().unwrap().clone();
            assert_eq!(changes.len(), usize::from(changed), "{changes:?}");
            if let Some((asked, body)) = changes.first() {
                assert!(asked.starts_with("post "), "{asked}");
                assert!(asked.contains("/containers/c/update"), "{asked}");
                assert_eq!(body, r#"{"CpusetMems":"0,1"}"#);
            }
        }
    }
}
