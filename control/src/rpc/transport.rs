//! ZeroMQ over TCP: the files that know the `omq-proto` crate.
//!
//! In: an address, keys and limits; out: messages with the connection they came from (ROUTER), or a
//! connection to a node (DEALER). The crate turns bytes into messages and back; sockets, queues and
//! limits are ours, so that between a request's bytes and the reply's there is neither a queue nor
//! another task (docs/adr/0002-zeromq-by-omq.md).
//!
//! Invariants: with CURVE on, a message of anybody but the allow-listed key is never handed out;
//! a peer that has gone or does not read costs its own messages only.

mod dealer;
mod link;
mod router;

use omq_proto::{CurveKeypair, CurvePublicKey, CurveSecretKey, CurveServerOptions, MechanismSetup};

use super::keys::{KeyPair, PublicKey, SecretKey};

pub(super) use dealer::{Dealer, DealerSender};
pub(super) use link::{Link, LinkError, SendOutcome};
pub(super) use router::{Allowed, Receive, Router, RouterOptions, try_address};

/// Why the transport could not be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransportError {
    #[error("the address cannot be bound")]
    Bind(#[source] std::io::Error),
    #[error("the thread for RPC cannot be started")]
    Thread(#[source] std::io::Error),
    #[error("the secret key of the pair does not belong to its public key")]
    KeyMismatch,
    #[error("nobody listens there")]
    Unreachable(#[source] std::io::Error),
    #[error("the two ends do not come to terms")]
    Handshake(#[source] link::LinkError),
}

/// The listening end's part of a handshake: everybody, or the one key.
fn server_mechanism(curve: Option<(&KeyPair, Allowed)>) -> Result<MechanismSetup, TransportError> {
    let Some((pair, allowed)) = curve else {
        return Ok(MechanismSetup::Null);
    };
    Ok(MechanismSetup::CurveServer {
        our_keypair: checked_pair(pair)?,
        // Where a peer with the own key is, the router looks at.
        options: CurveServerOptions::default()
            .authenticator(move |peer| allowed.knows(PublicKey(peer.public_key))),
    })
}

/// The connecting end's part of a handshake.
fn client_mechanism(
    curve: Option<(&KeyPair, PublicKey)>,
) -> Result<MechanismSetup, TransportError> {
    let Some((pair, node)) = curve else {
        return Ok(MechanismSetup::Null);
    };
    Ok(MechanismSetup::CurveClient {
        our_keypair: checked_pair(pair)?,
        server_public: CurvePublicKey(node.0),
    })
}

/// Makes a key pair from the system's randomness.
pub(super) fn generate_pair() -> KeyPair {
    let pair = CurveKeypair::generate();
    KeyPair {
        public: PublicKey(pair.public.0),
        secret: SecretKey(pair.secret.0),
    }
}

fn checked_pair(pair: &KeyPair) -> Result<CurveKeypair, TransportError> {
    let secret = CurveSecretKey(pair.secret.0);
    let public = CurvePublicKey(pair.public.0);
    if secret.derive_public() == public {
        Ok(CurveKeypair { public, secret })
    } else {
        Err(TransportError::KeyMismatch)
    }
}
