//! `bai-agent kernel …`: kernels by hand, over the agent's real RPC.

mod create;
mod exec;
mod records;

use crate::cli::output::{say, say_part};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;

use super::connection::{Agent, Way};
use super::exit::Problem;
use super::output::{self, Form, Table};
use crate::rpc::Value;
use records::KernelRecord;

/// Long enough for the agent's own deadlines (stop, log collection, deletion) to fire first.
const DESTROY_DEADLINE: Duration = Duration::from_secs(240);
/// Above the 30 s the manager itself allows for such calls.
const CALL_DEADLINE: Duration = Duration::from_secs(45);

/// The commands on kernels.
#[derive(Debug, Subcommand)]
pub enum KernelCommand {
    /// Create a kernel from a local image and wait until it runs.
    Create(create::CreateArgs),
    /// List the kernels of this node.
    List {
        /// Also those that have ended lately.
        #[arg(short, long)]
        all: bool,
    },
    /// Run a shell command (or code) in a kernel and show its output.
    ///
    /// Ends with the command's exit code. Ctrl-C interrupts what the kernel runs (SIGINT), once more leaves the run as
    /// it is, with the exit code 130. A run whose output is closed before its end (`| head`) is interrupted, too, and
    /// the exit code is 0. With `--output json` the newest 16 MiB of output are kept; `truncated` says that there
    /// was more.
    Exec(exec::ExecArgs),
    /// Show what a kernel's container has written to its console.
    Logs {
        /// The kernel's id, or the beginning of it.
        #[arg(value_name = "KERNEL")]
        kernel: String,
    },
    /// Start a service of a kernel and show where it can be reached.
    Service(ServiceArgs),
    /// Show statistics of all or some kernels.
    Stats {
        /// The kernels' ids, or the beginnings of them.
        #[arg(value_name = "KERNEL")]
        kernels: Vec<String>,
    },
    /// Show the folders of all or some kernels, with what the storage proxy tells of them.
    Folders {
        /// The kernels' ids, or the beginnings of them.
        #[arg(value_name = "KERNEL")]
        kernels: Vec<String>,
    },
    /// Destroy kernels.
    Destroy {
        /// The kernels' ids, or the beginnings of them.
        #[arg(value_name = "KERNEL", required = true)]
        kernels: Vec<String>,
        /// The reason that is recorded.
        #[arg(long, default_value = "user-requested")]
        reason: String,
    },
}

/// Arguments of `kernel service`.
#[derive(Debug, Args)]
pub struct ServiceArgs {
    /// The kernel's id, or the beginning of it.
    #[arg(value_name = "KERNEL")]
    kernel: String,
    /// The service's name; without it, the services are listed.
    service: Option<String>,
    /// Stop the service instead.
    #[arg(long, requires = "service")]
    stop: bool,
    /// An argument of the service, as NAME=VALUE (those its definition allows).
    #[arg(long = "argument", value_name = "NAME=VALUE", value_parser = pair)]
    arguments: Vec<(String, String)>,
    /// An environment variable of the service (those its definition allows).
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = pair)]
    envs: Vec<(String, String)>,
}

/// Splits `NAME=VALUE`.
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// A shell's exit code wants to be our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(pub u8);

/// Runs one command; the status is that of the command run in the kernel for `exec`, else 0.
pub async fn run(command: KernelCommand, way: &Way, form: Form) -> Result<ExitStatus, Problem> {
    let agent = way.open().await?;
    match command {
        KernelCommand::Create(args) => create::run(args, &agent, way, form).await?,
        KernelCommand::List { all } => list(&agent, all, form).await?,
        KernelCommand::Exec(args) => return exec::run(args, &agent, form).await,
        KernelCommand::Logs { kernel } => logs(&agent, &kernel, form).await?,
        KernelCommand::Service(args) => service(&agent, args, form).await?,
        KernelCommand::Stats { kernels } => stats(&agent, &kernels, form).await?,
        KernelCommand::Folders { kernels } => folders(&agent, &kernels, form).await?,
        KernelCommand::Destroy { kernels, reason } => {
            destroy(&agent, &kernels, &reason, form).await?
        }
    }
    Ok(ExitStatus(0))
}

/// All kernels the agent knows; `all` includes those that ended lately.
async fn kernels(agent: &Agent, all: bool) -> Result<Vec<KernelRecord>, Problem> {
    let reply: records::KernelsReply = agent
        .call("bai.kernels", vec![Value::Bool(all)], CALL_DEADLINE)
        .await?;
    Ok(reply.kernels)
}

/// Finds a kernel by its id or the unambiguous beginning of it.
async fn find(agent: &Agent, text: &str) -> Result<KernelRecord, Problem> {
    pick(kernels(agent, true).await?, text)
}

/// `all` are the ends that are remembered, oldest first, then the kernels that are there: of a kernel with several
/// lives the last one counts.
fn pick(all: Vec<KernelRecord>, text: &str) -> Result<KernelRecord, Problem> {
    let mut found: BTreeMap<String, KernelRecord> = all
        .into_iter()
        .filter(|kernel| !text.is_empty() && kernel.kernel_id.starts_with(text))
        .map(|kernel| (kernel.kernel_id.clone(), kernel))
        .collect();
    match (found.len(), found.pop_last()) {
        (1, Some((_, kernel))) => Ok(kernel),
        (0, _) => Err(Problem::Refused {
            method: "the look-up".to_owned(),
            class: "KeyError".to_owned(),
            repr: format!(
                "no kernel begins with {text}; `bai-agent kernel list` shows what is there"
            ),
        }),
        (several, _) => Err(Problem::Usage(anyhow::anyhow!(
            "{several} kernels begin with {text}; give more of the id"
        ))),
    }
}

async fn list(agent: &Agent, all: bool, form: Form) -> Result<(), Problem> {
    let kernels = kernels(agent, all).await?;
    if form == Form::Json {
        return Ok(output::json(&json!({ "kernels": kernels }))?);
    }
    let mut table = Table::new(&["KERNEL", "STATE", "IMAGE", ">AGE", "SERVICES"]);
    for kernel in kernels {
        let state = match (&kernel.exit_code, &kernel.reason) {
            (Some(code), Some(reason)) => format!("{} ({reason}, exit {code})", kernel.state),
            (None, Some(reason)) => format!("{} ({reason})", kernel.state),
            _ => kernel.state.clone(),
        };
        let services = kernel
            .service_ports
            .iter()
            .map(records::ServicePortRecord::summary)
            .collect::<Vec<_>>()
            .join(" ");
        table.row([
            kernel.kernel_id.clone(),
            state,
            kernel.image.clone(),
            kernel.age(),
            services,
        ]);
    }
    say_part!("{}", table.render());
    Ok(())
}

async fn logs(agent: &Agent, kernel: &str, form: Form) -> Result<(), Problem> {
    let kernel = find(agent, kernel).await?;
    let reply: records::LogsReply = agent
        .call(
            "get_logs",
            vec![Value::Str(kernel.kernel_id.clone())],
            CALL_DEADLINE,
        )
        .await?;
    if form == Form::Json {
        return Ok(output::json(
            &json!({ "kernel_id": kernel.kernel_id, "logs": reply.logs }),
        )?);
    }
    say_part!("{}", reply.logs);
    Ok(())
}

async fn service(agent: &Agent, args: ServiceArgs, form: Form) -> Result<(), Problem> {
    let kernel = find(agent, &args.kernel).await?;
    let Some(name) = args.service else {
        if form == Form::Json {
            return Ok(output::json(
                &json!({ "kernel_id": kernel.kernel_id, "service_ports": kernel.service_ports }),
            )?);
        }
        let mut table = Table::new(&["SERVICE", "PROTOCOL", ">CONTAINER", ">HOST"]);
        for port in &kernel.service_ports {
            for (container, host) in port.container_ports.iter().zip(&port.host_ports) {
                table.row([
                    port.name.clone(),
                    port.protocol.clone(),
                    container.to_string(),
                    host.to_string(),
                ]);
            }
        }
        say_part!("{}", table.render());
        return Ok(());
    };
    let call = |method: &str, mut args: Vec<Value>| {
        (method.to_owned(), {
            args.insert(0, Value::Str(kernel.kernel_id.clone()));
            args
        })
    };
    if args.stop {
        let (method, arguments) = call("shutdown_service", vec![Value::Str(name.clone())]);
        let _: Option<bool> = agent.call(&method, arguments, CALL_DEADLINE).await?;
        if form == Form::Json {
            return Ok(output::json(
                &json!({ "kernel_id": kernel.kernel_id, "service": name, "status": "stopped" }),
            )?);
        }
        say!("{name} of {} was asked to stop", kernel.kernel_id);
        return Ok(());
    }
    let text_map = |pairs: Vec<(String, String)>| {
        Value::Map(
            pairs
                .into_iter()
                .map(|(name, value)| (Value::Str(name), Value::Str(value)))
                .collect(),
        )
    };
    let options = Value::Map(vec![
        (Value::Str("arguments".to_owned()), text_map(args.arguments)),
        (Value::Str("envs".to_owned()), text_map(args.envs)),
    ]);
    let (method, arguments) = call("start_service", vec![Value::Str(name.clone()), options]);
    let reply: records::ServiceReply = agent.call(&method, arguments, CALL_DEADLINE).await?;
    if !matches!(reply.status.as_str(), "started" | "running") {
        return Err(Problem::Refused {
            method: format!("the start of {name}"),
            class: reply.status,
            repr: reply
                .error
                .unwrap_or_else(|| "no reason was given".to_owned()),
        });
    }
    let ports: Vec<u16> = kernel
        .service_ports
        .iter()
        .filter(|port| port.name == name)
        .flat_map(|port| port.host_ports.iter().copied())
        .collect();
    let host = serving_host(kernel.bind_host, agent.host());
    if form == Form::Json {
        return Ok(output::json(
            &json!({ "kernel_id": kernel.kernel_id, "service": name, "status": reply.status, "host": host, "host_ports": ports }),
        )?);
    }
    for port in ports {
        say!("{name}: {host}:{port}");
    }
    Ok(())
}

/// Where ports of a kernel are reached from here: at the address they are bound to or, where that is every one of
/// the node, at the one its agent was asked at.
fn serving_host(bound: Option<IpAddr>, asked: &str) -> String {
    match bound {
        Some(IpAddr::V6(host)) if !host.is_unspecified() => format!("[{host}]"),
        Some(IpAddr::V4(host)) if !host.is_unspecified() => host.to_string(),
        _ => asked.to_owned(),
    }
}

async fn stats(agent: &Agent, kernels: &[String], form: Form) -> Result<(), Problem> {
    let mut ids = Vec::new();
    for kernel in kernels {
        ids.push(Value::Str(find(agent, kernel).await?.kernel_id));
    }
    let reply: serde_json::Value = agent
        .call("bai.stats", vec![Value::Array(ids)], CALL_DEADLINE)
        .await?;
    if form == Form::Json {
        return Ok(output::json(&reply)?);
    }
    say_part!("{}", records::stats_table(&reply));
    Ok(())
}

async fn folders(agent: &Agent, kernels: &[String], form: Form) -> Result<(), Problem> {
    let mut ids = Vec::new();
    for kernel in kernels {
        ids.push(find(agent, kernel).await?.kernel_id);
    }
    let mut reply: records::FoldersReply =
        agent.call("bai.folders", Vec::new(), CALL_DEADLINE).await?;
    if !ids.is_empty() {
        reply.folders.retain(|it| ids.contains(&it.kernel_id));
    }
    if form == Form::Json {
        return Ok(output::json(&json!(reply))?);
    }
    say_part!("{}", records::folders_table(&reply));
    Ok(())
}

async fn destroy(
    agent: &Agent,
    kernels: &[String],
    reason: &str,
    form: Form,
) -> Result<(), Problem> {
    let mut destroyed = Vec::new();
    for kernel in kernels {
        let kernel = find(agent, kernel).await?;
        let arguments = vec![
            Value::Str(kernel.kernel_id.clone()),
            Value::Str(kernel.session_id.clone()),
            Value::Str(reason.to_owned()),
        ];
        let _: Option<bool> = agent
            .call("bai.destroy", arguments, DESTROY_DEADLINE)
            .await?;
        if form == Form::Text {
            say!("{}", kernel.kernel_id);
        }
        destroyed.push(kernel.kernel_id);
    }
    if form == Form::Json {
        output::json(&json!({ "destroyed": destroyed }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_kernel_with_several_lives_the_last_is_found() {
        let life = |id: &str, state: &str, image: &str| -> KernelRecord {
            let record =
                json!({"kernel_id": id, "session_id": "s", "image": image, "state": state});
            serde_json::from_value(record).unwrap()
        };
        let all = vec![
            life("aa-1", "terminated", "first"),
            life("ab-2", "terminated", "first"),
            life("aa-1", "terminated", "second"),
            life("ab-2", "running", "second"),
        ];
        let found = |text: &str| pick(all.clone(), text).map(|kernel| kernel.image);
        for text in ["aa-1", "aa", "ab-2", "ab"] {
            assert_eq!(found(text).unwrap(), "second", "{text}");
        }
        let problem = found("a").unwrap_err();
        assert!(
            matches!(&problem, Problem::Usage(err) if err.to_string().starts_with("2 kernels"))
        );
        for text in ["", "b"] {
            assert_eq!(found(text).unwrap_err().code(), 1, "{text}");
        }
    }

    #[test]
    fn a_port_is_shown_where_it_is_served() {
        let shown = |bound: &str, asked| serving_host(bound.parse().ok(), asked);
        assert_eq!(shown("127.0.0.2", "127.0.0.1"), "127.0.0.2");
        assert_eq!(shown("127.0.0.2", "node-7"), "127.0.0.2");
        assert_eq!(shown("2001:db8::7", "node-7"), "[2001:db8::7]");
        assert_eq!(shown("0.0.0.0", "127.0.0.1"), "127.0.0.1");
        assert_eq!(shown("0.0.0.0", "node-7"), "node-7");
        assert_eq!(shown("::", "[::1]"), "[::1]");
        // An agent that does not say.
        assert_eq!(shown("", "node-7"), "node-7");
    }
}
