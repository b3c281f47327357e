//! `bai-agent status` and `bai-agent ports`: the node at a glance.

use crate::cli::output::{say, say_part};
use std::time::Duration;

use serde_json::Value;

use super::connection::Way;
use super::exit::Problem;
use super::output::{self, Form, Table};
use crate::rpc::ClientError;

const DEADLINE: Duration = Duration::from_secs(15);

fn at<'a>(value: &'a Value, path: &[&str]) -> &'a Value {
    path.iter()
        .fold(value, |value, step| value.get(step).unwrap_or(&Value::Null))
}

fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Memory slots count bytes.
fn amount(slot: &str, value: &Value) -> String {
    let text = word(value);
    match text.parse() {
        Ok(count) if slot == "mem" || slot.ends_with(".mem") => output::bytes(count),
        _ => text,
    }
}

/// Shows the node's state. Ends with code 1 when a part of it is not working. `config` is the configuration of the
/// node that is asked, where that is known.
pub async fn status(way: &Way, config: Option<&config::Config>, form: Form) -> Result<(), Problem> {
    let agent = match way.reach().await {
        Ok(agent) => agent,
        Err(err) => {
            let silent = matches!(err, ClientError::Lost { .. } | ClientError::Deadline { .. });
            return match config {
                Some(config) if silent && tell_waiting(config, form)? => Err(Problem::Findings),
                _ => Err(way.told(err)),
            };
        }
    };
    let status: Value = agent.call("bai.status", Vec::new(), DEADLINE).await?;
    let engine = at(&status, &["docker", "reachable"])
        .as_bool()
        .unwrap_or(false);
    let dataplane = at(&status, &["dataplane", "alive"])
        .as_bool()
        .unwrap_or(false);
    match form {
        Form::Json => output::json(&status)?,
        Form::Text => {
            say!(
                "agent      {} {} ({})",
                word(at(&status, &["agent_id"])),
                word(at(&status, &["version"])),
                word(at(&status, &["mode"]))
            );
            say!(
                "up         {}",
                at(&status, &["uptime_s"])
                    .as_f64()
                    .map_or_else(|| "-".to_owned(), output::duration)
            );
            say!(
                "engine     {}",
                if engine {
                    format!("Docker {}", word(at(&status, &["docker", "version"])))
                } else {
                    "not reachable: is dockerd running?".to_owned()
                }
            );
            say!(
                "dataplane  {}",
                if dataplane {
                    "alive".to_owned()
                } else {
                    "not running: start bai-dataplane; service ports and statistics need it"
                        .to_owned()
                }
            );
            cluster(&status);
            storage(at(&status, &["storage_proxy"]));
            say!("kernels    {}", word(at(&status, &["kernels"])));
            memory(&status);
            let ports = at(&status, &["ports"]);
            say!(
                "ports      {} of {} free, {} cooling down",
                word(at(ports, &["free"])),
                word(at(ports, &["total"])),
                word(at(ports, &["cooling"]))
            );
            for (slot, amounts) in at(&status, &["slots"]).as_object().into_iter().flatten() {
                say!(
                    "slot       {slot}: {} of {} in use",
                    amount(slot, at(amounts, &["used"])),
                    amount(slot, at(amounts, &["total"]))
                );
            }
        }
    }
    let lost = |part: &str| at(&status, &["cluster", part]).as_bool() == Some(false);
    let away = at(&status, &["cluster", "etcd", "reachable"]).as_bool() == Some(false)
        || at(&status, &["cluster", "etcd", "refuses"]).is_string()
        || at(&status, &["cluster", "bus", "connected"]).as_bool() == Some(false)
        || lost("registered");
    if engine && dataplane && !away {
        Ok(())
    } else {
        Err(Problem::Findings)
    }
}

/// The kernels that are short of memory, and those that died.
fn memory(status: &Value) {
    let list = |name: &str| {
        let list = at(status, &[name]).as_array();
        list.into_iter().flatten().cloned().collect::<Vec<_>>()
    };
    let size = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), output::bytes);
    for kernel in list("short_of_memory") {
        let id = word(at(&kernel, &["kernel_id"]));
        let killed = at(&kernel, &["killed"]).as_u64().unwrap_or(0);
        if killed > 0 {
            let ago = at(&kernel, &["killed_s_ago"]).as_f64();
            say!(
                "memory     kernel {id}: {killed} killed at its limit of {}{}",
                size(at(&kernel, &["memory_limit"])),
                ago.map_or_else(String::new, |ago| format!(
                    ", the last {} ago",
                    output::duration(ago)
                ))
            );
        }
        let shm = at(&kernel, &["shm"]);
        if !shm.is_null() {
            say!(
                "shm        kernel {id}: /dev/shm is full ({} of {}); who needs more gets SIGBUS (exit 135)",
                size(at(shm, &["used"])),
                size(at(shm, &["size"]))
            );
        }
    }
    let now = crate::events::unix_seconds(std::time::SystemTime::now());
    for kernel in list("died") {
        say!(
            "died       kernel {} {} ago ({}, exit {}): {}",
            word(at(&kernel, &["kernel_id"])),
            at(&kernel, &["at"]).as_f64().map_or_else(
                || "-".to_owned(),
                |at| output::duration((now - at).max(0.0))
            ),
            word(at(&kernel, &["reason"])),
            word(at(&kernel, &["exit_code"])),
            word(at(&kernel, &["cause"]))
        );
    }
}

/// The lines of a node in a cluster.
fn cluster(status: &Value) {
    let cluster = at(status, &["cluster"]);
    if cluster.is_null() {
        return;
    }
    let etcd = at(cluster, &["etcd"]);
    let since = |seconds: &Value| {
        seconds
            .as_f64()
            .map_or_else(|| "-".to_owned(), output::duration)
    };
    say!(
        "etcd       {}",
        match at(etcd, &["reachable"]).as_bool() {
            Some(true) if at(etcd, &["refuses"]).is_string() => format!(
                "refuses for {}, the node goes on with what it knows: {}",
                since(at(etcd, &["refused_s"])),
                word(at(etcd, &["refuses"]))
            ),
            Some(true) => format!("answers at {}", word(at(etcd, &["endpoint"]))),
            Some(false) => format!(
                "away for {}, the node goes on with what it knows: {}",
                since(at(etcd, &["away_s"])),
                word(at(etcd, &["error"]))
            ),
            None => "not asked yet".to_owned(),
        }
    );
    let managers = at(cluster, &["managers"]).as_array().map_or(0, Vec::len);
    let registered = match at(cluster, &["registered"]).as_bool() {
        Some(true) => "registered",
        _ => "not registered",
    };
    say!(
        "cluster    {registered} in {}, {managers} managers are up",
        word(at(status, &["scaling_group"]))
    );
    let bus = at(cluster, &["bus"]);
    say!(
        "bus        {}, {} sent, {} waiting, {} left out",
        match at(bus, &["connected"]).as_bool() {
            Some(true) => "connected".to_owned(),
            Some(false) => format!("not connected ({})", word(at(bus, &["error"]))),
            None => "not tried yet".to_owned(),
        },
        word(at(bus, &["sent"])),
        word(at(bus, &["waiting"])),
        word(at(bus, &["left_out"]))
    );
    let changed: Vec<String> = at(cluster, &["settings_changed"])
        .as_array()
        .into_iter()
        .flatten()
        .map(word)
        .collect();
    if !changed.is_empty() {
        say!(
            "settings   {} changed in etcd; restart the agent to apply them (kernels go on)",
            changed.join(", ")
        );
    }
}

/// The line of a node that asks a storage proxy; kernels do not need one, so it is no finding.
fn storage(proxy: &Value) {
    if proxy.is_null() {
        return;
    }
    let since = |name: &str| {
        let seconds = at(proxy, &[name]).as_f64();
        seconds.map_or_else(|| "-".to_owned(), output::duration)
    };
    let url = word(at(proxy, &["url"]));
    say!(
        "storage    {}",
        match at(proxy, &["answers"]).as_bool() {
            Some(true) => format!(
                "{url} answers, {} things asked, the oldest answer is {} old, {} without an answer",
                word(at(proxy, &["questions"])),
                since("oldest_answer_s"),
                word(at(proxy, &["without_answer"]))
            ),
            Some(false) => format!(
                "{url} does not answer for {}, figures of folders are up to {} old: {}",
                since("away_s"),
                since("oldest_answer_s"),
                word(at(proxy, &["error"]))
            ),
            None => format!("{url}, not asked yet"),
        }
    );
}

/// A node that does not answer because it is not ready yet says what it waits for.
fn tell_waiting(config: &config::Config, form: Form) -> Result<bool, Problem> {
    let Some(waiting) = crate::cluster::read_waiting(config) else {
        return Ok(false);
    };
    let now = crate::events::unix_seconds(std::time::SystemTime::now());
    match form {
        Form::Json => output::json(&serde_json::json!({
            "agent_id": config.agent.id, "starting": waiting,
        }))?,
        Form::Text => {
            say!(
                "agent      {} is starting (pid {})",
                config.agent.id,
                waiting.pid
            );
            say!(
                "waits for  {}, for {}: {}",
                waiting.waiting_for,
                output::duration((now - waiting.since).max(0.0)),
                waiting.why
            );
        }
    }
    Ok(true)
}

/// How bytes get to a port's container, and by which engine if it is the relay.
fn path(port: &Value) -> String {
    let engine = word(at(port, &["engine"]));
    match engine.as_str() {
        "" | "-" | "none" => word(at(port, &["path"])),
        _ => format!("{} ({engine})", word(at(port, &["path"]))),
    }
}

/// Shows every published port: who has it, what serves it and, when nothing does, why.
pub async fn ports(way: &Way, form: Form) -> Result<(), Problem> {
    let agent = way.open().await?;
    let reply: Value = agent.call("bai.ports", Vec::new(), DEADLINE).await?;
    if form == Form::Json {
        return Ok(output::json(&reply)?);
    }
    let mut table = Table::new(&[
        ">PORT",
        "SERVICE",
        "KERNEL",
        ">CONTAINER",
        "STATE",
        "PATH",
        ">OPEN",
        ">TOTAL",
        ">REFUSED",
        ">IN",
        ">OUT",
        "WHY",
    ]);
    let bytes = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), output::bytes);
    for port in at(&reply, &["ports"]).as_array().into_iter().flatten() {
        table.row([
            word(at(port, &["host_port"])),
            word(at(port, &["service"])),
            word(at(port, &["kernel_id"])),
            word(at(port, &["container_port"])),
            word(at(port, &["state"])),
            path(port),
            word(at(port, &["sessions_active"])),
            word(at(port, &["sessions_total"])),
            word(at(port, &["sessions_refused"])),
            bytes(at(port, &["bytes_in"])),
            bytes(at(port, &["bytes_out"])),
            at(port, &["reason"])
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        ]);
    }
    say_part!("{}", table.render());
    Ok(())
}
