//! Images on this node.

use std::sync::Arc;

use uuid::Uuid;

use super::super::arguments::Arguments;
use super::super::failure::Failure;
use super::super::value::Value;
use super::reply;
use crate::events::Event;
use crate::image::{Check, ImageError};
use crate::kernel::create::image_request;
use crate::kernel::destroy::chain;
use crate::kernel::node::Node;
use crate::kernel::request::ImageConfig;

/// Starts one background task per image and answers their ids, 32 hex digits each, at once.
pub(super) async fn check_and_pull(
    node: &Arc<Node>,
    mut args: Arguments,
) -> Result<Value, Failure> {
    let Value::Map(entries) = args.take("image_configs") else {
        return Err(Failure::type_error("image_configs must be a map"));
    };
    let mut answer = Vec::with_capacity(entries.len());
    for (key, config) in entries {
        let config: ImageConfig = super::super::from_value(config).map_err(|err| {
            Failure::value_error(format!("an image configuration cannot be read: {err}"))
        })?;
        let task = Uuid::new_v4();
        let node = node.clone();
        node.clone()
            .tasks
            .spawn(async move { check_one(&node, task, &config).await });
        answer.push((key, Value::Str(task.simple().to_string())));
    }
    Ok(Value::Map(answer))
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
        .purge(&images, force, noprune)
        .await
        .into_iter()
        .map(|purged| serde_json::json!({"image": purged.image, "error": purged.error}))
        .collect();
    reply(&serde_json::json!({ "responses": purged }))
}

async fn check_one(node: &Arc<Node>, task: Uuid, config: &ImageConfig) {
    let task = task.hyphenated().to_string();
    node.events.emit(Event::BgtaskUpdated {
        task: task.clone(),
        current: 0,
        total: 0,
        message: Some("Task started".to_owned()),
    });
    let event = match pull_if_needed(node, config).await {
        Ok(()) => Event::BgtaskDone {
            task,
            message: None,
        },
        Err(err) => Event::BgtaskFailed {
            task,
            message: chain(&err),
        },
    };
    node.events.emit(event);
}

async fn pull_if_needed(node: &Arc<Node>, config: &ImageConfig) -> Result<(), ImageError> {
    let (image, agent) = (config.canonical.clone(), node.agent_id().to_owned());
    let request = image_request(config);
    let failed = |err: &ImageError| Event::ImagePullFailed {
        image: image.clone(),
        agent: agent.clone(),
        message: chain(err),
    };
    match node.images.check(&request).await {
        Ok(Check::Present(_)) => {
            node.events.emit(Event::ImagePullFinished {
                image,
                agent,
                message: Some("Image already exists".to_owned()),
            });
            return Ok(());
        }
        Ok(Check::MustPull) => {}
        Err(err) => {
            node.events.emit(failed(&err));
            return Err(err);
        }
    }
    let ticket = node.images.pull(&request.canonical, request.auth.as_ref());
    if ticket.joined() {
        // The one who pulls it tells of it.
        return ticket.wait(|_| ()).await;
    }
    node.events.emit(Event::ImagePullStarted {
        image: image.clone(),
        agent: agent.clone(),
    });
    match ticket.wait(|_| ()).await {
        Ok(()) => {
            node.events.emit(Event::ImagePullFinished {
                image,
                agent,
                message: None,
            });
            Ok(())
        }
        Err(err) => {
            node.events.emit(failed(&err));
            Err(err)
        }
    }
}
