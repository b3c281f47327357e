//! Waiting for the dataplane's ring.
//!
//! A thread of its own blocks in poll(2): watching a foreign descriptor from the runtime needs an
//! unsafe promise that this crate does not make.

use std::io;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use shared::doorbell::Doorbell;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// How often the thread looks whether the agent stops.
const LOOK: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// Listens until the agent stops; each ring (or several at once) notifies.
pub(super) fn listen(doorbell: Doorbell, stopping: CancellationToken) -> io::Result<Arc<Notify>> {
    let rung = Arc::new(Notify::new());
    let notify = rung.clone();
    std::thread::Builder::new()
        .name("doorbell".into())
        .spawn(move || {
            while !stopping.is_cancelled() {
                let mut fds = [PollFd::new(&doorbell, PollFlags::IN)];
                match poll(&mut fds, Some(&LOOK)) {
                    Ok(0) | Err(rustix::io::Errno::INTR) => {}
                    Ok(_) => {
                        doorbell.drain();
                        notify.notify_one();
                    }
                    Err(err) => {
                        // The regions are looked at every second without a ring, too.
                        tracing::error!(%err, "cannot wait for the doorbell any more");
                        return;
                    }
                }
            }
        })?;
    Ok(rung)
}
