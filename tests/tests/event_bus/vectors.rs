//! Every event this agent sends, byte for byte as the published agent sends it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use control::events::bus::VolumeRequest;
use control::events::bus::message::Message;
use control::events::bus::volumes::read_request;
use control::events::{Event, Severity, VolumeAnswer};
use control::kernel::lifecycle::Reason;
use serde_json::Value;

const FILES: [&str; 6] = ["agent", "kernel", "session", "image", "bgtask", "volume"];

fn load(name: &str) -> Result<Vec<Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("vectors/events/{name}.json"));
    let file: Value = serde_json::from_slice(&std::fs::read(&path)?)
        .with_context(|| format!("{}", path.display()))?;
    let lists = file.as_object().context("an object")?.values();
    Ok(lists
        .filter_map(Value::as_array)
        .flatten()
        .filter(|vector| vector.get("args_hex").is_some())
        .cloned()
        .collect())
}

fn text(args: &Value, at: impl serde_json::value::Index + std::fmt::Display) -> Result<String> {
    let text = args[&at].as_str();
    Ok(text
        .with_context(|| format!("text {at} of {args}"))?
        .to_owned())
}

/// A recorded event with texts in the place of pickled enums and without the pickled image: the
/// same bytes but for these.
fn plain(vector: &Value) -> Result<Value> {
    let (mut args, mut hex) = (vector["args_decoded"].clone(), text(vector, "args_hex")?);
    let items = args.as_array_mut().context("a list")?;
    for item in items.iter_mut().filter(|item| item["$ext"] == 6) {
        let (data, means) = (text(item, "data_hex")?, text(item, "means")?);
        let pickle = format!("c7{:02x}06{data}", data.len() / 2);
        ensure!(hex.contains(&pickle) && means.len() < 32, "{item}");
        let bytes: String = means.bytes().map(|byte| format!("{byte:02x}")).collect();
        hex = hex.replace(&pickle, &format!("{:02x}{bytes}", 0xa0 + means.len()));
        *item = means.into();
    }
    if let Some(image) = items.pop_if(|item| item["$ext"] == 7) {
        let data = text(&image, "data_hex")?;
        let (bytes, count) = (data.len() / 2, items.len());
        let pickle = match bytes {
            ..256 => format!("c7{bytes:02x}07{data}"),
            _ => format!("c8{bytes:04x}07{data}"),
        };
        let rest = hex.strip_suffix(&pickle).context("it comes last")?;
        hex = format!("{:02x}{}", 0x90 + count, &rest[2..]);
    }
    let mut vector = vector.clone();
    if let Some(payload) = vector["payload_text"].as_str() {
        let mut payload: Value = serde_json::from_str(payload)?;
        payload["args"] = STANDARD.encode(bytes_of(&hex)?).into();
        vector["payload_text"] = payload.to_string().into();
    }
    vector["args_decoded"] = args;
    vector["args_hex"] = hex.into();
    Ok(vector)
}

fn bytes_of(hex: &str) -> Result<Vec<u8>> {
    (0..hex.len() / 2)
        .map(|at| Ok(u8::from_str_radix(&hex[2 * at..2 * at + 2], 16)?))
        .collect()
}

/// The event whose arguments these are, as this agent would make it; `None` for those it never
/// sends and for forms that need a pickle, for which it sends a plain form.
fn event(name: &str, args: &Value) -> Result<Option<Event>> {
    if args.to_string().contains("\"$ext\"") {
        return Ok(None);
    }
    let reason = |at| -> Result<Reason> { Ok(Reason::from_text(&text(args, at)?)) };
    let word = |word: &'static str| -> Result<&'static str> {
        ensure!(
            args[args.as_array().map_or(0, Vec::len) - 1] == word,
            "{args}"
        );
        Ok(word)
    };
    let optional = |at: usize| args[at].as_str().map(str::to_owned);
    let answer = || -> Result<VolumeAnswer> {
        Ok(VolumeAnswer {
            agent: text(args, 0)?,
            path: text(args, 2)?,
            quota_scope: text(args, 3)?,
            error: optional(4),
        })
    };
    Ok(Some(match name {
        "agent_started" => Event::AgentStarted {
            reason: word("self-started")?,
        },
        "agent_terminated" => Event::AgentTerminated {
            reason: word("shutdown")?,
        },
        "agent_error" => Event::AgentError {
            message: text(args, 0)?,
            trace: optional(1),
            context: args[3].as_object().cloned().unwrap_or_default(),
            severity: Severity::Error,
        },
        "agent_images_remove" => Event::AgentImagesRemove {
            images: serde_json::from_value(args[0].clone())?,
        },
        "do_agent_resource_check" => Event::DoAgentResourceCheck {
            agent: text(args, 0)?,
        },
        "kernel_preparing" => Event::KernelPreparing {
            kernel: text(args, 0)?.parse()?,
            session: text(args, 1)?.parse()?,
        },
        "kernel_pulling" => Event::KernelPulling {
            kernel: text(args, 0)?.parse()?,
            session: text(args, 1)?.parse()?,
            image: text(args, 2)?,
        },
        "kernel_creating" => Event::KernelCreating {
            kernel: text(args, 0)?.parse()?,
            session: text(args, 1)?.parse()?,
        },
        "kernel_started" => Event::KernelStarted {
            kernel: text(args, 0)?.parse()?,
            session: text(args, 1)?.parse()?,
            creation_info: (&args[3]).into(),
        },
        "kernel_terminated" => Event::KernelTerminated {
            kernel: text(args, 0)?.parse()?,
            session: text(args, 1)?.parse()?,
            reason: reason(2)?,
            exit_code: args[3].as_i64(),
        },
        "do_sync_kernel_logs" => Event::DoSyncKernelLogs {
            kernel: text(args, 0)?.parse()?,
            container: text(args, 1)?.parse()?,
        },
        "session_success" => Event::SessionSuccess {
            session: text(args, 0)?.parse()?,
            reason: reason(1)?,
            exit_code: args[2].as_i64().context("a code")?,
        },
        "session_failure" => Event::SessionFailure {
            session: text(args, 0)?.parse()?,
            reason: reason(1)?,
            exit_code: args[2].as_i64().context("a code")?,
        },
        "execution_started" => Event::ExecutionStarted {
            session: text(args, 0)?.parse()?,
        },
        "execution_finished" => Event::ExecutionFinished {
            session: text(args, 0)?.parse()?,
        },
        "model_service_status_updated" => Event::ModelServiceStatusUpdated {
            session: text(args, 0)?.parse()?,
            status: match args[1].as_str() {
                Some("healthy") => "healthy",
                _ => word("unhealthy")?,
            },
        },
        "image_pull_started" => Event::ImagePullStarted {
            image: text(args, 0)?,
            agent: text(args, 1)?,
        },
        // Sent with four arguments.
        "image_pull_finished" if args.as_array().is_some_and(|args| args.len() == 4) => {
            Event::ImagePullFinished {
                image: text(args, 0)?,
                agent: text(args, 1)?,
                message: optional(3),
            }
        }
        "image_pull_failed" => Event::ImagePullFailed {
            image: text(args, 0)?,
            agent: text(args, 1)?,
            message: text(args, 2)?,
        },
        // Progress in fractions is not sent.
        "bgtask_updated" if args[1].is_u64() => Event::BgtaskUpdated {
            task: text(args, 0)?,
            current: args[1].as_u64().context("a count")?,
            total: args[2].as_u64().context("a count")?,
            message: optional(3),
        },
        "bgtask_done" => Event::BgtaskDone {
            task: text(args, 0)?,
            message: optional(1),
        },
        "bgtask_failed" => Event::BgtaskFailed {
            task: text(args, 0)?,
            message: text(args, 1)?,
        },
        "bgtask_cancelled" => Event::BgtaskCancelled {
            task: text(args, 0)?,
        },
        "volume_mounted" => Event::VolumeMounted(answer()?),
        "volume_unmounted" => Event::VolumeUnmounted(answer()?),
        _ => return Ok(None),
    }))
}

#[test]
fn events_are_the_published_agents_bytes() -> Result<()> {
    let mut compared: BTreeMap<String, usize> = BTreeMap::new();
    for file in FILES {
        for vector in load(file)? {
            let vector = plain(&vector)?;
            let name = vector["name"].as_str().context("a name")?;
            let args = &vector["args_decoded"];
            let Some(event) = event(name, args)? else {
                continue;
            };
            // Pulls have the time there, others an exit code.
            let seconds = args[2].as_f64().unwrap_or(0.0).max(0.0);
            let at = UNIX_EPOCH + Duration::from_secs_f64(seconds);
            let message = Message::of(&event, at)?.context("it leaves the node")?;
            let hex: String = message.args.iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(
                hex,
                vector["args_hex"].as_str().context("bytes")?,
                "{name} {args}"
            );
            if vector["delivery"] == "broadcast" {
                assert!(message.broadcast, "{name}");
                assert_eq!(
                    message.channel_text("i-evh"),
                    vector["payload_text"],
                    "{name}"
                );
                let cache = vector["cache"]["key"].as_str().map(str::to_owned);
                assert_eq!(message.cache, cache, "{name}");
            } else {
                assert!(message.anycast, "{name}");
            }
            *compared.entry(name.to_owned()).or_default() += 1;
        }
    }
    // Every event that this agent sends, except reports of state, which have their own test.
    assert_eq!(compared.len(), 25, "{compared:?}");
    Ok(())
}

#[test]
fn requests_of_the_manager_are_read() -> Result<()> {
    let mut read = Vec::new();
    for vector in load("volume")? {
        let text = vector["payload_text"].as_str().context("a text")?;
        if let Some(request) = read_request(text.as_bytes()).map_err(anyhow::Error::msg)? {
            read.push(request);
        }
    }
    let expected = [
        VolumeRequest::Mount {
            dir_name: "vol1".into(),
            backend: "nfsvol".into(),
            quota_scope: "user:c0ffee00-0000-4000-8000-000000000001".into(),
            location: "10.0.0.1:/export".into(),
            fs_type: "nfs".into(),
            options: None,
            scaling_group: None,
            edit_fstab: false,
            fstab_path: "/etc/fstab".into(),
        },
        VolumeRequest::Unmount {
            dir_name: "vol1".into(),
            backend: "nfsvol".into(),
            quota_scope: "user:c0ffee00-0000-4000-8000-000000000001".into(),
            scaling_group: None,
            edit_fstab: false,
            fstab_path: None,
        },
    ];
    assert_eq!(read, expected);
    // A pickle in the arguments is data, and no reason to fail.
    let pickled = STANDARD.encode([0x91, 0xc7, 0x03, 0x06, 0x80, 0x02, 0x2e]);
    let text = format!("{{\"name\":\"do_volume_mount\",\"args\":\"{pickled}\"}}");
    assert!(read_request(text.as_bytes()).is_err());
    Ok(())
}
