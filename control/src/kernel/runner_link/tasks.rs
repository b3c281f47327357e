//! The tasks of a link: the reader, the writer and the ticker.
//!
//! In: the link's state, the runner's address as it changes. Out: messages to and from the sockets.
//! Invariant: each ends when the link is closed; a connection that ends is opened again, with pauses.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};

use super::frame::{AnswerKind, Outgoing};
use super::socket::{self, SocketError};
use super::{Inner, PROMPT_OWED, RunnerAddress, lock};

const RECONNECT_FIRST: Duration = Duration::from_millis(50);
/// A container takes a second or two to listen; each attempt costs next to nothing.
const RECONNECT_LAST: Duration = Duration::from_millis(500);

pub(super) async fn read(inner: Arc<Inner>) {
    let mut delay = RECONNECT_FIRST;
    let mut first = true;
    let mut place = inner.address.subscribe();
    let work = async {
        loop {
            let address = place_of(&mut place).await;
            let converse = async {
                match socket::Receiver::connect(address.ip, address.repl_out).await {
                    Ok(mut receiver) => {
                        delay = RECONNECT_FIRST;
                        if !std::mem::take(&mut first) {
                            inner.reconnected();
                        }
                        let err = receive_all(&inner, &mut receiver).await;
                        report(&inner, &err);
                    }
                    Err(err) => report(&inner, &err),
                }
                pause(&mut delay).await;
            };
            if unless_moved(&mut place, converse).await.is_none() {
                delay = RECONNECT_FIRST;
            }
        }
    };
    inner.closed.run_until_cancelled(work).await;
}

/// Where the runner is, once that is known.
async fn place_of(place: &mut watch::Receiver<Option<RunnerAddress>>) -> RunnerAddress {
    loop {
        if let Some(address) = *place.borrow_and_update() {
            return address;
        }
        if place.changed().await.is_err() {
            // The link is gone, and with it whoever waits here.
            std::future::pending().await
        }
    }
}

/// Goes on until the runner is elsewhere: nothing is heard any more from where it was, not even the
/// end of a connection.
async fn unless_moved<T>(
    place: &mut watch::Receiver<Option<RunnerAddress>>,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::select! {
        // What is done is done: a message that was written is not sent a second time.
        biased;
        done = work => Some(done),
        Ok(()) = place.changed() => None,
    }
}

async fn receive_all(inner: &Inner, receiver: &mut socket::Receiver) -> SocketError {
    loop {
        match receiver.receive().await {
            Ok(Some((kind, payload))) => {
                inner.receive(&kind, payload);
                inner.hold_up().await;
            }
            Ok(None) => {
                tracing::debug!(kernel_id = %inner.kernel_id, "the runner sent a message without exactly two frames");
            }
            Err(err) => return err,
        }
        // A flood of small messages that are already in the buffer must not hold the thread.
        tokio::task::consume_budget().await;
    }
}

pub(super) async fn write(inner: Arc<Inner>, mut messages: mpsc::UnboundedReceiver<Outgoing>) {
    let mut delay = RECONNECT_FIRST;
    let mut unsent: Option<Outgoing> = None;
    let mut first = true;
    let mut place = inner.address.subscribe();
    let work = async {
        loop {
            let address = place_of(&mut place).await;
            let converse = async {
                match socket::Sender::connect(address.ip, address.repl_in).await {
                    Ok(mut sender) => {
                        delay = RECONNECT_FIRST;
                        if !std::mem::take(&mut first) {
                            inner.reconnected();
                        }
                        if let Some(err) =
                            send_all(&inner, &mut sender, &mut messages, &mut unsent).await
                        {
                            report(&inner, &err);
                        }
                    }
                    Err(err) => report(&inner, &err),
                }
                pause(&mut delay).await;
            };
            if unless_moved(&mut place, converse).await.is_none() {
                delay = RECONNECT_FIRST;
            }
        }
    };
    inner.closed.run_until_cancelled(work).await;
}

/// Sends until the connection ends; the message that could not be written stays in `unsent`.
async fn send_all(
    inner: &Inner,
    sender: &mut socket::Sender,
    messages: &mut mpsc::UnboundedReceiver<Outgoing>,
    unsent: &mut Option<Outgoing>,
) -> Option<SocketError> {
    loop {
        if unsent.is_none() {
            *unsent = tokio::select! {
                biased;
                () = sender.ended() => return None,
                message = messages.recv() => Some(message?),
            };
        }
        if let Some(message) = unsent.as_ref() {
            if let Err(err) = sender.send(message.kind, &message.payload).await {
                return Some(err);
            }
            inner.written(message);
            *unsent = None;
        }
    }
}

/// A container that is not up yet is the usual reason; whoever waits for an answer tells the user.
fn report(inner: &Inner, err: &SocketError) {
    tracing::debug!(kernel_id = %inner.kernel_id, %err, "the connection to the runner ended and is opened again");
}

async fn pause(delay: &mut Duration) {
    tokio::time::sleep(*delay).await;
    *delay = (*delay * 2).min(RECONNECT_LAST);
}

/// Pings the runner (which also keeps NAT entries alive) and forgets old runs.
pub(super) async fn tick(inner: Arc<Inner>, ping_interval: Duration) {
    // One wake-up for both: a node has hundreds of kernels.
    let pause = async || tokio::time::sleep(ping_interval).await;
    while inner.closed.run_until_cancelled(pause()).await.is_some() {
        {
            let mut state = lock(&inner.state);
            state.runs.sweep(Instant::now());
            inner.tell(&mut state);
            // An answer that counts as lost by now is owed no more.
            inner.publish(&mut state);
            if inner.check_room(&state, 0).is_ok() {
                let again = state.runs.probe_again(Instant::now());
                // The writer is gone only when the link is closed.
                let _sent = inner.send(again);
            }
        }
        // Nobody waits for this answer; its place keeps it from answering somebody else's ping.
        // A full queue means the runner does not listen, and another ping would not help.
        let _answer = inner.join(
            AnswerKind::Status,
            Outgoing::text("status", ""),
            PROMPT_OWED,
        );
    }
}
