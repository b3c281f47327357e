//! The event bus: how this node speaks to managers, and where it leaves what they read.
//!
//! In: events (as one more sink), reports, values for the databases. Out: stream entries, texts on
//! the channel, keys; and the requests that managers put on the channel. Invariants: emitting
//! never waits; lifecycle events are sent in their order, at least once, each from its own stored
//! bytes; the word that a console lies ready is sent once; every queue is bounded; an outage costs reports and progress, never a lifecycle event
//! within those bounds.
//!
//! `connection` is the only file that knows the client library. `message` encodes, `queue` and
//! `outbox` keep, `sender` sends, `readers` sees to those who read the stream, `store` writes values, `console_logs`
//! brings consoles there, `volumes` listens, `errors` limits how many error events go out.

mod backlog;
pub mod connection;
pub mod console_logs;
mod errors;
pub mod message;
mod outbox;
pub mod queue;
mod readers;
mod sender;
mod settings;
mod store;
pub mod volumes;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Event, EventRecord, Sink};
use backlog::Backlog;
use connection::Connector;
use errors::ErrorRate;
use message::Message;
use outbox::Outbox;
use queue::Bounds;
use sender::Sender;

pub use backlog::BusState;
pub use outbox::OutboxError;
pub use settings::{BusServer, BusSettings, BusTls, Endpoint, HostPort, HostPortError, Role};
pub use store::{Put, Store, StoreError};
pub use volumes::VolumeRequest;

/// The bus could not be set up.
#[derive(Debug, Error)]
pub enum BusError {
    /// The outbox cannot be used.
    #[error(transparent)]
    Outbox(#[from] OutboxError),
}

/// The node's end of the bus. Clones share it.
#[derive(Clone, Debug)]
pub struct Bus {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    waiting: Arc<Backlog>,
    statistics: Store,
    container_logs: Store,
    bgtask: Store,
    service_discovery: Store,
    stream: Store,
    source: String,
    volumes: Mutex<Option<mpsc::Receiver<VolumeRequest>>>,
    errors: Mutex<ErrorRate>,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Bus {
    /// Starts sending and listening on the current runtime. Answers at once: the server need not
    /// be there. Reads the outbox, so it blocks for as long as that takes.
    ///
    /// # Errors
    /// An outbox that cannot be used.
    pub fn start(settings: &BusSettings) -> Result<Bus, BusError> {
        Bus::start_with(settings, Bounds::default())
    }

    /// `start`, with other bounds on what may wait.
    ///
    /// # Errors
    /// An outbox that cannot be used.
    pub fn start_with(settings: &BusSettings, bounds: Bounds) -> Result<Bus, BusError> {
        let outbox = match &settings.outbox_dir {
            Some(dir) => Some(Outbox::open(dir)?),
            None => None,
        };
        if let Some((_, left)) = &outbox
            && (!left.messages.is_empty() || left.damaged > 0)
        {
            tracing::info!(
                events = left.messages.len(),
                damaged = left.damaged,
                "events of an earlier life wait for the bus"
            );
        }
        let waiting = Arc::new(Backlog::new(bounds, outbox));
        let stopping = CancellationToken::new();
        let tasks = TaskTracker::new();
        let sender = Sender {
            connector: Connector::of(settings, Role::Stream),
            source: settings.agent_id.clone(),
            waiting: waiting.clone(),
            stopping: stopping.clone(),
        };
        tasks.spawn(sender.run());
        let (requests, volumes) = volumes::requests();
        let listening = volumes::listen(
            Connector::of(settings, Role::Stream),
            requests,
            stopping.clone(),
        );
        tasks.spawn(listening);
        tasks.close();
        let limit = settings.connect_timeout + settings.command_timeout;
        let store = |role: Role| Store::new(Connector::of(settings, role), limit);
        Ok(Bus {
            inner: Arc::new(Inner {
                waiting,
                statistics: store(Role::Statistics),
                container_logs: store(Role::ContainerLog),
                bgtask: store(Role::Bgtask),
                // The server of `live`, but the database of statistics, as managers look for it.
                service_discovery: Store::new(
                    Connector::to_database(settings, Role::Live, Role::Statistics.database()),
                    limit,
                ),
                stream: Store::of_stream(Connector::of(settings, Role::Stream), limit),
                source: settings.agent_id.clone(),
                volumes: Mutex::new(Some(volumes)),
                errors: Mutex::default(),
                stopping,
                tasks,
            }),
        })
    }

    /// The sink that brings the node's events here.
    #[must_use]
    pub fn sink(&self) -> BusSink {
        BusSink { bus: self.clone() }
    }

    /// Publishes a message that was made elsewhere. Never waits.
    pub fn publish(&self, message: Message) {
        self.inner.waiting.push(message);
    }

    /// Database 0: statistics and metadata.
    #[must_use]
    pub fn statistics(&self) -> &Store {
        &self.inner.statistics
    }

    /// Database 6: logs of ended containers.
    #[must_use]
    pub fn container_logs(&self) -> &Store {
        &self.inner.container_logs
    }

    /// Database 7: the registry of background tasks.
    #[must_use]
    pub fn bgtask(&self) -> &Store {
        &self.inner.bgtask
    }

    /// Where service discovery looks: database 0 of the server of `live`.
    #[must_use]
    pub fn service_discovery(&self) -> &Store {
        &self.inner.service_discovery
    }

    /// The requests of managers; whoever does the mounting takes them, once.
    #[must_use]
    pub fn take_volume_requests(&self) -> Option<mpsc::Receiver<VolumeRequest>> {
        self.inner
            .volumes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// How the bus is doing, to look at or to wait on.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<BusState> {
        self.inner.waiting.state()
    }

    /// How many messages wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.inner.waiting.len()
    }

    /// Waits until everything emitted so far has been sent; `false` when `limit` passed before.
    pub async fn drained(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.inner.waiting.drained())
            .await
            .is_ok()
    }

    /// Waits until the lifecycle events emitted so far are on disk or sent, at most `limit`.
    pub async fn kept(&self, limit: Duration) -> bool {
        let waiting = self.inner.waiting.clone();
        crate::blocking::blocking(move || match waiting.outbox() {
            Some(outbox) => outbox.settle(limit),
            None => true,
        })
        .await
    }

    /// Sends what waits for at most `grace`, then stops. What is left of the lifecycle events is
    /// sent by the next life.
    pub async fn close(&self, grace: Duration) {
        if !self.drained(grace).await {
            tracing::warn!(
                waiting = self.waiting(),
                "stopping while events wait for the bus; lifecycle events are sent after the next start"
            );
        }
        self.inner.stopping.cancel();
        self.inner.tasks.wait().await;
        self.kept(grace).await;
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stopping.cancel();
    }
}

/// Takes events to the bus.
#[derive(Debug)]
pub struct BusSink {
    bus: Bus,
}

impl Sink for BusSink {
    fn accept(&self, occurrence: &EventRecord) {
        let limited;
        let event = match &occurrence.event {
            // Whoever brought the console to the bus has told it already.
            Event::DoSyncKernelLogs { .. } => return,
            error @ Event::AgentError { .. } => {
                let mut rate = self
                    .bus
                    .inner
                    .errors
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                match rate.admit(error, std::time::Instant::now()) {
                    Some(admitted) => {
                        limited = admitted;
                        &limited
                    }
                    None => return,
                }
            }
            other => other,
        };
        match Message::of(event, occurrence.at) {
            Ok(Some(message)) => self.bus.publish(message),
            Ok(None) => {}
            Err(err) => tracing::error!(
                event = event.name(),
                err = &err as &dyn std::error::Error,
                "an event cannot be put into words for the bus"
            ),
        }
    }
}
