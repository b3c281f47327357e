//! The thread that lists interfaces and routes and changes what is attached to them: all that waits for the
//! kernel's interface lock.
//!
//! In: orders. Out: what came of them, told to who owns the kernel path. Somebody may hold that lock for
//! as long as they like (a driver that resets its card, for one), and no wait for it can be ended: the
//! kernel takes it inside the calls. Invariants: orders are carried out in their order; of those that
//! wait there is one list of a kind at most and one order per place, the last one; who asks waits for the answer no
//! longer than [`PATIENCE`], no more than a quarter of the time, and not at all while an order hangs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::Ebpf;
use ebpf::program;
use shared::log_limit::LogLimit;

use super::attach::{self, Means};
use super::eligibility;
use super::error::KernelPathError;
use super::object::classifier;
use super::pins::{self, Pins, Side};
use crate::causes::words;
use crate::mailbox::Mailbox;
use crate::sys::clock::thread_cpu;
use crate::sys::netlink::interfaces::{Interface, Interfaces};
use crate::sys::netlink::routes::{Networks, Routes};
use crate::sys::netlink::{LinkLookup, NetlinkError};

/// An order that takes longer is taken to hang. The kernel needs less than a millisecond for most, and
/// some tenths of a second while many containers come and go.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// So many times as long as was waited patience takes to come back.
const REST: u32 = 3;

/// What listing routes may take at most before it is paced ...
const ROUTES_TAKE: Duration = Duration::from_millis(5);
/// ... to take no more than one part of so many of the time.
const ROUTES_REST: u32 = 20;

/// A side of an interface, by its index.
pub(super) type Place = (Side, u32);

/// What is to be done.
#[derive(Debug)]
pub(super) enum Order {
    /// List interfaces and addresses, and routes.
    List,
    /// Look at these interfaces.
    Look(BTreeSet<u32>),
    /// List routes, by the uplinks of the last list.
    Routes,
    /// Attach a program, or put it in the place of an earlier one. The number is told with the answer.
    Attach(Place, u64),
    /// Take a program away. Not there is fine.
    Detach(Place),
    /// Remove what another version has left.
    Remove(Pins),
    /// Remove what agents that are gone have left.
    RemoveAbandoned,
}

impl Order {
    fn place(&self) -> Option<Place> {
        match self {
            Self::Attach(place, _) | Self::Detach(place) => Some(*place),
            _ => None,
        }
    }
}

/// What routes lead to by each uplink.
#[derive(Debug)]
pub(super) enum Ways {
    /// It, as of now.
    Told(BTreeMap<u32, Networks>),
    /// There are so many that they are not listed again before then.
    Later(Instant),
}

/// The interfaces, and what routes lead to by the uplinks among them.
pub(super) type Listed = (BTreeMap<u32, Interface>, Result<Ways, NetlinkError>);

/// What came of an order.
#[derive(Debug)]
pub(super) enum Word {
    /// All there is.
    Listed(Result<Listed, NetlinkError>),
    /// Some interfaces without their addresses; none where there is none any more.
    Looked(Result<BTreeMap<u32, Option<Interface>>, NetlinkError>),
    /// Routes alone.
    Routed(Result<Ways, NetlinkError>),
    /// A program is attached, or not.
    Attached(Place, u64, Result<(), KernelPathError>),
}

/// What the thread works with.
pub(super) struct Hands {
    pub(super) object: Ebpf,
    pub(super) pins: Pins,
    pub(super) elders: Vec<Pins>,
    pub(super) means: Means,
    pub(super) interfaces: Interfaces,
    pub(super) routes: PacedRoutes,
    pub(super) names: LinkLookup,
}

/// Lists routes as often as that is cheap: a host may have a million of them, and each container that
/// comes or goes changes some.
pub(super) struct PacedRoutes {
    routes: Routes,
    uplinks: BTreeSet<u32>,
    /// Not before. None when they were never listed.
    next: Option<Instant>,
}

impl PacedRoutes {
    /// # Errors
    /// No socket.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            routes: Routes::open()?,
            uplinks: BTreeSet::new(),
            next: None,
        })
    }

    fn list(&mut self) -> Result<Ways, NetlinkError> {
        let began = Instant::now();
        if let Some(next) = self.next.filter(|it| began < *it) {
            return Ok(Ways::Later(next));
        }
        let before = thread_cpu();
        let listed = self.routes.list(&self.uplinks)?;
        // What was waited for, like a lock of the kernel's, costs nothing.
        let took = thread_cpu().saturating_sub(before);
        self.next = Some(Instant::now() + took.saturating_sub(ROUTES_TAKE) * ROUTES_REST);
        Ok(Ways::Told(listed))
    }
}

impl Hands {
    fn carry_out(&mut self, order: Order) -> Option<Word> {
        match order {
            Order::List => Some(Word::Listed(self.interfaces.list().map(|interfaces| {
                self.routes.uplinks = eligibility::uplinks(&interfaces);
                (interfaces, self.routes.list())
            }))),
            Order::Look(links) => {
                let one = |index| Ok((index, self.interfaces.one(index)?));
                Some(Word::Looked(links.into_iter().map(one).collect()))
            }
            Order::Routes => Some(Word::Routed(self.routes.list())),
            Order::Attach(place, number) => Some(Word::Attached(place, number, self.attach(place))),
            Order::Detach((side, index)) => {
                let name = self.names.name(index);
                if let Err(err) = attach::detach(&self.pins, side, index, name.as_deref()) {
                    tracing::warn!(
                        interface = index,
                        err = words(&err),
                        "a link stays attached"
                    );
                }
                None
            }
            Order::Remove(elder) => {
                attach::remove_filters(&elder, &self.names);
                let pins = elder.directory().display();
                match elder.remove() {
                    Ok(()) => tracing::info!(%pins, "another version's programs are gone"),
                    Err(err) => tracing::warn!(%pins, err = words(&err), "pins stay"),
                }
                None
            }
            Order::RemoveAbandoned => {
                pins::remove_abandoned(&self.names);
                None
            }
        }
    }

    fn attach(&mut self, (side, index): Place) -> Result<(), KernelPathError> {
        // By its name of now: the order may be old.
        let interface = self
            .names
            .name(index)
            .ok_or(KernelPathError::Gone { interface: index })?;
        let name = match side {
            Side::Uplink => program::FROM_UPLINK,
            Side::Container => program::FROM_CONTAINER,
            Side::Guard => program::TO_CONTAINER,
        };
        let program = classifier(&mut self.object, name)?;
        let pins = (&self.pins, self.elders.as_slice());
        attach::attach(program, pins, self.means, side, index, &interface)
    }
}

#[derive(Debug, Default)]
struct Desk {
    waiting: VecDeque<Order>,
    /// Since when the order under way is.
    since: Option<Instant>,
    words: Vec<Word>,
    /// The one who asks waits for all of it.
    waited: bool,
    stop: bool,
}

impl Desk {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.since.is_none()
    }
}

/// The thread's handle. Dropping it tells the thread to end, and does not wait.
#[derive(Debug)]
pub(super) struct Placer {
    desk: Arc<Mailbox<Desk>>,
    thread: JoinHandle<()>,
    number: u64,
    patience: Duration,
    rests_since: Instant,
    /// As of the last look, and told to the log.
    hangs: bool,
    log: LogLimit,
    /// It was said that the kernel hangs.
    said: bool,
}

impl Placer {
    /// Starts the thread; `wake` tells of words that nobody waits for.
    ///
    /// # Errors
    /// No thread.
    pub(super) fn start(
        mut hands: Hands,
        wake: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        Self::with(move |order| hands.carry_out(order), wake)
    }

    fn with(
        work: impl FnMut(Order) -> Option<Word> + Send + 'static,
        wake: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        let desk = Arc::new(Mailbox::<Desk>::default());
        let own = Arc::clone(&desk);
        let thread = std::thread::Builder::new().name("placer".into());
        Ok(Self {
            thread: thread.spawn(move || serve(&own, work, wake))?,
            desk,
            number: 0,
            patience: PATIENCE,
            rests_since: Instant::now(),
            hangs: false,
            log: LogLimit::default(),
            said: false,
        })
    }

    /// False when the thread has ended by itself.
    pub(super) fn healthy(&self) -> bool {
        !self.thread.is_finished()
    }

    /// At the last look an order had been under way for so long that somebody must hold the lock.
    pub(super) fn hangs(&self) -> bool {
        self.hangs
    }

    /// Has interfaces listed. False when that waits to be done already.
    pub(super) fn list(&mut self) -> bool {
        self.put_once(Order::List, |it| matches!(it, Order::List))
    }

    /// Has some interfaces looked at. False when that comes with what waits to be done already.
    pub(super) fn look(&mut self, links: BTreeSet<u32>) -> bool {
        let mut desk = self.desk.lock();
        for order in &mut desk.waiting {
            if let Order::Look(waiting) = order {
                waiting.extend(links);
                return false;
            }
        }
        desk.waiting.push_back(Order::Look(links));
        drop(desk);
        self.desk.wake();
        true
    }

    /// Has routes listed.
    pub(super) fn list_routes(&mut self) {
        let does = |it: &Order| matches!(it, Order::List | Order::Routes);
        self.put_once(Order::Routes, does);
    }

    /// Puts an order unless one that waits does the same.
    fn put_once(&mut self, order: Order, does: impl Fn(&Order) -> bool) -> bool {
        let mut desk = self.desk.lock();
        let fresh = !desk.waiting.iter().any(does);
        if fresh {
            desk.waiting.push_back(order);
            drop(desk);
            self.desk.wake();
        }
        fresh
    }

    /// Has a program attached. Answers the number that the answer will have.
    pub(super) fn attach(&mut self, place: Place) -> u64 {
        self.number += 1;
        self.put(Order::Attach(place, self.number));
        self.number
    }

    /// Has a program taken away.
    pub(super) fn detach(&mut self, place: Place) {
        self.put(Order::Detach(place));
    }

    /// Has removed what another version has left.
    pub(super) fn remove(&mut self, elder: Pins) {
        self.put(Order::Remove(elder));
    }

    /// Has removed what agents that are gone have left.
    pub(super) fn remove_abandoned(&mut self) {
        self.put(Order::RemoveAbandoned);
    }

    fn put(&mut self, order: Order) {
        let place = order.place();
        self.desk.change(|desk| {
            if place.is_some() {
                desk.waiting.retain(|it| it.place() != place);
            }
            desk.waiting.push_back(order);
        });
    }

    /// What came of orders since the last look. Never waits.
    pub(super) fn words(&mut self) -> Vec<Word> {
        let mut desk = self.desk.lock();
        let words = std::mem::take(&mut desk.words);
        let hangs = desk.since.is_some_and(|it| it.elapsed() >= PATIENCE);
        drop(desk);
        self.tell(hangs);
        words
    }

    /// The same after all orders are carried out, if that doesn't take too long.
    pub(super) fn wait(&mut self) -> Vec<Word> {
        let began = Instant::now();
        let rested = began.saturating_duration_since(self.rests_since);
        self.patience = (self.patience + rested / REST).min(PATIENCE);
        let mut desk = self.desk.lock();
        while !desk.is_idle() {
            let until = began + self.patience;
            let until = desk.since.map_or(until, |it| until.min(it + PATIENCE));
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            desk.waited = true;
            desk = self.desk.wait_for(desk, left);
        }
        desk.waited = false;
        drop(desk);
        self.rests_since = Instant::now();
        self.patience = self
            .patience
            .saturating_sub(self.rests_since.saturating_duration_since(began));
        self.words()
    }

    fn tell(&mut self, hangs: bool) {
        if hangs && !self.hangs {
            if let Some(suppressed) = self.log.pass() {
                tracing::warn!(
                    suppressed,
                    "the kernel does not let interfaces be listed or programs be attached, somebody \
                     holds its interface lock; the relay serves new ports until it does"
                );
                self.said = true;
            }
        } else if !hangs && std::mem::take(&mut self.said) {
            tracing::info!("the kernel lets interfaces be listed and programs be attached again");
        }
        self.hangs = hangs;
    }
}

impl Drop for Placer {
    fn drop(&mut self) {
        self.desk.change(|desk| desk.stop = true);
    }
}

/// Carries out orders until the end.
fn serve(desk: &Mailbox<Desk>, mut work: impl FnMut(Order) -> Option<Word>, wake: impl Fn()) {
    let mut held = desk.lock();
    loop {
        if held.stop {
            return;
        }
        let Some(order) = held.waiting.pop_front() else {
            held = desk.wait(held);
            continue;
        };
        held.since = Some(Instant::now());
        drop(held);
        let word = work(order);
        held = desk.lock();
        held.since = None;
        if held.waited {
            if held.waiting.is_empty() {
                desk.wake();
            }
        } else if word.is_some() {
            wake();
        }
        held.words.extend(word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::mpsc::{self, Receiver};

    const FIRST: Place = (Side::Container, 1);
    const SECOND: Place = (Side::Container, 2);

    /// A placer whose orders to list hang while the lock is held, what it has done, and its bell.
    fn placer(gate: &Arc<Mutex<()>>) -> (Placer, Arc<Mutex<Vec<String>>>, Receiver<()>) {
        let done = Arc::new(Mutex::new(Vec::new()));
        let (own, gate) = (Arc::clone(&done), Arc::clone(gate));
        let (bell, rung) = mpsc::channel();
        let work = move |order: Order| {
            own.lock().unwrap().push(format!("{order:?}"));
            match order {
                Order::List => {
                    drop(gate.lock());
                    let none = (BTreeMap::new(), Ok(Ways::Told(BTreeMap::new())));
                    Some(Word::Listed(Ok(none)))
                }
                Order::Attach(place, number) => Some(Word::Attached(place, number, Ok(()))),
                _ => None,
            }
        };
        let wake = move || bell.send(()).unwrap_or_default();
        (Placer::with(work, wake).unwrap(), done, rung)
    }

    fn numbers(words: &[Word]) -> Vec<u64> {
        let number = |word: &Word| match word {
            Word::Attached(_, number, _) => *number,
            Word::Listed(_) | Word::Looked(_) | Word::Routed(_) => 0,
        };
        words.iter().map(number).collect()
    }

    #[test]
    fn nobody_waits_for_what_hangs_and_the_last_order_of_each_place_is_carried_out_later() {
        let gate = Arc::new(Mutex::new(()));
        let (mut placer, done, rung) = placer(&gate);
        let first = placer.attach(FIRST);
        assert_eq!(numbers(&placer.wait()), [first]);
        assert!(!placer.hangs());
        let held = gate.lock().unwrap();
        assert!(placer.list());
        assert!(numbers(&placer.wait()).is_empty());
        // It hangs: from now on nobody waits at all, however often.
        for _ in 0..10_000 {
            placer.list();
            placer.detach(FIRST);
            placer.attach(SECOND);
            placer.detach(SECOND);
            placer.attach(FIRST);
            assert!(numbers(&placer.wait()).is_empty());
        }
        assert!(!placer.list(), "one waits already");
        assert!(placer.hangs());
        let (second, third) = (placer.attach(FIRST), placer.attach(SECOND));
        drop(held);
        let mut heard = Vec::new();
        while heard.len() < 4 {
            let until = Duration::from_secs(30);
            rung.recv_timeout(until).expect("the bell, for each word");
            heard.extend(numbers(&placer.words()));
        }
        assert_eq!(heard, [0, 0, second, third]);
        assert!(!placer.hangs());
        // Patience has been used up, and comes back with time.
        assert!(placer.patience < PATIENCE / 10);
        placer.rests_since -= PATIENCE * REST;
        let last = placer.attach(SECOND);
        assert_eq!(numbers(&placer.wait()), [last]);
        let done = done.lock().unwrap();
        assert_eq!(done.len(), 6, "{done:?}");
        assert!(placer.healthy());
    }

    #[test]
    fn what_is_only_slow_is_not_waited_for_either_once_patience_is_used_up() {
        let gate = Arc::new(Mutex::new(()));
        let (mut placer, _done, rung) = placer(&gate);
        // On a loaded machine any moment may take long.
        let at_once = (0..10).any(|_| {
            let held = gate.lock().unwrap();
            placer.patience = Duration::ZERO;
            placer.rests_since = Instant::now();
            placer.list();
            let number = placer.attach(FIRST);
            let began = Instant::now();
            let early = numbers(&placer.wait());
            let quick = began.elapsed() < PATIENCE / 2 && !placer.hangs();
            drop(held);
            // Told without being asked for, and in their order.
            let mut heard = early.clone();
            while heard.len() < 2 {
                let until = Duration::from_secs(30);
                rung.recv_timeout(until).expect("the bell, for each word");
                heard.extend(numbers(&placer.words()));
            }
            assert_eq!(heard, [0, number]);
            assert!(!placer.hangs());
            while rung.try_recv().is_ok() {}
            early.is_empty() && quick
        });
        assert!(at_once);
    }
}
