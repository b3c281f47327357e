//! Connections to Redis and Valkey: the only file that knows the client library.
//!
//! In: a server, a database, commands as byte strings. Out: replies, or an error after which the
//! connection is thrown away. Invariants: nothing waits longer than its deadline; nothing is sent
//! again behind the caller's back, so whoever retries knows that it retries; messages of a
//! subscription are taken off the socket as they come.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::aio::{MultiplexedConnection, PubSubSink, PubSubStream};
use redis::io::tcp::TcpSettings;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo,
    RedisError, TlsCertificates, Value,
};
use thiserror::Error;
use tokio::time::timeout;

use super::settings::{BusServer, BusSettings, Endpoint, HostPort, Role};

/// Why the bus could not be reached or did not do what it was asked.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The certificate file cannot be read.
    #[error("cannot read the certificates in {path}", path = path.display())]
    Certificates {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No connection, or no log-in.
    #[error("cannot connect to the bus at {address}; check config/redis in etcd and the server")]
    Connect {
        /// Where.
        address: HostPort,
        /// Why.
        #[source]
        source: RedisError,
    },
    /// The server takes connections and says nothing.
    #[error("the bus at {address} did not answer a log-in within {} s", limit.as_secs_f32())]
    ConnectTimeout {
        /// Where.
        address: HostPort,
        /// The deadline.
        limit: Duration,
    },
    /// No sentinel knew a master that is one.
    #[error("no sentinel of {endpoint} names a master that can be used: {last}")]
    NoMaster {
        /// The group.
        endpoint: Endpoint,
        /// What the last one asked said.
        last: String,
    },
    /// The connection ended while a command was under way: it may or may not have been carried out.
    #[error("the connection to the bus at {address} broke")]
    Broken {
        /// Where.
        address: HostPort,
        /// Why.
        #[source]
        source: RedisError,
    },
    /// No reply in time: the command may or may not have been carried out.
    #[error("the bus at {address} did not answer within {} s", limit.as_secs_f32())]
    Timeout {
        /// Where.
        address: HostPort,
        /// The deadline.
        limit: Duration,
    },
    /// The server refused the command.
    #[error("the bus at {address} refuses {command}: {message}")]
    Refused {
        /// Where.
        address: HostPort,
        /// Name of the command.
        command: String,
        /// Its words.
        message: String,
    },
    /// A reply of an unexpected kind.
    #[error(
        "the bus at {address} answered {command} as neither Redis 6.2 and later nor Valkey does; see what listens there"
    )]
    Unexpected {
        /// Where.
        address: HostPort,
        /// Name of the command.
        command: String,
    },
}

impl ConnectionError {
    /// Whether the commands may have been carried out although no reply came.
    #[must_use]
    pub fn is_ambiguous(&self) -> bool {
        matches!(self, Self::Broken { .. } | Self::Timeout { .. })
    }
}

/// How long a sentinel may think before the next one is asked too: whoever calls has seconds.
const NEXT_SENTINEL: Duration = Duration::from_millis(300);

/// Codes of refusals by a server that does not serve this connection any more.
const OF_CONNECTION: [&str; 4] = ["READONLY", "MASTERDOWN", "NOAUTH", "CLUSTERDOWN"];
/// Codes of further refusals that say nothing of the command and its keys: the server takes no
/// writes, or nothing, for a while.
const OF_SERVER: [&str; 6] = [
    "OOM",
    "MISCONF",
    "NOREPLICAS",
    "LOADING",
    "BUSY",
    "TRYAGAIN",
];

/// The first word of a refusal.
fn code(message: &str) -> &str {
    message.split_whitespace().next().unwrap_or_default()
}

/// Whether a refusal in these words is about the server as a whole (out of memory, a replica, still
/// loading) and will end with that state, not about the command and its keys.
#[must_use]
pub(super) fn is_of_server(message: &str) -> bool {
    let code = code(message);
    OF_CONNECTION.contains(&code) || OF_SERVER.contains(&code)
}

/// One command: its name and arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command(Vec<Bytes>);

impl Command {
    /// A command without arguments yet.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self(vec![Bytes::from_static(name.as_bytes())])
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<Bytes>) -> Self {
        self.0.push(argument.into());
        self
    }

    /// Adds a number as decimal text.
    #[must_use]
    pub fn number(self, number: impl fmt::Display) -> Self {
        self.arg(number.to_string())
    }

    fn name(&self) -> String {
        String::from_utf8_lossy(&self.0[0]).into_owned()
    }

    fn to_library(&self) -> redis::Cmd {
        let mut command = redis::Cmd::new();
        for argument in &self.0 {
            command.arg(argument.as_ref());
        }
        command
    }
}

/// What the server answered to one command.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Nothing.
    Nil,
    /// `OK`, `QUEUED` and their like.
    Status(String),
    /// A number.
    Int(i64),
    /// Bytes.
    Bytes(Bytes),
    /// Several replies.
    Array(Vec<Reply>),
    /// The server's refusal of this command.
    Error(String),
}

impl Reply {
    /// The bytes of a text or bulk reply.
    #[must_use]
    pub fn bytes(&self) -> Option<Bytes> {
        match self {
            Self::Bytes(bytes) => Some(bytes.clone()),
            Self::Status(text) => Some(Bytes::copy_from_slice(text.as_bytes())),
            _ => None,
        }
    }

    /// The elements of an array reply.
    #[must_use]
    pub fn array(&self) -> Option<&[Reply]> {
        match self {
            Self::Array(items) => Some(items),
            _ => None,
        }
    }

    /// Whether the server says by this that it does not serve this connection, as one that was made
    /// a replica: another connection may lead to a server that does.
    #[must_use]
    pub fn is_of_connection(&self) -> bool {
        matches!(self, Self::Error(message) if OF_CONNECTION.contains(&code(message)))
    }

    fn from_library(value: Value) -> Self {
        let all = |items: Vec<Value>| items.into_iter().map(Self::from_library).collect();
        match value {
            Value::Nil => Self::Nil,
            Value::Int(number) => Self::Int(number),
            Value::BulkString(bytes) => Self::Bytes(bytes.into()),
            Value::Array(items) | Value::Set(items) => Self::Array(all(items)),
            Value::Push { data, .. } => Self::Array(all(data)),
            Value::Map(pairs) => Self::Array(
                pairs
                    .into_iter()
                    .flat_map(|(key, value)| [key, value])
                    .map(Self::from_library)
                    .collect(),
            ),
            Value::Attribute { data, .. } => Self::from_library(*data),
            Value::SimpleString(text) => Self::Status(text),
            Value::VerbatimString { text, .. } => Self::Status(text),
            Value::Okay => Self::Status("OK".into()),
            Value::Double(number) => Self::Status(number.to_string()),
            Value::Boolean(flag) => Self::Int(i64::from(flag)),
            Value::ServerError(err) => Self::Error(format!(
                "{} {}",
                err.code(),
                err.details().unwrap_or_default()
            )),
            other => Self::Status(format!("{other:?}")),
        }
    }
}

/// Makes connections to the server of one role.
#[derive(Clone, Debug)]
pub struct Connector {
    server: BusServer,
    database: u8,
    connect_timeout: Duration,
    command_timeout: Duration,
}

impl Connector {
    /// Connections to a role's server and database.
    #[must_use]
    pub fn of(settings: &BusSettings, role: Role) -> Self {
        Self::to_database(settings, role, role.database())
    }

    /// Connections to a role's server, but to a database of another number.
    #[must_use]
    pub fn to_database(settings: &BusSettings, role: Role, database: u8) -> Self {
        Self {
            server: settings.server_of(role).clone(),
            database,
            connect_timeout: settings.connect_timeout,
            command_timeout: settings.command_timeout,
        }
    }

    /// Where it connects to, for people.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.server.endpoint
    }

    /// A connection for commands.
    ///
    /// # Errors
    /// No server, no log-in, or neither in time.
    pub async fn connect(&self) -> Result<Connection, ConnectionError> {
        let address = self.find_server().await?;
        let client = self.client(&address, self.database, true)?;
        let library = self.open(&client, &address).await?;
        Ok(Connection {
            library,
            address,
            limit: self.command_timeout,
        })
    }

    /// A subscription to a channel.
    ///
    /// # Errors
    /// As `connect`, and when the server refuses the subscription.
    pub async fn subscribe(&self, channel: &str) -> Result<Subscription, ConnectionError> {
        let address = self.find_server().await?;
        let client = self.client(&address, self.database, true)?;
        let limit = self.connect_timeout;
        let subscribed = timeout(limit, async {
            let (mut sink, messages) = client.get_async_pubsub().await?.split();
            sink.subscribe(channel).await?;
            Ok((sink, messages))
        });
        match subscribed.await {
            Ok(Ok((sink, messages))) => Ok(Subscription {
                sink,
                messages,
                address,
                limit: self.command_timeout,
            }),
            Ok(Err(source)) => Err(ConnectionError::Connect { address, source }),
            Err(_) => Err(ConnectionError::ConnectTimeout { address, limit }),
        }
    }

    async fn open(
        &self,
        client: &Client,
        address: &HostPort,
    ) -> Result<MultiplexedConnection, ConnectionError> {
        let limit = self.connect_timeout;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(limit))
            // The deadline of each batch is kept here, in `run`.
            .set_response_timeout(None);
        let connecting = client.get_multiplexed_async_connection_with_config(&config);
        match timeout(limit, connecting).await {
            Ok(Ok(library)) => Ok(library),
            Ok(Err(source)) => Err(ConnectionError::Connect {
                address: address.clone(),
                source,
            }),
            Err(_) => Err(ConnectionError::ConnectTimeout {
                address: address.clone(),
                limit,
            }),
        }
    }

    fn client(
        &self,
        address: &HostPort,
        database: u8,
        with_user: bool,
    ) -> Result<Client, ConnectionError> {
        let mut log_in = RedisConnectionInfo::default()
            .set_db(i64::from(database))
            .set_skip_set_lib_name();
        if let Some(password) = &self.server.password
            && !password.is_empty()
        {
            log_in = log_in.set_password(password.reveal());
            if let Some(user) = self.server.username.as_ref().filter(|_| with_user) {
                log_in = log_in.set_username(user);
            }
        }
        let failed = |source| ConnectionError::Connect {
            address: address.clone(),
            source,
        };
        let (host, port) = (address.host.clone(), address.port);
        let socket = TcpSettings::default()
            .set_nodelay(true)
            // A connection that is given up must not deliver what it still holds later on, when
            // the same commands have been sent by another one.
            .set_linger_time(Duration::ZERO)
            .set_user_timeout(self.command_timeout);
        let Some(tls) = &self.server.tls else {
            let info = ConnectionAddr::Tcp(host, port)
                .into_connection_info()
                .map_err(failed)?
                .set_tcp_settings(socket)
                .set_redis_settings(log_in);
            return Client::open(info).map_err(failed);
        };
        // A second installation is refused and harmless.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let root_cert = match &tls.ca_file {
            Some(path) => {
                Some(
                    std::fs::read(path).map_err(|source| ConnectionError::Certificates {
                        path: path.clone(),
                        source,
                    })?,
                )
            }
            None => None,
        };
        let info = ConnectionAddr::TcpTls {
            host,
            port,
            insecure: tls.skip_verify,
            tls_params: None,
        }
        .into_connection_info()
        .map_err(failed)?
        .set_tcp_settings(socket)
        .set_redis_settings(log_in);
        let certificates = TlsCertificates {
            client_tls: None,
            root_cert,
        };
        Client::build_with_tls(info, certificates).map_err(failed)
    }

    async fn find_server(&self) -> Result<HostPort, ConnectionError> {
        let (addresses, service_name) = match &self.server.endpoint {
            Endpoint::Direct(address) => return Ok(address.clone()),
            Endpoint::Sentinels {
                addresses,
                service_name,
            } => (addresses, service_name),
        };
        let mut last = "none is configured".to_owned();
        let mut to_ask = addresses.iter();
        let mut asked = FuturesUnordered::new();
        loop {
            let ask = |sentinel| Box::pin(self.ask_sentinel(sentinel, service_name));
            asked.extend(to_ask.next().map(ask));
            let answer = if to_ask.len() == 0 {
                asked.next().await
            } else {
                match timeout(NEXT_SENTINEL, asked.next()).await {
                    Ok(answer) => answer,
                    Err(_) => continue,
                }
            };
            match answer {
                Some(Ok(master)) => return Ok(master),
                Some(Err(said)) => last = said,
                None => break,
            }
        }
        Err(ConnectionError::NoMaster {
            endpoint: self.server.endpoint.clone(),
            last,
        })
    }

    /// The master a sentinel names, if that server itself agrees. Where our user may not ask it, the
    /// sentinel is believed: a replica that takes no writes says so at the first one.
    async fn ask_sentinel(&self, sentinel: &HostPort, name: &str) -> Result<HostPort, String> {
        let words = |err: ConnectionError| crate::causes::chain(&err);
        let client = self.client(sentinel, 0, false).map_err(words)?;
        let mut asked = Connection {
            library: self.open(&client, sentinel).await.map_err(words)?,
            address: sentinel.clone(),
            limit: self.command_timeout,
        };
        let question = Command::new("SENTINEL")
            .arg("GET-MASTER-ADDR-BY-NAME")
            .arg(name.to_owned());
        let answer = asked.ask(question).await.map_err(words)?;
        let text = |n: usize| {
            let item = answer.array()?.get(n)?.bytes()?;
            String::from_utf8(item.to_vec()).ok()
        };
        let master = match (text(0), text(1).and_then(|port| port.parse().ok())) {
            (Some(host), Some(port)) => HostPort { host, port },
            _ => return Err(format!("{sentinel} knows no master {name}")),
        };
        let client = self.client(&master, self.database, true).map_err(words)?;
        let mut named = Connection {
            library: self.open(&client, &master).await.map_err(words)?,
            address: master.clone(),
            limit: self.command_timeout,
        };
        let role = match named.ask(Command::new("ROLE")).await {
            Err(ConnectionError::Refused { message, .. }) if code(&message) == "NOPERM" => {
                return Ok(master);
            }
            answer => answer.map_err(words)?,
        };
        let is_master = role
            .array()
            .and_then(|items| items.first())
            .and_then(Reply::bytes)
            .is_some_and(|role| role.as_ref() == b"master");
        if is_master {
            Ok(master)
        } else {
            Err(format!("{master} is not a master yet"))
        }
    }
}

/// A connection that answers commands. After an error it is to be dropped.
pub struct Connection {
    library: MultiplexedConnection,
    address: HostPort,
    limit: Duration,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Where it leads.
    #[must_use]
    pub fn address(&self) -> &HostPort {
        &self.address
    }

    /// Sends commands at once and gives a reply for each. Refusals of single commands are replies.
    ///
    /// # Errors
    /// The connection broke or the deadline passed: the commands may have been carried out.
    pub async fn run(&mut self, commands: &[Command]) -> Result<Vec<Reply>, ConnectionError> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = redis::Pipeline::with_capacity(commands.len());
        for command in commands {
            pipeline.add_command(command.to_library());
        }
        let sending = self
            .library
            .send_packed_commands(&pipeline, 0, commands.len());
        match timeout(self.limit, sending).await {
            Ok(Ok(values)) if values.len() == commands.len() => {
                Ok(values.into_iter().map(Reply::from_library).collect())
            }
            Ok(Ok(_)) => Err(ConnectionError::Unexpected {
                address: self.address.clone(),
                command: commands[0].name(),
            }),
            Ok(Err(source)) => Err(ConnectionError::Broken {
                address: self.address.clone(),
                source,
            }),
            Err(_) => Err(ConnectionError::Timeout {
                address: self.address.clone(),
                limit: self.limit,
            }),
        }
    }

    /// Sends one command and gives its reply.
    ///
    /// # Errors
    /// As `run`, and the server's refusal.
    pub async fn ask(&mut self, command: Command) -> Result<Reply, ConnectionError> {
        let name = command.name();
        match self.run(&[command]).await?.pop() {
            Some(Reply::Error(message)) => Err(ConnectionError::Refused {
                address: self.address.clone(),
                command: name,
                message,
            }),
            Some(reply) => Ok(reply),
            None => Err(ConnectionError::Unexpected {
                address: self.address.clone(),
                command: name,
            }),
        }
    }

    /// Carries out all commands or none, and gives a reply for each.
    ///
    /// # Errors
    /// As `run`, and when the server refused the whole.
    pub async fn run_atomically(
        &mut self,
        commands: &[Command],
    ) -> Result<Vec<Reply>, ConnectionError> {
        let mut batch = Vec::with_capacity(commands.len() + 2);
        batch.push(Command::new("MULTI"));
        batch.extend_from_slice(commands);
        batch.push(Command::new("EXEC"));
        let mut replies = self.run(&batch).await?;
        let refused = |message: String| ConnectionError::Refused {
            address: self.address.clone(),
            command: commands.first().map(Command::name).unwrap_or_default(),
            message,
        };
        match replies.pop() {
            Some(Reply::Array(results)) if results.len() == commands.len() => Ok(results),
            last => {
                // The reason stands at the command that was refused, not at EXEC.
                let reason = replies
                    .into_iter()
                    .chain(last)
                    .find_map(|reply| match reply {
                        Reply::Error(message) => Some(message),
                        _ => None,
                    });
                Err(refused(reason.unwrap_or_else(|| "no result".into())))
            }
        }
    }
}

/// A subscription to one channel. After an error or the end it is to be dropped.
pub struct Subscription {
    sink: PubSubSink,
    messages: PubSubStream,
    address: HostPort,
    limit: Duration,
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscription")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Subscription {
    /// The next message within `wait`; `None` when there was none and the server still answers.
    ///
    /// # Errors
    /// The connection ended, or the server does not answer a ping.
    pub async fn next(&mut self, wait: Duration) -> Result<Option<Bytes>, ConnectionError> {
        match timeout(wait, self.messages.next()).await {
            Ok(Some(message)) => Ok(Some(Bytes::copy_from_slice(message.get_payload_bytes()))),
            Ok(None) => Err(ConnectionError::Broken {
                address: self.address.clone(),
                source: RedisError::from(std::io::Error::from(std::io::ErrorKind::UnexpectedEof)),
            }),
            Err(_) => {
                let pinged = timeout(self.limit, self.sink.ping::<Value>());
                match pinged.await {
                    Ok(Ok(_)) => Ok(None),
                    Ok(Err(source)) => Err(ConnectionError::Broken {
                        address: self.address.clone(),
                        source,
                    }),
                    Err(_) => Err(ConnectionError::Timeout {
                        address: self.address.clone(),
                        limit: self.limit,
                    }),
                }
            }
        }
    }
}
