//! Values in one of the bus's databases: statistics, container logs and their like.
//!
//! In: keys and values from whoever owns them. Out: one pipeline for each call. Invariants: a call
//! ends within its deadline whatever the server does; few calls wait, more are refused; nothing is
//! sent twice.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use thiserror::Error;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, timeout};

use super::connection::{Command, Connection, ConnectionError, Connector, Reply, is_of_server};
use super::readers;

/// Calls that wait or work at a time.
const CALLS: usize = 64;
/// After a failed connection nobody tries for this long: an outage is answered at once.
const REST: Duration = Duration::from_secs(1);

/// A value that could not be read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// Too many calls wait for the server.
    #[error("{CALLS} calls wait for the bus already")]
    Busy,
    /// The server did not answer a moment ago and has not been tried since.
    #[error("the bus did not answer a moment ago")]
    Resting,
    /// The deadline passed while others were served, or by the server.
    #[error("the bus took longer than {} s", limit.as_secs_f32())]
    Deadline {
        /// The deadline.
        limit: Duration,
    },
    /// The call failed.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The server refused it.
    #[error("the bus refuses to {step}: {message}")]
    Refused {
        /// What was tried.
        step: &'static str,
        /// The server's words.
        message: String,
    },
}

/// A value with its key and its time to live.
#[derive(Clone, Debug)]
pub struct Put {
    /// The key.
    pub key: String,
    /// The value.
    pub value: Bytes,
    /// After this time it is gone.
    pub expires: Duration,
}

/// A handle on one database of one role.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    connector: Connector,
    limit: Duration,
    /// Each connection sees to it that what it adds to the stream is read.
    is_stream: bool,
    calls: Semaphore,
    link: Mutex<Link>,
}

#[derive(Debug, Default)]
struct Link {
    connection: Option<Connection>,
    rests_until: Option<Instant>,
}

impl StoreError {
    /// Whether the commands were certainly not carried out.
    #[must_use]
    pub fn is_certain(&self) -> bool {
        match self {
            Self::Busy | Self::Resting | Self::Refused { .. } => true,
            Self::Deadline { .. } => false,
            Self::Connection(err) => !err.is_ambiguous(),
        }
    }

    /// Whether the server refused for a reason that lies in the command or its keys, so that it will
    /// refuse the same again; it may take other commands.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Refused { message, .. } if !is_of_server(message))
    }
}

impl Store {
    /// A store that connects when it is first used. `limit` bounds each call as a whole.
    pub(super) fn new(connector: Connector, limit: Duration) -> Self {
        Self::with(connector, limit, false)
    }

    /// The same, for the database that has the stream of events.
    pub(super) fn of_stream(connector: Connector, limit: Duration) -> Self {
        Self::with(connector, limit, true)
    }

    fn with(connector: Connector, limit: Duration, is_stream: bool) -> Self {
        Self {
            inner: Arc::new(Inner {
                connector,
                limit,
                is_stream,
                calls: Semaphore::new(CALLS),
                link: Mutex::default(),
            }),
        }
    }

    /// Sets a value that expires.
    ///
    /// # Errors
    /// The step that failed; the value may or may not be set then.
    pub async fn put(
        &self,
        key: impl Into<String>,
        value: impl Into<Bytes>,
        expires: Duration,
    ) -> Result<(), StoreError> {
        let put = Put {
            key: key.into(),
            value: value.into(),
            expires,
        };
        self.put_all(vec![put]).await
    }

    /// Sets many values at once.
    ///
    /// # Errors
    /// The step that failed; some values may be set then.
    pub async fn put_all(&self, puts: Vec<Put>) -> Result<(), StoreError> {
        let commands = puts
            .into_iter()
            .map(|put| {
                Command::new("SET")
                    .arg(put.key)
                    .arg(put.value)
                    .arg("PX")
                    .number(put.expires.as_millis().max(1))
            })
            .collect();
        self.run("set a value", commands).await.map(drop)
    }

    /// Reads a value.
    ///
    /// # Errors
    /// The step that failed.
    pub async fn get(&self, key: impl Into<String>) -> Result<Option<Bytes>, StoreError> {
        let command = Command::new("GET").arg(key.into());
        let replies = self.run("read a value", vec![command]).await?;
        Ok(replies.first().and_then(Reply::bytes))
    }

    /// Removes a key.
    ///
    /// # Errors
    /// The step that failed.
    pub async fn delete(&self, key: impl Into<String>) -> Result<(), StoreError> {
        let command = Command::new("DEL").arg(key.into());
        self.run("remove a key", vec![command]).await.map(drop)
    }

    /// Appends elements to a list and lets the list live for `expires` from now.
    ///
    /// # Errors
    /// The step that failed; some elements may be there then.
    pub async fn append(
        &self,
        key: impl Into<String>,
        elements: Vec<Bytes>,
        expires: Duration,
    ) -> Result<(), StoreError> {
        let key = key.into();
        let mut commands: Vec<Command> = elements
            .into_iter()
            .map(|element| Command::new("RPUSH").arg(key.clone()).arg(element))
            .collect();
        commands.push(expire(key, expires));
        self.run("append to a list", commands).await.map(drop)
    }

    /// Sets fields of a hash; with `expires` the hash lives that long from now.
    ///
    /// # Errors
    /// The step that failed.
    pub async fn set_fields(
        &self,
        key: impl Into<String>,
        fields: Vec<(String, Bytes)>,
        expires: Option<Duration>,
    ) -> Result<(), StoreError> {
        let key = key.into();
        let mut commands: Vec<Command> = hash(&key, fields).into_iter().collect();
        if let Some(expires) = expires {
            commands.push(expire(key, expires));
        }
        self.run("set fields", commands).await.map(drop)
    }

    /// Sets fields of a hash and removes others.
    ///
    /// # Errors
    /// The step that failed.
    pub async fn change_fields(
        &self,
        key: impl Into<String>,
        set: Vec<(String, Bytes)>,
        remove: Vec<String>,
    ) -> Result<(), StoreError> {
        let key = key.into();
        let mut commands: Vec<Command> = hash(&key, set).into_iter().collect();
        if !remove.is_empty() {
            let command = Command::new("HDEL").arg(key);
            commands.push(remove.into_iter().fold(command, Command::arg));
        }
        self.run("change fields", commands).await.map(drop)
    }

    /// Carries out commands; `step` says what they are for.
    ///
    /// # Errors
    /// The step that failed; some commands may be carried out then.
    pub(super) async fn run(
        &self,
        step: &'static str,
        commands: Vec<Command>,
    ) -> Result<Vec<Reply>, StoreError> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        let inner = &self.inner;
        let _permit = inner.calls.try_acquire().map_err(|_| StoreError::Busy)?;
        let limit = inner.limit;
        let replies = timeout(limit, inner.run(&commands))
            .await
            .map_err(|_| StoreError::Deadline { limit })??;
        for reply in &replies {
            if let Reply::Error(message) = reply {
                let message = message.clone();
                return Err(StoreError::Refused { step, message });
            }
        }
        Ok(replies)
    }
}

impl Inner {
    async fn run(&self, commands: &[Command]) -> Result<Vec<Reply>, StoreError> {
        let mut link = self.link.lock().await;
        // Taken out while it works: when the deadline cuts this off, it is not used again.
        let mut connection = match link.connection.take() {
            Some(connection) => connection,
            None => {
                if link.rests_until.is_some_and(|until| Instant::now() < until) {
                    return Err(StoreError::Resting);
                }
                // Before and after: the caller's deadline may cut the attempt off.
                link.rests_until = Some(Instant::now() + REST);
                let connected = self.connect().await;
                link.rests_until = Some(Instant::now() + REST);
                connected?
            }
        };
        let replies = connection.run(commands).await?;
        if replies.iter().any(Reply::is_of_connection) {
            // The next one is led to the server that has taken over, if there is one.
            link.rests_until = Some(Instant::now() + REST);
        } else {
            link.connection = Some(connection);
            link.rests_until = None;
        }
        Ok(replies)
    }

    async fn connect(&self) -> Result<Connection, ConnectionError> {
        let mut connection = self.connector.connect().await?;
        if self.is_stream {
            readers::make_group(&mut connection).await?;
        }
        Ok(connection)
    }
}

fn hash(key: &str, fields: Vec<(String, Bytes)>) -> Option<Command> {
    if fields.is_empty() {
        return None;
    }
    let command = Command::new("HSET").arg(key.to_owned());
    Some(fields.into_iter().fold(command, |command, (field, value)| {
        command.arg(field).arg(value)
    }))
}

fn expire(key: String, after: Duration) -> Command {
    Command::new("PEXPIRE")
        .arg(key)
        .number(after.as_millis().max(1))
}
