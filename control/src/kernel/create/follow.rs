//! What is seen to beside a runner that is connected: the models it runs, and what the journal knows of
//! its runs.
//!
//! In: a kernel and the link to its runner. Out: events, the record. Invariant: each ends with its link, or
//! with the agent.

use std::cmp::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shared::log_limit::LogLimit;
use tokio::sync::watch;

use crate::events::Event;
use crate::kernel::journal::JournalError;
use crate::kernel::node::Node;
use crate::kernel::registry::Kernel;
use crate::kernel::request::SessionType;
use crate::kernel::runner_link::RunnerLink;
use crate::kernel::services;

/// How long a run is under way before the journal says so: shorter ones cost no write.
const RUN_NOTED: Duration = Duration::from_secs(2);
/// How long after its end the journal says so.
const RUN_FORGOTTEN: Duration = Duration::from_millis(200);
/// Shortest time between two words about the health of a kernel's models.
const MODEL_PACE: Duration = Duration::from_secs(1);

/// Keeps in the journal how many runs have to be told to end: the next agent tells it if this one
/// does not. Short runs are over before they are noted.
pub(super) fn note_runs(node: &Arc<Node>, kernel: &Arc<Kernel>, runner: &RunnerLink) {
    let mut owed = runner.runs_owed();
    let (node, kernel, runner) = (node.clone(), kernel.clone(), runner.clone());
    node.clone().tasks.spawn(async move {
        let note = async {
            let noted = || kernel.with_record(|record| record.runs_owed);
            while is_news(&mut owed, noted()).await {
                kernel.update_record(|record| record.runs_owed = *owed.borrow());
                if let Err(err) = node.store(&kernel).await {
                    say_unwritten(&kernel, &err);
                }
            }
        };
        tokio::select! {
            biased;
            () = runner.closed() => {}
            () = node.stopping.cancelled() => {}
            () = note => {}
        }
    });
}

/// Waits until the journal, which knows of `noted` runs, is to know better. False when the link is gone.
async fn is_news(owed: &mut watch::Receiver<u32>, noted: u32) -> bool {
    loop {
        let news = owed.borrow_and_update().cmp(&noted);
        let patience = match news {
            Ordering::Equal => Duration::MAX,
            Ordering::Greater => RUN_NOTED,
            Ordering::Less => RUN_FORGOTTEN,
        };
        let other = owed.wait_for(|now| now.cmp(&noted) != news);
        match tokio::time::timeout(patience, other).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return false,
            Err(_) => return true,
        }
    }
}

/// Clients can have the journal written at will.
fn say_unwritten(kernel: &Kernel, err: &JournalError) {
    static LIMIT: Mutex<LogLimit> = Mutex::new(LogLimit::new());
    let passed = LIMIT.lock().unwrap_or_else(PoisonError::into_inner).pass();
    if let Some(suppressed) = passed {
        tracing::warn!(kernel_id = %kernel.id, err = err as &dyn std::error::Error, suppressed, "cannot write the journal");
    }
}

/// Tells what the runner finds out about the health of the kernel's models, while it is connected.
pub(super) fn follow_models(node: &Arc<Node>, kernel: &Kernel, runner: &RunnerLink) {
    if kernel.with_record(|record| record.session_type) != SessionType::Inference {
        return;
    }
    let mut updates = runner.model_updates();
    let (events, stopping) = (node.events.clone(), node.stopping.clone());
    let (id, session) = (kernel.id, kernel.session);
    node.tasks.spawn(async move {
        let tell = async {
            while let Some(update) = services::newest_status(&mut updates).await {
                let status = if update.is_healthy { "healthy" } else { "unhealthy" };
                tracing::info!(kernel_id = %id, model = update.model_name, status, "a model service has changed");
                events.emit(Event::ModelServiceStatusUpdated { session, status });
                tokio::time::sleep(MODEL_PACE).await;
            }
        };
        stopping.run_until_cancelled(tell).await;
    });
}

/// Starts the model services of an inference kernel in the background, unless that is done. A start
/// that nobody heard the answer of, because the agent ended, is asked for again: the runner knows
/// what runs.
pub fn start_models(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    if !kernel.with_record(|record| record.models_pending) {
        return;
    }
    let (node, kernel) = (node.clone(), kernel.clone());
    node.clone().tasks.spawn(async move {
        let Some(runner) = kernel.runner() else {
            return;
        };
        let models = kernel.with_record(|record| record.models.clone());
        let starts = models
            .iter()
            .map(|model| start_model(&node, &kernel, &runner, model));
        let told = tokio::select! {
            told = futures_util::future::join_all(starts) => told,
            // The next start of the agent asks again.
            () = node.stopping.cancelled() => return,
        };
        if told.into_iter().all(|told| told) && kernel.is_running() {
            node.note(&kernel, |record| record.models_pending = false)
                .await;
        }
    });
}

/// Starts one model and tells when that fails; whether there was an answer.
async fn start_model(
    node: &Node,
    kernel: &Kernel,
    runner: &RunnerLink,
    model: &serde_json::Value,
) -> bool {
    let reply = services::start_model_service(runner, model).await;
    if reply.is_cut_off() {
        return false;
    }
    if !reply.is_up() {
        tracing::warn!(kernel_id = %kernel.id, model = model["name"].as_str(), err = reply.error, "a model service did not start");
        node.events.emit(Event::ModelServiceStatusUpdated {
            session: kernel.session,
            status: "unhealthy",
        });
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn news_within(owed: &watch::Sender<u32>, noted: u32, limit: Duration) -> Option<bool> {
        let mut owed = owed.subscribe();
        let news = is_news(&mut owed, noted);
        tokio::time::timeout(limit, news).await.ok()
    }

    #[tokio::test]
    async fn only_long_runs_reach_the_journal() {
        let (short, owed) = (watch::channel(0).0, watch::channel(1).0);
        let come_and_go = async {
            for _ in 0..24 {
                tokio::time::sleep(RUN_NOTED / 20).await;
                short.send_modify(|runs| *runs = 1 - *runs);
            }
        };
        let (none, begun, ended, ()) = tokio::join!(
            news_within(&short, 0, RUN_NOTED * 6 / 5),
            news_within(&owed, 0, RUN_NOTED * 2),
            news_within(&owed, 2, RUN_NOTED / 2),
            come_and_go
        );
        assert_eq!((none, begun, ended), (None, Some(true), Some(true)));
        let mut left = owed.subscribe();
        drop(owed);
        assert!(!is_news(&mut left, 1).await);
    }
}
