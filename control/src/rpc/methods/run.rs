//! Running code and services in a kernel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::ids::SessionId;

use super::super::arguments::Arguments;
use super::super::failure::Failure;
use super::super::value::Value;
use super::{failed, kernel_id, known_kernel, reply, runner_of, runner_within};
use crate::kernel::execution::{self, BatchSteps, COMPLETION_LIMIT, ExecuteRequest, Mode};
use crate::kernel::node::Node;
use crate::kernel::record::PublishedBy;
use crate::kernel::registry::Kernel;
use crate::kernel::services::{self, ServiceReply, ServiceStart};
use crate::kernel::{batch_job, restart};

/// The original's words for a kernel that `execute` does not find.
fn not_found(id: shared::ids::KernelId) -> Failure {
    Failure::runtime_error(format!(
        "The container for kernel {id} is not found! (might be terminated--try it again)"
    ))
}

pub(super) async fn execute(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let id = kernel_id(&args, "kernel_id")?;
    let mut request = ExecuteRequest {
        run_id: args.get("run_id")?,
        mode: args
            .get::<String>("mode")?
            .parse::<Mode>()
            .map_err(|err| Failure::value_error(err.to_string()))?,
        code: args.get::<Option<String>>("code")?.unwrap_or_default(),
        opts: args.get::<Option<BatchSteps>>("opts")?.unwrap_or_default(),
        api_version: args.get("api_version")?,
        flush_timeout: args.get("flush_timeout")?,
    };
    let kernel = node.registry.get(id).ok_or_else(|| not_found(id))?;
    let back = restart::wait_if_restarting(&kernel);
    let waited = execution::when_back(&mut request, back).await;
    if let Some(nothing) = waited.map_err(|err| failed(&err))? {
        return reply(&nothing);
    }
    let runner = runner_of(&kernel).await?;
    // The link tells of the run's start and end: it knows them also when this call fails.
    let answer = execution::execute(&runner, request)
        .await
        .map_err(|err| failed(&err))?;
    reply(&answer)
}

pub(super) async fn interrupt(node: &Node, args: &Arguments) -> Result<Value, Failure> {
    let kernel = known_kernel(node, args)?;
    execution::interrupt(&runner_of(&kernel).await?).map_err(|err| failed(&err))?;
    Ok(Value::Nil)
}

/// Returns at once; a retry of the call finds the job running and does not start another.
pub(super) async fn trigger_batch(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let id = kernel_id(&args, "kernel_id")?;
    let session = SessionId(args.uuid("session_id")?.into_bytes());
    let code: String = args.get("code")?;
    let timeout: Option<f64> = args.get("timeout")?;
    let timeout = match timeout {
        Some(seconds) if seconds > 0.0 => Some(
            Duration::try_from_secs_f64(seconds)
                .map_err(|_| Failure::value_error(format!("{seconds} is no time limit")))?,
        ),
        _ => None,
    };
    let Some(kernel) = node.registry.get(id) else {
        batch_job::end_without_kernel(node, id, session);
        return Ok(Value::Nil);
    };
    runner_of(&kernel).await?;
    if !batch_job::start(node, &kernel, code, timeout).await {
        tracing::debug!(kernel_id = %id, "the batch job runs already");
    }
    Ok(Value::Nil)
}

pub(super) async fn completions(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let kernel = known_kernel(node, &args)?;
    let text: String = args.get("text")?;
    let opts: Option<serde_json::Map<String, serde_json::Value>> = args.get("opts")?;
    let began = Instant::now();
    let runner = runner_within(&kernel, COMPLETION_LIMIT).await?;
    let left = COMPLETION_LIMIT.saturating_sub(began.elapsed());
    reply(&execution::completions(&runner, &text, opts.unwrap_or_default(), left).await)
}

pub(super) async fn start_service(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let kernel = known_kernel(node, &args)?;
    let name: String = args.get("service")?;
    let options: Option<serde_json::Map<String, serde_json::Value>> = args.get("opts")?;
    if kernel.with_record(|record| record.block_service_ports) {
        return reply(&ServiceReply::blocked());
    }
    let Some(start) = service_start(&kernel, &name, options.unwrap_or_default()) else {
        return reply(&ServiceReply::unknown());
    };
    reply(&services::start_service(&runner_of(&kernel).await?, start).await)
}

fn service_start(
    kernel: &Kernel,
    name: &str,
    options: serde_json::Map<String, serde_json::Value>,
) -> Option<ServiceStart> {
    kernel.with_record(|record| {
        let service = record
            .services
            .iter()
            .find(|service| service.name == name && service.is_public())?;
        Some(ServiceStart {
            name: service.name.clone(),
            // On the host's network the runner's own services were told these ports, and others have no different ones.
            ports: match record.published_by {
                PublishedBy::Host => service.host_ports.clone(),
                _ => service.container_ports.clone(),
            },
            protocol: service.protocol.as_str().to_owned(),
            options,
        })
    })
}

/// All errors are swallowed, as the manager expects.
pub(super) fn shutdown_service(node: &Node, mut args: Arguments) -> Result<Value, Failure> {
    let id = kernel_id(&args, "kernel_id")?;
    let name: String = args.get("service")?;
    if let Some(runner) = node.registry.get(id).and_then(|kernel| kernel.runner()) {
        services::shutdown_service(&runner, &name);
    }
    Ok(Value::Nil)
}

pub(super) async fn ping_kernel(node: &Arc<Node>, args: &Arguments) -> Result<Value, Failure> {
    let kernel = known_kernel(node, args)?;
    match kernel.runner() {
        Some(runner) => reply(&execution::ping_kernel(&runner).await),
        None => Ok(Value::Nil),
    }
}
