//! The engine's events as one stream that outlives connections.
//!
//! Out: container and network events, and [`EngineEvent::Resynchronise`] after every
//! (re)subscription and after every loss, upon which the consumer lists the containers. Between
//! two connections the engine is asked for what happened `since` the last event seen, and events
//! already delivered are left out; dockerd remembers only its last 256 events and none over its
//! own restart, therefore the marker. Invariant: whatever is not delivered is announced by a
//! marker that comes later than the loss.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hyper::Method;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Docker;
use super::error::DockerError;
use super::lines::JsonLines;
use super::transport::{Call, Class};

/// First and longest pause between attempts to subscribe.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Events remembered to recognise one that `since` delivers again; dockerd keeps 256.
const REMEMBERED: usize = 512;

/// Longest id and action of an event.
const LONGEST_KEY: usize = 1024;

/// Something that happened at the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineEvent {
    /// The stream was (re)connected, or events were lost: list the containers and compare.
    Resynchronise,
    /// A container changed.
    Container(ContainerEvent),
    /// A container joined or left a network.
    Network(NetworkEvent),
}

/// A container event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerEvent {
    /// `start`, `die`, `oom`, `destroy`, ...
    pub action: String,
    /// 64 hex characters.
    pub container_id: String,
    /// Labels of the container, plus `name`, `image`, `exitCode`, ...
    pub attributes: HashMap<String, String>,
    /// The engine's clock, nanoseconds since the epoch.
    pub time_ns: i64,
}

impl ContainerEvent {
    /// The container's name without a leading slash.
    pub fn name(&self) -> &str {
        self.attributes
            .get("name")
            .map_or("", |name| name.trim_start_matches('/'))
    }

    /// Exit code of a `die` event.
    pub fn exit_code(&self) -> Option<i64> {
        self.attributes.get("exitCode")?.parse().ok()
    }
}

/// A container joined (`connect`) or left (`disconnect`) a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkEvent {
    /// `connect` or `disconnect`.
    pub action: String,
    /// The network's id.
    pub network_id: String,
    /// The network's name.
    pub network_name: String,
    /// The container's id.
    pub container_id: String,
    /// The engine's clock, nanoseconds since the epoch.
    pub time_ns: i64,
}

/// The receiving end; dropping it ends the subscription.
#[derive(Debug)]
pub struct EventStream {
    receiver: mpsc::Receiver<EngineEvent>,
    task: JoinHandle<()>,
}

impl EventStream {
    /// The next event. The stream never ends by itself: an engine that is down only means silence
    /// until the marker after its return.
    pub async fn next(&mut self) -> EngineEvent {
        match self.receiver.recv().await {
            Some(event) => event,
            // Only when the runtime is shutting down.
            None => std::future::pending().await,
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn subscribe(docker: Docker, capacity: usize) -> EventStream {
    let (sender, receiver) = mpsc::channel(capacity.max(1));
    let task = tokio::spawn(async move { follow(docker, Outlet::new(sender)).await });
    EventStream { receiver, task }
}

/// The sending end. When the consumer is behind, events are dropped and a marker is owed.
#[derive(Debug)]
struct Outlet {
    sender: mpsc::Sender<EngineEvent>,
    owed: bool,
}

impl Outlet {
    fn new(sender: mpsc::Sender<EngineEvent>) -> Self {
        Self {
            sender,
            owed: false,
        }
    }

    fn give(&mut self, event: EngineEvent) {
        if event == EngineEvent::Resynchronise {
            self.owed = true;
        }
        if self.owed {
            if self.sender.try_send(EngineEvent::Resynchronise).is_err() {
                return;
            }
            self.owed = false;
            if event == EngineEvent::Resynchronise {
                return;
            }
        }
        if self.sender.try_send(event).is_err() {
            self.owed = true;
        }
    }

    /// Resolves when the owed marker could be delivered; never when none is owed.
    async fn settle(&mut self) {
        if !self.owed {
            return std::future::pending().await;
        }
        if let Ok(place) = self.sender.reserve().await {
            place.send(EngineEvent::Resynchronise);
        }
        self.owed = false;
    }
}

/// Which events were delivered, to leave out what `since` repeats.
#[derive(Debug)]
struct Position {
    /// Where the next subscription begins, nanoseconds of the engine's clock.
    since_ns: i64,
    order: VecDeque<(i64, String, String)>,
    seen: HashSet<(i64, String, String)>,
}

impl Position {
    fn new(now_ns: i64) -> Self {
        Self {
            since_ns: now_ns,
            order: VecDeque::new(),
            seen: HashSet::new(),
        }
    }

    /// True when the event is new.
    fn take(&mut self, time_ns: i64, id: &str, action: &str) -> bool {
        let key = (time_ns, id.to_owned(), action.to_owned());
        if !self.seen.insert(key.clone()) {
            return false;
        }
        self.order.push_back(key);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        self.since_ns = self.since_ns.max(time_ns);
        true
    }

    /// The form `/events` wants: seconds, a dot, nine digits.
    fn since(&self) -> String {
        format!(
            "{}.{:09}",
            self.since_ns / 1_000_000_000,
            self.since_ns % 1_000_000_000
        )
    }
}

async fn follow(docker: Docker, mut outlet: Outlet) {
    // Our clock stands in for the engine's until its first event; the marker covers a difference.
    let now_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|age| i64::try_from(age.as_nanos()).ok())
        .unwrap_or_default();
    let mut position = Position::new(now_ns);
    let mut pause = PAUSE.0;
    let mut down = false;
    loop {
        let begun = Instant::now();
        let subscribed = docker.event_lines(&position.since()).await;
        let err = match subscribed {
            Ok((mut lines, _permit)) => {
                if down {
                    tracing::info!(host = docker.host(), "Docker events are followed again");
                }
                down = false;
                outlet.give(EngineEvent::Resynchronise);
                drain(&docker, &mut lines, &mut position, &mut outlet).await
            }
            Err(err) => err,
        };
        if outlet.sender.is_closed() {
            return;
        }
        // An engine that answers and breaks off at once is not asked more and more.
        if begun.elapsed() > PAUSE.1 {
            pause = PAUSE.0;
        }
        if !down {
            tracing::warn!(err = %err, "Docker events stopped; subscribing again");
            down = true;
        }
        docker.transport.forget_version();
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Delivers events until the connection is lost, and returns why.
async fn drain(
    docker: &Docker,
    lines: &mut JsonLines,
    position: &mut Position,
    outlet: &mut Outlet,
) -> DockerError {
    const STEP: &str = "follow events";
    loop {
        tokio::select! {
            line = lines.next(STEP) => match line {
                Ok(Some(value)) => deliver(value, position, outlet),
                Ok(None) => return DockerError::Broken {
                    step: STEP.into(),
                    source: "the stream ended".into(),
                },
                // Nobody's event may keep the others' from being read, now and after each new
                // subscription; what it was about is found by looking.
                Err(err @ DockerError::TooLarge { .. }) => {
                    tracing::debug!(%err, "a Docker event is too long to be read");
                    outlet.give(EngineEvent::Resynchronise);
                }
                Err(err) => return err,
            },
            () = outlet.settle() => {}
            () = tokio::time::sleep(docker.deadlines.event_silence) => {
                if let Err(err) = docker.ping().await {
                    return err;
                }
            }
        }
    }
}

#[derive(Debug, Deserialize)]
struct Message {
    #[serde(rename = "Type", default)]
    kind: String,
    #[serde(rename = "Action", default)]
    action: String,
    #[serde(rename = "Actor", default)]
    actor: Actor,
    #[serde(rename = "timeNano", default)]
    time_ns: i64,
}

#[derive(Debug, Default, Deserialize)]
struct Actor {
    #[serde(rename = "ID", default)]
    id: String,
    #[serde(rename = "Attributes", default)]
    attributes: Option<HashMap<String, String>>,
}

fn deliver(value: serde_json::Value, position: &mut Position, outlet: &mut Outlet) {
    let message: Message = match serde_json::from_value(value) {
        Ok(message) => message,
        Err(err) => {
            tracing::debug!(err = %err, "a Docker event can't be understood");
            return;
        }
    };
    let mut attributes = message.actor.attributes.unwrap_or_default();
    let subject = match message.kind.as_str() {
        "network" => attributes.get("container").cloned().unwrap_or_default(),
        _ => String::new(),
    };
    let key = format!("{}{subject}", message.actor.id);
    // Ids and actions are remembered.
    if key.len() + message.action.len() > LONGEST_KEY {
        tracing::debug!("a Docker event has an id or an action that cannot be");
        return;
    }
    if !position.take(message.time_ns, &key, &message.action) {
        return;
    }
    let event = match message.kind.as_str() {
        "container" => EngineEvent::Container(ContainerEvent {
            action: message.action,
            container_id: message.actor.id,
            attributes,
            time_ns: message.time_ns,
        }),
        "network" if matches!(message.action.as_str(), "connect" | "disconnect") => {
            EngineEvent::Network(NetworkEvent {
                action: message.action,
                network_id: message.actor.id,
                network_name: attributes.remove("name").unwrap_or_default(),
                container_id: subject,
                time_ns: message.time_ns,
            })
        }
        _ => return,
    };
    outlet.give(event);
}

impl Docker {
    async fn event_lines(
        &self,
        since: &str,
    ) -> Result<(JsonLines, tokio::sync::OwnedSemaphorePermit), DockerError> {
        // exec_* events come with every health check and are of no use here, but dockerd can only
        // select, not exclude; the actions that matter are named.
        let filters = serde_json::json!({
            "type": ["container", "network"],
            "event": ["create", "start", "restart", "pause", "unpause", "die", "oom", "kill", "stop",
                      "destroy", "rename", "connect", "disconnect"],
        });
        let call = Call::new(
            "follow events".into(),
            Class::Slow,
            self.deadlines.query,
            Method::GET,
            "/events".into(),
        )
        .query("since", since)
        .query("filters", filters.to_string());
        let streaming = self.transport.stream(&call).await?;
        Ok((
            JsonLines::new(streaming.response.into_body()),
            streaming.permit,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(at: i64) -> EngineEvent {
        EngineEvent::Container(ContainerEvent {
            action: "die".into(),
            container_id: at.to_string(),
            attributes: HashMap::new(),
            time_ns: at,
        })
    }

    #[tokio::test]
    async fn a_slow_consumer_loses_events_but_never_the_marker() {
        let (sender, mut receiver) = mpsc::channel(2);
        let mut outlet = Outlet::new(sender);
        for at in 0..5 {
            outlet.give(event(at));
        }
        assert_eq!(receiver.recv().await, Some(event(0)));
        assert_eq!(receiver.recv().await, Some(event(1)));
        outlet.settle().await;
        assert_eq!(receiver.recv().await, Some(EngineEvent::Resynchronise));
        outlet.give(event(9));
        assert_eq!(receiver.recv().await, Some(event(9)));
    }

    #[test]
    fn repeated_events_are_recognised_and_the_memory_is_bounded() {
        let mut position = Position::new(5);
        assert_eq!(position.since(), "0.000000005");
        assert!(position.take(1_500_000_000, "a", "die"));
        assert!(!position.take(1_500_000_000, "a", "die"));
        assert!(position.take(1_500_000_000, "a", "destroy"));
        assert!(position.take(1_500_000_000, "b", "die"));
        assert_eq!(position.since(), "1.500000000");
        for at in 0..2_000 {
            position.take(at, "x", "die");
        }
        assert_eq!(position.order.len(), REMEMBERED);
        assert_eq!(position.seen.len(), REMEMBERED);
        assert_eq!(position.since(), "1.500000000");
    }
}
