//! The threads that collect: an active one does the passes, and one on standby sees that it comes back.
//!
//! In: what to sample, and how often. Out: passes on the [`Board`]. A question about links waits in
//! the kernel for as long as anybody holds its interface lock, and such a wait can't be ended. The
//! thread that collects asks it itself, as handing it to another would cost more than the question;
//! but it leaves the [`Sampler`] behind meanwhile. If it isn't back in time, the other thread takes
//! the sampler and goes on without what only an answer tells, and the first one is the one that looks on
//! when it is back.
//! Invariants: one thread collects at any time; one question about links is out at most.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use shared::desired::{ContainerRow, DesiredChanges};
use shared::ids::{ContainerId, Generation};
use shared::log_limit::LogLimit;

use super::{LinkQuery, PassStart, Sampler};
use crate::board::Board;
use crate::mailbox::Mailbox;

/// A question about links that takes longer is taken to hang. The kernel needs less than a millisecond
/// per hundred links.
const PATIENCE: Duration = Duration::from_millis(250);
/// A question that is given up is told of when it hangs for this long: a machine that has no time for
/// the thread that asks is no lock.
const TOLD_AFTER: Duration = Duration::from_secs(2);

/// What has changed of the containers to sample since the last pass: one entry per container at most.
#[derive(Debug, Default)]
struct Wanted {
    /// Rows that came or changed; none where one went.
    rows: BTreeMap<ContainerId, Option<ContainerRow>>,
    /// Those that are not among them are not wanted any more.
    whole: bool,
}

impl Wanted {
    fn add(&mut self, changes: DesiredChanges) {
        // A region that says nothing yet doesn't say that there are no containers.
        if changes.rows.committed == Generation(0) {
            return;
        }
        let whole = changes.whole && changes.rows.invalid_rows == 0;
        if whole {
            self.rows.clear();
        }
        self.whole |= whole;
        let removed = changes.rows.removed_containers.iter().map(|it| it.key);
        for id in removed.chain(changes.freed_containers) {
            self.rows.insert(id, None);
        }
        for row in changes.rows.containers {
            self.rows.insert(row.container_id, Some(row));
        }
    }
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    interval: Duration,
    stop: bool,
    /// When the next pass is due, or the one under way was.
    due: Instant,
    /// Since when a question about links is out that is waited for.
    asked: Option<Instant>,
    /// Goes up with each question that was given up.
    given_up: u64,
    /// The other thread hangs in one.
    hangs: bool,
    /// Since when, until that was worth a word or not.
    unjudged: Option<Instant>,
    /// The log has been told of it.
    told: bool,
    log: LogLimit,
}

#[derive(Debug)]
struct Shared {
    state: Mailbox<State>,
    /// Held by the thread that collects, except while it waits.
    work: Mutex<Work>,
    board: Board,
}

#[derive(Debug, Default)]
struct Work {
    sampler: Option<Sampler>,
    failed: LogLimit,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Active,
    Standby,
    Stop,
}

/// The two threads' handle. Dropping it ends them, and does not wait for one that hangs.
#[derive(Debug)]
pub(super) struct CollectorThreads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl CollectorThreads {
    /// Starts the threads; the one that collects first makes the sampler.
    ///
    /// # Errors
    /// No thread.
    pub(super) fn start(
        interval: Duration,
        board: Board,
        make: impl FnOnce() -> Sampler + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mailbox::new(State {
                wanted: Wanted::default(),
                interval,
                stop: false,
                due: Instant::now(),
                asked: None,
                given_up: 0,
                hangs: false,
                unjudged: None,
                told: false,
                log: LogLimit::default(),
            }),
            work: Mutex::default(),
            board,
        });
        let mut threads = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
        };
        let own = Arc::clone(&shared);
        threads.spawn("collect", move || {
            let sampler = make();
            lock(&own.work).sampler = Some(sampler);
            // To make it takes a while, which makes no pass late.
            own.state.lock().due = Instant::now();
            own.run(Role::Active);
        })?;
        threads.spawn("collect-spare", move || {
            shared.run(Role::Standby);
        })?;
        Ok(threads)
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let thread = std::thread::Builder::new().name(name.to_owned());
        self.threads.push(thread.spawn(run)?);
        Ok(())
    }

    /// Tells what has changed of what to sample, and how often from now on.
    pub(super) fn want(&self, changes: DesiredChanges, interval: Duration) {
        let mut state = self.shared.state.lock();
        state.wanted.add(changes);
        if state.interval != interval {
            state.interval = interval;
            self.shared.state.wake();
        }
    }

    /// False when a thread has ended by itself.
    pub(super) fn healthy(&self) -> bool {
        !self.threads.iter().any(JoinHandle::is_finished)
    }
}

impl Drop for CollectorThreads {
    fn drop(&mut self) {
        let waits = {
            let mut state = self.shared.state.lock();
            state.stop = true;
            self.shared.state.wake();
            state.asked.is_some() || state.hangs
        };
        for thread in self.threads.drain(..) {
            // One that waits in the kernel comes back when that lets it; it holds nothing others need.
            if !waits {
                // A panic has been reported by the panic hook.
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    fn run(&self, first: Role) {
        let mut role = first;
        loop {
            role = match role {
                Role::Active => self.collect(),
                Role::Standby => self.stand_by(),
                Role::Stop => return,
            };
        }
    }

    /// Does the passes, until another thread does.
    fn collect(&self) -> Role {
        loop {
            let Some(due) = self.wait_till_due() else {
                return Role::Stop;
            };
            let late = due.elapsed();
            let begun = PassStart::now();
            let question = self.begin();
            let answered = match question {
                Some(question) => match self.ask(question) {
                    Ok(answered) => Some(answered),
                    Err(role) => return role,
                },
                None => None,
            };
            self.pass(begun, late, answered);
            self.tell_of_hang();
            self.next_beat();
        }
    }

    /// When the pass was due that begins now; none at the end.
    fn wait_till_due(&self) -> Option<Instant> {
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return None;
            }
            let now = Instant::now();
            state.due = state.due.min(now + state.interval);
            if now >= state.due {
                return Some(state.due);
            }
            let left = state.due - now;
            state = self.state.wait_for(state, left);
        }
    }

    /// Takes up what is wanted. The question about links, if it can be asked.
    fn begin(&self) -> Option<LinkQuery> {
        let mut work = lock(&self.work);
        let sampler = work.sampler.as_mut()?;
        let Wanted { rows, whole } = std::mem::take(&mut self.state.lock().wanted);
        if whole || !rows.is_empty() {
            for (id, _) in rows.iter().filter(|(_, row)| row.is_none()) {
                sampler.let_go(*id);
            }
            let rows: Vec<ContainerRow> = rows.into_values().flatten().collect();
            sampler.follow(&rows, whole);
        }
        sampler.ask_links()
    }

    /// Asks it, which may take for ever. The answer, or, if the other thread has gone on meanwhile,
    /// what to do next.
    fn ask(&self, mut question: LinkQuery) -> Result<LinkQuery, Role> {
        let given_up = {
            let mut state = self.state.lock();
            // Who ends the threads joins those that ask nothing.
            if state.stop {
                return Err(Role::Stop);
            }
            state.asked = Some(Instant::now());
            state.given_up
        };
        question.ask();
        let mut state = self.state.lock();
        if state.given_up == given_up {
            state.asked = None;
            return Ok(question);
        }
        drop(state);
        if let Some(sampler) = &mut lock(&self.work).sampler {
            sampler.take_back(question.reader);
        }
        state = self.state.lock();
        state.hangs = false;
        state.unjudged = None;
        if std::mem::take(&mut state.told) {
            tracing::info!("the kernel answers about links again");
        }
        Err(Role::Standby)
    }

    fn pass(&self, begun: PassStart, late: Duration, answered: Option<LinkQuery>) {
        let mut work = lock(&self.work);
        let Work {
            sampler, failed, ..
        } = &mut *work;
        let Some(sampler) = sampler else {
            return;
        };
        sampler.late = late;
        let pass = sampler.pass_with(begun, answered);
        tracing::debug!(
            tick = pass.tick,
            containers = pass.samples.len(),
            late_us = late.as_micros(),
            pass_us = sampler.last_pass.as_micros(),
            cpu_us = sampler.last_cpu.as_micros(),
            "pass done"
        );
        if let Err(err) = self.board.publish_pass(pass)
            && let Some(suppressed) = failed.pass()
        {
            tracing::error!(%err, suppressed, "a pass can't be published");
        }
    }

    /// Ticks stay on their beat; those that a long pass has swallowed are left out.
    fn next_beat(&self) {
        let mut state = self.state.lock();
        let interval = state.interval;
        state.due += interval;
        let now = Instant::now();
        if state.due < now {
            let missed = (now - state.due).as_nanos() / interval.as_nanos().max(1) + 1;
            state.due += interval * u32::try_from(missed).unwrap_or(1);
            drop(state);
            if let Some(sampler) = &mut lock(&self.work).sampler {
                sampler.missed += u64::try_from(missed).unwrap_or(1);
            }
        }
    }

    /// Looks on, until the thread that collects hangs in a question about links.
    fn stand_by(&self) -> Role {
        let mut state = self.state.lock();
        loop {
            if state.stop {
                return Role::Stop;
            }
            let now = Instant::now();
            let next = match state.asked {
                Some(asked) if now >= asked + PATIENCE => break,
                Some(asked) => asked + PATIENCE,
                None => state.due.min(now + state.interval).max(now) + PATIENCE,
            };
            state = self.state.wait_for(state, next - now);
        }
        state.asked = None;
        state.given_up += 1;
        state.hangs = true;
        state.unjudged = Some(Instant::now());
        Role::Active
    }

    /// Once for each question that hangs for long.
    fn tell_of_hang(&self) {
        let mut state = self.state.lock();
        if state
            .unjudged
            .is_none_or(|since| since.elapsed() < TOLD_AFTER)
        {
            return;
        }
        state.unjudged = None;
        let told = state.log.pass();
        state.told = told.is_some();
        drop(state);
        if let Some(suppressed) = told {
            tracing::warn!(
                suppressed,
                "the kernel does not answer about links, somebody holds its interface lock; \
                 network numbers that it is asked for are absent until it does"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::Sizes;
    use shared::desired::{DesiredSnapshot, Removed};
    use shared::doorbell::Ringer;
    use shared::ids::KernelId;
    use shared::observed::{ObservedReader, ObservedSnapshot, ObservedWriter, Source};
    use shared::run_dir::RunDir;

    use crate::accelerator::Accelerators;
    use crate::collect::ReadMethod;
    use crate::collect::disk::Disk;
    use crate::collect::veths::host_tests::{Pair, reads_links};

    /// A board, and where its region is.
    fn board_below(base: &std::path::Path, agent: &str) -> (Board, std::path::PathBuf) {
        let run_dir = RunDir::choose(Some(base), agent).unwrap();
        let directory = run_dir.create_dataplane().unwrap();
        let board = Board::new(
            ObservedWriter::open(&directory, Sizes::default()).unwrap(),
            Ringer::of(run_dir.control()).unwrap(),
            Accelerators::none(),
        );
        (board, directory)
    }

    fn changes(containers: Vec<ContainerRow>) -> DesiredChanges {
        DesiredChanges {
            rows: DesiredSnapshot {
                committed: Generation(1),
                containers,
                ..DesiredSnapshot::default()
            },
            ..DesiredChanges::default()
        }
    }

    #[test]
    fn changes_of_several_looks_are_taken_up_as_one() {
        let row = |byte: u8, init_pid| ContainerRow {
            container_id: ContainerId([byte; 32]),
            init_pid,
            ..ContainerRow::default()
        };
        let mut wanted = Wanted::default();
        let told = |wanted: &Wanted| {
            let rows = wanted.rows.iter();
            let rows = rows.map(|(id, row)| (id.0[0], row.as_ref().map(|it| it.init_pid)));
            (wanted.whole, rows.collect::<Vec<_>>())
        };
        wanted.add(changes(vec![row(1, 1), row(2, 2)]));
        let mut later = changes(vec![row(3, 3)]);
        later.freed_containers = vec![ContainerId([2; 32])];
        later.rows.removed_containers = vec![Removed {
            key: ContainerId([4; 32]),
            kernel_id: KernelId::default(),
            generation: Generation(1),
        }];
        wanted.add(later);
        let rows = vec![(1, Some(1)), (2, None), (3, Some(3)), (4, None)];
        assert_eq!(told(&wanted), (false, rows));
        // All there are, and one more since; then all of a region with rows that make no sense.
        let mut all = changes(vec![row(5, 5)]);
        all.whole = true;
        wanted.add(all.clone());
        wanted.add(changes(vec![row(1, 6)]));
        assert_eq!(told(&wanted), (true, vec![(1, Some(6)), (5, Some(5))]));
        // A region that was begun anew and says nothing yet.
        wanted.add(DesiredChanges {
            whole: true,
            ..DesiredChanges::default()
        });
        assert_eq!(told(&wanted), (true, vec![(1, Some(6)), (5, Some(5))]));
        let mut wanted = Wanted::default();
        all.rows.invalid_rows = 1;
        wanted.add(all);
        assert_eq!(told(&wanted), (false, vec![(5, Some(5))]));
    }

    /// Links that the kernel program reads need no question.
    #[test]
    fn counters_of_links_are_fresh_while_a_question_about_links_hangs() {
        let Some(pair) = Pair::new("lt", 121) else {
            return;
        };
        pair.send(20);
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let (board, directory) = board_below(base.path(), "i-fresh");
        let interval = Duration::from_millis(20);
        let gate = Arc::new(Mutex::new(()));
        let own = Arc::clone(&gate);
        let (say, said) = std::sync::mpsc::channel();
        let row = pair.row();
        let threads = CollectorThreads::start(interval, board, move || {
            let disk = Disk::start().unwrap();
            let method = ReadMethod::Best { containers: 8 };
            let mut sampler = Sampler::new(Arc::default(), disk, None, 10, method);
            sampler.follow(&[row], true);
            say.send(reads_links(&sampler)).unwrap();
            sampler.links.as_mut().unwrap().gate = Some(own);
            sampler
        })
        .unwrap();
        if !said.recv().unwrap() {
            return;
        }
        threads.want(changes(vec![pair.row()]), interval);
        let mut reader = ObservedReader::at(&directory);
        let mut wait_for = |wanted: &dyn Fn(&ObservedSnapshot) -> bool| {
            let until = Instant::now() + Duration::from_secs(30);
            loop {
                if let Ok(found) = reader.snapshot()
                    && wanted(&found)
                {
                    return found;
                }
                assert!(Instant::now() < until, "it does not come");
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        let bytes = |it: &ObservedSnapshot| it.containers.first()?.net.counters.rx_bytes;
        let by_program = |it: &ObservedSnapshot| {
            let first = it.containers.first();
            first.is_some_and(|it| it.net.source == Source::Bpf)
        };
        wait_for(&by_program);
        let held = lock(&gate);
        // Another container, about whose link the kernel must be asked.
        let mut row = pair.row();
        (row.container_id.0[0], row.link_indexes) = (200, vec![1]);
        threads.want(changes(vec![row]), interval);
        wait_for(&|_| threads.shared.state.lock().hangs);
        for _ in 0..3 {
            let before = bytes(&wait_for(&by_program));
            pair.send(5);
            let after = wait_for(&|it| by_program(it) && bytes(it) > before);
            assert!(
                after
                    .containers
                    .get(1)
                    .is_none_or(|it| it.net.get().is_none())
            );
        }
        drop(held);
        wait_for(&|it| {
            let other = it.containers.get(1);
            other.is_some_and(|it| it.net.source == Source::Netlink) && by_program(it)
        });
    }

    #[test]
    fn a_question_about_links_that_hangs_holds_nothing_else_up() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let (board, directory) = board_below(base.path(), "i-threads");
        let interval = Duration::from_millis(20);
        let gate = Arc::new(Mutex::new(()));
        let own = Arc::clone(&gate);
        let threads = CollectorThreads::start(interval, board, move || {
            let disk = Disk::start().unwrap();
            let mut sampler = Sampler::new(Arc::default(), disk, None, 10, ReadMethod::Files);
            sampler.links.as_mut().unwrap().gate = Some(own);
            sampler
        })
        .unwrap();
        // The loopback link stands for a container's.
        let row = ContainerRow {
            link_indexes: vec![1],
            ..ContainerRow::default()
        };
        threads.want(changes(vec![row]), interval);
        let mut reader = ObservedReader::at(&directory);
        let mut wait_for = |wanted: &dyn Fn(&ObservedSnapshot) -> bool| {
            let until = Instant::now() + Duration::from_secs(30);
            loop {
                if let Ok(found) = reader.snapshot()
                    && wanted(&found)
                {
                    return found.containers[0].tick;
                }
                assert!(Instant::now() < until, "it does not come");
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        let sampled = |snapshot: &ObservedSnapshot, after: u64, net: bool| {
            let sample = snapshot.containers.first();
            sample.is_some_and(|it| it.tick > after && it.net.get().is_some() == net)
        };
        let mut tick = 0;
        // More than once, so that each thread has been the one that hangs.
        for _ in 0..3 {
            tick = wait_for(&|it| sampled(it, tick, true));
            let held = lock(&gate);
            tick = wait_for(&|it| sampled(it, tick, false));
            // Others than the one that was under way, and without waiting.
            tick = wait_for(&|it| sampled(it, tick + 2, false));
            // A thread that got no processor may have been taken for one that hangs before.
            wait_for(&|_| threads.shared.state.lock().asked.is_none());
            assert!(threads.healthy());
            drop(held);
        }
        wait_for(&|it| sampled(it, tick, true));
        assert!(threads.healthy());
        let held = lock(&gate);
        wait_for(&|it| sampled(it, tick, false));
        // The thread that hangs is not waited for.
        drop(threads);
        drop(held);
    }
}
