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
use crate::kernel::record::Record;
use crate::kernel::registry::Kernel;
use crate::kernel::request::SessionType;
use crate::kernel::runner_link::{Owed, RunnerLink};
use crate::kernel::services;

/// How long a run is under way before the journal says so: shorter ones cost no write.
const RUN_NOTED: Duration = Duration::from_secs(2);
/// How long after its end the journal says so.
const RUN_FORGOTTEN: Duration = Duration::from_millis(200);
/// Shortest time between two words about the health of a kernel's models.
const MODEL_PACE: Duration = Duration::from_secs(1);

/// Keeps in the journal which runs have to be told to end, and what else the next agent has to know if this
/// one does not live to see it. Short runs are over before they are noted.
pub(super) fn note_runs(node: &Arc<Node>, kernel: &Arc<Kernel>, runner: &RunnerLink) {
    let mut owed = runner.owed();
    let (node, kernel, runner) = (node.clone(), kernel.clone(), runner.clone());
    node.clone().tasks.spawn(async move {
        let note = async {
            let noted = || kernel.with_record(Record::owed);
            while let Some(news) = news(&mut owed, &noted()).await {
                kernel.update_record(|record| record.set_owed(news));
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

/// Waits until the journal, which has `noted`, is to have something else, and returns that; `None` when the link is
/// gone. What is over goes soon, before what has begun is noted: who would be taken for another is not in it.
async fn news(owed: &mut watch::Receiver<Owed>, noted: &Owed) -> Option<Owed> {
    let kind = |now: &Owed| match now {
        now if now == noted => Ordering::Equal,
        now if now.known_to(noted) == *noted => Ordering::Greater,
        _ => Ordering::Less,
    };
    loop {
        let news = kind(&owed.borrow_and_update());
        let patience = match news {
            Ordering::Equal => Duration::MAX,
            Ordering::Greater => RUN_NOTED,
            Ordering::Less => RUN_FORGOTTEN,
        };
        let other = owed.wait_for(|now| kind(now) != news);
        let waited = tokio::time::timeout(patience, other).await;
        match waited.map(|other| other.is_ok()) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(_) if news == Ordering::Less => return Some(owed.borrow().known_to(noted)),
            Err(_) => return Some(owed.borrow().clone()),
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
    use crate::kernel::runner_link::runs::RunIds;

    fn runs(runs: u32) -> Owed {
        Owed {
            runs,
            ..Owed::default()
        }
    }

    async fn news_within(
        owed: &watch::Sender<Owed>,
        noted: Owed,
        limit: Duration,
    ) -> Option<Option<Owed>> {
        let mut owed = owed.subscribe();
        let news = news(&mut owed, &noted);
        tokio::time::timeout(limit, news).await.ok()
    }

    #[tokio::test]
    async fn only_long_runs_reach_the_journal() {
        let (short, owed) = (watch::channel(runs(0)).0, watch::channel(runs(1)).0);
        let of = |current: &str, waiting: &[&str]| Owed {
            ids: RunIds {
                current: Some(current.to_owned()),
                request: None,
                waiting: waiting.iter().map(|&id| id.to_owned()).collect(),
            },
            ..runs(2)
        };
        let others = watch::channel(of("b", &["c"])).0;
        let come_and_go = async {
            for _ in 0..24 {
                tokio::time::sleep(RUN_NOTED / 20).await;
                short.send_modify(|owed| owed.runs = 1 - owed.runs);
            }
        };
        let (none, begun, ended, over, joined, ()) = tokio::join!(
            news_within(&short, runs(0), RUN_NOTED * 6 / 5),
            news_within(&owed, runs(0), RUN_NOTED * 2),
            news_within(&owed, runs(2), RUN_NOTED / 2),
            // The one that is over is not taken for the one at work, however short that may be.
            news_within(&others, of("a", &["b"]), RUN_NOTED / 2),
            news_within(&others, of("b", &[]), RUN_NOTED * 2),
            come_and_go
        );
        let one = Some(Some(runs(1)));
        assert_eq!((none, &begun, &ended), (None, &one, &one));
        assert_eq!(
            (over, joined),
            (Some(Some(of("b", &[]))), Some(Some(of("b", &["c"]))))
        );
        let mut left = owed.subscribe();
        drop(owed);
        assert_eq!(news(&mut left, &runs(1)).await, None);
    }
}
