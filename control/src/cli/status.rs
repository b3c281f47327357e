//! `bai-agent status` and `bai-agent ports`: the node at a glance.

use crate::cli::output::{say, say_part};
use std::time::Duration;

use serde_json::Value;

use super::connection::Connection;
use super::exit::Problem;
use super::output::{self, Form, Table};

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

/// Shows the node's state. Ends with code 1 when a part of it is not working.
pub async fn status(connection: &Connection, form: Form) -> Result<(), Problem> {
    let agent = connection.open().await?;
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
            say!("kernels    {}", word(at(&status, &["kernels"])));
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
    if engine && dataplane {
        Ok(())
    } else {
        Err(Problem::Findings)
    }
}

/// Shows every published port: who has it, what serves it and, when nothing does, why.
pub async fn ports(connection: &Connection, form: Form) -> Result<(), Problem> {
    let agent = connection.open().await?;
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
            word(at(port, &["path"])),
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
