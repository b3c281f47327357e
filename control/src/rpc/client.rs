//! The connecting end of the RPC, for our command line and the tests.
//!
//! In: an address, keys, calls with deadlines; out: values or failures. One connection carries
//! any number of calls at once. Invariants: every call ends, by a reply, by its deadline or by the
//! end of the connection; nothing but a probe is sent to what is not bai-agent.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout_at};

use super::failure::Failure;
use super::frame::{BAI_AGENT, BodyError, Envelope, Header, Kind, Message, PING, WHO_ANSWERS};
use super::keys::{KeyPair, PublicKey};
use super::msgpack::{DecodeLimits, EncodeError};
use super::transport::{Dealer, DealerSender, LinkError, TransportError};
use super::value::Value;

/// Our key pair and the node's public key.
#[derive(Clone, Debug)]
pub struct ClientCurve {
    /// The caller's pair; the node must have its public half on the allow-list.
    pub pair: KeyPair,
    /// The node's public key.
    pub node: PublicKey,
}

/// Why a call has no value.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address has no meaning here.
    #[error("cannot resolve {address:?}; give host:port")]
    Resolve {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The connection could not be set up.
    #[error("cannot set up a connection to {address}")]
    Setup {
        /// The node.
        address: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The node can't be reached, refuses our key, or closed the connection.
    #[error("no connection to {address} ({reason})")]
    Lost {
        /// The node.
        address: String,
        /// Words of the transport.
        reason: String,
    },
    /// Something else than bai-agent serves the address. A call of a method that it lacks would make the Python
    /// agent deaf.
    #[error(
        "this is not bai-agent: what answers at {address} seems to be the Python agent (or a bai-agent older than this program); nothing more was sent to it"
    )]
    Stranger {
        /// The address.
        address: String,
    },
    /// Nothing came back in time.
    #[error("{address} did not answer {what} within {}", humantime(*.deadline))]
    Deadline {
        /// The node.
        address: String,
        /// `PING`, or the method.
        what: String,
        /// The time that was given.
        deadline: Duration,
    },
    /// The arguments can't be sent.
    #[error("the arguments can't be sent")]
    Encode(#[source] EncodeError),
    /// The reply can't be understood.
    #[error("the reply can't be understood")]
    Reply(#[source] BodyError),
    /// The call was cancelled on the node.
    #[error("the node cancelled the call")]
    Cancelled,
    /// The method failed.
    #[error("{0}")]
    Failure(Failure),
}

fn humantime(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

type Answer = Result<Value, ClientError>;

/// Calls waiting for their replies; `Err` holds why the connection ended.
type Waiting = Arc<Mutex<Result<HashMap<u32, oneshot::Sender<Answer>>, String>>>;

/// Largest reply that is read, in bytes: logs of a whole container come in one message.
const MAX_REPLY_BYTES: usize = 1 << 30;
/// Bounds of decoding a reply. The node is ours, its lists may be long.
const REPLY_LIMITS: DecodeLimits = DecodeLimits {
    depth: 128,
    values: 16_000_000,
};

/// A connection to a node that has answered a probe.
#[derive(Debug)]
pub struct Client {
    address: String,
    sender: DealerSender,
    next_sequence: AtomicU32,
    waiting: Waiting,
    reader: JoinHandle<()>,
}

impl Client {
    /// Connects to `host:port` (or `tcp://host:port`), probes it and waits for the answer that only bai-agent gives.
    ///
    /// # Errors
    /// Nobody answers by `deadline`, the keys do not fit, or it is not bai-agent.
    pub async fn connect(
        address: &str,
        curve: Option<&ClientCurve>,
        deadline: Duration,
    ) -> Result<Self, ClientError> {
        let until = Instant::now() + deadline;
        let address = address.strip_prefix("tcp://").unwrap_or(address).to_owned();
        let targets = resolve(&address, until, deadline).await?;
        let keys = curve.map(|curve| (&curve.pair, curve.node));
        let lost = |reason: &dyn std::error::Error| ClientError::Lost {
            address: address.clone(),
            reason: reason.to_string(),
        };
        let mut dealer = Dealer::connect(&targets, keys, MAX_REPLY_BYTES, deadline)
            .await
            .map_err(|err| match err {
                TransportError::Unreachable(source) => lost(&source),
                TransportError::Handshake(source) => lost(&source),
                other => ClientError::Setup {
                    address: address.clone(),
                    source: other.into(),
                },
            })?;
        let sender = dealer.sender();
        let handshake = async {
            let probe = [PING, b"", WHO_ANSWERS].map(Bytes::from_static);
            sender.send(&probe, deadline).await?;
            loop {
                if let Message::Pong(who) = Message::read(dealer.next().await?) {
                    return Ok::<_, LinkError>(who);
                }
            }
        };
        match timeout_at(until, handshake).await {
            Ok(Ok(who)) if who == BAI_AGENT => {}
            Ok(Ok(_)) => return Err(ClientError::Stranger { address }),
            Ok(Err(reason)) => return Err(lost(&reason)),
            Err(_) => {
                return Err(ClientError::Deadline {
                    address,
                    what: "PING".to_owned(),
                    deadline,
                });
            }
        }
        let waiting: Waiting = Arc::new(Mutex::new(Ok(HashMap::new())));
        let reader = tokio::spawn(read(dealer, waiting.clone(), address.clone()));
        Ok(Self {
            address,
            sender,
            next_sequence: AtomicU32::new(0),
            waiting,
            reader,
        })
    }

    /// Calls a method and waits for its value.
    ///
    /// # Errors
    /// The method failed, there is no reply by `deadline` or none that can be read, or the connection ended.
    pub async fn call(
        &self,
        method: &str,
        args: Vec<Value>,
        kwargs: Vec<(String, Value)>,
        deadline: Duration,
    ) -> Result<Value, ClientError> {
        let until = Instant::now() + deadline;
        let sequence = self.next_sequence.fetch_add(1, Ordering::Relaxed);
        let header = Header {
            kind: Kind::Function,
            method: method.to_owned(),
            order_key: "".into(),
            sequence: sequence.into(),
            zipped: false,
        };
        let frames = header.function(args, kwargs).map_err(ClientError::Encode)?;
        let answer = self.expect_answer(sequence)?;
        let _forget = Forget {
            waiting: &self.waiting,
            sequence,
        };
        let exchange = async {
            if let Err(reason) = self.sender.send(&frames, deadline).await {
                return Err(self.lost(reason.to_string()));
            }
            answer
                .await
                .unwrap_or_else(|_| Err(self.lost("closed".to_owned())))
        };
        timeout_at(until, exchange).await.unwrap_or_else(|_| {
            Err(ClientError::Deadline {
                address: self.address.clone(),
                what: method.to_owned(),
                deadline,
            })
        })
    }

    fn expect_answer(&self, sequence: u32) -> Result<oneshot::Receiver<Answer>, ClientError> {
        let (sender, answer) = oneshot::channel();
        match &mut *lock(&self.waiting) {
            Ok(waiting) => {
                waiting.insert(sequence, sender);
                Ok(answer)
            }
            Err(reason) => Err(self.lost(reason.clone())),
        }
    }

    fn lost(&self, reason: String) -> ClientError {
        ClientError::Lost {
            address: self.address.clone(),
            reason,
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Takes a call off the list when it ends in any way.
struct Forget<'a> {
    waiting: &'a Waiting,
    sequence: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Ok(waiting) = &mut *lock(self.waiting) {
            waiting.remove(&self.sequence);
        }
    }
}

fn lock(
    waiting: &Waiting,
) -> std::sync::MutexGuard<'_, Result<HashMap<u32, oneshot::Sender<Answer>>, String>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn resolve(
    address: &str,
    until: Instant,
    deadline: Duration,
) -> Result<Vec<SocketAddr>, ClientError> {
    let resolved = timeout_at(until, tokio::net::lookup_host(address))
        .await
        .map_err(|_| ClientError::Deadline {
            address: address.to_owned(),
            what: "the name lookup".to_owned(),
            deadline,
        })?;
    let failed = |source| ClientError::Resolve {
        address: address.to_owned(),
        source,
    };
    let addresses: Vec<_> = resolved.map_err(failed)?.collect();
    match addresses.is_empty() {
        true => Err(failed(std::io::ErrorKind::AddrNotAvailable.into())),
        false => Ok(addresses),
    }
}

/// Hands replies to their calls until the connection ends.
async fn read(mut dealer: Dealer, waiting: Waiting, address: String) {
    loop {
        match dealer.next().await {
            Ok(frames) => {
                if let Message::Upper(header, envelope) = Message::read(frames)
                    && let Ok(header) = Header::decode(&header)
                    && let Some(sequence) = header.sequence.as_i64()
                    && let Ok(sequence) = u32::try_from(sequence)
                    && let Some(answer) = answer(header.kind, &envelope)
                {
                    let waiter = match &mut *lock(&waiting) {
                        Ok(waiting) => waiting.remove(&sequence),
                        Err(_) => None,
                    };
                    if let Some(waiter) = waiter
                        && waiter.send(answer).is_err()
                    {
                        tracing::trace!(sequence, "a reply came after its deadline");
                    }
                }
            }
            Err(reason) => {
                let reason = reason.to_string();
                let ended = std::mem::replace(&mut *lock(&waiting), Err(reason.clone()));
                for waiter in ended.into_iter().flat_map(HashMap::into_values) {
                    let lost = ClientError::Lost {
                        address: address.clone(),
                        reason: reason.clone(),
                    };
                    if waiter.send(Err(lost)).is_err() {
                        tracing::trace!("a call ended with its connection");
                    }
                }
                return;
            }
        }
    }
}

fn answer(kind: Kind, envelope: &Bytes) -> Option<Answer> {
    let read = |read: fn(&Envelope) -> Result<Answer, BodyError>| {
        Envelope::decode(envelope)
            .and_then(|envelope| read(&envelope))
            .unwrap_or_else(|err| Err(ClientError::Reply(err)))
    };
    match kind {
        Kind::Result => Some(read(|envelope| envelope.body_value(&REPLY_LIMITS).map(Ok))),
        Kind::Failure | Kind::Error => Some(read(|envelope| {
            Ok(Err(ClientError::Failure(envelope.failure()?)))
        })),
        Kind::Cancelled => Some(Err(ClientError::Cancelled)),
        Kind::Null | Kind::Function | Kind::Cancel => None,
    }
}
