//! Kernels as a manager asks for them: requests in, plain JSON out.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use control::kernel::execution::{BatchSteps, ExecuteRequest, Mode};
use control::rpc::{self, ClientError, Failure, Value};
use serde_json::{Value as Json, json};
use uuid::Uuid;

use crate::images::{self, Image};
use crate::node::Node;
use crate::wait;

/// How long one call may take.
const CALL: Duration = Duration::from_secs(150);
/// How long a command may take; none here sleeps longer.
const RUN_LIMIT: Duration = Duration::from_secs(120);

/// A request for one kernel; change `config` and `cluster` before it is sent.
#[derive(Clone, Debug)]
pub struct Order {
    /// The kernel.
    pub kernel: Uuid,
    /// Its session.
    pub session: Uuid,
    /// `KernelCreationConfig`.
    pub config: Json,
    /// `ClusterInfo`.
    pub cluster: Json,
}

impl Order {
    /// A small kernel of one of the test images.
    pub fn of(image: Image) -> Result<Order> {
        Order::named(&images::image(image)?)
    }

    /// The same in the engine with this address.
    pub fn of_engine(image: Image, host: &str) -> Result<Order> {
        Self::local(&images::image_in(image, Some(host))?, Some(host))
    }

    /// A small kernel of a local image.
    pub fn named(image: &str) -> Result<Order> {
        Self::local(image, None)
    }

    fn local(image: &str, host: Option<&str>) -> Result<Order> {
        let found = images::inspect(image, host)?;
        let (kernel, session) = (Uuid::new_v4(), Uuid::new_v4());
        Ok(Order {
            kernel,
            session,
            config: json!({
                "image": {
                    "canonical": image,
                    "architecture": std::env::consts::ARCH,
                    "digest": found["Id"],
                    "registry": {"name": "", "url": ""},
                    "labels": found["Config"]["Labels"],
                    "is_local": true,
                    "auto_pull": "none",
                },
                "auto_pull": "none",
                "kernel_id": kernel.to_string(),
                "session_id": session.to_string(),
                "owner_user_id": Uuid::nil().to_string(),
                "network_id": session.to_string(),
                "session_type": "interactive",
                "cluster_mode": "single-node",
                "cluster_role": "main",
                "cluster_idx": 1,
                "local_rank": 0,
                "cluster_hostname": "main1",
                "resource_slots": {"cpu": "1", "mem": "268435456"},
                "resource_opts": {},
                "environ": {"BACKENDAI_KERNEL_ID": kernel.to_string()},
                "mounts": [],
                "idle_timeout": 600,
                "internal_data": {},
                "preopen_ports": [],
                "allocated_host_ports": [],
                "agent_addr": "tcp://127.0.0.1:6001",
                "scaling_group": "default",
            }),
            cluster: json!({
                "mode": "single-node",
                "size": 1,
                "replicas": {"main": 1},
                "network_config": {},
                "ssh_keypair": null,
                "cluster_ssh_port_mapping": null,
            }),
        })
    }

    /// Arguments of `create_kernels` for this one kernel.
    pub fn arguments(&self) -> Vec<Value> {
        let plain = |json: &Json| rpc::to_value(json).expect("JSON is a value");
        vec![
            Value::Str(self.session.to_string()),
            Value::Array(vec![Value::Str(self.kernel.to_string())]),
            Value::Array(vec![plain(&self.config)]),
            plain(&self.cluster),
            Value::Map(Vec::new()),
        ]
    }
}

/// A call's outcome: the plain value, or the failure the manager would see.
pub async fn call(node: &Node, method: &str, args: Vec<Value>) -> Result<Result<Json, Failure>> {
    let client = node.client().await?;
    match client.call(method, args, Vec::new(), CALL).await {
        Ok(value) => Ok(Ok(serde_json::to_value(value)?)),
        Err(ClientError::Failure(failure)) => Ok(Err(failure)),
        Err(err) => Err(anyhow::Error::new(err).context(format!("{method} was not answered"))),
    }
}

/// Restarts a kernel; what the manager is answered.
pub async fn restart(node: &Node, order: &Order) -> Result<Json> {
    let args = vec![
        text(order.session),
        text(order.kernel),
        Value::Nil,
        Value::Map(Vec::new()),
    ];
    ask(node, "restart_kernel", args).await
}

/// Starts the job of a batch session; `limit` is its longest time in seconds, or nothing.
pub async fn start_batch(node: &Node, order: &Order, command: &str, limit: Value) -> Result<Json> {
    let args = vec![
        text(order.session),
        text(order.kernel),
        Value::from(command),
        limit,
    ];
    ask(node, "trigger_batch_execution", args).await
}

/// As [`call`], for calls that have to succeed.
pub async fn ask(node: &Node, method: &str, args: Vec<Value>) -> Result<Json> {
    match call(node, method, args).await? {
        Ok(value) => Ok(value),
        Err(failure) => bail!("{method}: {}", failure.repr),
    }
}

/// Amount per accelerator that kernels hold, by the device's own id.
pub async fn devices_held(node: &Node) -> Result<Json> {
    let mut status = ask(node, "bai.status", Vec::new()).await?;
    Ok(status["devices_held"].take())
}

/// Creates a kernel; its part of the answer.
pub async fn create(node: &Node, order: &Order) -> Result<Json> {
    let results = ask(node, "create_kernels", order.arguments()).await?;
    ensure!(
        results.as_array().is_some_and(|list| list.len() == 1),
        "one result: {results}"
    );
    Ok(results[0].clone())
}

/// Creates a kernel that has to fail.
pub async fn fail_to_create(node: &Node, order: &Order) -> Result<Failure> {
    match call(node, "create_kernels", order.arguments()).await? {
        Ok(value) => bail!("the creation succeeded: {value}"),
        Err(failure) => Ok(failure),
    }
}

/// Has a kernel committed to a file, as the manager asks for it. The answer comes before that is done.
pub async fn commit(node: &Node, order: &Order, file: &str) -> Result<()> {
    let args = vec![
        text(order.kernel),
        Value::from("user_example.com"),
        Value::from("a/b:c"),
        Value::Map(vec![]),
        Value::from(file),
    ];
    ask(node, "commit", args).await.map(drop)
}

/// Destroys a kernel.
pub async fn destroy(node: &Node, order: &Order) -> Result<()> {
    let args = vec![
        text(order.kernel),
        text(order.session),
        Value::from("user-requested"),
    ];
    ask(node, "destroy_kernel", args).await.map(drop)
}

/// An id as the manager sends it.
pub fn text(id: Uuid) -> Value {
    Value::Str(id.to_string())
}

/// A request to run code, as the execution module takes it.
pub fn request(run_id: &str, mode: Mode, code: &str) -> ExecuteRequest {
    ExecuteRequest {
        run_id: Some(run_id.to_owned()),
        mode,
        code: code.to_owned(),
        opts: BatchSteps::default(),
        api_version: 3,
        flush_timeout: Some(2.0),
    }
}

/// Output and exit code of a batch command.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Everything printed.
    pub output: String,
    /// As the runner said it.
    pub exit_code: Option<i64>,
}

/// Runs a shell command in a kernel to its end.
pub async fn run(node: &Node, order: &Order, command: &str) -> Result<Ran> {
    let run_id = Uuid::new_v4().simple().to_string();
    let mut mode = "batch";
    let mut output = String::new();
    let mut opts = rpc::to_value(&json!({ "exec": command }))?;
    let begun = Instant::now();
    loop {
        ensure!(
            begun.elapsed() < RUN_LIMIT,
            "{command}: no end after {RUN_LIMIT:?}, only {output:?}"
        );
        let args = vec![
            text(order.session),
            text(order.kernel),
            Value::Int(3),
            Value::Str(run_id.clone()),
            Value::from(mode),
            Value::from(""),
            opts,
            Value::Float(2.0),
        ];
        let reply = ask(node, "execute", args).await?;
        for item in reply["console"].as_array().into_iter().flatten() {
            output.push_str(item[1].as_str().unwrap_or_default());
        }
        if reply["status"] == "finished" {
            return Ok(Ran {
                output,
                exit_code: reply["exitCode"].as_i64(),
            });
        }
        mode = "continue";
        opts = Value::Map(Vec::new());
    }
}

/// The lifecycle events of a node since its start that speak of a kernel, in order: name and
/// arguments.
pub async fn events(node: &Node, kernel: Uuid) -> Result<Vec<(String, Json)>> {
    let args = vec![Value::Int(0), Value::Float(0.0), Value::Int(1000)];
    let reply = ask(node, "bai.events", args).await?;
    let id = kernel.to_string();
    Ok(reply["events"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|event| event["args"].to_string().contains(&id))
        .map(|event| {
            (
                event["name"].as_str().unwrap_or_default().to_owned(),
                event["args"].clone(),
            )
        })
        .collect())
}

/// The ends announced of a kernel: reason and exit code.
pub async fn ends(node: &Node, kernel: Uuid) -> Result<Vec<(String, i64)>> {
    Ok(events(node, kernel)
        .await?
        .into_iter()
        .filter(|(name, _)| name == "kernel_terminated")
        .map(|(_, args)| {
            let reason = args[2].as_str().unwrap_or_default().to_owned();
            (reason, args[3].as_i64().unwrap_or(i64::MIN))
        })
        .collect())
}

/// Waits for the end of a kernel; its reason and exit code.
pub async fn wait_end(node: &Node, kernel: Uuid) -> Result<(String, i64)> {
    wait::until(
        "the kernel's end is announced",
        Duration::from_secs(60),
        || async { ends(node, kernel).await.ok()?.pop() },
    )
    .await
}

/// The state word of a kernel, if the node knows it.
pub async fn state(node: &Node, kernel: Uuid) -> Result<Option<String>> {
    let reply = ask(node, "bai.kernels", vec![Value::Bool(false)]).await?;
    let id = kernel.to_string();
    Ok(reply["kernels"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|shown| shown["kernel_id"] == id.as_str())
        .and_then(|shown| shown["state"].as_str().map(str::to_owned)))
}

/// The host ports of a service in a creation's result.
pub fn host_ports(result: &Json, service: &str) -> Vec<u16> {
    result["service_ports"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|shown| shown["name"] == service)
        .and_then(|shown| shown["host_ports"].as_array().cloned())
        .unwrap_or_default()
        .iter()
        .filter_map(|port| u16::try_from(port.as_u64()?).ok())
        .collect()
}

/// What a node still holds, in words; empty when nothing is left.
pub async fn remains(node: &Node) -> Result<Vec<String>> {
    let mut found: Vec<String> = node
        .containers()?
        .into_iter()
        .map(|id| format!("container {id}"))
        .collect();
    for (what, directory) in [
        ("scratch", node.scratch_root()),
        (
            "journal",
            node.state().join("kernels").join(node.agent_id()),
        ),
    ] {
        let entries = std::fs::read_dir(&directory)
            .into_iter()
            .flatten()
            .flatten();
        found.extend(
            entries
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .filter(|name| !name.starts_with('.') && name != "assigned-ports")
                .map(|name| format!("{what} {name}")),
        );
    }
    let status = ask(node, "bai.status", Vec::new()).await?;
    if status["kernels"] != 0 {
        found.push(format!("{} registered kernels", status["kernels"]));
    }
    let ports = &status["ports"];
    if ports["free"]
        .as_u64()
        .zip(ports["cooling"].as_u64())
        .map(|(free, rest)| free + rest)
        != ports["total"].as_u64()
    {
        found.push(format!("host ports: {ports}"));
    }
    for (slot, amounts) in status["slots"].as_object().into_iter().flatten() {
        if amounts["used"]
            .as_str()
            .is_none_or(|used| used.parse() != Ok(0.0))
        {
            found.push(format!("slot {slot}: {amounts}"));
        }
    }
    let desired = shared::desired::DesiredReader::open(node.regions().join("control"))
        .and_then(|mut reader| reader.snapshot())
        .context("the desired region can't be read")?;
    found.extend(
        desired
            .ports
            .iter()
            .map(|row| format!("port row {}", row.key())),
    );
    found.extend(
        desired
            .containers
            .iter()
            .map(|row| format!("container row {}", row.container_id)),
    );
    Ok(found)
}

/// Fails with a list of everything that is left.
pub async fn assert_clean(node: &Node) -> Result<()> {
    let found = remains(node).await?;
    ensure!(found.is_empty(), "left behind: {found:#?}");
    Ok(())
}

/// Runs the docker client; its output.
pub fn docker(args: &[&str]) -> Result<String> {
    let output = Command::new("docker")
        .args(args)
        .output()
        .context("docker can't be started")?;
    ensure!(
        output.status.success(),
        "docker {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A container, as `docker inspect` tells it.
pub fn inspect(container: &str) -> Result<Json> {
    let mut list: Json = serde_json::from_str(&docker(&["inspect", container])?)?;
    Ok(list[0].take())
}

/// One page from a local port.
pub fn fetch(port: u16, path: &str) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    // In one piece: a server may answer the first and reset what it has not read.
    let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
