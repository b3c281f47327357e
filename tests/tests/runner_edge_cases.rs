//! What rarely happens between agent and runner, as captured from the real runner: failing and empty
//! steps, bytes that are no text, services that cannot start, a command killed for its memory. Each
//! capture is replayed and the reply the manager gets is compared with it.

use anyhow::{Context, Result, ensure};
use control::kernel::execution::{
    self, BatchSteps, COMPLETION_LIMIT, ExecuteReply, ExecuteRequest, Mode, Status, completions,
};
use control::kernel::runner_link::{LinkOptions, RunnerLink};
use control::kernel::services::{self, ServiceReply, ServiceStart};
use harness::fake_runner::{FakeRunner, frame_bytes, logged_frames, vector};
use serde_json::{Value, json};
use shared::ids::KernelId;

fn link_to(runner: &FakeRunner) -> RunnerLink {
    RunnerLink::open(KernelId([9; 16]), runner.address, LinkOptions::default())
}

/// A message: its kind and payload.
type Message = (String, Vec<u8>);

fn message(frames: &Value) -> Result<Message> {
    let kind = String::from_utf8(frame_bytes(&frames[0])?)?;
    Ok((kind, frame_bytes(&frames[1])?))
}

fn messages(list: &Value) -> Result<Vec<Message>> {
    let list = list.as_array().context("messages")?;
    list.iter().map(message).collect()
}

/// The case of this name: what the agent sends and what the runner answers.
fn case(cases: &Value, name: &str) -> Result<(Vec<Message>, Vec<Message>)> {
    let cases = cases.as_array().context("cases")?;
    let case = cases
        .iter()
        .find(|case| case["case"] == name)
        .with_context(|| format!("no case {name}"))?;
    Ok((messages(&case["send"])?, messages(&case["recv"])?))
}

async fn step(link: &RunnerLink, run: &str, mode: Mode, opts: BatchSteps) -> Result<ExecuteReply> {
    let request = ExecuteRequest {
        run_id: Some(run.to_owned()),
        mode,
        code: String::new(),
        opts,
        api_version: 1,
        flush_timeout: Some(5.0),
    };
    Ok(execution::execute(link, request).await?)
}

/// Runs a batch to its end: the exit code of each step, and all of both outputs.
async fn batch(
    link: &RunnerLink,
    run: &str,
    opts: BatchSteps,
) -> Result<(Vec<Option<i64>>, String, String)> {
    let (mut codes, mut stdout, mut stderr) = (Vec::new(), String::new(), String::new());
    let mut reply = step(link, run, Mode::Batch, opts).await?;
    loop {
        let value = serde_json::to_value(&reply)?;
        stdout += value["stdout"].as_str().context("stdout")?;
        stderr += value["stderr"].as_str().context("stderr")?;
        if reply.status != Status::Continued {
            codes.push(reply.exit_code);
        }
        if reply.status == Status::Finished {
            return Ok((codes, stdout, stderr));
        }
        reply = step(link, run, Mode::Continue, BatchSteps::default()).await?;
    }
}

/// What both outputs of the runner's answers hold, as text.
fn printed(answers: &[Message], stream: &str) -> String {
    let bytes: Vec<u8> = answers
        .iter()
        .filter(|(kind, _)| kind == stream)
        .flat_map(|(_, payload)| payload.clone())
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn exit_codes(answers: &[Message]) -> Result<Vec<Option<i64>>> {
    answers
        .iter()
        .filter(|(kind, _)| kind.ends_with("finished"))
        .map(|(_, payload)| Ok(serde_json::from_slice::<Value>(payload)?["exitCode"].as_i64()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_that_fail_and_print_what_is_no_text() -> Result<()> {
    const DONE: &[u8] = br#"{"exitCode": 0}"#;
    let cases = vector("edge_cases")?;
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    for name in [
        "batch-exit-7",
        "exec-empty",
        "build-fail-then-exec",
        "command-not-found",
        "non-utf8-bytes",
        "exec-after-failed-build-consumed",
    ] {
        let (sent, answered) = case(&cases, name)?;
        let command = |kind: &str| {
            let found = sent.iter().find(|(sent, _)| sent == kind);
            found.map(|(_, payload)| String::from_utf8_lossy(payload).into_owned())
        };
        let opts = BatchSteps {
            clean: command("clean"),
            build: command("build"),
            exec: command("exec"),
        };
        // The agent always sends all three steps; the runner's answers to those that the capture
        // left out are the ones it gave to empty steps.
        let mut answers = Vec::new();
        for (kind, end) in [("clean", "clean-finished"), ("build", "build-finished")] {
            if command(kind).is_none() {
                answers.push((end.to_owned(), DONE.to_vec()));
            }
        }
        answers.extend(answered);
        let play = async {
            for kind in ["clean", "build", "exec"] {
                runner
                    .expect(kind, &command(kind).unwrap_or_default())
                    .await?;
            }
            for (kind, payload) in &answers {
                runner.send(kind, payload.clone());
            }
            anyhow::Ok(())
        };
        let (found, ()) = tokio::try_join!(batch(&link, name, opts), play)?;
        let expected = (
            exit_codes(&answers)?,
            printed(&answers, "stdout"),
            printed(&answers, "stderr"),
        );
        ensure!(found == expected, "{name}: {found:?}, not {expected:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn code_for_a_runtime_without_a_language_server_ends_with_127() -> Result<()> {
    let cases = vector("edge_cases")?;
    let (sent, answered) = case(&cases, "code-without-jupyter")?;
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let code = String::from_utf8(sent[0].1.clone())?;
    let request = ExecuteRequest {
        run_id: Some("q".to_owned()),
        mode: Mode::Query,
        code: code.clone(),
        opts: BatchSteps::default(),
        api_version: 3,
        flush_timeout: Some(5.0),
    };
    let play = async {
        runner.expect("code", &code).await?;
        runner.send(&answered[0].0, answered[0].1.clone());
        Ok(())
    };
    let client = async { anyhow::Ok(execution::execute(&link, request).await?) };
    let (reply, ()) = tokio::try_join!(client, play)?;
    ensure!(reply.status == Status::Finished && reply.exit_code == Some(127));
    Ok(())
}

fn service_of(payload: &[u8]) -> Result<ServiceStart> {
    let wanted: Value = serde_json::from_slice(payload)?;
    Ok(ServiceStart {
        name: wanted["name"].as_str().context("name")?.to_owned(),
        ports: serde_json::from_value(wanted["ports"].clone())?,
        protocol: wanted["protocol"].as_str().context("protocol")?.to_owned(),
        options: serde_json::from_value(wanted["options"].clone())?,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn services_that_cannot_start_say_why() -> Result<()> {
    let cases = vector("edge_cases")?;
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    for name in [
        "svc-pty",
        "svc-unsupported",
        "svc-exe-missing",
        "svc-running",
        "svc-preopen",
        "svc-restart",
        "model-bad-dir",
    ] {
        let (sent, answered) = case(&cases, name)?;
        let (kind, payload) = &sent[0];
        let play = async {
            runner
                .expect(kind, &String::from_utf8_lossy(payload))
                .await?;
            runner.send(&answered[0].0, answered[0].1.clone());
            anyhow::Ok(())
        };
        let client = async {
            anyhow::Ok(if kind == "start-model-service" {
                services::start_model_service(&link, &serde_json::from_slice(payload)?).await
            } else {
                services::start_service(&link, service_of(payload)?).await
            })
        };
        let (reply, ()) = tokio::try_join!(client, play)?;
        let expected: ServiceReply = serde_json::from_slice(&answered[0].1)?;
        ensure!(reply == expected, "{name}: {reply:?}, not {expected:?}");
    }
    // Answered for the runner, whose answer would come before those of other models.
    let (sent, answered) = case(&cases, "model-no-service")?;
    let model = serde_json::from_slice(&sent[0].1)?;
    let reply = services::start_model_service(&link, &model).await;
    ensure!(
        reply == serde_json::from_slice(&answered[0].1)?,
        "{reply:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_sent_while_another_one_is_being_started() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let models = ["slow", "none", "second"].map(|name| {
        let service = json!({"port": 8000, "start_command": "serve"});
        json!({"name": name, "service": (name != "none").then_some(service)})
    });
    let starts = models
        .iter()
        .map(|model| services::start_model_service(&link, model));
    let play = async {
        for name in ["slow", "second"] {
            let (kind, payload) = runner.receive().await?;
            let model: Value = serde_json::from_slice(&payload)?;
            ensure!(
                kind == "start-model-service" && model["name"] == name,
                "{model}"
            );
        }
        for status in ["started", "failed"] {
            let answer = json!({"status": status}).to_string();
            runner.send("model-service-result", answer.into_bytes());
        }
        anyhow::Ok(())
    };
    let (replies, played) = tokio::join!(futures_util::future::join_all(starts), play);
    played?;
    let told: Vec<&str> = replies.iter().map(|reply| reply.status.as_str()).collect();
    assert_eq!(told, ["started", "failed", "failed"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_completions_are_an_empty_list() -> Result<()> {
    let (_, answered) = case(&vector("edge_cases")?, "complete-empty")?;
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let play = async {
        let (kind, _) = runner.receive().await?;
        ensure!(kind == "complete", "{kind}");
        runner.send(&answered[0].0, answered[0].1.clone());
        Ok(())
    };
    let client = async {
        anyhow::Ok(completions(&link, "", serde_json::Map::new(), COMPLETION_LIMIT).await)
    };
    let (reply, ()) = tokio::try_join!(client, play)?;
    ensure!(
        serde_json::to_value(&reply)?
            == json!({"result": {"status": "finished", "error": null, "suggestions": []}}),
        "{reply:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_images_own_services_start_as_captured() -> Result<()> {
    let capture = vector("service_defs")?;
    let log = logged_frames(&capture["frames"]["A full options"])?;
    let results = &capture["rpc_results"];
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    // The same requests, in the capture's order, each with the name of its result.
    let names = [
        "webapp",
        "webapp2",
        "webapp_badarg",
        "webapp_badenv",
        "webapp_okenv",
        "missing",
        "pre",
        "p9000",
        "fast",
    ];
    let mut wanted = Vec::new();
    for frame in log.iter().filter(|frame| frame.kind == "start-service") {
        wanted.push(service_of(&frame.payload)?);
    }
    ensure!(wanted.len() == names.len());
    let talk: Vec<_> = log
        .into_iter()
        .filter(|frame| frame.kind.contains("service"))
        .collect();
    let client = async {
        for (service, name) in wanted.into_iter().zip(names) {
            if name == "webapp_badarg" {
                services::shutdown_service(&link, "webapp");
            }
            let reply = services::start_service(&link, service).await;
            let found = serde_json::to_value(&reply)?;
            ensure!(found == results[name], "{name}: {found}");
        }
        Ok(())
    };
    tokio::try_join!(client, runner.replay(&talk))?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_killed_for_its_memory_ends_with_137() -> Result<()> {
    let capture = vector("oom_batch")?;
    let mut log = logged_frames(&capture["C run"])?;
    log.extend(logged_frames(&capture["C cont"])?);
    let command = log
        .iter()
        .find(|frame| frame.kind == "exec")
        .map(|frame| String::from_utf8_lossy(&frame.payload).into_owned());
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let client = async {
        let opts = BatchSteps {
            exec: command,
            ..BatchSteps::default()
        };
        let first = step(&link, "oom", Mode::Batch, opts).await?;
        ensure!(first.status == Status::CleanFinished, "{first:?}");
        let next = || step(&link, "oom", Mode::Continue, BatchSteps::default());
        let second = next().await?;
        ensure!(second.status == Status::BuildFinished, "{second:?}");
        link.notify_oom()?;
        let last = next().await?;
        ensure!(
            last.status == Status::Finished && last.exit_code == Some(137),
            "{last:?}"
        );
        ensure!(serde_json::to_value(&last)?["stderr"] == "Killed\n");
        Ok(())
    };
    tokio::try_join!(client, runner.replay(&log))?;
    Ok(())
}
