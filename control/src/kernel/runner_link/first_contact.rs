//! The first contact with a runner that may still be starting.
//!
//! In: how long and how often to try. Out: the services of the image, or why there are none. Invariant: a
//! container that dies, or a link that is closed, ends the wait at once.

use std::time::{Duration, Instant};

use config::KernelLifecycles;
use tokio_util::sync::CancellationToken;

use super::{AppRecord, LinkError, RunnerLink, TICK};

/// How long and how often the first contact is tried.
#[derive(Clone, Debug)]
pub struct InitPolling {
    /// Attempts at most.
    pub attempts: u32,
    /// Time in total.
    pub total: Duration,
    /// Pause between attempts.
    pub interval: Duration,
    /// Limit of one wait for the runner's status.
    pub status_limit: Duration,
    /// Limit of one wait for the list of services.
    pub apps_limit: Duration,
}

impl Default for InitPolling {
    fn default() -> Self {
        Self {
            attempts: 10,
            total: Duration::from_secs(60),
            interval: Duration::from_millis(300),
            status_limit: Duration::from_secs(60),
            apps_limit: Duration::from_secs(10),
        }
    }
}

impl InitPolling {
    /// As the settings say. `init-polling-timeout-sec` cuts no attempt short, as in the original: what is one
    /// attempt there may be several of ours.
    pub fn of(limits: &KernelLifecycles) -> Self {
        Self {
            attempts: limits.init_polling_attempt,
            total: limits.init_polling_timeout.max(limits.init_timeout),
            status_limit: limits.init_timeout,
            ..Self::default()
        }
    }
}

/// Why a kernel's runner never became ready.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The container ended while we waited.
    #[error("the container ended before its runner was ready")]
    Died,
    /// Nothing was heard in time.
    #[error(
        "the kernel's runner was not ready within {waited:?} ({attempts} attempts); its console may say why, and kernel-lifecycles.init-timeout-sec gives it longer"
    )]
    TimedOut {
        /// How long was waited.
        waited: Duration,
        /// How often it was tried.
        attempts: u32,
    },
    /// The runner is there but could not say which services it has.
    #[error("the kernel's runner could not list its services ({attempts} attempts)")]
    AppsFailed {
        /// How often it was tried.
        attempts: u32,
    },
    /// The link was closed meanwhile.
    #[error("the connection to the kernel's runner was closed while waiting for it")]
    Closed,
}

impl RunnerLink {
    /// Waits until the runner serves, then asks for its services. Ends at once when `dead` is cancelled
    /// (the container died) or the link is closed.
    ///
    /// # Errors
    /// The runner was not ready in time or could not list its services, the container died, or the link was
    /// closed.
    pub async fn wait_ready(
        &self,
        polling: &InitPolling,
        dead: &CancellationToken,
    ) -> Result<Vec<AppRecord>, InitError> {
        tokio::select! {
            biased;
            () = dead.cancelled() => Err(InitError::Died),
            () = self.0.closed.cancelled() => Err(InitError::Closed),
            outcome = self.poll_ready(polling) => outcome,
        }
    }

    async fn poll_ready(&self, polling: &InitPolling) -> Result<Vec<AppRecord>, InitError> {
        let begun = Instant::now();
        // A message may be lost with a connection to a runner that is just starting: ask more than once.
        let slice = (polling.total / polling.attempts.max(1)).max(TICK);
        let timed_out = |attempts| InitError::TimedOut {
            waited: begun.elapsed(),
            attempts,
        };
        let mut attempts = 0;
        loop {
            attempts += 1;
            let left = polling.total.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(timed_out(attempts - 1));
            }
            let limit = if attempts >= polling.attempts {
                left
            } else {
                slice.min(left)
            };
            let apps = match self.status(limit.min(polling.status_limit)).await {
                Ok(_) => {
                    let left = polling.total.saturating_sub(begun.elapsed());
                    self.apps(polling.apps_limit.min(left)).await
                }
                Err(err) => Err(err),
            };
            match apps {
                Ok(Some(apps)) => return Ok(apps),
                Ok(None) if attempts >= polling.attempts => {
                    return Err(InitError::AppsFailed { attempts });
                }
                Err(LinkError::Closed) => return Err(InitError::Closed),
                Err(_) if attempts >= polling.attempts => return Err(timed_out(attempts)),
                Ok(None) | Err(_) => tokio::time::sleep(polling.interval).await,
            }
        }
    }
}
