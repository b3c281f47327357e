//! The connecting end. Dropping it closes the connection.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use omq_proto::SocketType;
use omq_proto::proto::{ConnectionConfig, Role};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::link::{self, Link, LinkError, Reader, SendOutcome};
use super::{TransportError, client_mechanism};
use crate::rpc::frame::Frames;
use crate::rpc::keys::{KeyPair, PublicKey};

/// A connection to a node that has shaken hands.
#[derive(Debug)]
pub(in crate::rpc) struct Dealer {
    reader: Reader,
}

impl Dealer {
    pub(in crate::rpc) async fn connect(
        addresses: &[SocketAddr],
        curve: Option<(&KeyPair, PublicKey)>,
        max_message_bytes: usize,
        deadline: Duration,
    ) -> Result<Self, TransportError> {
        let until = Instant::now() + deadline;
        let config = ConnectionConfig::new(Role::Client, SocketType::Dealer)
            .max_message_size(max_message_bytes)
            .mechanism(client_mechanism(curve)?);
        let (stream, address) = connect(addresses, until).await?;
        stream
            .set_nodelay(true)
            .map_err(TransportError::Unreachable)?;
        let reader = timeout_at(until, link::open(stream, 0, address, config))
            .await
            .unwrap_or(Err(LinkError::HandshakeTimeout))
            .map_err(TransportError::Handshake)?;
        Ok(Self { reader })
    }

    pub(in crate::rpc) fn sender(&self) -> DealerSender {
        DealerSender {
            link: self.reader.link().clone(),
        }
    }

    /// The frames of the next message, or why there is none any more.
    pub(in crate::rpc) async fn next(&mut self) -> Result<&[Bytes], LinkError> {
        self.reader.receive().await
    }
}

/// By the first address that answers. One that does not leaves time for those after it.
async fn connect(
    addresses: &[SocketAddr],
    until: Instant,
) -> Result<(TcpStream, SocketAddr), TransportError> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for (place, address) in (1..=addresses.len()).rev().zip(addresses) {
        let left = until.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(place).unwrap_or(u32::MAX);
        match tokio::time::timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok((stream, *address)),
            Ok(Err(err)) => last = err,
            Err(elapsed) => last = elapsed.into(),
        }
    }
    Err(TransportError::Unreachable(last))
}

/// Sends on a connecting end.
#[derive(Clone, Debug)]
pub(in crate::rpc) struct DealerSender {
    link: Arc<Link>,
}

impl DealerSender {
    /// Sends a message, waiting at most `deadline` until there is room for it.
    pub(in crate::rpc) async fn send(
        &self,
        frames: &Frames,
        deadline: Duration,
    ) -> Result<(), LinkError> {
        match self.link.send(frames, deadline).await {
            SendOutcome::Accepted => Ok(()),
            SendOutcome::PeerGone => Err(LinkError::Closed),
            SendOutcome::Full => Err(LinkError::Silent),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_name_is_tried_by_all_its_addresses() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let live = listener.local_addr().unwrap();
        let dead = SocketAddr::from(([127, 0, 0, 2], live.port()));
        let answered = async {
            let (stream, address) = listener.accept().await.unwrap();
            let config = ConnectionConfig::new(Role::Server, SocketType::Router);
            link::open(stream, 0, address, config).await
        };
        let addresses = [dead, live];
        let asked = Dealer::connect(&addresses, None, 1024, Duration::from_secs(30));
        let (asked, answered) = tokio::join!(asked, answered);
        answered.unwrap();
        asked.unwrap();
    }
}
