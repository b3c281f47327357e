//! Work that waits for a disk, off the async workers.

use std::time::{Duration, Instant};

/// How long a step that only writes a small file may take before it is reported.
const SLOW_DISK: Duration = Duration::from_secs(5);

/// Runs something that may wait for a disk off the async workers, and says so when it took long.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let began = Instant::now();
    let result = match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(err) => match err.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Blocking tasks are not cancelled once they run; the runtime is going down.
            Err(_) => std::future::pending().await,
        },
    };
    if began.elapsed() > SLOW_DISK {
        tracing::warn!(seconds = began.elapsed().as_secs(), "the disk is slow");
    }
    result
}
