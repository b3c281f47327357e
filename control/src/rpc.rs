//! The manager's RPC: transport, framing, codec, server and client.
//!
//! In go ZeroMQ messages of the manager (or of our own command line), out come [`Call`]s to a
//! [`Service`] and, for every accepted call, exactly one reply. Invariant: whatever a peer sends,
//! the receive loop lives on; a handler can neither delay a PONG nor another call's reply.
//!
//! Layers, lowest first: `transport` (the only file that knows the ZeroMQ crate), [`frame`]
//! (callosum's three frames), [`msgpack`], [`pickle`] and [`temporenc`] (the body dialect),
//! [`Value`] with its serde bridge ([`from_value`], [`to_value`]), then [`Server`] and [`Client`].

pub mod arguments;
pub mod catalogue;
pub mod client;
mod deserialize;
pub mod failure;
pub mod frame;
pub mod keys;
pub mod methods;
pub mod msgpack;
pub mod pickle;
mod serialize;
pub mod server;
pub mod service;
pub mod temporenc;
mod transport;
pub mod value;

pub use arguments::Arguments;
pub use client::{Client, ClientCurve, ClientError};
pub use deserialize::{ConversionError, from_value};
pub use failure::Failure;
pub use keys::{KeyError, KeyPair, PublicKey, SecretKey};
pub use serialize::to_value;
pub use server::{BindError, CurveServer, Limits, Server, ServerOptions, await_address};
pub use service::{BoxFuture, Call, Peer, Service};
pub use value::{ImageRef, Value};
