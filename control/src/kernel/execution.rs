//! Running code in a kernel: the `execute` RPC, completions, interrupt, ping.
//!
//! In: a request as the RPC carries it and the kernel's link. Out: replies that serialise to exactly
//! the maps the manager reads. Invariant: no call waits without a limit, and dropping a call (its
//! client went away) neither closes anything nor loses output.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::ser::{SerializeMap, SerializeTuple};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value, json};
use tokio::time::Instant;
use uuid::Uuid;

use super::runner_link::frame::{AnswerKind, Outgoing, Record, Step, Stream};
use super::runner_link::runs::{Ending, RunRefused, Submission, Taken};
use super::runner_link::{Interrupted, LinkError, RunnerLink, RunnerStatus};

/// How long a call without `flush_timeout` waits before it answers `continued`: below the manager's
/// RPC limit of 30 s, so that the client can go on instead of losing the reply.
const LONGEST_POLL: Duration = Duration::from_secs(25);
/// Longest `flush_timeout` a client may ask for.
const LONGEST_FLUSH: Duration = Duration::from_secs(3600);
/// Limit of `ping_kernel`.
pub const PING_LIMIT: Duration = Duration::from_secs(5);
/// Limit of `get_completions`, the wait for a runner's connection counted: below the manager's 10 s.
pub const COMPLETION_LIMIT: Duration = Duration::from_secs(8);

/// What `execute` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Run source text in the language runtime.
    Query,
    /// Run the clean, build and exec commands.
    Batch,
    /// Answer the run's question for input.
    Input,
    /// Fetch what the run produced since.
    Continue,
}

/// A mode the RPC does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown execution mode {0:?}; it is one of query, batch, input, continue")]
pub struct UnknownMode(pub String);

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "query" => Ok(Mode::Query),
            "batch" => Ok(Mode::Batch),
            "input" => Ok(Mode::Input),
            "continue" => Ok(Mode::Continue),
            other => Err(UnknownMode(other.to_owned())),
        }
    }
}

/// The commands of a batch run; missing ones are skipped, `*` asks for the language's heuristic.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct BatchSteps {
    /// Clean command.
    pub clean: Option<String>,
    /// Build command.
    pub build: Option<String>,
    /// Main command.
    pub exec: Option<String>,
}

/// One `execute` call.
#[derive(Clone, Debug)]
pub struct ExecuteRequest {
    /// The run; a new one is named by us when missing.
    pub run_id: Option<String>,
    /// What to do.
    pub mode: Mode,
    /// Source text (query) or the line of input (input).
    pub code: String,
    /// Commands (batch).
    pub opts: BatchSteps,
    /// Version of the result's form, 1 or later.
    pub api_version: u32,
    /// Seconds to collect before answering `continued`; `None` = as long as a call may take.
    pub flush_timeout: Option<f64>,
}

/// Why `execute` failed.
#[derive(Debug, thiserror::Error)]
pub enum ExecutionError {
    /// The run was not accepted.
    #[error("{0}")]
    Refused(RunRefused),
    /// A restart of the kernel takes longer than the caller waits.
    #[error("the kernel is being restarted and is not back yet; nothing was run, try again later")]
    Restarting,
    /// The runner could not be asked.
    #[error("the kernel's runner could not be reached")]
    Link(#[source] LinkError),
}

impl From<LinkError> for ExecutionError {
    fn from(err: LinkError) -> Self {
        match err {
            LinkError::Refused(refused) => ExecutionError::Refused(refused),
            other => ExecutionError::Link(other),
        }
    }
}

/// How far a run is, as the manager reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// More follows; poll again.
    Continued,
    /// The clean step ended.
    CleanFinished,
    /// The build step ended.
    BuildFinished,
    /// The run ended.
    Finished,
    /// The run waits for input.
    WaitingInput,
}

/// Console output in the form of an API version.
#[derive(Clone, Debug, PartialEq)]
pub enum Console {
    /// Version 1: one text per stream.
    Split {
        /// Standard output.
        stdout: String,
        /// Standard error.
        stderr: String,
        /// Media type and content.
        media: Vec<(String, String)>,
        /// HTML texts.
        html: Vec<String>,
    },
    /// Later versions: everything in order.
    Ordered(Vec<ConsoleItem>),
}

/// One item of an ordered console.
#[derive(Clone, Debug, PartialEq)]
pub enum ConsoleItem {
    /// Text of a stream.
    Text(Stream, String),
    /// Media type and content.
    Media(String, String),
}

impl Serialize for ConsoleItem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut pair = serializer.serialize_tuple(2)?;
        match self {
            ConsoleItem::Text(stream, text) => {
                pair.serialize_element(stream.name())?;
                pair.serialize_element(text)?;
            }
            ConsoleItem::Media(mime, content) => {
                pair.serialize_element("media")?;
                pair.serialize_element(&(mime, content))?;
            }
        }
        pair.end()
    }
}

/// The result of one `execute` call.
#[derive(Clone, Debug, PartialEq)]
pub struct ExecuteReply {
    /// The run.
    pub run_id: String,
    /// How far it is.
    pub status: Status,
    /// Exit code of the step that ended, if the runner said one.
    pub exit_code: Option<i64>,
    /// Details of a wanted input.
    pub options: Option<Map<String, Value>>,
    /// Output since the last result.
    pub console: Console,
}

impl Serialize for ExecuteReply {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("runId", &self.run_id)?;
        map.serialize_entry("status", &self.status)?;
        map.serialize_entry("exitCode", &self.exit_code)?;
        map.serialize_entry("options", &self.options)?;
        match &self.console {
            Console::Split {
                stdout,
                stderr,
                media,
                html,
            } => {
                map.serialize_entry("stdout", stdout)?;
                map.serialize_entry("stderr", stderr)?;
                map.serialize_entry("media", media)?;
                map.serialize_entry("html", html)?;
            }
            Console::Ordered(items) => map.serialize_entry("console", items)?,
        }
        map.serialize_entry("files", &[(); 0])?;
        map.end()
    }
}

fn run_id(wanted: Option<String>) -> String {
    match wanted {
        Some(run_id) if !run_id.is_empty() => run_id,
        _ => Uuid::new_v4().simple().to_string(),
    }
}

/// Waits until a kernel that is being restarted is `back`, before anything of the call is begun. Its
/// caller is gone after the manager's 30 s, and what it asked for must not be run after that: a poll is
/// answered `continued` when its time is over, which is what is returned then; after a wait the call has
/// less time.
///
/// # Errors
/// The kernel is not back in time for what the call asks for.
pub async fn when_back(
    request: &mut ExecuteRequest,
    back: impl Future<Output = ()>,
) -> Result<Option<ExecuteReply>, ExecutionError> {
    back_within(LONGEST_POLL, request, back).await
}

async fn back_within(
    longest: Duration,
    request: &mut ExecuteRequest,
    back: impl Future<Output = ()>,
) -> Result<Option<ExecuteReply>, ExecutionError> {
    let polls = request.mode == Mode::Continue;
    let limit = match polls {
        true => flush(request.flush_timeout).min(longest),
        false => longest,
    };
    let began = Instant::now();
    if tokio::time::timeout(limit, back).await.is_ok() {
        let left = longest.saturating_sub(began.elapsed()).as_secs_f64();
        request.flush_timeout = request.flush_timeout.or(Some(left));
        return Ok(None);
    }
    if !polls {
        return Err(ExecutionError::Restarting);
    }
    let nothing = Taken {
        records: Vec::new(),
        ending: Ending::Continued,
    };
    let run_id = run_id(request.run_id.take());
    Ok(Some(assemble(run_id, nothing, request.api_version)))
}

/// Sends what the mode asks for and collects one result.
///
/// # Errors
/// The run is refused, or the link to the runner is closed or full.
pub async fn execute(
    link: &RunnerLink,
    request: ExecuteRequest,
) -> Result<ExecuteReply, ExecutionError> {
    let run_id = run_id(request.run_id);
    link.submit(
        &run_id,
        submission(request.mode, request.code, request.opts),
    )?;
    let taken = link.collect(&run_id, flush(request.flush_timeout)).await?;
    Ok(assemble(run_id, taken, request.api_version))
}

/// The messages of a mode.
pub(super) fn submission(mode: Mode, code: String, opts: BatchSteps) -> Submission {
    let step = |kind, command: Option<String>| Outgoing::text(kind, command.unwrap_or_default());
    match mode {
        Mode::Query => Submission {
            messages: vec![Outgoing::text("code", code)],
            starts: true,
        },
        // Always all three: the manager's clients count the steps.
        Mode::Batch => Submission {
            messages: vec![
                step("clean", opts.clean),
                step("build", opts.build),
                step("exec", opts.exec),
            ],
            starts: true,
        },
        Mode::Input => Submission {
            messages: vec![Outgoing::text("input", code)],
            starts: false,
        },
        Mode::Continue => Submission {
            messages: Vec::new(),
            starts: false,
        },
    }
}

fn flush(seconds: Option<f64>) -> Duration {
    match seconds {
        None => LONGEST_POLL,
        Some(seconds) => Duration::try_from_secs_f64(seconds.max(0.0))
            .map_or(LONGEST_FLUSH, |flush| flush.min(LONGEST_FLUSH)),
    }
}

/// Brings records into the form of an API version.
fn assemble(run_id: String, taken: Taken, api_version: u32) -> ExecuteReply {
    let (status, exit_code, options) = match taken.ending {
        Ending::Continued => (Status::Continued, None, None),
        Ending::Step(Step::Clean, exit_code) => (Status::CleanFinished, exit_code, None),
        Ending::Step(Step::Build, exit_code) => (Status::BuildFinished, exit_code, None),
        Ending::Step(Step::Run, exit_code) => (Status::Finished, exit_code, None),
        Ending::WaitingInput(options) => (Status::WaitingInput, None, Some(options)),
    };
    let console = if api_version <= 1 {
        split(taken.records)
    } else {
        Console::Ordered(in_order(taken.records))
    };
    ExecuteReply {
        run_id,
        status,
        exit_code,
        options,
        console,
    }
}

fn split(records: Vec<Record>) -> Console {
    let (mut stdout, mut stderr, mut media, mut html) =
        (String::new(), String::new(), Vec::new(), Vec::new());
    for record in records {
        match record {
            Record::Text(Stream::Stdout, text) => stdout.push_str(&text),
            Record::Text(Stream::Stderr, text) => stderr.push_str(&text),
            Record::Text(Stream::Html, text) => html.push(text),
            Record::Media { mime, content } => media.push((mime, content)),
            Record::Text(Stream::Log, _) | Record::StepEnd(..) | Record::WaitingInput(_) => {}
        }
    }
    Console::Split {
        stdout,
        stderr,
        media,
        html,
    }
}

/// Consecutive pieces of standard output (or error) become one item.
fn in_order(records: Vec<Record>) -> Vec<ConsoleItem> {
    let mut items: Vec<ConsoleItem> = Vec::new();
    for record in records {
        match record {
            Record::Text(stream, text) => match items.last_mut() {
                Some(ConsoleItem::Text(last, before))
                    if *last == stream && matches!(stream, Stream::Stdout | Stream::Stderr) =>
                {
                    before.push_str(&text);
                }
                _ => items.push(ConsoleItem::Text(stream, text)),
            },
            Record::Media { mime, content } => items.push(ConsoleItem::Media(mime, content)),
            Record::StepEnd(..) | Record::WaitingInput(_) => {}
        }
    }
    items
}

/// Answer of `get_completions`; serialises as `{"result": {"status", "error", "suggestions"}}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompletionReply {
    /// Why there are none, if it failed.
    pub error: Option<String>,
    /// The suggestions.
    pub suggestions: Vec<String>,
}

impl Serialize for CompletionReply {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Body<'a> {
            status: &'static str,
            error: &'a Option<String>,
            suggestions: &'a [String],
        }
        let status = if self.error.is_none() {
            "finished"
        } else {
            "failed"
        };
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(
            "result",
            &Body {
                status,
                error: &self.error,
                suggestions: &self.suggestions,
            },
        )?;
        map.end()
    }
}

/// Asks the language runtime how `text` could go on, for at most `limit`.
pub async fn completions(
    link: &RunnerLink,
    text: &str,
    opts: Map<String, Value>,
    limit: Duration,
) -> CompletionReply {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        suggestions: Vec<String>,
    }
    let mut payload = Map::new();
    payload.insert("code".to_owned(), json!(text));
    payload.extend(opts);
    let message = Outgoing::json("complete", &Value::Object(payload));
    match link
        .ask(
            AnswerKind::Completion,
            message,
            limit,
            Duration::from_secs(30),
        )
        .await
    {
        Ok(answer) => match serde_json::from_slice::<Answer>(&answer) {
            Ok(answer) => CompletionReply {
                error: None,
                suggestions: answer.suggestions,
            },
            Err(err) => failed_completion(&LinkError::bad_answer("complete", err)),
        },
        Err(err) => failed_completion(&err),
    }
}

fn failed_completion(err: &dyn fmt::Display) -> CompletionReply {
    CompletionReply {
        error: Some(err.to_string()),
        suggestions: Vec::new(),
    }
}

/// Interrupts what the kernel runs.
///
/// # Errors
/// The link to the runner is closed or full.
pub fn interrupt(link: &RunnerLink) -> Result<(), LinkError> {
    link.interrupt()
}

/// Interrupts one run and no other.
///
/// # Errors
/// The link to the runner is closed or full.
pub fn interrupt_run(link: &RunnerLink, run_id: &str) -> Result<Interrupted, LinkError> {
    link.interrupt_run(run_id)
}

/// The runner's status, or `None` when it does not answer within 5 s.
pub async fn ping_kernel(link: &RunnerLink) -> Option<RunnerStatus> {
    link.status(PING_LIMIT).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(mode: Mode, flush_timeout: Option<f64>) -> ExecuteRequest {
        ExecuteRequest {
            run_id: Some("run".to_owned()),
            mode,
            code: "work".to_owned(),
            opts: BatchSteps::default(),
            api_version: 3,
            flush_timeout,
        }
    }

    /// Far below the real one.
    const LONGEST: Duration = Duration::from_millis(50);

    async fn never_back(mut request: ExecuteRequest) -> Result<ExecuteReply, ExecutionError> {
        let waited = back_within(LONGEST, &mut request, std::future::pending()).await;
        waited.map(|reply| reply.expect("it is not back"))
    }

    #[tokio::test]
    async fn a_restart_is_waited_for_as_long_as_the_caller_waits() {
        for mode in [Mode::Query, Mode::Batch, Mode::Input] {
            let refused = never_back(request(mode, Some(0.01))).await;
            assert!(matches!(refused, Err(ExecutionError::Restarting)));
        }
        for flush in [None, Some(0.01), Some(3000.0)] {
            let reply = never_back(request(Mode::Continue, flush)).await.unwrap();
            assert_eq!(
                (reply.run_id.as_str(), reply.status),
                ("run", Status::Continued)
            );
            assert_eq!(reply.console, Console::Ordered(Vec::new()));
        }
    }

    #[tokio::test]
    async fn after_a_restart_a_call_has_the_rest_of_its_time() {
        let rest = async |flush| {
            let mut query = request(Mode::Query, flush);
            // Its time begins when it is waited for, not before.
            let back = async { tokio::time::sleep(LONGEST).await };
            let waited = when_back(&mut query, back).await;
            assert!(waited.unwrap().is_none());
            query.flush_timeout.unwrap()
        };
        let longest = LONGEST_POLL.as_secs_f64();
        assert!(rest(None).await <= longest - LONGEST.as_secs_f64());
        assert_eq!(rest(Some(2.0)).await.to_bits(), 2.0_f64.to_bits());
    }
}
