//! The way from `169.254.169.254` to the metadata service: a chain of iptables of this agent's own.
//!
//! In: `node.metadata-redirect` and the addresses of kernels. Out: a rule for each that leads its
//! connections to that address and port 80 to the service, whichever network it is on. Invariants:
//! without the setting the firewall is not written to, but for taking away a chain of ours that is
//! left; what is not a kernel of this agent keeps its own way to that address; the chain stays while
//! the agent is down, so that no kernel reaches somebody else's service there.

use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::causes;
use crate::firewall::{self, NoAnswer};
use crate::kernel::Node;

/// Programs that Docker itself needs.
const IPTABLES: &str = "iptables";
const RESTORE: &str = "iptables-restore";
/// Deadline of one change.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks whether the rules are still there: others may reload the firewall.
const LOOK: Duration = Duration::from_secs(30);
/// Kernels come together; their rules are written together.
const QUIET: Duration = Duration::from_millis(20);
/// Rules that lead to the chain and are taken away with it.
const MOST_JUMPS: usize = 64;
/// The rule that leads to the chain, without its target.
const MATCH: [&str; 9] = [
    "PREROUTING",
    "-d",
    "169.254.169.254/32",
    "-p",
    "tcp",
    "-m",
    "tcp",
    "--dport",
    "80",
];

/// The chain of an agent: several may share a host.
pub fn chain_of(agent_id: &str) -> String {
    let mut name = "BAI-METADATA-".to_owned();
    for byte in Sha256::digest(agent_id).iter().take(4) {
        // Writing to a text cannot fail.
        let _ = write!(name, "{byte:02X}");
    }
    name
}

/// The whole chain, in the words of iptables-restore.
fn table(chain: &str, addresses: &[Ipv4Addr], port: u16) -> String {
    let mut text = format!("*nat\n:{chain} - [0:0]\n");
    for address in addresses {
        let _ = writeln!(
            text,
            "-A {chain} -s {address}/32 -p tcp -j REDIRECT --to-ports {port}"
        );
    }
    text.push_str("COMMIT\n");
    text
}

/// The code by which iptables says that a rule is not there.
const ABSENT: i32 = 1;

/// A program of the family has not done what it should.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// It has not said what is there.
    #[error(transparent)]
    NoAnswer(#[from] NoAnswer),
    /// It cannot be run.
    #[error("cannot run {program}")]
    Run {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has ended without doing it.
    #[error("{program}: {words}")]
    Refused {
        /// Which.
        program: &'static str,
        /// How it has ended; none by a signal.
        code: Option<i32>,
        /// What it said.
        words: String,
    },
    /// It has not ended in time.
    #[error("{program}: no answer in {} s", PATIENCE.as_secs())]
    Late {
        /// Which.
        program: &'static str,
    },
}

/// Runs a program of the family.
async fn run(program: &'static str, words: &[&str], input: &str) -> Result<(), RedirectError> {
    let mut command = Command::new(program);
    command
        .args(["-w", "2"])
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let failed = |source| RedirectError::Run { program, source };
    let running = async {
        let mut child = command.spawn().map_err(failed)?;
        if let Some(mut pipe) = child.stdin.take() {
            // One that has ended says why itself.
            let _ = pipe.write_all(input.as_bytes()).await;
        }
        let output = child.wait_with_output().await.map_err(failed)?;
        match output.status.success() {
            true => Ok(()),
            false => Err(RedirectError::Refused {
                program,
                code: output.status.code(),
                words: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            }),
        }
    };
    tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap_or(Err(RedirectError::Late { program }))
}

/// Runs one command on the rule that leads to the chain.
async fn jump(how: &str, chain: &str) -> Result<(), RedirectError> {
    let words: Vec<&str> = ["-t", "nat", how]
        .into_iter()
        .chain(MATCH)
        .chain(["-j", chain])
        .collect();
    run(IPTABLES, &words, "").await
}

/// What is there has as many rules as it should, and is led to.
async fn stands(chain: &str, count: usize) -> bool {
    let listed = firewall::rules(IPTABLES, &["-t", "nat", "-S", chain]).await;
    let rules = listed.map(|text| text.lines().filter(|line| line.starts_with("-A")).count());
    rules == Some(count) && jump("-C", chain).await.is_ok()
}

/// Makes the chain what it should be, in one step, and leads to it.
async fn apply(chain: &str, addresses: &[Ipv4Addr], port: u16) -> Result<(), RedirectError> {
    run(RESTORE, &["--noflush"], &table(chain, addresses, port)).await?;
    match jump("-C", chain).await {
        // Not when it is not known: there would be one more each time.
        Err(RedirectError::Refused {
            code: Some(ABSENT), ..
        }) => jump("-I", chain).await,
        known => known,
    }
}

/// Takes the chain of an agent away; whether there was one.
///
/// # Errors
/// There is one and it stays, or it is not known whether there is one.
pub async fn remove(agent_id: &str) -> Result<bool, RedirectError> {
    let chain = chain_of(agent_id);
    let listed = firewall::ask(IPTABLES, &["-t", "nat", "-S", &chain]).await?;
    if listed.is_none() {
        return Ok(false);
    }
    // Others may have led there, too.
    for _ in 0..MOST_JUMPS {
        if jump("-D", &chain).await.is_err() {
            break;
        }
    }
    for how in ["-F", "-X"] {
        run(IPTABLES, &["-t", "nat", how, &chain], "").await?;
    }
    Ok(true)
}

fn wanted(node: &Node) -> Vec<Ipv4Addr> {
    let all = node.registry.callers().addresses().into_iter();
    all.filter_map(|address| match address {
        IpAddr::V4(address) => Some(address),
        IpAddr::V6(_) => None,
    })
    .collect()
}

/// Keeps the chain right until the agent stops.
pub async fn follow(node: Arc<Node>) {
    if !node.config.node.metadata_redirect {
        match remove(node.agent_id()).await {
            Ok(false) => {}
            Ok(true) => tracing::info!("took the rules of node.metadata-redirect away"),
            Err(err) => tracing::warn!(
                err = causes::chain(&err),
                chain = chain_of(node.agent_id()),
                "rules of node.metadata-redirect, which is off, are still there; `bai-agent detach` removes them, or iptables -t nat"
            ),
        }
        return;
    }
    let (chain, port) = (
        chain_of(node.agent_id()),
        node.config.agent.metadata_server.port,
    );
    let mut written: Option<Vec<Ipv4Addr>> = None;
    let mut reported = false;
    loop {
        let addresses = wanted(&node);
        let same = written.as_ref() == Some(&addresses);
        if !same || !stands(&chain, addresses.len()).await {
            match apply(&chain, &addresses, port).await {
                Ok(()) => {
                    reported = false;
                    written = Some(addresses);
                }
                Err(err) => {
                    written = None;
                    if !std::mem::replace(&mut reported, true) {
                        tracing::error!(
                            err = causes::chain(&err),
                            "kernels' connections to 169.254.169.254 are not led to the metadata service; see that iptables works on this host, or set node.metadata-redirect = false; it is tried again"
                        );
                    }
                }
            }
        }
        tokio::select! {
            () = node.registry.callers().changed() => {}
            () = tokio::time::sleep(LOOK) => {}
            () = node.stopping.cancelled() => return,
        }
        tokio::time::sleep(QUIET).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_agent_has_a_chain_and_each_kernel_a_rule() {
        let chain = chain_of("i-node");
        assert_ne!(chain, chain_of("i-other"));
        // The kernel takes 28 bytes.
        assert!(chain.len() <= 28, "{chain}");
        let addresses = [[172, 17, 0, 2].into(), [172, 20, 0, 3].into()];
        let lines = [
            "*nat".to_owned(),
            format!(":{chain} - [0:0]"),
            format!("-A {chain} -s 172.17.0.2/32 -p tcp -j REDIRECT --to-ports 40128"),
            format!("-A {chain} -s 172.20.0.3/32 -p tcp -j REDIRECT --to-ports 40128"),
            "COMMIT\n".to_owned(),
        ];
        assert_eq!(table(&chain, &addresses, 40_128), lines.join("\n"));
    }
}
