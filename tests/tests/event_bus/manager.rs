//! The published classes of the manager's side read what this agent leaves.

use anyhow::{Context, Result, ensure};
use control::events::bus::console_logs::ConsoleLogs;
use control::events::bus::message::Message;
use control::events::{Event, Severity};
use control::heartbeat::{Identity, payload};
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
const TASK: &str = "29d8aebc-8d49-427a-9cce-86d5e75ebdb9";

#[tokio::test]
async fn the_managers_classes_read_the_same_values() -> Result<()> {
    let Some(python) = python::interpreter("event_bus")? else {
        return Ok(());
    };
    let redis = Redis::start()?;
    let (bus, events) = bus(&settings(redis.port))?;
    let kernel: KernelId = KERNEL.parse()?;
    let session: SessionId = SESSION.parse()?;
    let container: ContainerId = "c0de".repeat(16).parse()?;
    let creation_info = json!({
        "id": KERNEL, "container_id": container.to_string(), "kernel_host": "10.0.0.5",
        "repl_in_port": 2000, "repl_out_port": 2001, "stdin_port": 0, "stdout_port": 0,
        "service_ports": [], "attached_devices": {},
        "resource_spec": {"slots": {"cpu": "1"}, "allocations": {"cpu": {"cpu": {"0": "1"}}}},
    });
    for event in [
        Event::AgentStarted {
            reason: "self-started",
        },
        Event::KernelStarted {
            kernel,
            session,
            creation_info,
        },
        Event::KernelTerminated {
            kernel,
            session,
            reason: Reason::USER_REQUESTED,
            exit_code: Some(137),
        },
        Event::SessionFailure {
            session,
            reason: Reason::from_text("task-failed"),
            exit_code: 3,
        },
        Event::ImagePullFinished {
            image: "cr.example/stable/python:3.9".into(),
            agent: "i-evh".into(),
            message: None,
        },
        Event::AgentError {
            message: "an error".into(),
            trace: None,
            context: serde_json::Map::new(),
            severity: Severity::Warning,
        },
        Event::BgtaskUpdated {
            task: TASK.into(),
            current: 3,
            total: 9,
            message: Some("pulling".into()),
        },
    ] {
        events.emit(event);
    }
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

    // A console of several pieces, announced when it is there.
    let state = tempfile::tempdir()?;
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
    let said = tokio::task::spawn_blocking(move || {
        python::check(&python, "event_reader.py", &[&port, &id])
    })
    .await??;
    let read: Value = serde_json::from_str(&said).context("JSON from the reader")?;
    assert_eq!(read["log"], text);
    let entries = read["entries"].as_array().context("entries")?;
    let find = |name: &str| -> Result<&Value> {
        let entry = entries.iter().find(|entry| entry["name"] == name);
        let entry = entry.with_context(|| format!("{name} was not read: {read}"))?;
        ensure!(entry["source"] == "i-evh", "{entry}");
        Ok(&entry["event"])
    };
    assert_eq!(find("agent_started")?, &json!({"reason": "self-started"}));
    let ended = find("kernel_terminated")?;
    assert_eq!(ended["kernel_id"], json!({"UUID": KERNEL}));
    assert_eq!(ended["session_id"], json!({"UUID": SESSION}));
    assert_eq!(
        (&ended["reason"], &ended["exit_code"]),
        (&json!("user-requested"), &json!(137))
    );
    let started = find("kernel_started")?;
    assert_eq!(started["creation_info"]["repl_in_port"], 2000);
    assert_eq!(
        started["creation_info"]["resource_spec"]["slots"]["cpu"],
        "1"
    );
    let failed = find("session_failure")?;
    assert_eq!(
        (&failed["reason"], &failed["exit_code"]),
        (&json!("task-failed"), &json!(3))
    );
    assert_eq!(
        find("image_pull_finished")?["image"],
        "cr.example/stable/python:3.9"
    );
    assert_eq!(find("agent_error")?["severity"], "WARNING");
    assert_eq!(
        find("do_sync_kernel_logs")?["container_id"],
        container.to_string()
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
    let cached = &read["cached"][0];
    assert_eq!(cached["name"], "bgtask_updated");
    assert_eq!(cached["event"]["current_progress"], 3);
    Ok(())
}
