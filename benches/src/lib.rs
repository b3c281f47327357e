//! Benches against peers: the load generator, the topology they run in, and what is made of the
//! figures.
//!
//! In: options of the bench programs. Out: tables, plots and JSON under `target/bench`. Invariant:
//! whatever a bench makes on the machine goes away with its [`site::Site`].
#![forbid(unsafe_code)]

pub mod chart;
pub mod echo;
pub mod engine;
pub mod load;
pub mod node;
pub mod peer;
pub mod ports;
pub mod publish;
pub mod site;
pub mod statistics;
pub mod stats;

use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use dataplane::sys::signal;

use crate::site::Site;

/// Where a bench leaves the handle of what it has made, for whoever must clean up.
#[derive(Debug, Clone, Default)]
pub struct Stage(Arc<Mutex<Option<Arc<Site>>>>);

impl Stage {
    /// Leaves a site here.
    pub fn set(&self, site: Site) -> Arc<Site> {
        let site = Arc::new(site);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&site));
        site
    }

    fn take(&self) -> Option<Arc<Site>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.take()
    }

    fn clean(&self) {
        if let Some(site) = self.take() {
            site.clean();
        }
    }
}

/// Runs a bench; cleans up when it ends, fails or is told to stop by SIGINT, SIGTERM or SIGHUP.
pub fn run(bench: impl FnOnce(&Stage) -> Result<()> + Send + 'static) -> ExitCode {
    const LOOK: Duration = Duration::from_millis(100);
    // Before any thread exists, so that signals come here and nowhere else.
    let mut signals = match signal::block() {
        Ok(signals) => signals,
        Err(errno) => {
            eprintln!("signals cannot be taken: {errno}");
            return ExitCode::FAILURE;
        }
    };
    let stage = Stage::default();
    let (told, answer) = sync_channel(1);
    let theirs = stage.clone();
    let spawned = std::thread::Builder::new()
        .name("bench".to_owned())
        .spawn(move || {
            let outcome = bench(&theirs);
            let _ = told.send(outcome);
        });
    if let Err(err) = spawned {
        eprintln!("no thread: {err}");
        return ExitCode::FAILURE;
    }
    loop {
        match answer.recv_timeout(LOOK) {
            Ok(Ok(())) => {
                stage.clean();
                return ExitCode::SUCCESS;
            }
            Ok(Err(err)) => {
                stage.clean();
                eprintln!("{err:#}");
                return ExitCode::FAILURE;
            }
            Err(RecvTimeoutError::Disconnected) => {
                stage.clean();
                return ExitCode::FAILURE;
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if signals.take().is_some() {
            eprintln!("interrupted, cleaning up");
            let site = stage.take();
            if let Some(site) = &site {
                site.clean();
                // The bench's thread may have been between two steps: it has failed by now.
                std::thread::sleep(LOOK);
                site.clean();
            }
            // As a shell reports it.
            return ExitCode::from(130);
        }
    }
}
