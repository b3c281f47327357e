//! Small methods about the node and about kernels as they are.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;
use shared::ids::KernelId;
use uuid::Uuid;

use super::super::arguments::Arguments;
use super::super::failure::Failure;
use super::super::value::Value;
use super::{PATIENCE, failed, kernel_id, reply, unknown_kernel};
use crate::blocking::blocking;
use crate::causes::chain;
use crate::docker::LogOptions;
use crate::kernel::node::Node;
use crate::network;
use crate::resource::Amount;

/// The most of a console that is answered; its end is kept.
const LOG_LIMIT: usize = 16 << 20;
/// One change of the resource group at a time: the file, etcd's scope and the heartbeat agree on the
/// last one.
static REGROUPING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The state of accelerators; cpu and mem are left out by the original too.
pub(super) fn hardware(node: &Node) -> Result<Value, Failure> {
    let all: serde_json::Map<_, _> = node
        .ledger
        .hardware()
        .into_iter()
        .map(|(name, state)| (name, json!(state)))
        .collect();
    reply(&all)
}

/// The console: Docker's while the container is there, the kept one afterwards. An engine that is about to
/// remove the container has none of it either, and says so in another way than that it is gone.
pub(super) async fn logs(node: &Arc<Node>, args: &Arguments) -> Result<Value, Failure> {
    let id = kernel_id(args, "kernel_id")?;
    let mut refused = None;
    if let Some(kernel) = node.registry.get(id)
        && let Some(container) = kernel.container()
    {
        let options = LogOptions {
            keep: LOG_LIMIT,
            partial: true,
            limit: Some(PATIENCE),
            for_user: true,
        };
        match node.docker.logs(&container.to_string(), options).await {
            Ok(log) => return reply(&json!({ "logs": log.text })),
            Err(err) if err.is_not_found() => {}
            Err(err) => {
                let failure = Failure::new("DockerError", chain(&err));
                // What is kept of a kernel at work is of the container before its restart.
                if kernel.is_up() {
                    return Err(failure);
                }
                refused = Some(failure);
            }
        }
    }
    match kept_log(node, id).await {
        Some(text) => reply(&json!({ "logs": text })),
        None => Err(refused.unwrap_or_else(|| unknown_kernel(id))),
    }
}

async fn kept_log(node: &Arc<Node>, id: KernelId) -> Option<String> {
    let logs = node.logs.clone();
    blocking(move || logs.load(id)).await
}

pub(super) async fn create_network(
    node: &Arc<Node>,
    mut args: Arguments,
) -> Result<Value, Failure> {
    let name: String = args.get("network_name")?;
    network::create_local_network(&node.docker, &name)
        .await
        .map_err(|err| Failure::new("DockerError", chain(&err)))?;
    Ok(Value::Nil)
}

pub(super) async fn destroy_network(
    node: &Arc<Node>,
    mut args: Arguments,
) -> Result<Value, Failure> {
    let name: String = args.get("network_name")?;
    network::destroy_local_network(&node.docker, &name)
        .await
        .map_err(|err| Failure::new("DockerError", chain(&err)))?;
    Ok(Value::Nil)
}

/// A port for a host-network cluster, kept for the kernel that will come for it.
pub(super) async fn assign_port(node: &Arc<Node>) -> Result<Value, Failure> {
    let port = node
        .ports
        .assign(node.bind_host())
        .map_err(|err| Failure::new("KeyError", err.to_string()))?;
    remember_assigned(node).await;
    Ok(Value::from(port))
}

pub(super) async fn release_port(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let port: u16 = args.get("port_no")?;
    if node.ports.release_assigned(port) {
        remember_assigned(node).await;
    } else {
        // A kernel's port is freed by the kernel's end, whoever asks.
        tracing::debug!(port, "a port that is not assigned was released");
    }
    Ok(Value::Nil)
}

async fn remember_assigned(node: &Arc<Node>) {
    let of_node = node.clone();
    let stored = blocking(move || {
        let assigned = || of_node.ports.assigned();
        of_node.journal.store_assigned_ports(assigned)
    });
    if let Err(err) = stored.await {
        tracing::warn!(
            err = &err as &dyn std::error::Error,
            "cannot remember the assigned ports"
        );
    }
}

/// UUID of a device to its amount, over all kernels.
pub(super) fn gpu_allocations(node: &Node) -> Result<Value, Failure> {
    reply(&by_uuid(node.ledger.accelerators_held()))
}

/// The manager's API has a type for these that takes plain UUIDs only, and one key that is none keeps it
/// from showing any: NVIDIA's ids lose what they begin with, ids of other kinds are left out.
fn by_uuid(held: BTreeMap<String, Amount>) -> BTreeMap<String, String> {
    let mut sums: BTreeMap<String, Amount> = BTreeMap::new();
    for (id, amount) in held {
        let of_nvidia = ["GPU-", "MIG-"];
        let bare = of_nvidia.iter().find_map(|start| id.strip_prefix(start));
        if let Ok(uuid) = Uuid::try_parse(bare.unwrap_or(&id)) {
            let sum = sums.entry(uuid.to_string()).or_default();
            *sum = sum.saturating_add(amount);
        }
    }
    let told = sums.into_iter();
    told.map(|(id, amount)| (id, amount.to_string())).collect()
}

/// Changes the resource group, in the file the node was started with and in the running node.
pub(super) async fn update_scaling_group(
    node: &Arc<Node>,
    mut args: Arguments,
) -> Result<Value, Failure> {
    let group: String = args.get("scaling_group")?;
    let Some(file) = node.config.file.clone() else {
        return Err(Failure::runtime_error(
            "this node was started without a configuration file; there is nothing to rewrite",
        ));
    };
    let _turn = REGROUPING.lock().await;
    let name = group.clone();
    blocking(move || config::update_scaling_group(&file, &name))
        .await
        .map_err(|err| failed(&err))?;
    // The file first: what is told to the manager is still so after a restart. The heartbeat tells it.
    if let Some(cluster) = &node.cluster {
        cluster.etcd.set_scaling_group(&group);
    }
    tracing::info!(scaling_group = group, "the resource group was changed");
    node.scaling_group.send_replace(group);
    Ok(Value::Nil)
}

pub(super) fn local_config(node: &Node) -> Result<Value, Failure> {
    let path = node.config.agent.abuse_report_path.as_deref();
    let path = path
        .map(std::path::Path::to_string_lossy)
        .unwrap_or_default();
    reply(&json!({ "agent": { "abuse-report-path": path }, "watcher": {} }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_told_of_devices_with_a_uuid_only() {
        let amount = |text: &str| text.parse::<Amount>().expect("an amount");
        let held = [
            ("GPU-8F0F9C8E-0000-4000-8000-000000000001", "0.5"),
            ("MIG-8f0f9c8e-0000-4000-8000-000000000002", "1"),
            // A made-up device.
            ("8f0f9c8e-0000-4000-8000-000000000003", "2"),
            // An old driver's part, a plugin's replica, AMD's, a TPU's, another plugin's.
            ("MIG-GPU-8f0f9c8e-0000-4000-8000-000000000001/7/0", "1"),
            ("GPU-8f0f9c8e-0000-4000-8000-000000000001%3A%3A0", "1"),
            ("0000:c1:00.0", "1"),
            ("GPU-23a8b5d1c2e4f607", "1"),
            ("0", "1"),
            ("GPU-", "1"),
            ("", "1"),
        ];
        let held = held.map(|(id, held)| (id.to_owned(), amount(held)));
        let told = [
            ("8f0f9c8e-0000-4000-8000-000000000001", "0.5"),
            ("8f0f9c8e-0000-4000-8000-000000000002", "1"),
            ("8f0f9c8e-0000-4000-8000-000000000003", "2"),
        ];
        let told = told.map(|(id, amount)| (id.to_owned(), amount.to_owned()));
        assert_eq!(by_uuid(held.into()), told.into());
    }
}
