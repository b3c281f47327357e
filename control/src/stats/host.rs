//! One reader of the host for all who ask: the records and the scrapes.
//!
//! Invariant: disks are asked once per interval, however many ask at the same time.

use std::time::{Duration, Instant};

use shared::monotonic_ns;
use tokio::sync::Mutex;

use super::disks::{Disks, Space};
use super::node::HostReading;
use crate::kernel::node::blocking;

/// How old the numbers of disks may be.
const FRESH: Duration = Duration::from_secs(4);

/// The host.
#[derive(Debug, Default)]
pub struct Host {
    disks: Mutex<Known>,
}

/// What was found out of the disks, and when.
#[derive(Debug, Default)]
struct Known {
    disks: Disks,
    at: Option<Instant>,
    spaces: Vec<(String, Space)>,
}

impl Host {
    /// Reads cores and memory now, disks if that was not done a moment ago.
    pub async fn read(&self) -> HostReading {
        let disks = {
            let mut known = self.disks.lock().await;
            if known.at.is_none_or(|at| at.elapsed() > FRESH) {
                known.spaces = known.disks.read().await;
                known.at = Some(Instant::now());
            }
            known.spaces.clone()
        };
        let mut reading = blocking(|| HostReading::of_this_host(monotonic_ns())).await;
        reading.disks = disks;
        reading
    }
}
