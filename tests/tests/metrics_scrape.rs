//! `/metrics` and `/health` of a real node: what is documented is there and true, and a real Prometheus gets data
//! for every question of the dashboard and takes every alert.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use harness::images;
use harness::node::{Node, NodeOptions, free_port};
use harness::wait;
use serde_json::Value;
use tokio::io::AsyncReadExt;

const PATIENCE: Duration = Duration::from_secs(90);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Status and body of one request.
fn request(address: &str, method: &str, path: &str) -> Result<(u16, String, String)> {
    let mut stream = TcpStream::connect(address).context("nobody listens")?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
    )?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (head, body) = reply.split_once("\r\n\r\n").context("no end of the head")?;
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
    Ok((
        status.context("no status")?,
        head.to_lowercase(),
        body.to_owned(),
    ))
}

fn get(address: &str, path: &str) -> Result<(u16, String)> {
    request(address, "GET", path).map(|(status, _, body)| (status, body))
}

/// A page or an answer may be sent in chunks; only a whole one is looked at.
fn unchunk(head: &str, body: &str) -> String {
    if !head.contains("transfer-encoding: chunked") {
        return body.to_owned();
    }
    let (mut text, mut rest) = (String::new(), body);
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        if size == 0 || after.len() < size {
            break;
        }
        text.push_str(&after[..size]);
        rest = after[size..].trim_start_matches("\r\n");
    }
    text
}

/// Name and labels to value.
fn series(page: &str) -> Result<BTreeMap<String, f64>> {
    page.lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| {
            let (key, value) = line.rsplit_once(' ').context("a sample has a value")?;
            Ok((
                key.to_owned(),
                value.parse().with_context(|| line.to_owned())?,
            ))
        })
        .collect()
}

fn cli(node: &Node, args: &[&str]) -> Result<String> {
    let output = node.command(args)?;
    ensure!(
        output.status.success(),
        "bai-agent {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// Runs a program in a terminal of 80 columns until it has shown a text, tells it to end, and answers with what it
/// wrote; fails when the terminal is left in another state than it was given in.
const IN_A_TERMINAL: &str = r#"
import fcntl, os, pty, select, signal, struct, subprocess, sys, termios, time
wanted = sys.argv[1].encode()
main, side = pty.openpty()
fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
before = termios.tcgetattr(side)
program = subprocess.Popen(sys.argv[2:], stdin=side, stdout=side, stderr=side,
                           env=dict(os.environ, TERM='xterm'))
seen, until = b'', time.time() + 30
def read(seconds):
    global seen
    if select.select([main], [], [], seconds)[0]:
        seen += os.read(main, 65536)
        return True
while wanted not in seen and time.time() < until:
    read(0.1)
assert wanted in seen, seen
assert termios.tcgetattr(side) != before, 'the terminal was not taken'
program.send_signal(signal.SIGTERM)
code = program.wait(10)
while read(0.2):
    pass
assert code == 0, (code, seen)
assert termios.tcgetattr(side) == before, 'the terminal is not what it was'
assert b'\x1b[?1049h' in seen and seen.rindex(b'\x1b[?1049l') > seen.rindex(b'\x1b[?1049h'), seen
assert b'\x1b[?25h' in seen, 'the cursor stays hidden'
"#;

#[tokio::test(flavor = "multi_thread")]
async fn top_shows_a_kernel_in_a_terminal_and_gives_it_back_when_told_to_end() -> Result<()> {
    let node = Node::start(options()).await?;
    let kernel = kernel(&node).await?;
    let config = node.config_file();
    let output = Command::new("python3")
        .args(["-c", IN_A_TERMINAL, &kernel[..8]])
        .arg(harness::node::program("bai-agent")?)
        .args(["top", "--config"])
        .arg(config)
        .stdin(Stdio::null())
        .output()?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A kernel that has a service and has been measured twice.
async fn kernel(node: &Node) -> Result<String> {
    let image = images::image(images::Image::Runner)?;
    let kernel = cli(
        node,
        &[
            "kernel", "create", "--quiet", "--cpu", "0.1", "--mem", "128m", &image,
        ],
    )?;
    wait::until("the kernel is measured", PATIENCE, || async {
        let page = get(node.http_address(), "/metrics").ok()?.1;
        page.lines()
            .any(|line| line.starts_with("container_cpu_usage") && line.contains(&kernel))
            .then_some(())
    })
    .await?;
    Ok(kernel)
}

fn options() -> NodeOptions {
    NodeOptions {
        sections: "[node.dataplane]\nstats-interval = \"500ms\"\n".to_owned(),
        ..NodeOptions::default()
    }
}

/// Family to its labels, from the document.
fn documented() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let text = std::fs::read_to_string(root().join("docs/metrics.md"))?;
    Ok(text
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| {
            let (name, rest) = line.split_once("` | ")?;
            let labels = rest.split(" | ").nth(1)?;
            let labels = labels.split(", ").filter(|label| *label != "-");
            Some((name.to_owned(), labels.map(str::to_owned).collect()))
        })
        .collect())
}

fn base_name(name: &str) -> &str {
    ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|end| name.strip_suffix(end))
        .filter(|base| base.ends_with("_seconds") || base.ends_with("_sec"))
        .unwrap_or(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrape_is_what_the_document_says_and_the_numbers_are_the_kernel_s() -> Result<()> {
    let mut node = Node::start(options()).await?;
    let kernel = kernel(&node).await?;
    let address = node.http_address().to_owned();
    let (status, head, body) = request(&address, "GET", "/metrics")?;
    ensure!(
        status == 200 && head.contains("content-type: text/plain; charset=utf-8"),
        "{head}"
    );
    ensure!(head.contains("access-control-allow-origin: *"), "{head}");
    let page = series(&unchunk(&head, &body))?;
    let documented = documented()?;
    for key in page.keys() {
        let (name, labels) = key.split_once('{').unwrap_or((key, ""));
        let known = documented
            .get(base_name(name))
            .with_context(|| format!("{name} is not in docs/metrics.md"))?;
        for label in labels
            .split(',')
            .filter_map(|label| label.split_once("=\""))
        {
            ensure!(
                known.contains(label.0),
                "the label {} of {name} is not in docs/metrics.md",
                label.0
            );
        }
    }
    // Every group of the document that this node can have is on the page.
    let shown: BTreeSet<&str> = page
        .keys()
        .map(|key| base_name(key.split('{').next().unwrap_or(key)))
        .collect();
    for name in [
        "backendai_container_utilization",
        "backendai_device_utilization",
        "backendai_rpc_requests_total",
        "backendai_rpc_request_duration_seconds",
        "container_cpu_usage_seconds_total",
        "container_memory_working_set_bytes",
        "container_network_receive_bytes_total",
        "container_threads",
        "bai_dataplane_up",
        "bai_dataplane_pass_seconds",
        "bai_sample_age_seconds",
        "bai_node_memory_bytes",
        "bai_port_serving",
        "bai_slot_total",
        "process_resident_memory_bytes",
        "backendai_api_request_duration_sec",
        "backendai_sync_container_lifecycle_trigger_count_total",
        "backendai_cpu_usage_percent",
        "backendai_memory_used_rss",
        "backendai_memory_used_vms",
    ] {
        ensure!(shown.contains(name), "{name} is not on the page");
    }

    // The numbers are those of the region, and the manager's are the same.
    let of_kernel = |page: &BTreeMap<String, f64>, start: &str| {
        page.iter()
            .find(|(key, _)| {
                key.starts_with(start)
                    && key.contains(&kernel)
                    && !key.contains("value_type=\"capacity\"")
            })
            .map(|(_, value)| *value)
    };
    let stats = |node: &Node| -> Result<Value> {
        let config = node.config_file();
        let config = config.to_str().context("a path is text")?;
        let text = cli(node, &["stats", "--output", "json", "--config", config])?;
        Ok(serde_json::from_str(&text)?)
    };
    let before = stats(&node)?;
    let (_, head, body) = request(&address, "GET", "/metrics")?;
    let page = series(&unchunk(&head, &body))?;
    let after = stats(&node)?;
    let used = |stats: &Value| {
        stats["kernels"][&kernel]["cpu"]["usage_ns"]
            .as_f64()
            .map(|ns| ns / 1e9)
    };
    let seconds = of_kernel(&page, "container_cpu_usage_seconds_total").context("CPU time")?;
    let (low, high) = (
        used(&before).context("before")?,
        used(&after).context("after")?,
    );
    // A float of seconds is exact to less than a microsecond.
    ensure!(
        low - 1e-6 <= seconds && seconds <= high + 1e-6,
        "{low} <= {seconds} <= {high}"
    );
    let start = "backendai_container_utilization{container_metric_name=\"cpu_util\"";
    let milliseconds = of_kernel(&page, start).context("the manager's CPU time")?;
    ensure!(
        (milliseconds - seconds * 1000.0).abs() <= 0.001,
        "{milliseconds} ms, {seconds} s"
    );
    let limit = of_kernel(&page, "container_spec_memory_limit_bytes").context("the limit")?;
    ensure!((limit - f64::from(128 << 20)).abs() < 1.0, "{limit}");

    // Who floods the server does not keep others from it.
    let mut flood = Vec::new();
    for _ in 0..160 {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind("127.0.0.9:0".parse()?)?;
        flood.push(socket.connect(address.parse()?).await?);
    }
    ensure!(get(&address, "/metrics")?.0 == 200);
    let mut told = String::new();
    let last = flood.last_mut().context("a connection")?;
    tokio::time::timeout(PATIENCE, last.read_to_string(&mut told)).await??;
    ensure!(told.starts_with("HTTP/1.1 503 "), "{told}");
    drop(flood);

    // Other requests.
    ensure!(get(&address, "/nothing")?.0 == 404);
    let (status, head, _) = request(&address, "POST", "/metrics")?;
    ensure!(
        status == 405 && head.contains("allow: get"),
        "{status} {head}"
    );
    ensure!(request(&address, "OPTIONS", "/metrics")?.0 == 200);

    // A container's series end with it.
    cli(&node, &["kernel", "destroy", &kernel])?;
    wait::until("the series are gone", PATIENCE, || async {
        let page = get(&address, "/metrics").ok()?.1;
        (!page.contains(&kernel)).then_some(())
    })
    .await?;

    // Health follows the dataplane.
    wait::until("the node is healthy", PATIENCE, || async {
        get(&address, "/health")
            .ok()
            .filter(|(status, _)| *status == 200)
    })
    .await?;
    node.kill_dataplane()?;
    let (_, body) = wait::until("the node is not healthy", PATIENCE, || async {
        get(&address, "/health")
            .ok()
            .filter(|(status, _)| *status == 503)
    })
    .await?;
    let health: Value = serde_json::from_str(body.trim()).context(body)?;
    ensure!(
        health["status"] == "degraded" && health["component"] == "agent",
        "{health}"
    );
    ensure!(health["checks"]["docker"]["ok"] == true, "{health}");
    // Old samples tell before the missing heartbeat does.
    wait::until("the dataplane is told to be down", PATIENCE, || async {
        let page = get(&address, "/metrics").ok()?.1;
        page.contains("\nbai_dataplane_up 0\n").then_some(())
    })
    .await?;
    Ok(())
}

/// A Prometheus of our own. Dropping it ends it.
struct Prometheus {
    child: Child,
    address: String,
    _data: tempfile::TempDir,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    fn start(target: &str) -> Result<Prometheus> {
        let data = tempfile::tempdir()?;
        let rules = root().join("deploy/prometheus/alerts.yml").canonicalize()?;
        let config = data.path().join("prometheus.yml");
        std::fs::write(
            &config,
            format!(
                "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\n\
                 scrape_configs: [{{job_name: bai-agent, static_configs: [{{targets: ['{target}']}}]}}]\n",
                rules.display()
            ),
        )?;
        let address = format!("127.0.0.1:{}", free_port()?);
        let log = std::fs::File::create(data.path().join("log"))?;
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                data.path().join("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("prometheus can't be started; run deploy/setup test")?;
        Ok(Prometheus {
            child,
            address,
            _data: data,
        })
    }

    fn ask(&self, path: &str) -> Result<Value> {
        let (_, head, body) = request(&self.address, "GET", path)?;
        let reply: Value = serde_json::from_str(&unchunk(&head, &body)).context(body)?;
        ensure!(reply["status"] == "success", "{path}: {reply}");
        Ok(reply["data"].clone())
    }

    /// How many series an expression gives now.
    fn query(&self, expression: &str) -> Result<usize> {
        let escaped: String = expression
            .bytes()
            .map(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
                other => format!("%{other:02X}"),
            })
            .collect();
        let data = self.ask(&format!("/api/v1/query?query={escaped}"))?;
        Ok(data["result"].as_array().map_or(0, Vec::len))
    }
}

/// Expressions of the dashboard, its variables filled in.
fn expressions() -> Result<Vec<String>> {
    let text = std::fs::read_to_string(root().join("deploy/grafana/node.json"))?;
    let dashboard: Value = serde_json::from_str(&text)?;
    let panels = dashboard["panels"].as_array().context("panels")?;
    let variables = dashboard["templating"]["list"].as_array();
    let all = |variable: &str| -> Result<String> {
        let found = variables.into_iter().flatten();
        let mut found = found.filter(|known| known["name"] == variable);
        let all = found.next().and_then(|known| known["allValue"].as_str());
        // Other exporters' series, such as cAdvisor's, lack these labels or have them empty.
        ensure!(all == Some(".+"), "{variable}: {all:?}");
        Ok(all.unwrap_or_default().to_owned())
    };
    let (instances, kernels) = (all("instance")?, all("kernel")?);
    Ok(panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().into_iter().flatten())
        .filter_map(|target| target["expr"].as_str())
        .map(|text| {
            text.replace("$__rate_interval", "10s")
                .replace("$instance", &instances)
                .replace("$kernel", &kernels)
        })
        .collect())
}

/// What a healthy node without accelerators has no series of: each must be said here.
fn may_be_empty(expression: &str) -> bool {
    expression.contains("bai_accelerator_")
        || expression.contains("backendai_rpc_failure_requests_total")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_has_data_for_the_dashboard_and_takes_the_alerts() -> Result<()> {
    for (what, file) in [("rules", "alerts.yml"), ("config", "prometheus.yml")] {
        let path = root().join("deploy/prometheus").join(file);
        let checked = Command::new("promtool")
            .args(["check", what])
            .arg(&path)
            .output()
            .context("promtool can't be started; run deploy/setup test")?;
        ensure!(
            checked.status.success(),
            "{file}: {}{}",
            String::from_utf8_lossy(&checked.stdout),
            String::from_utf8_lossy(&checked.stderr)
        );
    }
    let mut node = Node::start(NodeOptions {
        bind_host: "127.0.0.2".to_owned(),
        ..options()
    })
    .await?;
    let kernel = kernel(&node).await?;
    // Calls to count and a service to show.
    let shown = cli(&node, &["kernel", "service", &kernel, "web"])?;
    ensure!(shown.starts_with("web: 127.0.0.2:"), "{shown}");
    let prometheus = Prometheus::start(node.http_address())?;
    let expressions = expressions()?;
    ensure!(expressions.len() > 30, "{} expressions", expressions.len());
    for expression in &expressions {
        let found = wait::until(&format!("data for {expression}"), PATIENCE, || async {
            // The RPC is asked now and then, so that its rates are of something.
            let _ = cli(&node, &["ports"]);
            let found = prometheus.query(expression).ok()?;
            (found > 0 || may_be_empty(expression)).then_some(found)
        })
        .await?;
        ensure!(found < 1000, "{expression} gives {found} series");
    }
    let rules = prometheus.ask("/api/v1/rules")?;
    let rules = rules["groups"][0]["rules"]
        .as_array()
        .context("rules")?
        .clone();
    ensure!(rules.len() >= 15, "{} rules", rules.len());
    // An outage raises its alert; the one for a healthy node's parts stays down.
    node.kill_dataplane()?;
    wait::until("the alert of a dead dataplane", PATIENCE, || async {
        let alerts = prometheus.ask("/api/v1/alerts").ok()?;
        let raised: Vec<&str> = alerts["alerts"]
            .as_array()?
            .iter()
            .filter_map(|alert| alert["labels"]["alertname"].as_str())
            .collect();
        raised.contains(&"BaiDataplaneDown").then_some(())
    })
    .await?;
    // The kernel is not told to rest while nobody measures it.
    wait::until("the numbers of the kernel have ended", PATIENCE, || async {
        let left = prometheus.query("container_cpu_usage_seconds_total").ok()?;
        let seen = prometheus.query("container_last_seen").ok()?;
        (left == 0 && seen == 1).then_some(())
    })
    .await?;
    let rules = prometheus.ask("/api/v1/rules")?;
    for rule in rules["groups"][0]["rules"].as_array().context("rules")? {
        if rule["health"] != "ok" {
            bail!("an alert cannot be evaluated: {rule}");
        }
    }
    Ok(())
}

/// Labels that do not match make a rule that is right by its syntax and never fires.
#[test]
fn every_alert_fires_when_it_must_and_none_on_a_well_node() -> Result<()> {
    let alerts = std::fs::read_to_string(root().join("deploy/prometheus/alerts.yml"))?;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("prometheus/alerts.yml");
    let cases = std::fs::read_to_string(&path)?;
    for alert in alerts
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
    {
        ensure!(
            cases.contains(&format!("labels: '{{alertname=\"{alert}\"}}'")),
            "{alert} has no case in {}",
            path.display()
        );
    }
    let tested = Command::new("promtool")
        .args(["test", "rules"])
        .arg(&path)
        .output()
        .context("promtool can't be started; run deploy/setup test")?;
    ensure!(
        tested.status.success(),
        "{}{}",
        String::from_utf8_lossy(&tested.stdout),
        String::from_utf8_lossy(&tested.stderr)
    );
    Ok(())
}

/// Every alert has its row in the operator's table.
#[test]
fn every_alert_has_a_remedy() -> Result<()> {
    let alerts = std::fs::read_to_string(root().join("deploy/prometheus/alerts.yml"))?;
    let operations = std::fs::read_to_string(root().join("docs/operations.md"))?;
    let names: Vec<&str> = alerts
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    ensure!(names.len() >= 15);
    for name in names {
        ensure!(
            operations.contains(&format!("| `{name}` |")),
            "{name} has no row in docs/operations.md"
        );
    }
    Ok(())
}
