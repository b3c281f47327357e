//! Images on this node.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;
use uuid::Uuid;

use super::super::arguments::Arguments;
use super::super::failure::Failure;
use super::super::value::Value;
use super::{kernel_id, known_kernel, reply};
use crate::background::{Purpose, Reporter, TaskKey};
use crate::causes::chain;
use crate::docker::{Progress, RegistryAuth};
use crate::events::Event;
use crate::image::{Check, ImageError};
use crate::kernel::commit::{self, CommitOrder};
use crate::kernel::create::image_request;
use crate::kernel::node::Node;
use crate::kernel::request::{ImageConfig, RegistryConfig};

/// Starts one background task per image and answers their ids, 32 hex digits each, at once.
pub(super) fn check_and_pull(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let Value::Map(entries) = args.take("image_configs") else {
        return Err(Failure::type_error("image_configs must be a map"));
    };
    // All are read before the first is begun: an answer is for all or for none.
    let mut configs: Vec<(Value, ImageConfig)> = Vec::with_capacity(entries.len());
    for (key, config) in entries {
        let config = super::super::from_value(config).map_err(|err| {
            Failure::value_error(format!("an image configuration cannot be read: {err}"))
        })?;
        configs.push((key, config));
    }
    let answer = configs
        .into_iter()
        .map(|(key, config)| {
            let work = |reporter| pull_if_needed(node.clone(), config, reporter);
            let task = node
                .background
                .start(TaskKey::Own(Purpose::Pull, Uuid::new_v4()), work);
            (key, Value::Str(task.simple().to_string()))
        })
        .collect();
    Ok(Value::Map(answer))
}

/// Makes an image or an archive of a kernel, in the background.
pub(super) fn commit(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let kernel = known_kernel(node, &args)?;
    let order = CommitOrder {
        subdir: args.get("subdir")?,
        canonical: args.get("canonical")?,
        labels: label_map(&args.take("extra_labels"))?,
        filename: args.get("filename")?,
    };
    let path = order
        .path()
        .map_err(|err| Failure::value_error(err.to_string()))?;
    let id = kernel.id;
    let task = node
        .background
        .start(TaskKey::Commit(id, order.clone()), |reporter| {
            commit::commit(node.clone(), kernel, order, reporter)
        });
    reply(&json!({
        "bgtask_id": task.hyphenated().to_string(),
        "kernel": id.to_string(),
        "path": path,
    }))
}

/// A map of texts; well-known names come as members of an enumeration.
fn label_map(value: &Value) -> Result<BTreeMap<String, String>, Failure> {
    let entries = match value {
        Value::Nil => &[][..],
        Value::Map(entries) => entries,
        other => {
            return Err(Failure::type_error(format!(
                "extra_labels must be a map, not {}",
                other.kind()
            )));
        }
    };
    entries
        .iter()
        .map(|(name, value)| match (name.as_str(), value.as_str()) {
            (Some(name), Some(value)) => Ok((name.to_owned(), value.to_owned())),
            _ => Err(Failure::type_error(
                "names and values of extra_labels must be texts",
            )),
        })
        .collect()
}

/// Whether a commit of the kernel is under way.
pub(super) fn commit_status(node: &Node, args: &Arguments) -> Result<Value, Failure> {
    let id = kernel_id(args, "kernel_id")?;
    let ongoing = node
        .background
        .running(|key| matches!(key, TaskKey::Commit(kernel, _) if *kernel == id));
    let status = if ongoing { "ongoing" } else { "ready" };
    reply(&json!({ "kernel": id.to_string(), "status": status }))
}

/// Pushes an image to the registry in its name, in the background.
pub(super) fn push(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let Value::ImageRef(image) = args.take("image_ref") else {
        return Err(Failure::type_error("image_ref must be an ImageRef"));
    };
    let registry: RegistryConfig = args.get("registry_conf")?;
    let canonical = image.canonical();
    let password = registry.password.as_ref();
    let auth = RegistryAuth::from_parts(
        registry.username.as_deref(),
        password.map(|password| password.reveal()),
    );
    let task = if image.is_local {
        // It is meant for this node only: done at once, as in the original.
        node.background
            .start(TaskKey::Own(Purpose::Push, Uuid::new_v4()), |_| async {
                Ok::<_, ImageError>(None)
            })
    } else {
        let key = TaskKey::Push(canonical.clone(), auth.clone());
        node.background.start(key, |reporter| {
            push_now(node.clone(), canonical.clone(), auth, reporter)
        })
    };
    reply(&json!({
        "bgtask_id": task.hyphenated().to_string(),
        "canonical": canonical,
    }))
}

/// Whether a pull of the image is under way.
pub(super) fn check_pulling(node: &Node, mut args: Arguments) -> Result<Value, Failure> {
    let name: String = args.get("image_name")?;
    Ok(Value::Bool(node.images.is_pulling(&name)))
}

pub(super) async fn purge(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let images: Vec<String> = args.get("image_canonicals")?;
    let (force, noprune): (bool, bool) = (args.get("force")?, args.get("noprune")?);
    let purged: Vec<serde_json::Value> = node
        .images
        .purge(images, force, noprune)
        .await
        .into_iter()
        .map(|purged| json!({"image": purged.image, "error": purged.error}))
        .collect();
    reply(&json!({ "responses": purged }))
}

/// Checks, pulls when needed, and tells how it goes on.
async fn pull_if_needed(
    node: Arc<Node>,
    config: ImageConfig,
    mut reporter: Reporter,
) -> Result<Option<String>, ImageError> {
    let (image, agent) = (config.canonical.clone(), node.agent_id().to_owned());
    let request = image_request(&config);
    let failed = |err: &ImageError| Event::ImagePullFailed {
        image: image.clone(),
        agent: agent.clone(),
        message: chain(err),
    };
    match node.images.check(&request).await {
        Ok(Check::Present(_)) => {
            let message = Some("Image already exists".to_owned());
            node.events.emit(Event::ImagePullFinished {
                image,
                agent,
                message,
            });
            return Ok(None);
        }
        Ok(Check::MustPull) => {}
        // The event cancels every session that waits for the image on this node. An engine that does
        // not answer now is asked again by the manager, and another node may have what this one
        // may not fetch.
        Err(err @ (ImageError::Lookup { .. } | ImageError::NotAvailable { .. })) => {
            return Err(err);
        }
        Err(err) => {
            node.events.emit(failed(&err));
            return Err(err);
        }
    }
    let ticket = node.images.pull(&request.canonical, request.auth.as_ref());
    // The end is told by all who wait: the creation of a kernel may have begun the pull, and tells
    // only of the kernel, while the manager waits for the image.
    if !ticket.joined() {
        node.events.emit(Event::ImagePullStarted {
            image: image.clone(),
            agent: agent.clone(),
        });
    }
    let outcome = ticket
        .wait(|progress| report(&mut reporter, &image, progress))
        .await;
    match &outcome {
        Ok(()) => {
            // What is not right about it is told to the creation, which asks again.
            if let Err(err) = node.images.settle(&request).await {
                tracing::debug!(image, err = chain(&err), "cannot look at what was pulled");
            }
            node.events.emit(Event::ImagePullFinished {
                image,
                agent,
                message: None,
            });
        }
        Err(err) => node.events.emit(failed(err)),
    }
    outcome.map(|()| None)
}

/// Pushes an image under the name it has.
async fn push_now(
    node: Arc<Node>,
    image: String,
    auth: Option<RegistryAuth>,
    mut reporter: Reporter,
) -> Result<Option<String>, ImageError> {
    tracing::info!(image, "pushing an image");
    node.images
        .push(&image, auth.as_ref(), |progress| {
            report(&mut reporter, &image, progress);
        })
        .await?;
    tracing::info!(image, "an image was pushed");
    Ok(None)
}

fn report(reporter: &mut Reporter, image: &str, progress: &Progress) {
    reporter.update(progress.current, progress.total, || {
        let (known, done) = progress.layers;
        format!("{image}: {} ({done} of {known} layers)", progress.status)
    });
}
