//! `bai-agent kernel exec`: run a command or code, show its output as it comes, end with its exit code.

use std::collections::VecDeque;
use std::io::{BufRead, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{CALL_DEADLINE, ExitStatus, find};
use crate::cli::connection::Agent;
use crate::cli::exit::Problem;
use crate::cli::output::{self, Form, aside, say_part};
use crate::rpc::Value;

/// How long the agent collects output before it answers with what there is.
const FLUSH_SECONDS: f64 = 1.0;
/// How long after a Ctrl-C that has not met the run it is looked for again: it may be there soon.
const INTERRUPT_AGAIN: Duration = Duration::from_secs(1);
/// The agent answers within the flush time; what is above is the runner being busy with another run.
const POLL_DEADLINE: Duration = Duration::from_secs(60);

/// As a shell tells what SIGINT has ended.
const INTERRUPTED: ExitStatus = ExitStatus(128 + 2);

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

/// Runs it; the status is the command's own, or 130 where the user has left it or it has none after a Ctrl-C.
pub(super) async fn run(args: ExecArgs, agent: &Agent, form: Form) -> Result<ExitStatus, Problem> {
    let kernel = find(agent, &args.kernel).await?;
    let signals = signal(SignalKind::interrupt())?;
    let interrupted = CancellationToken::new();
    let run_id = uuid::Uuid::new_v4().simple().to_string();
    let run = (kernel.kernel_id.as_str(), run_id.as_str());
    let mut left = std::pin::pin!(left(agent, run, signals, &interrupted));
    let code = args.command.join(" ");
    let (mut mode, mut code, mut options) = match args.mode {
        Mode::Batch => (
            "batch",
            String::new(),
            Value::Map(vec![(text("exec"), Value::Str(code))]),
        ),
        Mode::Query => ("query", code, Value::Map(Vec::new())),
    };
    let mut collected = Collected::default();
    let mut typed: Option<oneshot::Receiver<_>> = None;
    let (exit_code, status) = loop {
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
        let reply: Reply = tokio::select! {
            biased;
            reply = agent.call("execute", arguments, POLL_DEADLINE) => reply?,
            left = &mut left => break (None, left?),
        };
        match form {
            Form::Text => show(&reply.console),
            Form::Json => collected.add(reply.console),
        }
        mode = "continue";
        match reply.status.as_str() {
            "finished" => {
                let status = match reply.exit_code {
                    None if interrupted.is_cancelled() => INTERRUPTED,
                    code => ExitStatus(shell_status(code)),
                };
                break (reply.exit_code, status);
            }
            // It might never end, as `yes` does not.
            _ if output::is_closed() => {
                interrupt(agent, run).await?;
                return Ok(ExitStatus(0));
            }
            "waiting-input" => {
                let had_been = interrupted.is_cancelled();
                let line = typed.get_or_insert_with(|| read_input(reply.options.as_ref()));
                tokio::select! {
                    biased;
                    line = line => {
                        typed = None;
                        mode = "input";
                        // Without the reader there is no input.
                        code = line.unwrap_or(Ok(String::new()))?;
                    }
                    left = &mut left => break (None, left?),
                    () = interrupted.cancelled(), if !had_been => {}
                }
            }
            // The program may wait for it still, after a Ctrl-C that it ignores.
            _ => {
                if let Some(Ok(line)) = typed.as_mut().map(oneshot::Receiver::try_recv) {
                    typed = None;
                    mode = "input";
                    code = line?;
                }
            }
        }
    };
    if form == Form::Json {
        let (console, truncated) = collected.into_parts();
        output::json(
            &json!({ "kernel_id": kernel.kernel_id, "run_id": run_id, "exit_code": exit_code, "console": console, "truncated": truncated }),
        )?;
    }
    Ok(status)
}

fn text(text: &str) -> Value {
    Value::Str(text.to_owned())
}

/// What an interrupt has met.
#[derive(Debug, Deserialize)]
struct Interrupt {
    met: String,
}

/// Interrupts this run of this kernel, and no other.
async fn interrupt(agent: &Agent, (kernel, run_id): (&str, &str)) -> Result<Interrupt, Problem> {
    let arguments = vec![text(kernel), text(run_id)];
    agent.call("bai.interrupt", arguments, CALL_DEADLINE).await
}

/// Ends when the run is to be left to itself: the first Ctrl-C interrupts it in the kernel, or ends it there
/// while it waits for its turn, the second leaves it.
async fn left(
    agent: &Agent,
    run: (&str, &str),
    mut signals: Signal,
    interrupted: &CancellationToken,
) -> Result<ExitStatus, Problem> {
    signals.recv().await;
    aside!("bai-agent: interrupting; once more leaves the run as it is");
    interrupted.cancel();
    let interrupts = async {
        loop {
            match interrupt(agent, run).await?.met.as_str() {
                "absent" => tokio::time::sleep(INTERRUPT_AGAIN).await,
                _ => return Ok::<_, Problem>(()),
            }
        }
    };
    tokio::select! {
        met = interrupts => met?,
        _ = signals.recv() => return Ok(INTERRUPTED),
    }
    signals.recv().await;
    Ok(INTERRUPTED)
}

/// Output for one JSON document: the newest of it.
#[derive(Default)]
struct Collected {
    pieces: VecDeque<(String, serde_json::Value)>,
    bytes: usize,
    truncated: bool,
}

impl Collected {
    /// Bytes that are kept, about.
    const LIMIT: usize = 16 << 20;

    fn add(&mut self, console: Vec<(String, serde_json::Value)>) {
        for piece in console {
            self.bytes += weight(&piece);
            self.pieces.push_back(piece);
        }
        while self.bytes > Self::LIMIT
            && let Some(piece) = self.pieces.pop_front()
        {
            self.bytes -= weight(&piece);
            self.truncated = true;
        }
    }

    /// The pieces, and whether there were earlier ones.
    fn into_parts(self) -> (VecDeque<(String, serde_json::Value)>, bool) {
        (self.pieces, self.truncated)
    }
}

/// Bytes that a piece takes: what names it, too, as there may be many small ones.
fn weight((kind, data): &(String, serde_json::Value)) -> usize {
    let text = data
        .as_str()
        .map_or_else(|| data.to_string().len(), str::len);
    64 + kind.len() + text
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

/// One line from standard input; end of file is an empty answer. Whoever leaves meanwhile does not wait for it.
fn read_input(
    options: Option<&serde_json::Value>,
) -> oneshot::Receiver<Result<String, std::io::Error>> {
    let hidden = options
        .and_then(|options| options.get("is_password"))
        .and_then(serde_json::Value::as_bool)
        .unwrap_or(false);
    if hidden {
        let _ = write!(std::io::stderr(), "(password, shown as typed) ");
    }
    let (sender, line) = oneshot::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line);
        let line = read.map(|_| line.trim_end_matches('\n').to_owned());
        // Nobody may wait for it any more.
        let _ = sender.send(line);
    });
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_output_is_kept_for_one_document() {
        let mut collected = Collected::default();
        let piece = |number: usize| {
            let text = format!("{number}{}", " ".repeat(1 << 20));
            ("stdout".to_owned(), json!(text))
        };
        collected.add(vec![piece(0), piece(1)]);
        assert!(!collected.truncated);
        for number in 2..40 {
            collected.add(vec![piece(number)]);
        }
        let (pieces, truncated) = collected.into_parts();
        assert!(truncated && pieces.len() == 15, "{}", pieces.len());
        assert_eq!(pieces.back(), Some(&piece(39)));
        // Nor do many that say nothing take more.
        let mut collected = Collected::default();
        collected.add(vec![(String::new(), json!("")); 300_000]);
        let (pieces, truncated) = collected.into_parts();
        assert!(truncated && pieces.len() * 64 <= Collected::LIMIT);
    }

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
