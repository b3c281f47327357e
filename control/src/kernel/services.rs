//! Services inside a kernel: start, shut down, model services, and what the image says about them.
//!
//! In: the RPC's wishes. Out: the runner's answers. Invariant: one service request is with the runner
//! at a time, because it holds one lock for all of them and its answers carry no name; the caller gets
//! an answer within 10 s while the runner may take 30 s, or as long as what is before it takes. Models are all sent at once: the runner starts
//! one after the other, however long each takes, and answers in that order.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use super::runner_link::frame::{AnswerKind, Outgoing};
use super::runner_link::{AppRecord, LinkError, ModelServiceStatus, RunnerLink};

/// The manager gets its answer within this time.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// The runner answers each request, and in turn. What an image has it do before a start has no limit, nor
/// has the start of a model, which it does in the same turn.
const ANSWER_OWED: Duration = Duration::from_secs(3600);
/// The answer in the place of one that will not come: the kernel is ended or restarted, or the agent
/// stops.
const CUT_OFF: &str = "cancelled";
/// Longest wait for a model service, of which a definition may ask for hours; and how long after it an
/// answer may come that belongs to no later model: what is done before a start takes its time.
const MODEL_LIMIT: Duration = Duration::from_secs(3600);

/// A service to start.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceStart {
    /// Name.
    pub name: String,
    /// All container ports of the service.
    pub ports: Vec<u16>,
    /// `http`, `tcp`, `preopen`, `pty` ...
    pub protocol: String,
    /// The RPC's options (`arguments`, `envs`), unchanged.
    pub options: Map<String, Value>,
}

/// The runner's answer, or ours in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceReply {
    /// `started`, `running` or `failed`.
    pub status: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl ServiceReply {
    /// A failure with its reason.
    pub fn failed(error: impl Into<String>) -> Self {
        Self {
            status: "failed".to_owned(),
            error: Some(error.into()),
        }
    }

    /// The kernel was created with `block_service_ports`.
    pub fn blocked() -> Self {
        Self::failed("operation blocked")
    }

    /// The kernel has no service of this name.
    pub fn unknown() -> Self {
        Self::failed("invalid service name")
    }

    /// Whether the connection to the runner was closed before it answered.
    pub fn is_cut_off(&self) -> bool {
        self.error.as_deref() == Some(CUT_OFF)
    }

    /// Whether the service runs.
    pub fn is_up(&self) -> bool {
        matches!(self.status.as_str(), "started" | "running")
    }

    fn from_outcome(outcome: Result<bytes::Bytes, LinkError>) -> Self {
        match outcome {
            Ok(answer) => serde_json::from_slice(&answer)
                .unwrap_or_else(|_| Self::failed("the runner's answer could not be read")),
            Err(LinkError::Timeout { .. }) => Self::failed("timeout"),
            Err(LinkError::Closed) => Self::failed(CUT_OFF),
            Err(err) => Self::failed(err.to_string()),
        }
    }
}

/// Starts a service and answers within 10 s. A service that needs longer is answered `timeout`; asking
/// again later says `running`.
pub async fn start_service(link: &RunnerLink, service: ServiceStart) -> ServiceReply {
    let Some(port) = service.ports.first() else {
        return ServiceReply::failed("the service has no port");
    };
    let payload = json!({
        "name": service.name,
        "port": port,
        "ports": service.ports,
        "protocol": service.protocol,
        "options": service.options,
    });
    let message = Outgoing::json("start-service", &payload);
    ServiceReply::from_outcome(
        link.ask_alone(AnswerKind::Service, message, ANSWER_LIMIT, ANSWER_OWED)
            .await,
    )
}

/// Ends a service; the runner does not answer. A failure to tell it is only logged.
pub fn shutdown_service(link: &RunnerLink, name: &str) {
    if let Err(err) = link.post(Outgoing::json("shutdown-service", &Value::from(name))) {
        tracing::debug!(kernel_id = %link.kernel_id(), service = name, %err, "a service could not be told to end");
    }
}

/// Starts a model service; `model` is one entry of the validated model definition. One that is not
/// answered in time is started all the same when its turn comes. Health changes come
/// through [`RunnerLink::model_updates`].
pub async fn start_model_service(link: &RunnerLink, model: &Value) -> ServiceReply {
    if model["service"].is_null() {
        // The runner's own words, which come out of turn.
        return ServiceReply::failed("service failed to start");
    }
    let limit = model_limit(model);
    let message = Outgoing::json("start-model-service", model);
    ServiceReply::from_outcome(
        link.ask(AnswerKind::ModelService, message, limit, MODEL_LIMIT)
            .await,
    )
}

/// 10 s, plus all the retries of a health check.
fn model_limit(model: &Value) -> Duration {
    let check = &model["service"]["health_check"];
    let (Some(retries), Some(wait)) = (
        check["max_retries"].as_f64(),
        check["max_wait_time"].as_f64(),
    ) else {
        return ANSWER_LIMIT;
    };
    let extra = Duration::try_from_secs_f64((retries * wait).max(0.0)).unwrap_or(MODEL_LIMIT);
    (ANSWER_LIMIT + extra.min(MODEL_LIMIT)).min(MODEL_LIMIT)
}

/// The last of the changes that wait, or the next one; `None` when there will be none. The manager
/// knows a session's state, not a model's, so the last word is all it needs, and a container that says
/// it without end fills neither the log nor the queue of events that all kernels share.
pub async fn newest_status(
    updates: &mut broadcast::Receiver<ModelServiceStatus>,
) -> Option<ModelServiceStatus> {
    let mut last = loop {
        match updates.recv().await {
            Ok(update) => break update,
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => return None,
        }
    };
    // No more than there is room for: it may be filled while it is read.
    for _ in 0..updates.len() {
        match updates.try_recv() {
            Ok(update) => last = update,
            Err(TryRecvError::Lagged(_)) => {}
            Err(TryRecvError::Empty | TryRecvError::Closed) => break,
        }
    }
    Some(last)
}

/// A kernel's record of a service that the image may describe further.
pub trait ServiceRecord {
    /// The service's name.
    fn name(&self) -> &str;
    /// Takes over what the image says about it.
    fn describe(&mut self, app: &AppRecord);
}

/// Merges the runner's list of services into the kernel's records of the same name.
pub fn merge_apps<R: ServiceRecord>(records: &mut [R], apps: &[AppRecord]) {
    for record in records {
        if let Some(app) = apps.iter().find(|app| app.name == record.name()) {
            record.describe(app);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_with_health_check_is_given_the_time_of_its_retries() {
        assert_eq!(
            model_limit(&json!({"service": {"health_check": null}})),
            ANSWER_LIMIT
        );
        let model = json!({"service": {"health_check": {"max_retries": 3, "max_wait_time": 5.0}}});
        assert_eq!(model_limit(&model), Duration::from_secs(25));
        let endless =
            json!({"service": {"health_check": {"max_retries": 1e300, "max_wait_time": 5.0}}});
        assert_eq!(model_limit(&endless), MODEL_LIMIT);
    }

    #[tokio::test]
    async fn of_many_changes_the_last_is_told() {
        let (sender, mut updates) = broadcast::channel(16);
        let say = |number: usize, is_healthy| {
            let model_name = format!("m{number}");
            let status = ModelServiceStatus {
                model_name,
                is_healthy,
            };
            sender.send(status).expect("somebody listens");
        };
        for number in 0..1000 {
            say(number, false);
        }
        say(1000, true);
        let told = newest_status(&mut updates).await.expect("told");
        assert_eq!((told.model_name.as_str(), told.is_healthy), ("m1000", true));
        say(1, false);
        let told = newest_status(&mut updates).await.expect("told");
        assert_eq!(told.model_name, "m1");
        drop(sender);
        assert_eq!(newest_status(&mut updates).await, None);
    }

    #[test]
    fn replies_are_what_the_manager_reads() {
        assert_eq!(
            serde_json::to_value(ServiceReply::blocked()).expect("plain"),
            json!({"status": "failed", "error": "operation blocked"})
        );
        let running =
            ServiceReply::from_outcome(Ok(bytes::Bytes::from_static(br#"{"status": "running"}"#)));
        assert!(running.is_up());
        assert_eq!(
            serde_json::to_value(running).expect("plain"),
            json!({"status": "running"})
        );
    }

    #[test]
    fn apps_are_merged_by_name() {
        struct Port(&'static str, Option<String>);
        impl ServiceRecord for Port {
            fn name(&self) -> &str {
                self.0
            }
            fn describe(&mut self, app: &AppRecord) {
                self.1.clone_from(&app.url_template);
            }
        }
        let mut ports = [Port("webapp", None), Port("other", None)];
        let apps: Vec<AppRecord> =
            serde_json::from_str(r#"[{"name": "webapp", "url_template": "{protocol}://{host}:{port}/"}, {"name": "fast"}]"#)
                .expect("apps");
        merge_apps(&mut ports, &apps);
        assert_eq!(ports[0].1.as_deref(), Some("{protocol}://{host}:{port}/"));
        assert_eq!(ports[1].1, None);
    }
}
