//! Who is where: the kernels of this node and what is being done with each.
//!
//! In: kernels that creation accepts or recovery finds, and inputs to their lifecycle. Out: handles
//! on kernels, and waiting until one of them has reached a state. Invariant: exclusion is per kernel
//! and comes from its `Lifecycle`, which is stepped under a lock held for a few instructions and
//! never over an await; no operation on one kernel waits for another kernel.

mod ended;
mod kernel;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::ids::{KernelId, SessionId};

pub use self::ended::EndedKernel;
pub use self::kernel::{JournalEntry, Kernel, KernelView};

use self::ended::ENDED_KEPT;
use super::callers::{Callers, Source};
use super::lifecycle::{Action, Ending, Input, Lifecycle, Refusal, State};
use super::record::Record;

/// What became of a request to create.
#[derive(Debug)]
pub enum Admission {
    /// The kernel is new: the caller creates it.
    Accepted(Arc<Kernel>),
    /// It runs already: answer with the stored result.
    Exists(Arc<Kernel>),
    /// The id is busy.
    Refused(Refusal),
}

/// All kernels of this node.
#[derive(Debug, Default)]
pub struct Registry {
    kernels: Mutex<HashMap<KernelId, Arc<Kernel>>>,
    ended: Mutex<VecDeque<Arc<EndedKernel>>>,
    callers: Callers,
}

impl Registry {
    fn kernels(&self) -> MutexGuard<'_, HashMap<KernelId, Arc<Kernel>>> {
        self.kernels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits a creation, or says what is there already. A kernel of the same id that is in service
    /// is the same kernel only if session and image agree: ids are not reused.
    pub fn admit(&self, record: Record) -> Admission {
        let mut kernels = self.kernels();
        if let Some(kernel) = kernels.get(&record.id()) {
            let kernel = kernel.clone();
            drop(kernels);
            return match kernel.step(Input::Create).as_slice() {
                [Action::AnswerStored] => Admission::Exists(kernel),
                [Action::Refuse(why)] => Admission::Refused(*why),
                _ => Admission::Refused(Refusal::CreationInProgress),
            };
        }
        let kernel = Arc::new(Kernel::new(Lifecycle::creating(), record));
        kernels.insert(kernel.id, kernel.clone());
        Admission::Accepted(kernel)
    }

    /// Enters a kernel found at start. `None` when it is there already.
    pub fn adopt(&self, lifecycle: Lifecycle, record: Record) -> Option<Arc<Kernel>> {
        let mut kernels = self.kernels();
        if kernels.contains_key(&record.id()) {
            return None;
        }
        let kernel = Arc::new(Kernel::new(lifecycle, record));
        kernels.insert(kernel.id, kernel.clone());
        Some(kernel)
    }

    /// The kernel, unless it is unknown.
    pub fn get(&self, id: KernelId) -> Option<Arc<Kernel>> {
        self.kernels().get(&id).cloned()
    }

    /// All kernels, in the order of their ids.
    pub fn all(&self) -> Vec<Arc<Kernel>> {
        let sorted: BTreeMap<KernelId, Arc<Kernel>> = self
            .kernels()
            .iter()
            .map(|(id, kernel)| (*id, kernel.clone()))
            .collect();
        sorted.into_values().collect()
    }

    /// How many kernels there are.
    pub fn len(&self) -> usize {
        self.kernels().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.kernels().is_empty()
    }

    /// Which kernel calls from which address.
    pub fn callers(&self) -> &Callers {
        &self.callers
    }

    /// Notes the addresses of a kernel that is still here.
    pub fn enter_sources(&self, kernel: &Arc<Kernel>, sources: &[Source]) {
        let kernels = self.kernels();
        if kernels
            .get(&kernel.id)
            .is_some_and(|it| Arc::ptr_eq(it, kernel))
        {
            self.callers.enter(kernel.id, sources.to_vec());
        }
    }

    /// Drops a kernel that has ended and remembers its end. Answers a kernel whose end is no longer
    /// remembered.
    pub fn forget(&self, kernel: &Arc<Kernel>, end: EndedKernel) -> Option<KernelId> {
        let removed = {
            let mut kernels = self.kernels();
            match kernels.get(&kernel.id) {
                // Another life of the same id is not ours to drop.
                Some(present) if Arc::ptr_eq(present, kernel) => {
                    self.callers.leave(kernel.id);
                    kernels.remove(&kernel.id)
                }
                _ => None,
            }
        };
        removed?;
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let oldest = (ended.len() == ENDED_KEPT).then(|| ended.pop_front());
        ended.push_back(Arc::new(end));
        let gone = oldest.flatten()?.view.id;
        // A later life of it may have ended too.
        ended
            .iter()
            .all(|ended| ended.view.id != gone)
            .then_some(gone)
    }

    /// Takes up the ends that an earlier life of the agent has left.
    pub fn remember(&self, ends: Vec<EndedKernel>) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let room = ENDED_KEPT.saturating_sub(ended.len());
        let surplus = ends.len().saturating_sub(room);
        for end in ends.into_iter().skip(surplus).rev() {
            ended.push_front(Arc::new(end));
        }
    }

    /// The kernels that ended last, oldest first.
    pub fn ended(&self) -> Vec<Arc<EndedKernel>> {
        self.ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .cloned()
            .collect()
    }

    /// How the last life of a kernel ended, and whether it was condemned, while that is remembered.
    pub fn end_of(&self, id: KernelId, session: SessionId) -> Option<(Ending, bool)> {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let mut newest = ended.iter().rev().map(|ended| &ended.view);
        let view = newest.find(|view| view.id == id && view.record.session() == session)?;
        Some((outcome(&view.state)?.clone(), view.record.condemned))
    }
}

/// How a kernel ends or has ended.
pub fn outcome(state: &State) -> Option<&Ending> {
    match state {
        State::Ending(ending) | State::Ended(ending) => Some(ending),
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::{Duration, Instant, SystemTime};

    use shared::ids::ContainerId;

    use super::kernel::START_AGAIN;
    use super::*;
    use crate::kernel::death::Death;
    use crate::kernel::journal::{Journal, Phase};
    use crate::kernel::lifecycle::{Reason, Stage};
    use crate::kernel::record::PublishedBy;
    use crate::kernel::request::SessionType;
    use crate::kernel::runner_link::runs::RunIds;
    use crate::kernel::runner_link::{LinkOptions, RunnerAddress, RunnerLink};

    /// Of a kernel whose files are being made.
    pub(in crate::kernel) fn record(id: u8) -> Record {
        Record {
            kernel_id: uuid::Uuid::from_bytes([id; 16]),
            session_id: uuid::Uuid::nil(),
            phase: Phase::Files,
            ending: None,
            created_at: 1.0,
            request: None,
            cluster: None,
            image: "a/b:c".into(),
            session_type: SessionType::Interactive,
            hostname: "main1".into(),
            container_name: String::new(),
            container_id: None,
            slots: serde_json::Map::new(),
            allocation: None,
            services: Vec::new(),
            ports_ahead: Vec::new(),
            published_by: PublishedBy::Rows,
            repl_ports: None,
            block_service_ports: false,
            network: None,
            distro: None,
            mounts: Vec::new(),
            models: Vec::new(),
            models_pending: false,
            runner_version: None,
            result: None,
            environ: None,
            batch_running: false,
            batch_job: None,
            condemned: false,
            pausing: false,
            runs_owed: 0,
            run_ids: RunIds::default(),
            service_owed: false,
            memory_pinned: None,
        }
    }

    fn accepted(registry: &Registry, id: u8) -> Arc<Kernel> {
        match registry.admit(record(id)) {
            Admission::Accepted(kernel) => kernel,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_later_journal_entry_is_not_overwritten_by_an_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "i-node").unwrap();
        let kernel = accepted(&Registry::default(), 1);
        let early = kernel.journal_entry();
        kernel.step(Input::Entered(Stage::Started));
        kernel.step(Input::Ready);
        let late = kernel.journal_entry();
        let last = kernel.journal_entry();
        late.write(&journal).unwrap();
        early.write(&journal).unwrap();
        let (records, _) = journal.load::<Record>().unwrap();
        assert_eq!(records[&kernel.id].phase, Phase::Running);
        kernel.journal_entry().remove(&journal).unwrap();
        last.write(&journal).unwrap();
        assert!(
            journal.load::<Record>().unwrap().0.is_empty(),
            "the file came back"
        );
    }

    #[test]
    fn the_journal_takes_the_word_of_a_destroy_that_a_purge_has_overtaken() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "i-node").unwrap();
        let kernel = accepted(&Registry::default(), 1);
        kernel.step(Input::Entered(Stage::Started));
        kernel.step(Input::Ready);
        let destroy = |reason, suppress| kernel.step(Input::Destroy { reason, suppress });
        let noted = || {
            kernel.journal_entry().write(&journal).unwrap();
            let ending = journal.load::<Record>().unwrap().0[&kernel.id]
                .ending
                .clone();
            ending.map(|ending| (ending.reason, ending.suppress))
        };
        destroy(Reason::USER_PURGED, true);
        assert_eq!(noted(), Some(("user-purged".to_owned(), true)));
        let actions = destroy(Reason::USER_REQUESTED, false);
        assert!(actions.contains(&Action::NoteEnding), "{actions:?}");
        assert_eq!(noted(), Some(("user-requested".to_owned(), false)));
        // Nothing changes with the next ones, and nothing is written.
        for suppress in [false, true] {
            assert_eq!(destroy(Reason::USER_PURGED, suppress), [Action::JoinEnding]);
        }
    }

    #[test]
    fn a_start_is_told_again_of_a_kernel_in_service_and_not_at_once() {
        let kernel = accepted(&Registry::default(), 1);
        let now = Instant::now();
        assert!(!kernel.may_tell_start(now), "it is being created");
        kernel.step(Input::Entered(Stage::Started));
        kernel.step(Input::Ready);
        kernel.start_told(now);
        assert!(!kernel.may_tell_start(now));
        let later = now + START_AGAIN;
        assert!(kernel.may_tell_start(later));
        assert!(!kernel.may_tell_start(later));
        assert!(kernel.may_tell_start(later + START_AGAIN));
        kernel.step(Input::Died { exit_code: None });
        assert!(!kernel.may_tell_start(later + 2 * START_AGAIN), "it ends");
    }

    #[test]
    fn records_of_earlier_agents_are_read() {
        let mut json = serde_json::to_value(record(1)).unwrap();
        // Since then they know how far a batch job has come.
        json.as_object_mut().unwrap().remove("batch_job").unwrap();
        json.as_object_mut().unwrap().remove("pausing").unwrap();
        let read: Record = serde_json::from_value(json).unwrap();
        assert_eq!((read.batch_job, read.pausing), (None, false));
    }

    #[test]
    fn a_known_id_is_not_admitted_twice() {
        let registry = Registry::default();
        let kernel = accepted(&registry, 1);
        let refused =
            |admission| matches!(admission, Admission::Refused(Refusal::CreationInProgress));
        assert!(refused(registry.admit(record(1))));
        kernel.step(Input::Entered(Stage::Started));
        kernel.step(Input::Ready);
        assert!(matches!(registry.admit(record(1)), Admission::Exists(_)));
        accepted(&registry, 2);
        assert_eq!(registry.len(), 2);
    }

    #[tokio::test]
    async fn those_who_wait_go_on_after_the_entry_was_dropped() {
        let registry = Arc::new(Registry::default());
        let kernel = accepted(&registry, 1);
        let waiting = {
            let (registry, kernel) = (registry.clone(), kernel.clone());
            tokio::spawn(async move {
                kernel.wait_ended().await;
                registry.get(kernel.id).is_none()
            })
        };
        kernel.step(Input::CreationFailed { exit_code: None });
        let actions = kernel.step(Input::Cleaned {
            exit_code: Some(3),
            death: None,
        });
        assert!(actions.contains(&Action::Forget));
        registry.forget(&kernel, EndedKernel::now(&kernel));
        kernel.leave();
        let dropped = tokio::time::timeout(Duration::from_secs(10), waiting).await;
        assert!(dropped.unwrap().unwrap());
        let ended = registry.ended();
        assert_eq!(ended.len(), 1);
        assert_eq!(outcome(&ended[0].view.state).unwrap().exit_code, Some(3));
    }

    fn end(registry: &Registry, id: [u8; 16], ends: &Journal) {
        let mut record = record(1);
        record.kernel_id = uuid::Uuid::from_bytes(id);
        record.environ = serde_json::from_value(serde_json::json!({"SECRET": "word"})).unwrap();
        record.result = Some((&serde_json::json!({"resource_spec": "big"})).into());
        let Admission::Accepted(kernel) = registry.admit(record) else {
            panic!("not admitted")
        };
        kernel.step(Input::Entered(Stage::Started));
        kernel.step(Input::Ready);
        kernel.step(Input::Died { exit_code: None });
        kernel.step(Input::Cleaned {
            exit_code: Some(137),
            death: Some(Death::OutOfMemory),
        });
        let end = EndedKernel::now(&kernel);
        end.store(ends).unwrap();
        if let Some(gone) = registry.forget(&kernel, end) {
            ends.remove(gone).unwrap();
        }
    }

    #[test]
    fn ends_are_remembered_by_the_next_agent() {
        let dir = tempfile::tempdir().unwrap();
        let ends = Journal::open_ends(dir.path(), "i-node").unwrap();
        let id = |n: u16| {
            let mut id = [7; 16];
            id[..2].copy_from_slice(&n.to_be_bytes());
            id
        };
        let (registry, count) = (Registry::default(), u16::try_from(ENDED_KEPT).unwrap());
        for n in 0..count + 2 {
            end(&registry, id(n), &ends);
        }
        let files = || std::fs::read_dir(ends.dir()).unwrap().count();
        assert_eq!(files(), ENDED_KEPT, "the oldest go");
        let text =
            std::fs::read_to_string(ends.dir().join(format!("{}.json", KernelId(id(9))))).unwrap();
        assert!(!text.contains("word"), "no secrets: {text}");
        assert!(!text.contains("big"), "no details: {text}");

        let (found, damaged) = EndedKernel::load(&ends).unwrap();
        assert!(damaged.is_empty());
        let next = Registry::default();
        end(&next, id(count + 2), &ends);
        next.remember(found);
        let session = SessionId([0; 16]);
        assert_eq!(next.end_of(KernelId(id(2)), session), None, "no room");
        let (ending, _) = next.end_of(KernelId(id(3)), session).unwrap();
        assert_eq!(
            (ending.told(), ending.exit_code),
            (Reason::OUT_OF_MEMORY, Some(137))
        );
        assert_eq!(next.end_of(KernelId(id(3)), SessionId([1; 16])), None);
        let (before, after) = (registry.ended(), next.ended());
        let times = |ended: &[Arc<EndedKernel>]| ended.iter().map(|it| it.at).collect::<Vec<_>>();
        assert_eq!(after.len(), ENDED_KEPT);
        assert!(times(&after).is_sorted());
        let age =
            |a: SystemTime, b: SystemTime| a.duration_since(b).unwrap_or_else(|err| err.duration());
        assert!(
            age(after[0].at, before[1].at) < Duration::from_micros(1),
            "the time stays"
        );
        // What an agent that was killed has left too much goes at the next start.
        assert_eq!(files(), ENDED_KEPT + 1);
        EndedKernel::load(&ends).unwrap();
        assert_eq!(files(), ENDED_KEPT);
    }

    #[test]
    fn ends_that_make_no_sense_are_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let ends = Journal::open_ends(dir.path(), "i-node").unwrap();
        for n in 1..=4 {
            end(&Registry::default(), [n; 16], &ends);
        }
        let file = |n: u8| ends.dir().join(format!("{}.json", KernelId([n; 16])));
        let spoil = |n: u8, field: &str, value: serde_json::Value| {
            let mut json: serde_json::Value =
                serde_json::from_slice(&std::fs::read(file(n)).unwrap()).unwrap();
            let place = json.pointer_mut(field).expect(field);
            *place = value;
            std::fs::write(file(n), json.to_string()).unwrap();
        };
        spoil(1, "/record/at", (-1.0).into());
        spoil(2, "/record/record/ending", serde_json::Value::Null);
        std::fs::rename(file(3), file(5)).unwrap();
        let (found, damaged) = EndedKernel::load(&ends).unwrap();
        assert_eq!((found.len(), damaged.len()), (1, 3), "{damaged:?}");
        assert!(damaged.iter().all(|it| it.path.exists()));
        let (found, damaged) = EndedKernel::load(&ends).unwrap();
        assert_eq!((found.len(), damaged.len()), (1, 0), "{damaged:?}");
    }

    #[test]
    fn the_creation_that_has_to_give_up_is_woken() {
        let kernel = accepted(&Registry::default(), 1);
        let abort = kernel.abort_token();
        kernel.step(Input::Entered(Stage::Started));
        assert!(!abort.is_cancelled());
        kernel.step(Input::Died { exit_code: Some(1) });
        assert!(abort.is_cancelled());
    }

    #[tokio::test]
    async fn a_link_to_a_runner_does_not_outlive_its_kernel() {
        let kernel = accepted(&Registry::default(), 1);
        let container = ContainerId([7; 32]);
        kernel.update_record(|record| record.container_id = Some(container.to_string()));
        // Nobody listens there.
        let address = RunnerAddress {
            ip: std::net::Ipv4Addr::LOCALHOST.into(),
            repl_in: 1,
            repl_out: 1,
        };
        let link = || RunnerLink::open(kernel.id, address, LinkOptions::default());
        assert!(kernel.offer_runner(container, link()).is_some(), "creating");
        kernel.step(Input::Entered(Stage::Started));
        kernel.step(Input::Ready);
        assert!(kernel.offer_runner(ContainerId([8; 32]), link()).is_some());
        assert!(kernel.runner().is_none());
        let (called, to_close) = tokio::join!(
            biased;
            kernel.wait_runner(Duration::from_secs(10)),
            async { kernel.offer_runner(container, link()) },
        );
        assert!(called.is_some(), "a call that waits gets the link");
        assert!(to_close.is_none());
        assert!(kernel.runner().is_some());
        kernel.step(Input::Died { exit_code: None });
        kernel.set_runner(None);
        assert!(kernel.offer_runner(container, link()).is_some(), "ending");
        assert!(kernel.runner().is_none());
    }
}
