//! `bai-agent kernel create`: what the manager would send, with progress while it happens.

use crate::cli::output::say;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::json;
use uuid::Uuid;

use super::records::{EventsReply, ImageReply};
use super::{CALL_DEADLINE, pair};
use crate::cli::connection::{Agent, Way};
use crate::cli::exit::Problem;
use crate::cli::output::{self, Form};
use crate::rpc::{ImageRef, Value};

/// What kind of session the kernel belongs to.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Kind {
    #[default]
    Interactive,
    Batch,
    Inference,
    System,
}

/// Arguments of `kernel create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// A local image (`docker image ls` shows them).
    #[arg(value_name = "IMAGE")]
    image: String,
    /// CPU cores.
    #[arg(long, default_value = "1")]
    cpu: String,
    /// Memory, with an optional unit (512m, 2g).
    #[arg(long, default_value = "512m", value_parser = memory)]
    mem: u64,
    /// Another slot, as cuda.device=1.
    #[arg(long = "slot", value_name = "SLOT=AMOUNT", value_parser = pair)]
    slots: Vec<(String, String)>,
    /// Size of /dev/shm.
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    shm: Option<u64>,
    /// An environment variable of the kernel.
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    environ: Vec<(String, String)>,
    /// A host directory to mount, as HOST:KERNEL or HOST:KERNEL:ro.
    #[arg(short, long = "mount", value_name = "HOST:KERNEL[:ro]", value_parser = mount)]
    mounts: Vec<(String, String, String)>,
    /// A further port of the container to make reachable.
    #[arg(short, long = "port", value_name = "PORT")]
    ports: Vec<u16>,
    /// A script that runs in the kernel before it is ready.
    #[arg(long, value_name = "FILE")]
    bootstrap: Option<PathBuf>,
    /// The kind of session it belongs to.
    #[arg(long, value_enum, default_value_t)]
    kind: Kind,
    /// The kernel's id (a new one by default).
    #[arg(long, value_name = "UUID")]
    id: Option<Uuid>,
    /// The session's id (the kernel's by default).
    #[arg(long, value_name = "UUID")]
    session: Option<Uuid>,
    /// How long the creation may take in all, in seconds.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// No progress on standard error.
    #[arg(short, long)]
    quiet: bool,
}

fn memory(text: &str) -> Result<u64, String> {
    text.parse::<config::ByteSize>()
        .map(|size| size.0)
        .map_err(|error| error.to_string())
}

fn mount(text: &str) -> Result<(String, String, String), String> {
    let mut parts = text.split(':');
    let (Some(host), Some(kernel), mode, None) = (
        parts.next(),
        parts.next(),
        parts.next().unwrap_or("rw"),
        parts.next(),
    ) else {
        return Err("expected HOST:KERNEL or HOST:KERNEL:ro".to_owned());
    };
    if !host.starts_with('/') || !kernel.starts_with('/') {
        return Err("both paths must be absolute".to_owned());
    }
    if !matches!(mode, "ro" | "rw") {
        return Err(format!("{mode} is no mode of a mount; ro and rw are"));
    }
    Ok((host.to_owned(), kernel.to_owned(), mode.to_owned()))
}

fn text(text: impl Into<String>) -> Value {
    Value::Str(text.into())
}

fn map(entries: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    Value::Map(
        entries
            .into_iter()
            .map(|(name, value)| (text(name), value))
            .collect(),
    )
}

fn optional(value: Option<Value>) -> Value {
    value.unwrap_or(Value::Nil)
}

/// The arguments of `create_kernels` for one kernel.
fn request(
    args: &CreateArgs,
    image: &ImageReply,
    kernel: Uuid,
    session: Uuid,
    bootstrap: Option<String>,
) -> Vec<Value> {
    let slots = [
        ("cpu".to_owned(), args.cpu.clone()),
        ("mem".to_owned(), args.mem.to_string()),
    ];
    let slots = slots
        .into_iter()
        .chain(args.slots.clone())
        .map(|(name, amount)| (text(name), text(amount)))
        .collect();
    let labels = image
        .labels
        .iter()
        .map(|(name, value)| (text(name), text(value.as_str().unwrap_or_default())))
        .collect();
    let environ = [
        ("BACKENDAI_SESSION_ID", session.to_string()),
        ("BACKENDAI_KERNEL_ID", kernel.to_string()),
        ("BACKENDAI_KERNEL_IMAGE", image.canonical.clone()),
        ("BACKENDAI_CLUSTER_SIZE", "1".to_owned()),
        ("BACKENDAI_CLUSTER_REPLICAS", "main:1".to_owned()),
        ("BACKENDAI_CLUSTER_HOSTS", "main1".to_owned()),
        ("BACKENDAI_CLUSTER_HOST", "main1".to_owned()),
        ("BACKENDAI_CLUSTER_ROLE", "main".to_owned()),
        ("BACKENDAI_CLUSTER_IDX", "1".to_owned()),
        ("BACKENDAI_CLUSTER_LOCAL_RANK", "0".to_owned()),
    ];
    let environ = environ
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .chain(args.environ.clone());
    let environ = environ
        .map(|(name, value)| (text(name), text(value)))
        .collect();
    let mounts = args.mounts.iter().map(|(host, inside, mode)| {
        map([
            ("name", text(inside.rsplit('/').next().unwrap_or_default())),
            (
                "vfid",
                text(format!("user:{}/{}", Uuid::nil(), Uuid::new_v4().simple())),
            ),
            ("vfsubpath", text(".")),
            ("host_path", text(host)),
            ("kernel_path", text(inside)),
            ("mount_perm", text(mode)),
            ("usage_mode", text("general")),
        ])
    });
    let kind = match args.kind {
        Kind::Interactive => "interactive",
        Kind::Batch => "batch",
        Kind::Inference => "inference",
        Kind::System => "system",
    };
    let shmem = args.shm.map(|size| (text("shmem"), text(size.to_string())));
    let config = map([
        (
            "image",
            map([
                ("canonical", text(&image.canonical)),
                ("project", Value::Nil),
                ("architecture", text(&image.architecture)),
                ("digest", text(&image.digest)),
                ("repo_digest", Value::Nil),
                (
                    "registry",
                    map([
                        ("name", text("")),
                        ("url", text("")),
                        ("username", Value::Nil),
                        ("password", Value::Nil),
                    ]),
                ),
                ("labels", Value::Map(labels)),
                ("is_local", Value::Bool(true)),
                ("auto_pull", text("none")),
            ]),
        ),
        ("auto_pull", text("none")),
        ("kernel_id", text(kernel.to_string())),
        ("session_id", text(session.to_string())),
        ("owner_user_id", text(Uuid::nil().to_string())),
        ("owner_project_id", Value::Nil),
        ("network_id", text(session.to_string())),
        ("session_type", text(kind)),
        ("cluster_mode", text("single-node")),
        ("cluster_role", text("main")),
        ("cluster_idx", Value::Int(1)),
        ("local_rank", Value::Int(0)),
        ("cluster_hostname", text("main1")),
        ("uid", Value::Nil),
        ("main_gid", Value::Nil),
        ("supplementary_gids", Value::Array(Vec::new())),
        ("resource_slots", Value::Map(slots)),
        ("resource_opts", Value::Map(shmem.into_iter().collect())),
        ("environ", Value::Map(environ)),
        ("mounts", Value::Array(mounts.collect())),
        ("package_directory", Value::Array(Vec::new())),
        ("idle_timeout", Value::Int(0)),
        ("bootstrap_script", optional(bootstrap.map(text))),
        ("startup_command", Value::Nil),
        ("internal_data", Value::Nil),
        (
            "preopen_ports",
            Value::Array(
                args.ports
                    .iter()
                    .map(|port| Value::Int(i64::from(*port)))
                    .collect(),
            ),
        ),
        ("allocated_host_ports", Value::Array(Vec::new())),
        ("agent_addr", text("")),
        ("scaling_group", text("default")),
        ("endpoint_id", Value::Nil),
    ]);
    let cluster = map([
        ("mode", text("single-node")),
        ("size", Value::Int(1)),
        ("replicas", map([("main", Value::Int(1))])),
        ("network_config", Value::Map(Vec::new())),
        ("ssh_keypair", Value::Nil),
        ("cluster_ssh_port_mapping", Value::Nil),
    ]);
    let (name, tag) = image
        .canonical
        .rsplit_once(':')
        .filter(|(_, tag)| !tag.contains('/'))
        .unwrap_or((&image.canonical, "latest"));
    let reference = ImageRef {
        name: name.to_owned(),
        project: None,
        tag: tag.to_owned(),
        registry: String::new(),
        architecture: image.architecture.clone(),
        is_local: true,
    };
    vec![
        text(session.to_string()),
        Value::Array(vec![text(kernel.to_string())]),
        Value::Array(vec![config]),
        cluster,
        Value::Map(vec![(
            Value::Uuid(kernel),
            Value::ImageRef(Box::new(reference)),
        )]),
    ]
}

/// Creates the kernel; prints its id (text) or the agent's whole result (JSON).
pub(super) async fn run(
    args: CreateArgs,
    agent: &Agent,
    way: &Way,
    form: Form,
) -> Result<(), Problem> {
    let bootstrap = match &args.bootstrap {
        None => None,
        Some(path) => Some(tokio::fs::read_to_string(path).await.map_err(|error| {
            Problem::Usage(anyhow::Error::new(error).context(format!(
                "cannot read the bootstrap script {}",
                path.display()
            )))
        })?),
    };
    let image: ImageReply = agent
        .call("bai.image", vec![text(&args.image)], CALL_DEADLINE)
        .await?;
    let kernel = args.id.unwrap_or_else(Uuid::new_v4);
    let session = args.session.unwrap_or(kernel);

    // Progress comes on a connection of its own: it must never hold up the creation.
    let progress = match (args.quiet, form) {
        (false, Form::Text) => {
            let watcher = way.open().await?;
            // Where the stream stands before anything is asked for, so that its first event is seen too.
            let head = events(&watcher, -1, 0.0).await?.next;
            Some(tokio::spawn(follow(watcher, head, kernel)))
        }
        _ => None,
    };
    let created = agent
        .call::<serde_json::Value>(
            "create_kernels",
            request(&args, &image, kernel, session, bootstrap),
            Duration::from_secs(args.timeout),
        )
        .await;
    if let Some(progress) = progress {
        progress.abort();
        let _ = progress.await;
    }
    let result = created?;
    match form {
        Form::Json => output::json(
            &json!({ "kernel_id": kernel.to_string(), "session_id": session.to_string(), "result": result }),
        )?,
        Form::Text => say!("{kernel}"),
    }
    Ok(())
}

async fn events(agent: &Agent, after: i64, wait: f64) -> Result<EventsReply, Problem> {
    agent
        .call(
            "bai.events",
            vec![Value::Int(after), Value::Float(wait), Value::Int(100)],
            CALL_DEADLINE,
        )
        .await
}

/// Prints the kernel's lifecycle events to standard error until it is aborted.
async fn follow(agent: Agent, mut after: u64, kernel: Uuid) -> Result<(), Problem> {
    let id = kernel.to_string();
    loop {
        let reply = events(&agent, i64::try_from(after).unwrap_or(i64::MAX), 5.0).await?;
        after = reply.next;
        for event in reply
            .events
            .iter()
            .filter(|event| event.args.first().and_then(serde_json::Value::as_str) == Some(&id))
        {
            match event.args.get(1).and_then(serde_json::Value::as_str) {
                Some(step) if event.name == "kernel_progress" => eprintln!("  {step}"),
                _ => eprintln!("{}", event.name.replace('_', " ")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_checked_before_anything_is_sent() {
        assert_eq!(
            mount("/a:/b"),
            Ok(("/a".to_owned(), "/b".to_owned(), "rw".to_owned()))
        );
        assert_eq!(
            mount("/a:/b:ro"),
            Ok(("/a".to_owned(), "/b".to_owned(), "ro".to_owned()))
        );
        for bad in ["", "/a", "a:/b", "/a:b", "/a:/b:rx", "/a:/b:ro:x"] {
            assert!(mount(bad).is_err(), "{bad}");
        }
    }
}
