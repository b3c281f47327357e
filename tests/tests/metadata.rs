//! The metadata service: kernels ask it by the address that clouds use, and nobody else gets a word.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step fails the test

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use control::metadata::redirect::chain_of;
use harness::images::{self, Image};
use harness::kernels::{self, Order, inspect};
use harness::node::{Node, NodeOptions, program};
use harness::wait;
use serde_json::{Value as Json, json};

const SOON: Duration = Duration::from_secs(30);

/// What a program in a kernel is answered, head and all. This one ends its side of the connection
/// once it has asked.
async fn asked(node: &Node, order: &Order, path: &str) -> Result<String> {
    let request = format!("GET {} HTTP/1.0\\r\\n\\r\\n", path.replace('%', "%%"));
    let command = format!("printf '{request}' | busybox nc -w 5 169.254.169.254 80");
    let ran = kernels::run(node, order, &command).await?;
    ensure!(ran.exit_code == Some(0), "{path}: {ran:?}");
    Ok(ran.output.replace('\r', ""))
}

/// What a program of this host is answered.
fn asked_here(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(SOON))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.replace('\r', ""))
}

fn parts(answer: &str) -> (&str, &str) {
    answer.split_once("\n\n").unwrap_or((answer, ""))
}

/// The rules of the node's chain, and how many lead to it.
fn rules(node: &Node) -> (Vec<String>, usize) {
    let output = Command::new("iptables")
        .args(["-w", "5", "-t", "nat", "-S"])
        .output()
        .expect("iptables");
    let text = String::from_utf8(output.stdout).unwrap();
    let (chain, mut leading) = (chain_of(node.agent_id()), 0);
    let mut rules = Vec::new();
    for line in text.lines() {
        if line.starts_with(&format!("-A {chain} ")) {
            rules.push(line.to_owned());
        } else if line.ends_with(&format!(" -j {chain}")) {
            leading += 1;
        } else {
            assert!(
                !line.contains(&chain) || line == format!("-N {chain}"),
                "{line}"
            );
        }
    }
    (rules, leading)
}

fn address(container: &Json) -> String {
    let networks = container["NetworkSettings"]["Networks"]
        .as_object()
        .unwrap();
    let endpoint = networks.values().next().unwrap();
    endpoint["IPAddress"].as_str().unwrap().to_owned()
}

/// A bridge of its own, removed with the value.
struct Bridge(String);

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = kernels::docker(&["network", "rm", &self.0]);
    }
}

/// A container that is no kernel, removed with the value.
struct Stranger(String);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = kernels::docker(&["rm", "-f", &self.0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kernels_are_told_of_themselves_and_strangers_nothing() -> Result<()> {
    let bridge = Bridge(format!("metadata-{}", uuid::Uuid::new_v4().simple()));
    kernels::docker(&["network", "create", &bridge.0])?;
    let mut node = Node::start(NodeOptions {
        node: "metadata-redirect = true\n".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let (mut one, mut two) = (Order::of(Image::Runner)?, Order::of(Image::Runner)?);
    one.config["environ"]["SECRET"] = json!("of one: \"ä\"\nand more");
    two.config["environ"]["SECRET"] = json!("of two");
    two.cluster["network_config"] = json!({"mode": "bridge", "network_name": bridge.0});
    let mut addresses = Vec::new();
    for order in [&one, &two] {
        let result = kernels::create(&node, order).await?;
        let id = result["container_id"]
            .as_str()
            .context("a container")?
            .to_owned();
        let container = inspect(&id)?;
        let address = address(&container);
        let documents = asked(&node, order, "/latest/meta-data/").await?;
        let (head, body) = parts(&documents);
        assert!(head.starts_with("HTTP/1.0 200 OK"), "{documents}");
        assert!(head.contains("server: BackendAI"), "{documents}");
        assert_eq!(body, "envs\nlocal-ipv4\nsandbox");
        for (path, expected) in [
            ("/", "latest/"),
            ("/latest/", "extension/\nmeta-data/"),
            ("/latest/meta-data/sandbox", "docker"),
            ("/latest/meta%2Ddata/sandbox", "docker"),
            ("/latest/meta-data/local-ipv4", address.as_str()),
        ] {
            let answer = asked(&node, order, path).await?;
            assert_eq!(parts(&answer).1, expected, "{path}: {answer:?}");
        }
        let answer = asked(&node, order, "/latest/meta-data/envs").await?;
        assert!(
            answer.contains("content-type: application/json; charset=utf-8"),
            "{answer}"
        );
        let told: Json = serde_json::from_str(parts(&answer).1)?;
        assert_eq!(told["SECRET"], order.config["environ"]["SECRET"]);
        assert_eq!(told["BACKENDAI_KERNEL_ID"], json!(order.kernel.to_string()));
        // All that it was made with; the image has variables of its own besides.
        let real = container["Config"]["Env"].as_array().context("Env")?;
        for (name, value) in told.as_object().context("a map")? {
            let entry = format!("{name}={}", value.as_str().context("a text")?);
            assert!(real.contains(&json!(entry)), "{entry}");
        }
        let absent = asked(&node, order, "/latest/meta-data/absent").await?;
        assert!(absent.starts_with("HTTP/1.0 404 Not Found"), "{absent}");
        addresses.push(address);
    }

    // A container on the same bridge that is no kernel, and this host.
    let stranger = Stranger(format!("stranger-{}", uuid::Uuid::new_v4().simple()));
    let port = node.metadata_port();
    let script = format!(
        "printf 'GET /latest/meta-data/envs HTTP/1.0\\r\\n\\r\\n' | \
         /bin/busybox nc -w 5 $(/bin/busybox ip route | /bin/busybox awk '/default/ {{print $3}}') {port}"
    );
    let bare = images::image(Image::Bare)?;
    let said = kernels::docker(&[
        "run",
        "--name",
        &stranger.0,
        &bare,
        "/bin/busybox",
        "sh",
        "-c",
        &script,
    ])?;
    for answer in [
        said,
        asked_here(port, "/latest/meta-data/envs")?,
        asked_here(port, "/")?,
    ] {
        let (head, body) = parts(&answer);
        assert!(head.starts_with("HTTP/1.0 403 Forbidden"), "{answer:?}");
        assert_eq!(body, "");
    }

    // Only what kernels ask of that address is led away.
    let (lines, leading) = rules(&node);
    assert_eq!((lines.len(), leading), (2, 1), "{lines:?}");
    for address in &addresses {
        let own = format!("-s {address}/32 ");
        assert!(lines.iter().any(|line| line.contains(&own)), "{lines:?}");
    }

    // A restart of the agent, also of one that has lost the journal of a kernel.
    node.kill_control()?;
    assert_eq!(rules(&node).0.len(), 2);
    let journal = node.state().join("kernels").join(node.agent_id());
    std::fs::remove_file(journal.join(format!("{}.json", two.kernel)))?;
    node.start_control().await?;
    for order in [&one, &two] {
        let answer = wait::until("an answer", SOON, || async {
            let answer = asked(&node, order, "/latest/meta-data/envs").await.ok()?;
            answer.starts_with("HTTP/1.0 200").then_some(answer)
        })
        .await?;
        let told: Json = serde_json::from_str(parts(&answer).1)?;
        assert_eq!(told["SECRET"], order.config["environ"]["SECRET"]);
    }

    // Rules end with their kernels, the chain with the setting or the agent.
    kernels::destroy(&node, &two).await?;
    wait::until("its rule is gone", SOON, || async {
        (rules(&node).0.len() == 1).then_some(())
    })
    .await?;
    kernels::destroy(&node, &one).await?;
    kernels::assert_clean(&node).await?;
    node.stop_control()?;
    let text = std::fs::read_to_string(node.config_file())?;
    std::fs::write(
        node.config_file(),
        text.replace("metadata-redirect = true", ""),
    )?;
    node.start_control().await?;
    wait::until("the chain is gone", SOON, || async {
        (rules(&node).1 == 0).then_some(())
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn detaching_takes_the_rules_away() -> Result<()> {
    let mut node = Node::start(NodeOptions {
        node: "metadata-redirect = true\n".to_owned(),
        dataplane: false,
        ..NodeOptions::default()
    })
    .await?;
    wait::until("the chain is there", SOON, || async {
        (rules(&node).1 == 1).then_some(())
    })
    .await?;
    node.stop_control()?;
    assert_eq!(rules(&node).1, 1, "it stays while the agent is down");
    let output = Command::new(program("bai-agent")?)
        .args(["detach", "--config"])
        .arg(node.config_file())
        .output()?;
    ensure!(output.status.success(), "{output:?}");
    assert_eq!(rules(&node), (Vec::new(), 0));
    Ok(())
}
