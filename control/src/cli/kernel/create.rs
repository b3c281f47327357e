//! `bai-agent kernel create`: what the manager would send, with progress while it happens.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value as Json, json};
use uuid::Uuid;

use super::records::{EventsReply, ImageReply};
use super::{CALL_DEADLINE, pair};
use crate::cli::connection::{Agent, Way};
use crate::cli::exit::Problem;
use crate::cli::output::{self, Form, aside, say};
use crate::rpc::{ConversionError, ImageRef, Value, to_value};

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

/// Variables as a manager sets them for a session of one kernel, then the caller's own.
fn environ(args: &CreateArgs, image: &ImageReply, kernel: Uuid, session: Uuid) -> Json {
    let mut environ = json!({
        "BACKENDAI_SESSION_ID": session,
        "BACKENDAI_KERNEL_ID": kernel,
        "BACKENDAI_KERNEL_IMAGE": image.canonical,
        "BACKENDAI_CLUSTER_SIZE": "1",
        "BACKENDAI_CLUSTER_REPLICAS": "main:1",
        "BACKENDAI_CLUSTER_HOSTS": "main1",
        "BACKENDAI_CLUSTER_HOST": "main1",
        "BACKENDAI_CLUSTER_ROLE": "main",
        "BACKENDAI_CLUSTER_IDX": "1",
        "BACKENDAI_CLUSTER_LOCAL_RANK": "0",
    });
    for (name, value) in &args.environ {
        environ[name] = json!(value);
    }
    environ
}

/// `KernelCreationConfig`.
fn creation_config(
    args: &CreateArgs,
    image: &ImageReply,
    kernel: Uuid,
    session: Uuid,
    bootstrap: Option<String>,
) -> Json {
    let mut slots = json!({"cpu": args.cpu, "mem": args.mem.to_string()});
    for (name, amount) in &args.slots {
        slots[name] = json!(amount);
    }
    let labels: Map<String, Json> = image
        .labels
        .iter()
        .map(|(name, value)| (name.clone(), json!(value.as_str().unwrap_or_default())))
        .collect();
    let mounts = args.mounts.iter().map(|(host, inside, mode)| {
        json!({
            "name": inside.rsplit('/').next().unwrap_or_default(),
            "vfid": format!("user:{}/{}", Uuid::nil(), Uuid::new_v4().simple()),
            "vfsubpath": ".",
            "host_path": host,
            "kernel_path": inside,
            "mount_perm": mode,
            "usage_mode": "general",
        })
    });
    let mounts: Vec<Json> = mounts.collect();
    let kind = match args.kind {
        Kind::Interactive => "interactive",
        Kind::Batch => "batch",
        Kind::Inference => "inference",
        Kind::System => "system",
    };
    let options = match args.shm {
        Some(size) => json!({"shmem": size.to_string()}),
        None => json!({}),
    };
    json!({
        "image": {
            "canonical": image.canonical,
            "project": null,
            "architecture": image.architecture,
            "digest": image.digest,
            "repo_digest": null,
            "registry": {"name": "", "url": "", "username": null, "password": null},
            "labels": labels,
            "is_local": true,
            "auto_pull": "none",
        },
        "auto_pull": "none",
        "kernel_id": kernel,
        "session_id": session,
        "owner_user_id": Uuid::nil(),
        "owner_project_id": null,
        "network_id": session,
        "session_type": kind,
        "cluster_mode": "single-node",
        "cluster_role": "main",
        "cluster_idx": 1,
        "local_rank": 0,
        "cluster_hostname": "main1",
        "uid": null,
        "main_gid": null,
        "supplementary_gids": [],
        "resource_slots": slots,
        "resource_opts": options,
        "environ": environ(args, image, kernel, session),
        "mounts": mounts,
        "package_directory": [],
        "idle_timeout": 0,
        "bootstrap_script": bootstrap,
        "startup_command": null,
        "internal_data": null,
        "preopen_ports": args.ports,
        "allocated_host_ports": [],
        "agent_addr": "",
        "scaling_group": "default",
        "endpoint_id": null,
    })
}

/// The arguments of `create_kernels` for one kernel.
fn request(
    config: &Json,
    image: &ImageReply,
    kernel: Uuid,
    session: Uuid,
) -> Result<Vec<Value>, ConversionError> {
    let cluster = json!({
        "mode": "single-node",
        "size": 1,
        "replicas": {"main": 1},
        "network_config": {},
        "ssh_keypair": null,
        "cluster_ssh_port_mapping": null,
    });
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
    Ok(vec![
        Value::Str(session.to_string()),
        Value::Array(vec![Value::Str(kernel.to_string())]),
        Value::Array(vec![to_value(config)?]),
        to_value(&cluster)?,
        Value::Map(vec![(
            Value::Uuid(kernel),
            Value::ImageRef(Box::new(reference)),
        )]),
    ])
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
        .call(
            "bai.image",
            vec![Value::Str(args.image.clone())],
            CALL_DEADLINE,
        )
        .await?;
    let kernel = args.id.unwrap_or_else(Uuid::new_v4);
    let session = args.session.unwrap_or(kernel);
    let config = creation_config(&args, &image, kernel, session, bootstrap);
    let request = request(&config, &image, kernel, session)
        .map_err(|error| Problem::Other(anyhow::Error::new(error)))?;

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
        .call::<Json>("create_kernels", request, Duration::from_secs(args.timeout))
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
            .filter(|event| event.args.first().and_then(Json::as_str) == Some(&id))
        {
            match event.args.get(1).and_then(Json::as_str) {
                Some(step) if event.name == "kernel_progress" => aside!("  {step}"),
                _ => aside!("{}", event.name.replace('_', " ")),
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
