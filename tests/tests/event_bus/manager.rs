//! The published classes of the manager's side read what this agent leaves.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use control::events::bus::console_logs::ConsoleLogs;
use control::events::bus::message::Message;
use control::events::{Delivery, Event, Severity, VolumeAnswer};
use control::heartbeat::{Identity, payload, status};
use control::kernel::kept_logs::KeptLogs;
use control::kernel::lifecycle::Reason;
use control::resource::{AvailableSlot, PluginFacts, SlotType};
use harness::python;
use harness::redis::Redis;
use serde_json::{Value, json};
use shared::ids::{ContainerId, KernelId, SessionId};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{LIMIT, bus, drained, settings};

const KERNEL: &str = "7b4d2a9f-0000-4000-8000-0000000000b2";
const SESSION: &str = "5a3c1f6e-0000-4000-8000-0000000000a1";
/// Names of the events that leave the node, without the two reports of its state.
const NAMES: usize = 26;

/// One event of each kind that leaves the node, two of those that come in two forms.
fn every_event(kernel: KernelId, session: SessionId, container: ContainerId) -> Vec<Event> {
    let image = || "cr.example/stable/python:3.9".to_owned();
    let agent = || "i-evh".to_owned();
    // A broadcast of a task is kept under its id.
    let task = |n: u8| format!("29d8aebc-8d49-427a-9cce-86d5e75ebdb{n}");
    let answer = |error: Option<&str>| VolumeAnswer {
        agent: agent(),
        path: "/mnt/vol1".into(),
        quota_scope: "user:c0ffee00-0000-4000-8000-000000000001".into(),
        error: error.map(str::to_owned),
    };
    let creation_info = json!({
        "id": KERNEL, "container_id": container.to_string(), "kernel_host": "10.0.0.5",
        "repl_in_port": 2000, "repl_out_port": 2001, "stdin_port": 0, "stdout_port": 0,
        "service_ports": [], "attached_devices": {},
        "resource_spec": {"slots": {"cpu": "1"}, "allocations": {"cpu": {"cpu": {"0": "1"}}}},
    });
    vec![
        Event::AgentStarted {
            reason: "self-started",
        },
        Event::AgentTerminated { reason: "shutdown" },
        Event::DoAgentResourceCheck { agent: agent() },
        Event::AgentImagesRemove {
            images: vec![image(), "cr.example/stable/gone:1".into()],
        },
        Event::AgentError {
            message: "an error".into(),
            trace: Some("its cause".into()),
            context: serde_json::Map::from_iter([("kernel_id".to_owned(), json!(KERNEL))]),
            severity: Severity::Warning,
        },
        Event::KernelPreparing { kernel, session },
        Event::KernelPulling {
            kernel,
            session,
            image: image(),
        },
        Event::KernelCreating { kernel, session },
        Event::KernelStarted {
            kernel,
            session,
            creation_info: (&creation_info).into(),
        },
        Event::KernelTerminated {
            kernel,
            session,
            reason: Reason::USER_REQUESTED,
            exit_code: Some(137),
        },
        Event::DoSyncKernelLogs { kernel, container },
        Event::SessionSuccess {
            session,
            reason: Reason::from_text("task-finished"),
            exit_code: 0,
        },
        Event::SessionFailure {
            session,
            reason: Reason::from_text("task-failed"),
            exit_code: 3,
        },
        Event::SessionFailure {
            session,
            reason: Reason::from_text("task-timeout"),
            exit_code: -2,
        },
        Event::ExecutionStarted { session },
        Event::ExecutionFinished { session },
        Event::ExecutionCancelled { session },
        Event::ModelServiceStatusUpdated {
            session,
            status: "unhealthy",
        },
        Event::ModelServiceStatusUpdated {
            session,
            status: "healthy",
        },
        Event::ImagePullStarted {
            image: image(),
            agent: agent(),
        },
        Event::ImagePullFinished {
            image: image(),
            agent: agent(),
            message: None,
        },
        Event::ImagePullFinished {
            image: image(),
            agent: agent(),
            message: Some("Image already exists".into()),
        },
        Event::ImagePullFailed {
            image: image(),
            agent: agent(),
            message: "no such image".into(),
        },
        Event::BgtaskUpdated {
            task: task(1),
            current: 3,
            total: 9,
            message: Some("pulling".into()),
        },
        Event::BgtaskDone {
            task: task(2),
            message: None,
        },
        Event::BgtaskFailed {
            task: task(3),
            message: "it failed".into(),
        },
        Event::BgtaskCancelled { task: task(4) },
        Event::VolumeMounted(answer(None)),
        Event::VolumeUnmounted(answer(Some("busy"))),
    ]
}

/// What the manager's class of this event holds; a kind without a line here does not compile.
fn as_read(event: &Event) -> Value {
    let id = |id: &dyn ToString| json!({"UUID": id.to_string()});
    match event {
        Event::AgentStarted { reason } | Event::AgentTerminated { reason } => {
            json!({"reason": reason})
        }
        Event::DoAgentResourceCheck { agent } => json!({"agent_id": agent}),
        Event::AgentImagesRemove { images } => json!({"image_canonicals": images}),
        Event::AgentError {
            message,
            trace,
            context,
            severity,
        } => json!({
            "message": message, "traceback": trace, "user": null, "context_env": context, "severity": severity.as_str(),
        }),
        Event::KernelPreparing { kernel, session } | Event::KernelCreating { kernel, session } => {
            json!({"kernel_id": id(kernel), "session_id": id(session), "reason": "", "creation_info": {}})
        }
        Event::KernelPulling {
            kernel,
            session,
            image,
        } => {
            json!({"kernel_id": id(kernel), "session_id": id(session), "reason": image, "creation_info": {}})
        }
        Event::KernelStarted {
            kernel,
            session,
            creation_info,
        } => {
            json!({"kernel_id": id(kernel), "session_id": id(session), "reason": "", "creation_info": creation_info})
        }
        Event::KernelTerminated {
            kernel,
            session,
            reason,
            exit_code,
        } => {
            json!({"kernel_id": id(kernel), "session_id": id(session), "reason": reason.as_str(), "exit_code": exit_code})
        }
        Event::DoSyncKernelLogs { kernel, container } => {
            json!({"kernel_id": id(kernel), "container_id": container.to_string()})
        }
        Event::KernelProgress { .. } => Value::Null,
        Event::SessionSuccess {
            session,
            reason,
            exit_code,
        }
        | Event::SessionFailure {
            session,
            reason,
            exit_code,
        } => {
            json!({"session_id": id(session), "reason": reason.as_str(), "exit_code": exit_code})
        }
        Event::ExecutionStarted { session }
        | Event::ExecutionFinished { session }
        | Event::ExecutionCancelled { session } => json!({"session_id": id(session)}),
        Event::ModelServiceStatusUpdated { session, status } => {
            json!({"session_id": id(session), "new_status": status})
        }
        Event::ImagePullStarted { image, agent } => {
            json!({"image": image, "agent_id": agent, "image_ref": null})
        }
        Event::ImagePullFinished {
            image,
            agent,
            message,
        } => json!({"image": image, "agent_id": agent, "msg": message, "image_ref": null}),
        Event::ImagePullFailed {
            image,
            agent,
            message,
        } => json!({"image": image, "agent_id": agent, "msg": message, "image_ref": null}),
        Event::BgtaskUpdated {
            task,
            current,
            total,
            message,
        } => {
            json!({"task_id": id(task), "current_progress": current, "total_progress": total, "message": message})
        }
        Event::BgtaskDone { task, message } => json!({"task_id": id(task), "message": message}),
        Event::BgtaskFailed { task, message } => json!({"task_id": id(task), "message": message}),
        Event::BgtaskCancelled { task } => {
            json!({"task_id": id(task), "message": "Task cancelled"})
        }
        Event::VolumeMounted(answer) | Event::VolumeUnmounted(answer) => json!({
            "node_id": answer.agent, "node_type": "agent", "mount_path": answer.path,
            "quota_scope_id": answer.quota_scope, "err_msg": answer.error,
        }),
    }
}

/// Compares the events of one way, in their order; `at` times are the server's.
fn compare(read: &Value, sent: &[&Event]) -> Result<()> {
    let read = read.as_array().context("a list")?;
    assert_eq!(read.len(), sent.len(), "{read:#?}");
    for (entry, event) in read.iter().zip(sent) {
        let mut found = entry["event"].clone();
        if let Some(at) = found.as_object_mut().context("fields")?.remove("timestamp") {
            let now = control::events::unix_seconds(std::time::SystemTime::now());
            let at = at.as_f64().context("seconds")?;
            ensure!((now - 120.0..=now).contains(&at), "{entry}");
        }
        assert_eq!(entry["name"], event.name());
        assert_eq!(entry["source"], "i-evh", "{entry}");
        assert_eq!(found, as_read(event), "{}", event.name());
    }
    Ok(())
}

#[tokio::test]
async fn the_managers_classes_read_the_same_values() -> Result<()> {
    let Some(python) = python::interpreter("event_bus")? else {
        return Ok(());
    };
    let redis = Redis::start()?;
    let mut listener = redis.client()?;
    listener.ask(&["SUBSCRIBE", "events_all"])?;
    let (bus, events) = bus(&settings(redis.port))?;
    let kernel: KernelId = KERNEL.parse()?;
    let session: SessionId = SESSION.parse()?;
    let container: ContainerId = "c0de".repeat(16).parse()?;
    let sent = every_event(kernel, session, container);
    let names: BTreeSet<&str> = sent.iter().map(Event::name).collect();
    assert_eq!(names.len(), NAMES, "{names:?}");
    for event in &sent {
        events.emit(event.clone());
    }
    drained(&bus).await?;
    let console = Event::DoSyncKernelLogs { kernel, container };
    let by = |ways: [Delivery; 2]| -> Vec<&Event> {
        // That of the console is sent by who brings it, below.
        let goes = |event: &&Event| ways.contains(&event.delivery()) && **event != console;
        sent.iter().filter(goes).collect()
    };
    let broadcasts = by([Delivery::Broadcast, Delivery::Both]);
    let state = tempfile::tempdir()?;
    let heard = state.path().join("heard");
    let mut lines = String::new();
    for _ in &broadcasts {
        lines += std::str::from_utf8(listener.read()?.item(2)?.bytes()?)?;
        lines.push('\n');
    }
    std::fs::write(&heard, lines)?;

    let slot = |name: &str, kind, amount: u64| AvailableSlot {
        name: name.into(),
        kind,
        amount: amount.into(),
    };
    let identity = Identity {
        ip: "10.0.0.5".into(),
        region: "local".into(),
        address: "tcp://10.0.0.5:6001".into(),
        public_key: Some("q".repeat(40)),
        public_host: "10.0.0.5".into(),
        architecture: "x86_64".into(),
        ends_abusing_kernels: false,
    };
    let args = payload::args(
        &identity,
        "default",
        &[
            slot("cpu", SlotType::Count, 7),
            slot("mem", SlotType::Bytes, 66_571_993_088),
        ],
        &["cpu", "mem"].map(|name| (name.to_owned(), PluginFacts::default())),
        bytes::Bytes::new(),
    );
    bus.publish(Message::report("agent_heartbeat", args)?);
    let active = status::Active {
        container_id: container.to_string(),
        kernel_id: KERNEL.into(),
        status: "running".into(),
    };
    let kernels = [
        (kernel, Some(container.to_string())),
        (KernelId([1; 16]), None),
    ];
    let args = status::args("i-evh", &[active], &kernels);
    bus.publish(Message::report("agent_status_heartbeat", args)?);
    drained(&bus).await?;

    // A console of several pieces, announced when it is there.
    let logs = KeptLogs::open(state.path(), "i-evh")?;
    let text = "a line of output, also of é\n".repeat(10_000);
    logs.store(kernel, &text)?;
    logs.to_ship(kernel, container)?;
    let tasks = TaskTracker::new();
    let stopping = CancellationToken::new();
    let consoles = ConsoleLogs::start(
        &bus,
        logs,
        events.clone(),
        64 << 10,
        &tasks,
        stopping.clone(),
    );
    consoles.ship(kernel, container);
    harness::wait::until("the console is announced", LIMIT, || {
        let stream = redis.stream().unwrap_or_default();
        let told = stream
            .iter()
            .any(|entry| entry.text("name") == "do_sync_kernel_logs");
        async move { told.then_some(()) }
    })
    .await?;
    drained(&bus).await?;
    stopping.cancel();

    let port = redis.port.to_string();
    let id = container.to_string();
    let file = heard.to_string_lossy().into_owned();
    let said = tokio::task::spawn_blocking(move || {
        python::check(&python, "event_reader.py", &[&port, &id, &file])
    })
    .await??;
    let read: Value = serde_json::from_str(&said).context("JSON from the reader")?;
    assert_eq!(read["log"], text);
    let entries = read["entries"].as_array().context("entries")?;
    let find = |name: &str| -> Result<&Value> {
        let mut found = entries.iter().filter(|entry| entry["name"] == name);
        let entry = found.next_back();
        let entry = entry.with_context(|| format!("{name} was not read: {read}"))?;
        ensure!(entry["source"] == "i-evh", "{entry}");
        Ok(&entry["event"])
    };
    let anycasts = by([Delivery::Anycast, Delivery::Both]);
    // The reports and the console's announcement come after them.
    let (first, reports) = entries.split_at(anycasts.len().min(entries.len()));
    compare(&json!(first), &anycasts)?;
    assert_eq!(reports.len(), 3, "{reports:#?}");
    compare(&read["heard"], &broadcasts)?;
    let tasks: Vec<&Event> = broadcasts
        .iter()
        .copied()
        .filter(|event| event.name().starts_with("bgtask_"))
        .collect();
    compare(&read["cached"], &tasks)?;
    assert_eq!(find("do_sync_kernel_logs")?, &as_read(&console));
    let status = find("agent_status_heartbeat")?;
    assert_eq!(
        status["active_containers"],
        json!([{"container_id": container.to_string(), "kernel_id": {"UUID": KERNEL}, "status": "running"}])
    );
    assert_eq!(
        status["active_kernels"],
        json!([
            {"kernel_id": {"UUID": KERNEL}, "container_id": container.to_string()},
            {"kernel_id": {"UUID": KernelId([1; 16]).to_string()}, "container_id": null},
        ])
    );
    let info = &find("agent_heartbeat")?["agent_info"];
    assert_eq!(
        info["available_resource_slots"],
        json!({"cpu": {"Decimal": "7"}, "mem": {"Decimal": "66571993088"}})
    );
    assert_eq!(
        info["slot_key_and_units"],
        json!({"cpu": "count", "mem": "bytes"})
    );
    assert_eq!(info["public_key"], json!({"bytes": "71".repeat(40)}));
    assert_eq!(info["scaling_group"], "default");
    let beat = entries
        .iter()
        .find(|entry| entry["name"] == "agent_heartbeat");
    let beat = beat.context("a heartbeat")?;
    assert_eq!(
        (&beat["slots_type"], &beat["images"]),
        (&json!("ResourceSlot"), &json!([]))
    );
    Ok(())
}
