//! The seam between the wire and the methods: a [`Call`] goes in, a value or a [`Failure`] comes out.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;

use super::arguments::Arguments;
use super::catalogue::{self, Method};
use super::failure::Failure;
use super::keys::PublicKey;
use super::value::Value;

/// A boxed future, as trait objects need it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Who sent a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Number of the connection, never reused while the server lives.
    pub connection: u64,
    /// Remote address, when the transport knows it.
    pub address: Option<SocketAddr>,
    /// The peer's verified CURVE key; `None` without CURVE.
    pub key: Option<PublicKey>,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "{address}"),
            None => write!(f, "connection {}", self.connection),
        }
    }
}

/// One call as it came from the wire; nothing is checked but the framing.
#[derive(Clone, Debug, PartialEq)]
pub struct Call {
    /// Method name.
    pub method: String,
    /// Positional arguments.
    pub args: Vec<Value>,
    /// Keyword arguments.
    pub kwargs: Vec<(String, Value)>,
    /// The sender.
    pub peer: Peer,
}

impl Call {
    /// Finds the method in the catalogue and binds the arguments to its parameters.
    ///
    /// # Errors
    /// An unknown method, or arguments that do not fit.
    pub fn bind(self) -> Result<(&'static Method, Arguments), Failure> {
        let method = catalogue::find(&self.method).ok_or_else(|| unknown_method(&self.method))?;
        let arguments = Arguments::bind(method, self.args, self.kwargs)?;
        Ok((method, arguments))
    }
}

/// The answer to a method nobody knows.
#[must_use]
pub fn unknown_method(method: &str) -> Failure {
    Failure::new(
        "NotImplementedError",
        format!("this agent has no RPC method {method:?}"),
    )
}

/// Whoever answers calls.
pub trait Service: Send + Sync + 'static {
    /// Answers one call. The future is run to its end whatever becomes of the caller, unless the method
    /// [`Service::ends_with_its_caller`]; a panic becomes a failure reply. Calls run concurrently: exclusion
    /// is the service's affair.
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Value, Failure>>;

    /// Whether a call of this method is dropped when its caller's connection has ended: what it would take
    /// for one who is gone stays for the next.
    fn ends_with_its_caller(&self, _method: &str) -> bool {
        false
    }

    /// Whether calls of this method are answered from memory, with neither a wait nor long work, by
    /// [`Service::answer_at_once`].
    fn answers_at_once(&self, _method: &str) -> bool {
        false
    }

    /// Answers such a call on the transport's own thread, where anything longer would hold up all
    /// connections. A panic becomes a failure reply.
    ///
    /// # Errors
    /// The failure that is replied.
    fn answer_at_once(&self, call: Call) -> Result<Value, Failure> {
        Err(unknown_method(&call.method))
    }
}
