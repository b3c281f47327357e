//! Our own methods, for the command line. Same wire; the manager never calls them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value as Json, json};
use shared::ids::KernelId;
use shared::observed::{ForwardPath, ObservedSnapshot};
use uuid::Uuid;

use super::super::arguments::parse_uuid;
use super::super::failure::Failure;
use super::super::service::{Call, unknown_method};
use super::super::value::Value;
use super::{failed, lifecycle, reply, runner_of, unknown_kernel};
use crate::causes::chain;
use crate::cluster::Cluster;
use crate::etcd::Health;
use crate::image::{self, ImageError};
use crate::kernel::death::full_shm;
use crate::kernel::execution;
use crate::kernel::node::Node;
use crate::kernel::registry::outcome;
use crate::stats;
use crate::storage_proxy;

/// What their names start with.
pub(super) const PREFIX: &str = "bai.";
/// How long `bai.events` waits at most.
const EVENTS_WAIT: Duration = Duration::from_secs(30);
/// How many events one answer holds at most.
const EVENTS_LIMIT: usize = 1000;
/// How many kernels that died `bai.status` names.
const DIED_SHOWN: usize = 5;
/// How long `bai.status` waits for Docker.
const DOCKER_WAIT: Duration = Duration::from_secs(3);

pub(super) async fn answer(
    node: &Arc<Node>,
    started: Instant,
    call: Call,
) -> Result<Value, Failure> {
    let arg = |index: usize, name: &str| -> Value {
        let named = call
            .kwargs
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value);
        call.args
            .get(index)
            .or(named)
            .cloned()
            .unwrap_or(Value::Nil)
    };
    match call.method.as_str() {
        "bai.status" => status(node, started).await,
        "bai.kernels" => kernels(node, matches!(arg(0, "all"), Value::Bool(true))),
        "bai.stats" => statistics(node, &arg(0, "kernel_ids")),
        "bai.ports" => ports(node),
        "bai.folders" => reply(&storage_proxy::documents::folders(
            node.storage_proxy.as_ref(),
            &storage_proxy::mounted(node),
            Instant::now(),
        )),
        "bai.events" => events(node, &arg(0, "after"), &arg(1, "wait_s"), &arg(2, "limit")).await,
        "bai.destroy" => {
            let (kernel, session) = (arg(0, "kernel_id"), arg(1, "session_id"));
            lifecycle::destroy_for_operator(node, &kernel, &session, &arg(2, "reason")).await
        }
        "bai.interrupt" => interrupt(node, &arg(0, "kernel_id"), &arg(1, "run_id")).await,
        "bai.image" => local_image(node, &arg(0, "name")).await,
        other => Err(unknown_method(other)),
    }
}

async fn status(node: &Arc<Node>, started: Instant) -> Result<Value, Failure> {
    let version = tokio::time::timeout(DOCKER_WAIT, node.docker.version()).await;
    let docker = match version {
        Ok(Ok(version)) => json!({"reachable": true, "version": version.version}),
        Ok(Err(err)) => json!({"reachable": false, "version": null, "error": chain(&err)}),
        Err(_) => json!({"reachable": false, "version": null, "error": "no answer"}),
    };
    let observed = node.link.observed();
    let occupancy = node.ports.occupancy();
    let mode = if node.config.standalone {
        "standalone"
    } else {
        "manager"
    };
    reply(&json!({
        "agent_id": node.agent_id(),
        "version": env!("CARGO_PKG_VERSION"),
        "epoch": node.link.epoch(),
        "uptime_s": started.elapsed().as_secs_f64(),
        "mode": mode,
        "docker": docker,
        "dataplane": {
            "alive": observed.is_alive(),
            "heartbeat_age_ms": observed.heartbeat_age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            "epoch": observed.epoch,
        },
        "kernels": node.registry.len(),
        "short_of_memory": short_of_memory(node, observed.snapshot.as_deref()),
        "died": died(node),
        "ports": {
            "total": occupancy.total,
            "free": occupancy.free,
            "cooling": occupancy.resting,
        },
        "slots": slots(node),
        "devices_held": devices_held(node),
        "scaling_group": *node.scaling_group.borrow(),
        "cluster": node.cluster.as_ref().map(cluster),
        "storage_proxy": node
            .storage_proxy
            .as_ref()
            .map(|proxy| storage_proxy::documents::status(proxy, Instant::now())),
    }))
}

/// The kernels in service whose processes were killed for memory, or whose /dev/shm is full.
fn short_of_memory(node: &Node, snapshot: Option<&ObservedSnapshot>) -> Vec<Json> {
    let kernels = node.registry.all().into_iter();
    kernels
        .filter_map(|kernel| {
            let told = kernel.out_of_memory();
            let sample = snapshot.and_then(|snapshot| snapshot.container(kernel.container()?));
            let memory = sample.and_then(|sample| sample.memory.get());
            // The engine's events may have been missed, its own counter counts them all.
            let counted = memory.and_then(|memory| memory.oom_kill_events);
            let kills = counted.unwrap_or(0).max(told.kills);
            let shm = sample.and_then(full_shm);
            (kills > 0 || shm.is_some()).then(|| {
                json!({
                    "kernel_id": kernel.id.to_string(),
                    "killed": kills,
                    "killed_s_ago": told.last.map(|last| last.elapsed().as_secs_f64()),
                    "memory_limit": memory.and_then(|memory| memory.limit_bytes),
                    "shm": shm.map(|(used, size)| json!({"used": used, "size": size})),
                })
            })
        })
        .collect()
}

/// The kernels that died last, newest first.
fn died(node: &Node) -> Vec<Json> {
    let ended = node.registry.ended().into_iter().rev();
    ended
        .filter_map(|ended| {
            let ending = outcome(&ended.view.state)?;
            Some(json!({
                "kernel_id": ended.view.id.to_string(),
                "reason": ending.told().to_string(),
                "exit_code": ending.exit_code,
                "cause": ending.death?.words(),
                "at": crate::events::unix_seconds(ended.at),
            }))
        })
        .take(DIED_SHOWN)
        .collect()
}

/// What is known of etcd, the bus and the managers.
fn cluster(cluster: &Cluster) -> Json {
    let health = cluster.etcd.health().borrow().clone();
    let etcd = match health {
        Health::Untried => json!({"reachable": null}),
        Health::Reachable { endpoint } => json!({"reachable": true, "endpoint": endpoint}),
        Health::Refused { since, error } => json!({
            "reachable": true, "refuses": error, "refused_s": since.elapsed().as_secs_f64(),
        }),
        Health::Lost { since, error } => json!({
            "reachable": false, "error": error, "away_s": since.elapsed().as_secs_f64(),
        }),
    };
    let bus = cluster.bus.state().borrow().clone();
    json!({
        "etcd": etcd,
        "registered": cluster.is_registered(),
        "managers": cluster.changes.managers(),
        "settings_changed": cluster.changes.differing(),
        "bus": {
            "connected": bus.connected,
            "since": bus.since.map(crate::events::unix_seconds),
            "error": bus.trouble,
            "waiting": cluster.bus.waiting(),
            "sent": bus.sent,
            "left_out": bus.left_out,
        },
    })
}

/// Total and used amounts per slot, as text: they may be fractions or large.
fn slots(node: &Node) -> Json {
    let mut slots = Map::new();
    let mut used: BTreeMap<String, crate::resource::Amount> = BTreeMap::new();
    for kernel in node.registry.all() {
        for (name, amount) in kernel.with_record(|record| record.slots.clone()) {
            if let Some(amount) = amount
                .as_str()
                .and_then(|text| text.parse::<crate::resource::Amount>().ok())
            {
                *used.entry(name).or_default() += amount;
            }
        }
    }
    for slot in node.ledger.available() {
        let used = used.get(&slot.name).copied().unwrap_or_default();
        slots.insert(
            slot.name.clone(),
            json!({"total": slot.amount.to_string(), "used": used.to_string()}),
        );
    }
    Json::Object(slots)
}

/// Amount per device that kernels hold, by the device's own id, as text.
fn devices_held(node: &Node) -> BTreeMap<String, String> {
    let held = node.ledger.accelerators_held().into_iter();
    held.map(|(id, amount)| (id, amount.to_string())).collect()
}

fn kernels(node: &Node, all: bool) -> Result<Value, Failure> {
    let mut shown = Vec::new();
    if all {
        shown.extend(
            node.registry
                .ended()
                .iter()
                .map(|ended| lifecycle::shown(&ended.view, None)),
        );
    }
    for kernel in node.registry.all() {
        let serving = Some(&node.config.container);
        shown.push(lifecycle::shown(&kernel.view(), serving));
    }
    reply(&json!({ "kernels": shown }))
}

fn wanted_kernels(value: &Value) -> Result<Vec<KernelId>, Failure> {
    let Some(ids) = value.as_array() else {
        return Ok(Vec::new());
    };
    ids.iter()
        .map(|id| match id {
            Value::Uuid(id) => Ok(*id),
            other => other
                .as_str()
                .and_then(parse_uuid)
                .ok_or_else(Failure::bad_uuid),
        })
        .map(|id| id.map(|id: Uuid| KernelId(id.into_bytes())))
        .collect()
}

fn statistics(node: &Node, kernel_ids: &Value) -> Result<Value, Failure> {
    let wanted = wanted_kernels(kernel_ids)?;
    let kernels = match wanted.as_slice() {
        [] => node.registry.all(),
        ids => ids
            .iter()
            .map(|id| node.registry.get(*id).ok_or_else(|| unknown_kernel(*id)))
            .collect::<Result<Vec<_>, _>>()?,
    };
    let snapshot = node.link.observed().snapshot;
    let mut samples = Map::new();
    for kernel in kernels {
        let sample = kernel
            .container()
            .and_then(|container| snapshot.as_ref()?.container(container))
            .map_or_else(|| json!({}), stats::container);
        samples.insert(kernel.id.to_string(), sample);
    }
    let of_node = snapshot
        .as_ref()
        .and_then(|snapshot| snapshot.node.as_ref());
    reply(&json!({
        "node": of_node.map_or_else(|| json!({}), stats::node_map),
        "kernels": samples,
        "tick": of_node.map_or(0, |node| node.tick),
    }))
}

fn ports(node: &Node) -> Result<Value, Failure> {
    let snapshot = node.link.observed().snapshot;
    let mut shown = Vec::new();
    for kernel in node.registry.all() {
        let record = kernel.record();
        for service in &record.services {
            for (container_port, host_port) in
                service.container_ports.iter().zip(&service.host_ports)
            {
                let key = shared::desired::PortKey {
                    protocol: shared::desired::Protocol::Tcp,
                    host_port: *host_port,
                };
                let status = snapshot.as_ref().and_then(|snapshot| snapshot.port(key));
                let status = status.filter(|status| status.kernel_id == kernel.id);
                shown.push(json!({
                    "host_port": host_port,
                    "kernel_id": kernel.id.to_string(),
                    "service": service.name,
                    "container_port": container_port,
                    "state": status.map_or("unknown", |status| status.state.name()),
                    "path": status.map(|status| path_name(status.path)),
                    "engine": status.map(|status| status.engine.name()),
                    "reason": status.map(|status| status.reason.clone()),
                    "sessions_active": status.map(|status| status.sessions_active),
                    "sessions_total": status.map(|status| status.sessions_total),
                    "sessions_refused": status.map(|status| status.sessions_refused),
                    "bytes_in": status.map(|status| status.bytes_in),
                    "bytes_out": status.map(|status| status.bytes_out),
                    "packets_in": status.map(|status| status.packets_in),
                    "packets_out": status.map(|status| status.packets_out),
                }));
            }
        }
    }
    reply(&json!({ "ports": shown }))
}

fn path_name(path: ForwardPath) -> &'static str {
    match path {
        ForwardPath::None => "none",
        ForwardPath::Relay => "relay",
        ForwardPath::KernelPath => "kernel",
        ForwardPath::Engine => "engine",
    }
}

async fn events(
    node: &Arc<Node>,
    after: &Value,
    wait: &Value,
    limit: &Value,
) -> Result<Value, Failure> {
    let ring = node.events.ring();
    let after = match after.as_i64() {
        Some(after) if after >= 0 => u64::try_from(after).unwrap_or(0),
        None => 0,
        // From now on.
        Some(_) => return reply(&json!({ "events": [], "next": ring.newest() })),
    };
    let seconds = match wait {
        Value::Float(seconds) => *seconds,
        other => other
            .as_i64()
            .and_then(|seconds| u32::try_from(seconds).ok())
            .map_or(0.0, f64::from),
    };
    let wait = Duration::try_from_secs_f64(seconds.max(0.0))
        .unwrap_or(EVENTS_WAIT)
        .min(EVENTS_WAIT);
    let limit = limit
        .as_i64()
        .and_then(|limit| usize::try_from(limit).ok())
        .unwrap_or(100)
        .min(EVENTS_LIMIT);
    let (found, next) = ring.wait_after(after, limit, wait).await;
    let found: Vec<Json> = found
        .iter()
        .map(|occurrence| occurrence.to_json())
        .collect();
    reply(&json!({ "events": found, "next": next }))
}

/// Interrupts one run, not whatever is at work as the managers' `interrupt_kernel` does.
async fn interrupt(node: &Node, kernel: &Value, run_id: &Value) -> Result<Value, Failure> {
    let id = kernel.as_str().and_then(parse_uuid);
    let id = KernelId(id.ok_or_else(Failure::bad_uuid)?.into_bytes());
    let Some(run_id) = run_id.as_str() else {
        return Err(Failure::type_error("the id of a run is a text"));
    };
    let kernel = node.registry.get(id).ok_or_else(|| unknown_kernel(id))?;
    let met = execution::interrupt_run(&runner_of(&kernel).await?, run_id);
    reply(&json!({ "met": met.map_err(|err| failed(&err))? }))
}

async fn local_image(node: &Arc<Node>, name: &Value) -> Result<Value, Failure> {
    let Some(name) = name.as_str() else {
        return Err(Failure::type_error("the name of an image is a text"));
    };
    let found = node.docker.inspect_image(name).await.map_err(|err| {
        if err.is_not_found() {
            let err = ImageError::NotAvailable {
                image: name.to_owned(),
            };
            Failure::new(err.class(), err.to_string())
        } else {
            Failure::new("DockerError", chain(&err))
        }
    })?;
    reply(&json!({
        "canonical": canonical(name, &found.repo_tags),
        "digest": found.id,
        "architecture": image::architecture(&found.architecture),
        "labels": found.labels,
        "size": found.size,
    }))
}

/// The name the image is known by: as given when it is one of its tags, else its first tag.
fn canonical(name: &str, tags: &[String]) -> String {
    let tagged = format!("{name}:latest");
    if tags.iter().any(|tag| tag == name) {
        return name.to_owned();
    }
    if tags.contains(&tagged) {
        return tagged;
    }
    tags.first().cloned().unwrap_or_else(|| name.to_owned())
}
