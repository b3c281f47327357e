//! Which containers and kernels this node has, for the manager to compare.
//!
//! In: the engine's list of this agent's containers, and the registry. Out:
//! `agent_status_heartbeat`, at start and every minute. Invariant: only containers labelled as this
//! agent's are listed, and only when the engine gave the list in time: the manager has what it
//! does not know purged.

use std::sync::Arc;
use std::time::Duration;

use shared::ids::KernelId;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, timeout};

use crate::causes::chain;
use crate::docker::{ContainerSummary, DockerError, Liveness};
use crate::events::bus::Bus;
use crate::events::bus::message::{Message, MessageError};
use crate::kernel::Node;
use crate::rpc::Value;

/// What collecting may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Reports until the node stops.
pub(super) async fn report_periodically(
    node: Arc<Node>,
    bus: Bus,
    period: Duration,
    first: oneshot::Sender<()>,
) {
    let mut first = Some(first);
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = node.stopping.cancelled() => return,
        }
        let collected = tokio::select! {
            collected = collect(&node) => collected,
            () = node.stopping.cancelled() => return,
        };
        match collected {
            Ok(message) => bus.publish(message),
            Err(err) => tracing::warn!(
                err = chain(&err),
                "cannot report this node's containers; the next report does"
            ),
        }
        if let Some(first) = first.take() {
            // The heartbeat may have stopped waiting.
            let _ = first.send(());
        }
    }
}

/// Why there is no report.
#[derive(Debug, Error)]
enum StatusError {
    #[error("the engine took longer than {} s", LIMIT.as_secs())]
    Late,
    #[error(transparent)]
    Engine(#[from] DockerError),
    #[error(transparent)]
    Message(#[from] MessageError),
}

async fn collect(node: &Node) -> Result<Message, StatusError> {
    let listed = node.docker.list_containers(false, Some(node.agent_id()));
    let listed = timeout(LIMIT, listed)
        .await
        .map_err(|_| StatusError::Late)??;
    // After the list: a kernel that came in between is in the registry, with its container.
    let kernels: Vec<(KernelId, Option<String>)> = node
        .registry
        .all()
        .into_iter()
        .map(|kernel| (kernel.id, kernel.container().map(|id| id.to_string())))
        .collect();
    let containers: Vec<Active> = listed.iter().filter_map(active).collect();
    let args = args(node.agent_id(), &containers, &kernels);
    Ok(Message::report("agent_status_heartbeat", args)?)
}

/// A container that counts as active.
#[derive(Debug, PartialEq, Eq)]
pub struct Active {
    /// Its id.
    pub container_id: String,
    /// Its kernel's.
    pub kernel_id: String,
    /// The engine's word.
    pub status: String,
}

fn active(listed: &ContainerSummary) -> Option<Active> {
    if Liveness::of_listed(listed) != Liveness::Active {
        return None;
    }
    let kernel_id = listed.labels.as_ref()?.get("ai.backend.kernel-id")?;
    Some(Active {
        container_id: listed.id.clone()?,
        // A label that is no id would make the manager refuse the whole report.
        kernel_id: kernel_id.parse::<KernelId>().ok()?.to_string(),
        status: listed.state?.to_string(),
    })
}

/// The arguments of the report: the active containers, and the kernels with theirs.
pub fn args(
    agent: &str,
    containers: &[Active],
    kernels: &[(KernelId, Option<String>)],
) -> Vec<Value> {
    let text = |text: &str| Value::Str(text.to_owned());
    let containers = containers.iter().map(|container| {
        Value::map([
            ("container_id", text(&container.container_id)),
            ("kernel_id", text(&container.kernel_id)),
            ("status", text(&container.status)),
        ])
    });
    let kernels = kernels.iter().map(|(kernel, container)| {
        let container = container.as_deref().map_or(Value::Nil, text);
        Value::Array(vec![text(&kernel.to_string()), container])
    });
    vec![
        text(agent),
        Value::Array(containers.collect()),
        Value::Array(kernels.collect()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_is_the_published_agents_bytes() {
        let id = "c0de".repeat(16);
        let containers = [Active {
            container_id: id.clone(),
            kernel_id: "7b4d2a9f-0000-4000-8000-0000000000b2".into(),
            status: "running".into(),
        }];
        let kernels = [
            (
                "7b4d2a9f-0000-4000-8000-0000000000b2".parse().unwrap(),
                Some(id),
            ),
            (
                "00000000-0000-4000-8000-0000000000c3".parse().unwrap(),
                None,
            ),
        ];
        let message = Message::report(
            "agent_status_heartbeat",
            args("i-evh", &containers, &kernels),
        )
        .unwrap();
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/vectors/events/agent.json")).unwrap();
        let vector = vectors["vectors"]
            .as_array()
            .unwrap()
            .iter()
            .find(|vector| vector["name"] == "agent_status_heartbeat")
            .unwrap();
        let hex: String = message
            .args
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(hex, vector["args_hex"].as_str().unwrap());
    }

    #[test]
    fn only_active_containers_of_kernels_are_listed() {
        let listed = |state: &str, kernel: Option<&str>| -> ContainerSummary {
            serde_json::from_value(serde_json::json!({
                "Id": "c1",
                "State": state,
                "Labels": kernel.map(|kernel| serde_json::json!({"ai.backend.kernel-id": kernel})),
            }))
            .unwrap()
        };
        let id = "7b4d2a9f-0000-4000-8000-0000000000b2";
        for state in ["running", "restarting", "paused"] {
            assert_eq!(active(&listed(state, Some(id))).unwrap().status, state);
        }
        for state in ["created", "exited", "dead", "removing"] {
            assert_eq!(active(&listed(state, Some(id))), None);
        }
        assert_eq!(active(&listed("running", Some("no id"))), None);
        assert_eq!(active(&listed("running", None)), None);
    }
}
