//! Creating, destroying, restarting kernels, and comparing registries.

use std::collections::HashSet;
use std::sync::Arc;

use shared::ids::{ContainerId, KernelId, SessionId};
use uuid::Uuid;

use super::super::arguments::{Arguments, parse_uuid};
use super::super::failure::Failure;
use super::super::value::Value;
use super::{kernel_id, reply};
use crate::causes::chain;
use crate::kernel::create::{self, Order, public_services};
use crate::kernel::death::Death;
use crate::kernel::destroy::{self, DestroyError};
use crate::kernel::lifecycle::{Reason, State};
use crate::kernel::node::Node;
use crate::kernel::request::{ClusterInfo, KernelCreationConfig};
use crate::kernel::restart::{self, RestartError};

pub(super) async fn create_kernels(
    node: &Arc<Node>,
    mut args: Arguments,
) -> Result<Value, Failure> {
    let ids: Vec<String> = args.get("raw_kernel_ids")?;
    let configs: Vec<KernelCreationConfig> = args.get("raw_configs")?;
    let cluster: Arc<ClusterInfo> = Arc::new(args.get("raw_cluster_info")?);
    // The original zips the two lists and drops the surplus of either.
    if ids.len() != configs.len() {
        return Err(Failure::value_error(format!(
            "{} kernel ids and {} kernel configurations were given",
            ids.len(),
            configs.len()
        )));
    }
    let mut seen = HashSet::new();
    let mut orders = Vec::with_capacity(ids.len());
    for (id, mut config) in ids.iter().zip(configs) {
        let id = parse_uuid(id).ok_or_else(Failure::bad_uuid)?;
        if !seen.insert(id) {
            return Err(Failure::value_error(format!("kernel {id} is named twice")));
        }
        // The list decides which kernel a configuration is for.
        config.kernel_id = id;
        orders.push(Order {
            id: KernelId(id.into_bytes()),
            config: Arc::new(config),
            cluster: cluster.clone(),
        });
    }
    let outcomes = create::create_kernels(node, orders).await;
    let mut results = Vec::new();
    let mut failures = Vec::new();
    for outcome in outcomes {
        match outcome {
            Ok(result) => results.push(result),
            Err(err) => failures.push(err.failure()),
        }
    }
    match failures.len() {
        0 => reply(&results),
        1 => Err(failures.remove(0)),
        _ => Err(Failure::group("agent.create_kernels() failed", &failures)),
    }
}

/// Whether the kernel is here. A manager asks of kernels that it believes under creation for long,
/// and does nothing about one that is here: it waits to be told of its start.
pub(super) fn check_creating(node: &Node, args: &Arguments) -> Result<Value, Failure> {
    let id = kernel_id(args, "kernel_id")?;
    let kernel = node.registry.get(id);
    if let Some(kernel) = &kernel {
        node.tell_start_again(kernel);
    }
    Ok(Value::Bool(kernel.is_some()))
}

pub(super) fn check_running(node: &Node, args: &Arguments) -> Result<Value, Failure> {
    let id = kernel_id(args, "kernel_id")?;
    Ok(Value::Bool(
        node.registry
            .get(id)
            .is_some_and(|kernel| kernel.is_running()),
    ))
}

pub(super) async fn destroy_kernel(
    node: &Arc<Node>,
    mut args: Arguments,
) -> Result<Value, Failure> {
    let id = kernel_id(&args, "kernel_id")?;
    let session = SessionId(args.uuid("session_id")?.into_bytes());
    let reason = match args.value("reason") {
        Value::Nil => Reason::USER_REQUESTED,
        value => match value.as_str() {
            Some(text) => Reason::from_text(text),
            None => return Err(Failure::type_error("reason must be a text or nothing")),
        },
    };
    let suppress: bool = args.get("suppress_events")?;
    destroyed(destroy::destroy(node, id, session, reason, suppress).await)
}

fn destroyed(outcome: Result<(), DestroyError>) -> Result<Value, Failure> {
    outcome.map(|()| Value::Nil).map_err(|err| match &err {
        DestroyError::StillEnding { .. } => Failure::runtime_error(err.to_string()),
        DestroyError::Inspect { .. } => Failure::new("DockerError", chain(&err)),
    })
}

/// The same for an operator. The manager has not begun to end the session: it is told how a batch session's job
/// has ended.
pub(super) async fn destroy_for_operator(
    node: &Arc<Node>,
    kernel: &Value,
    session: &Value,
    reason: &Value,
) -> Result<Value, Failure> {
    let uuid = |value: &Value| value.as_str().and_then(parse_uuid);
    let (id, session) = uuid(kernel)
        .zip(uuid(session))
        .ok_or_else(Failure::bad_uuid)?;
    let id = KernelId(id.into_bytes());
    let reason = reason
        .as_str()
        .map_or(Reason::USER_REQUESTED, Reason::from_text);
    // One that ends already ends for who wanted it first.
    if let Some(kernel) = node.registry.get(id).filter(|it| it.ending().is_none()) {
        kernel.update_record(|record| record.condemned = true);
    }
    let session = SessionId(session.into_bytes());
    destroyed(destroy::destroy(node, id, session, reason, false).await)
}

pub(super) async fn restart_kernel(
    node: &Arc<Node>,
    mut args: Arguments,
) -> Result<Value, Failure> {
    let id = kernel_id(&args, "kernel_id")?;
    let updated: serde_json::Value = args.get("updated_config")?;
    let err = match restart::restart(node, id, &updated).await {
        Ok(result) => return reply(&restart_answer(&result)),
        Err(err) => err,
    };
    Err(match &*err {
        // The original answers the old values when the new container did not come. They would name
        // a container that is gone; the caller is told, and the kernel's end is announced.
        RestartError::Create(err) => {
            tracing::warn!(kernel_id = %id, err = err as &dyn std::error::Error, "a restart failed");
            err.failure()
        }
        RestartError::NotNow { source, .. } => Failure::new(source.class(), chain(&*err)),
        RestartError::Unknown(id) => super::unknown_kernel(*id),
        RestartError::Timeout(_) => Failure::timeout().with_traceback(err.to_string()),
        other => Failure::runtime_error(chain(other)),
    })
}

/// The keys that the manager writes to its database; all are there.
fn restart_answer(result: &serde_json::Value) -> serde_json::Value {
    let mut answer = serde_json::Map::new();
    for key in [
        "container_id",
        "repl_in_port",
        "repl_out_port",
        "stdin_port",
        "stdout_port",
        "service_ports",
    ] {
        answer.insert(key.to_owned(), result.get(key).cloned().unwrap_or_default());
    }
    serde_json::Value::Object(answer)
}

fn id_pairs(args: &mut Arguments, name: &str) -> Result<Vec<(String, String)>, Failure> {
    args.get(name)
}

/// Listed kernels that are unknown here have ended; kernels that are not listed must not live.
pub(super) fn sync_registry(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let mut listed = HashSet::new();
    for (kernel, session) in id_pairs(&mut args, "raw_kernel_session_ids")? {
        let kernel = KernelId(
            parse_uuid(&kernel)
                .ok_or_else(Failure::bad_uuid)?
                .into_bytes(),
        );
        let session = SessionId(
            parse_uuid(&session)
                .ok_or_else(Failure::bad_uuid)?
                .into_bytes(),
        );
        listed.insert(kernel);
        if node.registry.get(kernel).is_none() {
            destroy::tell_end_again(node, kernel, session, None);
        }
    }
    for kernel in node.registry.all() {
        // One that is just being created may be younger than the manager's list.
        if !listed.contains(&kernel.id) && kernel.is_running() {
            let (id, session) = (kernel.id, kernel.session);
            destroy_in_background(node, id, session, Reason::NOT_FOUND_IN_MANAGER);
        }
    }
    Ok(Value::Nil)
}

fn destroy_in_background(node: &Arc<Node>, id: KernelId, session: SessionId, reason: Reason) {
    let node = node.clone();
    node.clone().tasks.spawn(async move {
        if let Err(err) = destroy::destroy(&node, id, session, reason, true).await {
            tracing::warn!(kernel_id = %id, err = &err as &dyn std::error::Error, "cannot destroy a kernel");
        }
    });
}

/// Containers that must not live, as the manager knows from the status heartbeat.
pub(super) fn purge_containers(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    for (container, kernel) in id_pairs(&mut args, "container_kernel_ids")? {
        let id = KernelId(
            parse_uuid(&kernel)
                .ok_or_else(Failure::bad_uuid)?
                .into_bytes(),
        );
        let Ok(container) = container.parse::<ContainerId>() else {
            tracing::warn!(
                container_id = container,
                "the manager asked to purge what is no container id"
            );
            continue;
        };
        let node = node.clone();
        node.clone()
            .tasks
            .spawn(async move { purge(&node, id, container).await });
    }
    Ok(Value::Map(Vec::new()))
}

async fn purge(node: &Arc<Node>, id: KernelId, container: ContainerId) {
    // Only a container of this agent, and only the one the kernel has now: a restart replaces it.
    let kernel = match node.registry.get(id) {
        Some(kernel) => Some(kernel),
        None => crate::kernel::recovery::adopt_stray(node, id).await.unwrap_or_else(|err| {
            tracing::warn!(kernel_id = %id, err = &err as &dyn std::error::Error, "cannot look for a container");
            None
        }),
    };
    let Some(kernel) = kernel.filter(|kernel| kernel.container() == Some(container)) else {
        tracing::debug!(kernel_id = %id, container_id = %container, "nothing to purge");
        return;
    };
    if let Err(err) = destroy::destroy(node, id, kernel.session, Reason::USER_PURGED, true).await {
        tracing::warn!(kernel_id = %id, err = &err as &dyn std::error::Error, "cannot purge a container");
    }
}

/// Registry entries that the manager does not know. The original drops the entry and forgets the
/// container; here what the entry holds is given back as well.
pub(super) fn drop_registry(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let Some(ids) = args.take("kernel_ids").as_array().map(<[Value]>::to_vec) else {
        return Err(Failure::type_error("kernel_ids must be a list"));
    };
    for id in &ids {
        let id = match id {
            Value::Uuid(id) => *id,
            other => other
                .as_str()
                .and_then(parse_uuid)
                .ok_or_else(Failure::bad_uuid)?,
        };
        if let Some(kernel) = node.registry.get(KernelId(id.into_bytes())) {
            destroy_in_background(
                node,
                kernel.id,
                kernel.session,
                Reason::NOT_FOUND_IN_MANAGER,
            );
        }
    }
    Ok(Value::Map(Vec::new()))
}

/// Destroys all kernels and waits for their ends.
pub(super) async fn reset(node: &Arc<Node>) -> Result<Value, Failure> {
    let tasks: Vec<_> = node
        .registry
        .all()
        .into_iter()
        .map(|kernel| {
            let node = node.clone();
            node.clone().tasks.spawn(async move {
                // The manager has not begun to end its session.
                kernel.update_record(|record| record.condemned = true);
                destroy::destroy(
                    &node,
                    kernel.id,
                    kernel.session,
                    Reason::from_text("agent-termination"),
                    false,
                )
                .await
            })
        })
        .collect();
    let mut failures = Vec::new();
    for task in tasks {
        match task.await {
            Ok(Ok(())) => {}
            Ok(Err(err)) => failures.push(Failure::runtime_error(err.to_string())),
            Err(err) => failures.push(Failure::runtime_error(err.to_string())),
        }
    }
    match failures.len() {
        0 => Ok(Value::Nil),
        1 => Err(failures.remove(0)),
        _ => Err(Failure::group("reset_agent() failed", &failures)),
    }
}

/// What `bai.kernels` shows of one kernel; with the node's settings where its ports are served.
pub(super) fn shown(
    view: &crate::kernel::registry::KernelView,
    serving: Option<&config::Container>,
) -> serde_json::Value {
    let record = &view.record;
    let ending = crate::kernel::registry::outcome(&view.state);
    let death = ending.and_then(|ending| ending.death);
    let state = match &view.state {
        State::Creating { .. } if record.result.is_some() => "restarting",
        state => state.name(),
    };
    serde_json::json!({
        "kernel_id": view.id.to_string(),
        "session_id": Uuid::from_bytes(record.session().0).to_string(),
        "container_id": record.container_id,
        "image": record.image,
        "state": state,
        "reason": ending.map(|ending| ending.told().to_string()),
        "exit_code": ending.and_then(|ending| ending.exit_code),
        "cause": death.map(Death::words),
        "created_at": record.created_at,
        "session_type": record.session_type,
        "cluster_hostname": record.hostname,
        "slots": record.slots,
        "service_ports": public_services(&record.services),
        "address": serving.map(|container| &container.advertised_host),
        "bind_host": serving.map(|container| container.bind_host),
    })
}
