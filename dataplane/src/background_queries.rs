//! Questions that may take for ever, and their last answers.
//!
//! In: keys, asked about again and again. Out: the last answer about each, with its time. What is
//! asked may hang: a dead mount, a task in uninterruptible sleep, a driver. Invariants: nobody waits
//! for an answer; a question that hangs holds one thread, is not asked again before it returns, and
//! makes its own answer old and no other, until as many hang as there may be threads.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt::{self, Debug};
use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::mailbox::Mailbox;

/// A question that has taken this long is taken to hang; a spare thread goes on with the others.
const PATIENCE: Duration = Duration::from_millis(200);
/// A spare thread that has had nothing to wait for this long ends.
const SPARE_KEPT: Duration = Duration::from_secs(10);

/// What came of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryResult<A> {
    /// This is so.
    Is(A),
    /// There is nothing (any more).
    Gone,
    /// Nothing new: what was said last stands.
    Unknown,
}

/// Answers, and the questions that hang.
pub type CompletedRound<K, A> = (Vec<(K, A)>, Vec<K>);

type QueryFn<K, A> = Box<dyn Fn(&K) -> QueryResult<A> + Send + Sync>;

/// The asking threads' handle. Dropping it tells them to end, and does not wait for one that hangs.
pub struct BackgroundQueries<K: Send + 'static, A: Send + 'static>(Arc<Inner<K, A>>);

struct Inner<K, A> {
    name: &'static str,
    most_threads: usize,
    ask: QueryFn<K, A>,
    state: Mailbox<State<K, A>>,
}

struct State<K, A> {
    waiting: VecDeque<K>,
    /// Questions under way, and since when.
    asked: HashMap<K, Instant>,
    answers: HashMap<K, (Instant, A)>,
    threads: usize,
    idle: usize,
    /// When a question last waited for a thread.
    spare_wanted: Instant,
    stop: bool,
}

impl<K: Send, A: Send> Debug for BackgroundQueries<K, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackgroundQueries")
            .field("name", &self.0.name)
            .finish_non_exhaustive()
    }
}

impl<K, A> BackgroundQueries<K, A>
where
    K: Clone + Eq + Hash + Send + 'static,
    A: Send + 'static,
{
    /// Starts the first thread; there will be `most_threads` at most.
    ///
    /// # Errors
    /// No thread.
    pub fn start(
        name: &'static str,
        most_threads: usize,
        ask: impl Fn(&K) -> QueryResult<A> + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let inner = Arc::new(Inner {
            name,
            most_threads,
            ask: Box::new(ask),
            state: Mailbox::new(State {
                waiting: VecDeque::new(),
                asked: HashMap::new(),
                answers: HashMap::new(),
                threads: 1,
                idle: 0,
                spare_wanted: Instant::now(),
                stop: false,
            }),
        });
        Inner::spawn(&inner)?;
        Ok(Self(inner))
    }

    /// Asks about these, in this order, once each; forgets all others. Never waits.
    pub fn ask(&self, wanted: impl IntoIterator<Item = K>) {
        let mut state = self.0.state.lock();
        let state = &mut *state;
        let mut all = HashSet::new();
        let mut fresh = Vec::new();
        let before: HashSet<K> = state.waiting.iter().cloned().collect();
        for key in wanted {
            if all.insert(key.clone()) && !state.asked.contains_key(&key) && !before.contains(&key)
            {
                fresh.push(key);
            }
        }
        // Those that wait since the last time go first.
        state.waiting.retain(|key| all.contains(key));
        state.waiting.extend(fresh);
        state.answers.retain(|key, _| all.contains(key));
        if state.waiting.is_empty() {
            return;
        }
        // Whoever is at work may hang.
        self.0.make_spare(state);
        self.0.state.wake();
    }

    /// The last answer.
    pub fn last(&self, key: &K) -> Option<(Instant, A)>
    where
        A: Clone,
    {
        self.0.state.lock().answers.get(key).cloned()
    }

    /// Takes all answers that have come, once every question has been answered or is taken to hang;
    /// with them the questions that hang.
    pub fn take(&self) -> Option<CompletedRound<K, A>> {
        let mut state = self.0.state.lock();
        let hang = |since: &Instant| since.elapsed() >= PATIENCE;
        if !state.waiting.is_empty() || !state.asked.values().all(hang) {
            return None;
        }
        let answers = state.answers.drain();
        let answers = answers.map(|(key, (_, answer))| (key, answer)).collect();
        Some((answers, state.asked.keys().cloned().collect()))
    }
}

impl<K: Send, A: Send> Drop for BackgroundQueries<K, A> {
    fn drop(&mut self) {
        self.0.state.change(|state| state.stop = true);
    }
}

impl<K, A> Inner<K, A>
where
    K: Clone + Eq + Hash + Send + 'static,
    A: Send + 'static,
{
    fn spawn(inner: &Arc<Self>) -> std::io::Result<()> {
        let own = Arc::clone(inner);
        std::thread::Builder::new()
            .name(inner.name.to_owned())
            .spawn(move || own.serve())
            .map(drop)
    }

    /// Sees to it that a thread is there for what waits, should all others hang.
    fn make_spare(self: &Arc<Self>, state: &mut State<K, A>) {
        state.spare_wanted = Instant::now();
        let spare = state.idle == 0 && state.threads < self.most_threads;
        if spare && Self::spawn(self).is_ok() {
            state.threads += 1;
        }
    }

    fn serve(self: Arc<Self>) {
        while let Some(key) = self.next() {
            let answer = (self.ask)(&key);
            let mut state = self.state.lock();
            state.asked.remove(&key);
            match answer {
                QueryResult::Is(answer) => {
                    state.answers.insert(key, (Instant::now(), answer));
                }
                QueryResult::Gone => {
                    state.answers.remove(&key);
                }
                QueryResult::Unknown => {}
            }
        }
        self.state.lock().threads -= 1;
    }

    /// Waits for a question that nobody else is about to ask; `None` when the thread is to end.
    fn next(self: &Arc<Self>) -> Option<K> {
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return None;
            }
            // One works, one waits for it to hang.
            let at_work = state.asked.values().any(|since| since.elapsed() < PATIENCE);
            if !at_work && let Some(key) = state.waiting.pop_front() {
                state.asked.insert(key.clone(), Instant::now());
                if !state.waiting.is_empty() {
                    self.make_spare(&mut state);
                }
                return Some(key);
            }
            let quiet = state.waiting.is_empty();
            let enough = match quiet && state.spare_wanted.elapsed() >= SPARE_KEPT {
                true => 1,
                false => 2,
            };
            if state.idle >= enough {
                return None;
            }
            state.idle += 1;
            let waited = if quiet { SPARE_KEPT } else { PATIENCE };
            state = self.state.wait_for(state, waited);
            state.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Condvar, Mutex};

    fn until(mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < deadline, "not so after 30 s");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn what_hangs_grows_old_alone_and_is_asked_once() {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        let asked = Arc::new(AtomicUsize::new(0));
        let answers = {
            let (gate, asked) = (Arc::clone(&gate), Arc::clone(&asked));
            BackgroundQueries::start("test", 16, move |key: &u32| {
                if key.is_multiple_of(10) {
                    asked.fetch_add(1, Ordering::SeqCst);
                    let mut open = gate.0.lock().unwrap();
                    while !*open {
                        open = gate.1.wait(open).unwrap();
                    }
                }
                match *key {
                    7 => QueryResult::Gone,
                    key => QueryResult::Is(key),
                }
            })
            .unwrap()
        };
        // Ten of a hundred hang, and every other one is answered again and again.
        let mut before = Instant::now();
        for _ in 0..3 {
            answers.ask(0..100);
            until(|| {
                (0..100).all(|key| match answers.last(&key) {
                    Some((at, answer)) => answer == key && at > before,
                    None => key == 7 || key % 10 == 0,
                })
            });
            before = Instant::now();
        }
        assert_eq!(asked.load(Ordering::SeqCst), 10);
        until(|| answers.take().is_some_and(|(_, hang)| hang.len() == 10));
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        until(|| answers.0.state.lock().asked.is_empty());
        answers.ask([3, 3, 7, 20]);
        until(|| answers.last(&20).is_some());
        assert!(answers.last(&0).is_none(), "not wanted any more");
        let inner = Arc::clone(&answers.0);
        assert!(inner.state.lock().threads <= 16);
        until(|| inner.state.lock().threads == 1);
        drop(answers);
        until(|| inner.state.lock().threads == 0);
    }

    #[test]
    fn a_question_that_hangs_alone_holds_up_none_that_comes_later() {
        let answers = BackgroundQueries::start("test", 4, |key: &u32| {
            if *key == 0 {
                loop {
                    std::thread::park();
                }
            }
            QueryResult::Is(())
        })
        .unwrap();
        answers.ask([0]);
        until(|| answers.0.state.lock().asked.contains_key(&0));
        answers.ask([0, 1]);
        until(|| answers.last(&1).is_some());
    }

    #[test]
    fn more_than_there_are_threads_for_stop_their_kind_and_no_more_threads_are_made() {
        let answers = BackgroundQueries::start("test", 4, |key: &u32| {
            if *key > 0 {
                loop {
                    std::thread::park();
                }
            }
            QueryResult::Is(())
        })
        .unwrap();
        answers.ask(1..=4);
        until(|| answers.0.state.lock().asked.len() == 4);
        answers.ask(0..=4);
        std::thread::sleep(PATIENCE * 2);
        let state = answers.0.state.lock();
        assert_eq!((state.threads, state.waiting.len()), (4, 1));
        assert!(state.answers.is_empty());
    }
}
