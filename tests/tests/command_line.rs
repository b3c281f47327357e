//! The command line itself, without a node: exit codes, and output that nobody reads.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result};
use harness::node::program;

/// A whole configuration of a cluster, as the original's agent needs it.
const CLUSTER: &str = r#"
[agent]
mode = "docker"
id = "i-command-line"
rpc-listen-addr = "127.0.0.1:6001"
scaling-group = "default"
[container]
port-range = [30000, 30010]
scratch-type = "hostdir"
stats-type = "docker"
[resource]
reserved-cpu = 1
reserved-mem = "1g"
[etcd]
namespace = "local"
addr = { host = "127.0.0.1", port = 2379 }
"#;

fn agent(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("bai-agent")?);
    command.args(arguments).stdin(Stdio::null());
    Ok(command)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_cluster_without_its_section_is_refused_in_words() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("agent.toml");
    std::fs::write(&file, CLUSTER)?;
    let path = file.to_str().context("a plain path")?;
    let checked = agent(&["check-config", "--config", path])?.output()?;
    assert!(checked.status.success(), "{}", said(&checked));
    let shown = String::from_utf8_lossy(&checked.stdout);
    assert!(shown.contains("container.stats-type"), "{shown}");
    let without: String = CLUSTER.replace("[etcd]", "[elsewhere]");
    std::fs::write(&file, without)?;
    let refused = agent(&["run", "--config", path])?.output()?;
    assert_eq!(refused.status.code(), Some(78), "{}", said(&refused));
    assert!(
        said(&refused).contains("--standalone"),
        "{}",
        said(&refused)
    );
    Ok(())
}

#[test]
fn output_that_nobody_reads_is_no_crash() -> Result<()> {
    for form in ["text", "json"] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let output = agent(&["check-config", "--standalone", "--output", form])?
            .env_remove("BACKEND_CONFIG_FILE")
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()?;
        assert_eq!(output.status.code(), Some(0), "{form}: {}", said(&output));
        assert_eq!(said(&output), "", "{form}");
    }
    Ok(())
}
