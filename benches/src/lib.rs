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

use std::process::{Child, Command, ExitCode, ExitStatus};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dataplane::sys::signal;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::site::Site;

/// How often it is looked whether a program has ended.
const LOOK: Duration = Duration::from_millis(100);

/// Where a bench leaves the handle of what it has made, for whoever must clean up.
#[derive(Debug, Clone, Default)]
pub struct Stage {
    site: Arc<Mutex<Option<Arc<Site>>>>,
    /// A program in no group of the site, which cleans up itself.
    guest: Arc<Mutex<Option<Child>>>,
}

impl Stage {
    /// Leaves a site here.
    pub fn set(&self, site: Site) -> Arc<Site> {
        let site = Arc::new(site);
        *self.site.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&site));
        site
    }

    fn take(&self) -> Option<Arc<Site>> {
        let mut kept = self.site.lock().unwrap_or_else(PoisonError::into_inner);
        kept.take()
    }

    /// Runs a program that needs time to clean up, to its end. When the bench is interrupted meanwhile, the
    /// program gets SIGTERM and is waited for. It inherits a mask in which that is blocked: it has to unblock it.
    ///
    /// # Errors
    /// It is not there, or was ended because the bench is interrupted.
    pub fn run(&self, command: &mut Command) -> Result<ExitStatus> {
        let name = command.get_program().display().to_string();
        // Held, so that an interruption waits until there is something to end.
        let mut guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn();
        *guest = Some(child.with_context(|| format!("{name} cannot be started"))?);
        loop {
            let child = guest.as_mut();
            let child = child.with_context(|| format!("{name} was interrupted"))?;
            if let Some(status) = child.try_wait()? {
                *guest = None;
                return Ok(status);
            }
            drop(guest);
            std::thread::sleep(LOOK);
            guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the program that is run, if there is one, and waits for it at most `limit`.
    fn end_guest(&self, limit: Duration) {
        let mut guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut child) = guest.take() else {
            return;
        };
        // It is waited for here only, so the number is still its own.
        if let Ok(pid) = i32::try_from(child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let until = Instant::now() + limit;
        while matches!(child.try_wait(), Ok(None)) {
            if Instant::now() >= until {
                eprintln!("a program of the bench did not end in time and is killed");
                let _ = child.kill();
                let _ = child.wait();
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    fn clean(&self) {
        if let Some(site) = self.take() {
            site.clean();
        }
    }
}

/// Runs a bench; cleans up when it ends, fails or is told to stop by SIGINT, SIGTERM or SIGHUP.
pub fn run(bench: impl FnOnce(&Stage) -> Result<()> + Send + 'static) -> ExitCode {
    // More than what such a program gives its own ones.
    const GUEST_LIMIT: Duration = Duration::from_secs(150);
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
            stage.end_guest(GUEST_LIMIT);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_outside_all_groups_is_ended_with_the_bench_and_waited_for() {
        let directory =
            std::env::temp_dir().join(format!("bai-bench-guest-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let stage = Stage::default();
        let theirs = stage.clone();
        let script =
            "trap 'sleep 0.2; : >cleaned; exit 7' TERM; : >ready; while :; do sleep 0.05; done";
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(&directory);
        let bench = std::thread::spawn(move || theirs.run(&mut command));
        let until = Instant::now() + Duration::from_secs(30);
        while !directory.join("ready").exists() {
            assert!(Instant::now() < until, "the program begins");
            std::thread::sleep(Duration::from_millis(5));
        }
        stage.end_guest(Duration::from_secs(30));
        assert!(directory.join("cleaned").exists());
        let err = bench.join().unwrap().unwrap_err();
        assert!(err.to_string().contains("interrupted"), "{err:#}");
        // One that ends by itself tells how; nothing is left to end then.
        let status = stage
            .run(Command::new("sh").args(["-c", "exit 3"]))
            .unwrap();
        assert_eq!(status.code(), Some(3));
        stage.end_guest(Duration::ZERO);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_program_that_does_not_end_is_killed() {
        let stage = Stage::default();
        let theirs = stage.clone();
        let (told, begun) = sync_channel(0);
        let bench = std::thread::spawn(move || {
            let _ = told.send(());
            theirs
                .run(Command::new("sh").args(["-c", "trap '' TERM; while :; do sleep 0.05; done"]))
        });
        begun.recv().unwrap();
        while stage.guest.lock().unwrap().is_none() {
            std::thread::yield_now();
        }
        stage.end_guest(Duration::from_millis(300));
        assert!(bench.join().unwrap().is_err());
    }
}
