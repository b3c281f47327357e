//! Others' ways to the same numbers: a loop in Python, the engine's statistics API, the Python agent.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;
use shared::desired::ContainerRow;

use super::Tick;
use crate::Stage;
use crate::engine::Engine;
use crate::site::{Place, Site, done, ip};

/// A Python process that reads the files of all containers when it is told to.
#[derive(Debug)]
pub struct PythonLoop {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl PythonLoop {
    /// Starts it over these containers.
    ///
    /// # Errors
    /// There is no Python.
    pub fn start(rows: &[ContainerRow]) -> Result<Self> {
        let mut child = Command::new("python3")
            .args(["-c", include_str!("files_loop.py")])
            .args(rows.iter().map(|row| &row.cgroup_path))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("python3 cannot be started (run deploy/setup bench)")?;
        let mut python = Self {
            stdin: child.stdin.take().context("piped")?,
            stdout: BufReader::new(child.stdout.take().context("piped")?),
            child,
        };
        // What is made once is made.
        python.tick()?;
        Ok(python)
    }

    /// One round.
    ///
    /// # Errors
    /// It has failed.
    pub fn tick(&mut self) -> Result<Tick> {
        self.stdin.write_all(b"\n")?;
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        let mut words = line.split_whitespace().map(str::parse);
        let (Some(Ok(cpu_us)), Some(Ok(elapsed_us))) = (words.next(), words.next()) else {
            anyhow::bail!("the Python loop said {line:?}");
        };
        Ok(Tick { cpu_us, elapsed_us })
    }
}

impl Drop for PythonLoop {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU of the engine and its helpers for one answer about one container.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct EngineCost {
    /// As agents ask: two samples of the engine's, about a second apart.
    pub stream_ms_per_container: f64,
    /// The cheapest question there is.
    pub one_shot_ms_per_container: f64,
    /// What the engine uses when nobody asks, of one core.
    pub idle_share: f64,
}

fn ask(socket: &str, id: &str, question: &str) -> Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(
        stream,
        "GET /containers/{id}/stats?{question} HTTP/1.0\r\nHost: engine\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(
        answer.contains("total_usage"),
        "the engine says {:?}",
        answer.chars().take(300).collect::<String>()
    );
    Ok(())
}

/// Asks an engine of our own about containers that answer HTTP.
///
/// # Errors
/// There is no engine, or it does not answer.
pub fn engine(site: &Site, containers: u16, rounds: u32) -> Result<EngineCost> {
    let host = site.namespace(Place::Host);
    ip(&format!("netns add {host}"))?;
    ip(&format!("-n {host} link set lo up"))?;
    let engine = Engine::start(site)?;
    let ids = (0..containers)
        .map(|_| engine.run(&[]))
        .collect::<Result<Vec<String>>>()?;
    let socket = engine
        .socket()
        .strip_prefix("unix://")
        .context("the engine listens elsewhere")?;
    let cpu = || -> Result<f64> { Ok(site.cpu()?.server) };
    let measure = |work: &dyn Fn() -> Result<()>| -> Result<(f64, f64)> {
        let (before, at) = (cpu()?, Instant::now());
        work()?;
        Ok((cpu()? - before, at.elapsed().as_secs_f64()))
    };
    let (idle, watched) = measure(&|| {
        std::thread::sleep(Duration::from_secs(5));
        Ok(())
    })?;
    let idle_share = idle / watched;
    let asking = |question: &'static str| -> Result<f64> {
        let (used, elapsed) = measure(&|| {
            for _ in 0..rounds {
                std::thread::scope(|scope| {
                    let asked: Vec<_> = ids
                        .iter()
                        .map(|id| scope.spawn(move || ask(socket, id, question)))
                        .collect();
                    asked.into_iter().try_for_each(|it| {
                        it.join()
                            .map_err(|_| anyhow::anyhow!("a question has died"))?
                    })
                })?;
            }
            Ok(())
        })?;
        let answers = f64::from(rounds) * f64::from(containers);
        Ok((used - idle_share * elapsed).max(0.0) * 1e3 / answers)
    };
    let cost = EngineCost {
        stream_ms_per_container: asking("stream=false")?,
        one_shot_ms_per_container: asking("stream=false&one-shot=true")?,
        idle_share,
    };
    println!(
        "engine's API: {:.2} ms CPU per container, {:.2} ms one-shot",
        cost.stream_ms_per_container, cost.one_shot_ms_per_container
    );
    Ok(cost)
}

/// Has the Python agent watched with as many kernels, and without.
///
/// # Errors
/// It can't be installed or started.
pub fn agent(stage: &Stage, kernels: u16, seconds: u32, output: &Path) -> Result<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("the bench has no repository")?;
    let python = done(&mut Command::new(root.join("tests/scripts/manager-env")))?;
    let result = std::path::absolute(output.join("python-agent.json"))?;
    let status = stage.run(
        Command::new(python.trim())
            .arg(root.join("tests/python/bench_stats.py"))
            .args(["--kernels", &kernels.to_string()])
            .args(["--seconds", &seconds.to_string()])
            .arg("--out")
            .arg(&result)
            .stdin(Stdio::null()),
    )?;
    ensure!(
        status.success(),
        "the Python agent can't be measured: {status}"
    );
    let text = std::fs::read_to_string(&result)?;
    std::fs::remove_file(&result)?;
    Ok(serde_json::from_str(&text)?)
}
