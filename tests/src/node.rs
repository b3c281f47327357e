//! A whole worker node for a test: both programs, their own directories, their own port range.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use control::rpc::{Client, ClientCurve, KeyPair, PublicKey, Value};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::place::HeldDirectory;
use crate::{host_ports, images, wait};

/// How many host ports a test node has, unless it asks for another number.
const PORTS: u16 = 40;

/// A command that was begun. It is killed with this handle.
#[derive(Debug)]
pub struct Begun(pub Child);

impl Begun {
    /// Begins it.
    pub fn spawn(command: &mut Command) -> Result<Begun> {
        let child = command.spawn();
        Ok(Begun(child.context("the command can't be started")?))
    }

    /// Sends it what Ctrl-C at a terminal does.
    pub fn interrupt(&self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.0.id())?);
        Ok(kill(pid, Signal::SIGINT)?)
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a test wants of its node.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Lines added to `[agent]`, `[container]`, `[resource]`, `[node]` and whole sections at the end.
    pub agent: String,
    pub container: String,
    pub resource: String,
    pub node: String,
    pub sections: String,
    /// `container.scratch-type`.
    pub scratch_type: String,
    /// `container.bind-host`.
    pub bind_host: String,
    /// How many host ports the pool has.
    pub ports: u16,
    /// Whether the dataplane is started too.
    pub dataplane: bool,
    /// Environment of both programs.
    pub environment: Vec<(String, String)>,
    /// Address of the engine, when it is not the machine's own.
    pub engine: Option<String>,
    /// Our pair and the agent's public key, when `agent` switches authentication on.
    pub curve: Option<(KeyPair, PublicKey)>,
    /// Whether the node joins the cluster of the `[etcd]` among `sections`; standalone otherwise.
    pub cluster: bool,
}

impl Default for NodeOptions {
    fn default() -> Self {
        NodeOptions {
            agent: String::new(),
            container: String::new(),
            resource: String::new(),
            node: String::new(),
            sections: String::new(),
            scratch_type: "hostdir".to_owned(),
            bind_host: "127.0.0.1".to_owned(),
            ports: PORTS,
            dataplane: true,
            environment: Vec::new(),
            engine: None,
            curve: None,
            cluster: false,
        }
    }
}

/// A running node. Dropping it stops both programs and removes the containers it owns.
#[derive(Debug)]
pub struct Node {
    directory: TempDir,
    run_directory: HeldDirectory,
    agent_id: String,
    address: String,
    http_address: String,
    metadata_port: u16,
    ports: (u16, u16),
    environment: Vec<(String, String)>,
    engine: Option<String>,
    curve: Option<ClientCurve>,
    standalone: bool,
    control: Option<Child>,
    dataplane: Option<Child>,
}

/// The directory of the built programs: two above the test's own file.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("the test's own path is unknown")?;
    let path = own
        .parent()
        .and_then(Path::parent)
        .context("the test runs outside a target directory")?
        .join(name);
    ensure!(
        path.exists(),
        "{} is not built; run `make build` first",
        path.display()
    );
    Ok(path)
}

/// The installed runner packages, shared by all tests of a machine.
pub fn runner_directory() -> PathBuf {
    let named = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let caches = || named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache")));
    let own = || named("BAI_AGENT_CACHE").or_else(|| Some(caches()?.join("bai-agent")));
    named("BAI_RUNNER_DIR")
        .unwrap_or_else(|| own().unwrap_or_else(std::env::temp_dir).join("runner"))
}

/// A range of host ports that no other test process has.
fn port_range(count: u16) -> Result<(u16, u16)> {
    let first = host_ports::adjacent(count)?;
    Ok((first, first + count - 1))
}

/// A port that no other test process has.
pub fn free_port() -> Result<u16> {
    host_ports::one()
}

impl Node {
    /// Starts a node and waits until it answers.
    pub async fn start(options: NodeOptions) -> Result<Node> {
        let directory = tempfile::Builder::new()
            .prefix("bai-node-")
            .tempdir()
            .context("no temporary directory")?;
        let run_directory = HeldDirectory::new()?;
        let agent_id = format!(
            "i-test-{}",
            &uuid::Uuid::new_v4().simple().to_string()[..12]
        );
        let port = free_port()?;
        let (http, metadata) = (free_port()?, free_port()?);
        let ports = port_range(options.ports)?;
        let place = directory.path().display();
        let text = format!(
            r#"[agent]
mode = "docker"
id = "{agent_id}"
rpc-listen-addr = {{ host = "127.0.0.1", port = {port} }}
service-addr = {{ host = "127.0.0.1", port = {http} }}
metadata-server-port = {metadata}
var-base-path = "{place}/state"
ipc-base-path = "{place}/ipc"
{agent}
[container]
bind-host = "{bind_host}"
kernel-uid = 1000
kernel-gid = 1000
scratch-type = "{scratch_type}"
scratch-root = "{place}/scratches"
port-range = [{first}, {last}]
{container}
[resource]
reserved-cpu = 0
{resource}
[node]
run-dir = "{run}"
runner-dir = "{runner}"
{node}
{sections}
"#,
            metadata = metadata,
            agent = options.agent,
            container = options.container,
            resource = options.resource,
            node = options.node,
            sections = options.sections,
            scratch_type = options.scratch_type,
            bind_host = options.bind_host,
            first = ports.0,
            last = ports.1,
            run = run_directory.path().display(),
            runner = runner_directory().display(),
        );
        std::fs::write(directory.path().join("agent.toml"), text)
            .context("the configuration can't be written")?;
        let mut node = Node {
            directory,
            run_directory,
            agent_id,
            address: format!("127.0.0.1:{port}"),
            http_address: format!("127.0.0.1:{http}"),
            metadata_port: metadata,
            ports,
            environment: options.environment,
            engine: options.engine,
            curve: options.curve.map(|(pair, node)| ClientCurve { pair, node }),
            standalone: !options.cluster,
            control: None,
            dataplane: None,
        };
        if options.dataplane {
            node.start_dataplane()?;
        }
        node.start_control().await?;
        Ok(node)
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where `/metrics` and `/health` are.
    pub fn http_address(&self) -> &str {
        &self.http_address
    }

    /// Where kernels ask for metadata, at any address of this host.
    pub fn metadata_port(&self) -> u16 {
        self.metadata_port
    }

    pub fn agent_id(&self) -> &str {
        &self.agent_id
    }

    /// The first and the last host port of the pool.
    pub fn ports(&self) -> (u16, u16) {
        self.ports
    }

    pub fn config_file(&self) -> PathBuf {
        self.directory.path().join("agent.toml")
    }

    pub fn scratch(&self, kernel_id: &str) -> PathBuf {
        self.directory.path().join("scratches").join(kernel_id)
    }

    pub fn scratch_root(&self) -> PathBuf {
        self.directory.path().join("scratches")
    }

    pub fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// The directory of this node's two regions.
    pub fn regions(&self) -> PathBuf {
        self.run_directory.path().join(&self.agent_id)
    }

    pub fn control_pid(&self) -> Option<u32> {
        self.control.as_ref().map(Child::id)
    }

    pub fn dataplane_pid(&self) -> Option<u32> {
        self.dataplane.as_ref().map(Child::id)
    }

    fn spawn(&self, name: &str, args: &[&str]) -> Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join(format!("{name}.log")))
            .context("no log file")?;
        Command::new(program(name)?)
            .args(args)
            .args(self.standalone.then_some("--standalone"))
            .arg("--config")
            .arg(self.config_file())
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .envs(self.engine.iter().map(|host| ("DOCKER_HOST", host)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{name} can't be started"))
    }

    pub fn start_dataplane(&mut self) -> Result<()> {
        ensure!(self.dataplane.is_none(), "the dataplane runs already");
        self.dataplane = Some(self.spawn("bai-dataplane", &[])?);
        Ok(())
    }

    /// Starts control and waits until it answers a ping.
    pub async fn start_control(&mut self) -> Result<()> {
        ensure!(self.control.is_none(), "control runs already");
        self.control = Some(self.spawn("bai-agent", &["run"])?);
        let answer = wait::until("the agent answers", Duration::from_secs(60), || async {
            match self.client().await {
                Ok(client) => client
                    .call(
                        "ping",
                        vec![Value::Str("up".to_owned())],
                        Vec::new(),
                        Duration::from_secs(5),
                    )
                    .await
                    .ok(),
                Err(_) => None,
            }
        });
        if let Err(error) = answer.await {
            bail!("{error}; its log:\n{}", self.log("bai-agent"));
        }
        Ok(())
    }

    /// A new connection to the agent.
    pub async fn client(&self) -> Result<Client> {
        Client::connect(&self.address, self.curve.as_ref(), Duration::from_secs(5))
            .await
            .context("the agent can't be reached")
    }

    /// Calls a method on a connection of its own, as the manager does.
    pub async fn call(&self, method: &str, args: Vec<Value>) -> Result<Value> {
        let client = self.client().await?;
        client
            .call(method, args, Vec::new(), Duration::from_secs(120))
            .await
            .with_context(|| format!("{method} failed"))
    }

    /// Runs the command line against this node.
    pub fn command(&self, args: &[&str]) -> Result<Output> {
        self.command_to(args, Stdio::piped())
    }

    /// The same, with a standard output of one's own.
    pub fn command_to(&self, args: &[&str], stdout: impl Into<Stdio>) -> Result<Output> {
        Command::new(program("bai-agent")?)
            .args(args)
            .env("BAI_AGENT_ADDRESS", &self.address)
            .stdin(Stdio::null())
            .stdout(stdout)
            .output()
            .context("bai-agent can't be started")
    }

    /// Starts a command of the program that is to be ended from outside.
    pub fn begin_command(&self, args: &[&str]) -> Result<Begun> {
        let mut command = Command::new(program("bai-agent")?);
        command
            .args(args)
            .env("BAI_AGENT_ADDRESS", &self.address)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        Begun::spawn(&mut command)
    }

    /// What a program has logged so far.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(format!("{name}.log")))
            .unwrap_or_default()
    }

    fn end(child: &mut Option<Child>, signal: Signal) -> Result<()> {
        let Some(mut child) = child.take() else {
            return Ok(());
        };
        let pid = Pid::from_raw(i32::try_from(child.id()).context("a pid is an i32")?);
        // ESRCH: it has ended by itself and waits to be reaped.
        let _ = kill(pid, signal);
        let ended = wait::until_blocking("the program ends", Duration::from_secs(60), || {
            child.try_wait().ok().flatten()
        });
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        ended.map(|_| ())
    }

    pub fn stop_control(&mut self) -> Result<()> {
        Self::end(&mut self.control, Signal::SIGTERM)
    }

    pub fn kill_control(&mut self) -> Result<()> {
        Self::end(&mut self.control, Signal::SIGKILL)
    }

    pub fn kill_dataplane(&mut self) -> Result<()> {
        Self::end(&mut self.dataplane, Signal::SIGKILL)
    }

    /// Exit codes of control and of the dataplane, which end by themselves.
    pub fn ended(&mut self) -> Result<[Option<i32>; 2]> {
        let code = |child: &mut Option<Child>| -> Result<Option<i32>> {
            let running = child.as_mut().context("the program was started")?;
            let what = "the program ends by itself";
            let status = wait::until_blocking(what, Duration::from_secs(60), || {
                running.try_wait().ok().flatten()
            })?;
            *child = None;
            Ok(status.code())
        };
        Ok([code(&mut self.control)?, code(&mut self.dataplane)?])
    }

    /// Ids of this node's containers, running or not.
    pub fn containers(&self) -> Result<Vec<String>> {
        let output = images::docker(self.engine.as_deref())
            .args([
                "ps",
                "-aq",
                "--no-trunc",
                "--filter",
                &format!("label=ai.backend.owner={}", self.agent_id),
            ])
            .output()
            .context("docker can't be started")?;
        ensure!(
            output.status.success(),
            "docker ps: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)
            .context("ids are text")?
            .lines()
            .map(str::to_owned)
            .collect())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["bai-agent", "bai-dataplane"] {
                let log = self.log(name);
                let tail: Vec<&str> = log.lines().rev().take(40).collect();
                eprintln!("--- end of {name}'s log");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
        let _ = self.stop_control();
        let _ = self.kill_dataplane();
        // Programs in the kernel outlive both.
        if let Ok(agent) = program("bai-agent") {
            let _ = Command::new(agent)
                .args(["detach", "--config"])
                .arg(self.config_file())
                .output();
        }
        if let Ok(left) = self.containers()
            && !left.is_empty()
        {
            let _ = images::docker(self.engine.as_deref())
                .args(["rm", "-f"])
                .args(&left)
                .output();
        }
        // Scratch directories of the memory and loop kinds are mounts.
        let root = self.directory.path().to_owned();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for mount in mounts
            .lines()
            .rev()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|mount| Path::new(mount).starts_with(&root))
        {
            let _ = nix::mount::umount2(mount, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}
