//! The lifecycle in its variants: other scratches, limits, networks and publishers, folders and
//! users, and the ways a container ends by itself.

mod endings;
mod folders;
mod limits;
mod networks;
mod sessions;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use control::rpc::{self, Value};
use harness::fault_docker::{Fault, FaultDocker};
use harness::images::{self, FileContent, Image};
use harness::kernels::{self, Order, inspect, restart, text};
use harness::node::{Node, NodeOptions};
use harness::wait;
use serde_json::{Value as Json, json};

/// How long a thing that follows by itself may take.
const SOON: Duration = Duration::from_secs(30);

fn container_of(result: &Json) -> &str {
    result["container_id"].as_str().expect("a container id")
}

/// Everything mounted at or below a directory of the host.
fn mounts_below(directory: &Path) -> Vec<String> {
    std::fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .filter(|line| {
            line.split(' ')
                .nth(1)
                .is_some_and(|at| Path::new(at).starts_with(directory))
        })
        .map(str::to_owned)
        .collect()
}

/// Loop devices whose file is below a directory, whether it still exists or not.
fn loops_below(directory: &Path) -> Vec<String> {
    std::fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("loop/backing_file")).ok())
        .filter(|file| Path::new(file).starts_with(directory))
        .collect()
}

/// A command's output; it has to succeed.
async fn output_of(node: &Node, order: &Order, command: &str) -> Result<String> {
    let ran = kernels::run(node, order, command).await?;
    ensure!(ran.exit_code == Some(0), "{command}: {ran:?}");
    Ok(ran.output)
}

/// A session that serves the model whose definition, a file of this name, is put into `folder`.
fn model_order(folder: &Path, name: &str, definition: &str) -> Result<Order> {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    std::fs::write(folder.join(name), definition)?;
    let mut order = Order::of(Image::Runner)?;
    order.config["session_type"] = json!("inference");
    order.config["mounts"] = json!([{
        "name": "model", "vfid": null, "vfsubpath": ".", "host_path": folder.display().to_string(),
        "kernel_path": "/models", "mount_perm": "ro", "usage_mode": "model",
    }]);
    order.config["internal_data"] =
        json!({"runtime_variant": "custom", "model_definition_path": null});
    Ok(order)
}

async fn start_service(node: &Node, order: &Order, name: &str) -> Result<()> {
    let args = vec![
        text(order.kernel),
        Value::from(name),
        Value::Map(Vec::new()),
    ];
    let reply = kernels::ask(node, "start_service", args).await?;
    ensure!(reply["status"] == "started", "{name}: {reply}");
    Ok(())
}

/// Takes a port as soon as its holder lets go of it.
struct Thief {
    thread: Option<std::thread::JoinHandle<Option<std::net::TcpListener>>>,
}

impl Thief {
    fn waiting_for(port: u16) -> Thief {
        let deadline = Instant::now() + SOON;
        let thread = std::thread::spawn(move || {
            while Instant::now() < deadline {
                if let Ok(taken) = std::net::TcpListener::bind(("127.0.0.1", port)) {
                    return Some(taken);
                }
                std::thread::yield_now();
            }
            None
        });
        Thief {
            thread: Some(thread),
        }
    }

    /// What was taken.
    fn loot(mut self) -> Result<std::net::TcpListener> {
        let thread = self.thread.take().expect("joined once");
        let loot = thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thief panicked"))?;
        loot.context("the port never became free")
    }
}

/// The first bytes a server says, or what it answers to a request.
fn greeting(port: u16, request: &str) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(request.as_bytes())?;
    let mut buffer = [0; 256];
    let length = stream.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}
