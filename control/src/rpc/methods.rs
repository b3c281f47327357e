//! The agent's methods: from arguments to operations on kernels, and from their outcomes to
//! replies.
//!
//! In: calls. Out: values and failures of the original's shapes. Nothing is decided here: exclusion
//! and retries are the lifecycle's, limits the server's.

mod answers;
mod extension;
mod files;
mod images;
mod lifecycle;
mod run;

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::ids::KernelId;
use uuid::Uuid;

use super::arguments::Arguments;
use super::failure::Failure;
use super::service::{BoxFuture, Call, Service, unknown_method};
use super::value::Value;
use crate::events::{Event, Severity};
use crate::kernel::Node;
use crate::kernel::registry::Kernel;
use crate::kernel::runner_link::RunnerLink;

/// How long a call waits for the connection to a runner that is just being taken over.
const RUNNER_WAIT: Duration = Duration::from_secs(10);

/// How long what is asked of a container may take: the manager waits 30 s for the answer, and hears
/// nothing of one that comes later.
const PATIENCE: Duration = Duration::from_secs(25);

/// What [`AgentService::answer_at_once`] answers.
const AT_ONCE: [&str; 5] = [
    "ping",
    "check_creating",
    "check_running",
    "get_commit_status",
    "shutdown_agent",
];

/// The service behind the manager's RPC.
#[derive(Debug)]
pub struct AgentService {
    node: Arc<Node>,
    started: Instant,
}

impl AgentService {
    /// Answers for one node.
    pub fn new(node: Arc<Node>) -> AgentService {
        AgentService {
            node,
            started: Instant::now(),
        }
    }
}

impl Service for AgentService {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Value, Failure>> {
        if self.answers_at_once(&call.method) {
            return Box::pin(std::future::ready(self.answer_at_once(call)));
        }
        let (node, started) = (self.node.clone(), self.started);
        Box::pin(async move {
            if call.method.starts_with(extension::PREFIX) {
                return extension::answer(&node, started, call).await;
            }
            let (method, args) = call.bind()?;
            tracing::debug!(method = method.name, "rpc");
            let answered = answer(&node, method.name, args).await;
            if let Err(failure) = &answered {
                report(&node, method.name, failure);
            }
            answered
        })
    }

    fn ends_with_its_caller(&self, method: &str) -> bool {
        // The run goes on, and what it says is the next poll's.
        method == "execute"
    }

    fn answers_at_once(&self, method: &str) -> bool {
        AT_ONCE.contains(&method)
    }

    fn answer_at_once(&self, call: Call) -> Result<Value, Failure> {
        let node = &self.node;
        let (method, mut args) = call.bind()?;
        tracing::debug!(method = method.name, "rpc");
        match method.name {
            "ping" => Ok(args.take("msg")),
            "check_creating" => lifecycle::check_creating(node, &args),
            "check_running" => lifecycle::check_running(node, &args),
            "get_commit_status" => images::commit_status(node, &args),
            // The original's does nothing.
            "shutdown_agent" => Ok(Value::Nil),
            other => Err(unknown_method(other)),
        }
    }
}

/// Tells administrators of a failure that is not the caller's: the bus limits how many go out.
fn report(node: &Node, method: &str, failure: &Failure) {
    const CALLERS: [&str; 6] = [
        "KeyError",
        "TypeError",
        "ValueError",
        "NotImplementedError",
        "InvalidResourceArgument",
        "InsufficientResource",
    ];
    if CALLERS.contains(&failure.class.as_str()) {
        return;
    }
    let mut context = serde_json::Map::new();
    context.insert("method".into(), method.into());
    node.events.emit(Event::AgentError {
        message: failure.repr.clone(),
        trace: Some(failure.traceback.clone()).filter(|trace| !trace.is_empty()),
        context,
        severity: Severity::Error,
    });
}

async fn answer(node: &Arc<Node>, method: &str, args: Arguments) -> Result<Value, Failure> {
    match method {
        "gather_hwinfo" => answers::hardware(node),
        "check_and_pull" => images::check_and_pull(node, args),
        "check_pulling" => images::check_pulling(node, args),
        "create_kernels" => lifecycle::create_kernels(node, args).await,
        "destroy_kernel" => lifecycle::destroy_kernel(node, args).await,
        "restart_kernel" => lifecycle::restart_kernel(node, args).await,
        "execute" => run::execute(node, args).await,
        "interrupt_kernel" => run::interrupt(node, &args).await,
        "trigger_batch_execution" => run::trigger_batch(node, args).await,
        "get_completions" => run::completions(node, args).await,
        "start_service" => run::start_service(node, args).await,
        "shutdown_service" => run::shutdown_service(node, args),
        "get_logs" => answers::logs(node, &args).await,
        "upload_file" => files::upload(node, args).await,
        "download_file" => files::download(node, args).await,
        "download_single" => files::download_single(node, args).await,
        "list_files" => files::list(node, args).await,
        "commit" => images::commit(node, args),
        "push_image" => images::push(node, args),
        "purge_images" => images::purge(node, args).await,
        "sync_kernel_registry" => lifecycle::sync_registry(node, args),
        "purge_containers" => lifecycle::purge_containers(node, args),
        "drop_kernel_registry" => lifecycle::drop_registry(node, args),
        "create_local_network" => answers::create_network(node, args).await,
        "destroy_local_network" => answers::destroy_network(node, args).await,
        "assign_port" => answers::assign_port(node).await,
        "release_port" => answers::release_port(node, args).await,
        "scan_gpu_alloc_map" => answers::gpu_allocations(node),
        "update_scaling_group" => answers::update_scaling_group(node, args).await,
        "get_local_config" => answers::local_config(node),
        "ping_kernel" => run::ping_kernel(node, &args).await,
        "reset_agent" => lifecycle::reset(node).await,
        other => Err(unknown_method(other)),
    }
}

fn kernel_id(args: &Arguments, name: &str) -> Result<KernelId, Failure> {
    args.uuid(name).map(|id| KernelId(id.into_bytes()))
}

/// The kernel, or the original's `KeyError(UUID('...'))`.
fn known_kernel(node: &Node, args: &Arguments) -> Result<Arc<Kernel>, Failure> {
    let id = kernel_id(args, "kernel_id")?;
    node.registry.get(id).ok_or_else(|| unknown_kernel(id))
}

fn unknown_kernel(id: KernelId) -> Failure {
    Failure::key_error_uuid(Uuid::from_bytes(id.0))
}

/// The connection to the kernel's runner.
async fn runner_of(kernel: &Kernel) -> Result<RunnerLink, Failure> {
    runner_within(kernel, RUNNER_WAIT).await
}

async fn runner_within(kernel: &Kernel, limit: Duration) -> Result<RunnerLink, Failure> {
    kernel.wait_runner(limit).await.ok_or_else(|| {
        Failure::runtime_error(format!(
            "kernel {} is {}; its runner cannot be reached",
            kernel.id,
            kernel.state().name()
        ))
    })
}

/// Plain data as a reply.
fn reply(data: &impl serde::Serialize) -> Result<Value, Failure> {
    super::to_value(data)
        .map_err(|err| Failure::runtime_error(format!("the answer cannot be encoded: {err}")))
}

/// Any error of ours as a `RuntimeError` with its causes.
fn failed(err: &dyn std::error::Error) -> Failure {
    Failure::runtime_error(crate::causes::chain(err))
}
