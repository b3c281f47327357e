//! Waiting for a condition with a deadline, instead of sleeping and hoping.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(10);

/// A limit for a machine of usual speed, on this one: `BAI_SLOWNESS` says how much slower it is, as under emulation.
pub fn here(limit: Duration) -> Duration {
    let slowness = std::env::var("BAI_SLOWNESS").ok();
    limit * slowness.and_then(|it| it.parse().ok()).unwrap_or(1)
}

/// Waits until `condition` gives a value; fails with `what` when `limit` has passed.
pub async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> F,
) -> Result<T> {
    let limit = here(limit);
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not so after {limit:?}");
        }
        tokio::time::sleep(STEP).await;
    }
}

/// The same for plain code.
pub fn until_blocking<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> Result<T> {
    let limit = here(limit);
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not so after {limit:?}");
        }
        std::thread::sleep(STEP);
    }
}
