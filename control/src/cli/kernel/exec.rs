//! `bai-agent kernel exec`: run a command or code, show its output as it comes, end with its exit code.

use std::io::{BufRead, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde_json::json;

use super::{CALL_DEADLINE, ExitStatus, find};
use crate::cli::connection::Agent;
use crate::cli::exit::Problem;
use crate::cli::output::{self, Form, say_part};
use crate::rpc::Value;

/// How long the agent collects output before it answers with what there is.
const FLUSH_SECONDS: f64 = 1.0;
/// The agent answers within the flush time; what is above is the runner being busy with another run.
const POLL_DEADLINE: Duration = Duration::from_secs(60);

/// How code is run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// A shell command.
    #[default]
    Batch,
    /// Code for the kernel's interpreter (needs a Jupyter kernel in the image).
    Query,
}

/// Arguments of `kernel exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    /// The kernel's id, or the beginning of it.
    #[arg(value_name = "KERNEL")]
    kernel: String,
    /// How the words after the kernel are taken.
    #[arg(long, value_enum, default_value_t)]
    mode: Mode,
    /// The command (its words are joined by blanks and read by /bin/sh) or the code.
    #[arg(
        value_name = "COMMAND",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    command: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Reply {
    status: String,
    #[serde(rename = "exitCode")]
    exit_code: Option<i64>,
    options: Option<serde_json::Value>,
    #[serde(default)]
    console: Vec<(String, serde_json::Value)>,
}

/// Runs it; the status is the command's own.
pub(super) async fn run(args: ExecArgs, agent: &Agent, form: Form) -> Result<ExitStatus, Problem> {
    let kernel = find(agent, &args.kernel).await?;
    let run_id = uuid::Uuid::new_v4().simple().to_string();
    let code = args.command.join(" ");
    let text = |text: &str| Value::Str(text.to_owned());
    let (mut mode, mut code, mut options) = match args.mode {
        Mode::Batch => (
            "batch",
            String::new(),
            Value::Map(vec![(text("exec"), Value::Str(code))]),
        ),
        Mode::Query => ("query", code, Value::Map(Vec::new())),
    };
    let mut collected: Vec<(String, serde_json::Value)> = Vec::new();
    let exit_code = loop {
        let arguments = vec![
            text(&kernel.session_id),
            text(&kernel.kernel_id),
            Value::Int(3),
            text(&run_id),
            text(mode),
            Value::Str(std::mem::take(&mut code)),
            std::mem::replace(&mut options, Value::Map(Vec::new())),
            Value::Float(FLUSH_SECONDS),
        ];
        let reply: Reply = agent.call("execute", arguments, POLL_DEADLINE).await?;
        match form {
            Form::Text => show(&reply.console),
            Form::Json => collected.extend(reply.console),
        }
        mode = "continue";
        match reply.status.as_str() {
            "finished" => break reply.exit_code,
            "waiting-input" if !output::is_closed() => {
                mode = "input";
                code = read_input(reply.options.as_ref()).await?;
            }
            // It might never end, as `yes` does not.
            _ if output::is_closed() => {
                let kernel_id = vec![text(&kernel.kernel_id)];
                let () = agent
                    .call("interrupt_kernel", kernel_id, CALL_DEADLINE)
                    .await?;
                return Ok(ExitStatus(0));
            }
            _ => {}
        }
    };
    if form == Form::Json {
        let console: Vec<_> = collected
            .into_iter()
            .map(|(kind, data)| json!([kind, data]))
            .collect();
        output::json(
            &json!({ "kernel_id": kernel.kernel_id, "run_id": run_id, "exit_code": exit_code, "console": console }),
        )?;
    }
    Ok(ExitStatus(shell_status(exit_code)))
}

/// As a shell tells it: killed by signal N is 128 + N, no code at all is 255.
fn shell_status(code: Option<i64>) -> u8 {
    match code {
        Some(code @ 0..=255) => u8::try_from(code).unwrap_or(255),
        Some(code @ -127..=-1) => u8::try_from(128 - code).unwrap_or(255),
        _ => 255,
    }
}

/// Shows what has come, on the stream it was written to.
fn show(console: &[(String, serde_json::Value)]) {
    for (kind, data) in console {
        let text = data
            .as_str()
            .map_or_else(|| data.to_string(), str::to_owned);
        match kind.as_str() {
            "stderr" => output::written(std::io::stderr().lock().write_all(text.as_bytes())),
            _ => say_part!("{text}"),
        }
    }
}

/// One line from standard input; end of file is an empty answer.
async fn read_input(options: Option<&serde_json::Value>) -> Result<String, Problem> {
    let hidden = options
        .and_then(|options| options.get("is_password"))
        .and_then(serde_json::Value::as_bool)
        .unwrap_or(false);
    if hidden {
        let _ = write!(std::io::stderr(), "(password, shown as typed) ");
    }
    let line = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map(|_| line)
    })
    .await
    .map_err(|error| Problem::Other(error.into()))??;
    Ok(line.trim_end_matches('\n').to_owned())
}

#[cfg(test)]
mod tests {
    use super::shell_status;

    #[test]
    fn exit_codes_follow_the_shell() {
        for (code, status) in [
            (Some(0), 0),
            (Some(7), 7),
            (Some(127), 127),
            (Some(-9), 137),
            (Some(-1), 129),
            (Some(4096), 255),
            (None, 255),
        ] {
            assert_eq!(shell_status(code), status, "{code:?}");
        }
    }
}
