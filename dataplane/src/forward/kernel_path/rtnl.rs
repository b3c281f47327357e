//! The thread that lists interfaces and routes and changes what is attached to them: all that waits for the
//! kernel's interface lock (rtnl).
//!
//! In: requests. Out: what came of them, told to who owns the kernel path. Somebody may hold that lock for
//! as long as they like (a driver that resets its card, for one), and no wait for it can be ended: the
//! kernel takes it inside the calls. Invariants: requests are carried out in their order; of those that
//! wait there is one list of a kind at most and one request per place, the last one; who asks waits for the answer no
//! longer than [`PATIENCE`], no more than a quarter of the time, and not at all while a request hangs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::Ebpf;
use ebpf::program;
use shared::log_limit::LogLimit;

use super::attach::{self, AttachMethod};
use super::eligibility;
use super::error::KernelPathError;
use super::object::classifier;
use super::pins::{self, Pins, Side};
use crate::causes::chain;
use crate::mailbox::Mailbox;
use crate::sys::clock::thread_cpu;
use crate::sys::netlink::interfaces::{Interface, Interfaces};
use crate::sys::netlink::routes::{Networks, Routes};
use crate::sys::netlink::{LinkLookup, NetlinkError};

/// A request that takes longer is taken to hang. The kernel needs less than a millisecond for most, and
/// some tenths of a second while many containers come and go.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// So many times as long as was waited patience takes to come back.
const REST: u32 = 3;

/// What listing routes may take at most before it is paced ...
const ROUTES_TAKE: Duration = Duration::from_millis(5);
/// ... to take no more than one part of so many of the time.
const ROUTES_REST: u32 = 20;

/// A side of an interface, by its index.
pub(super) type AttachPoint = (Side, u32);

/// What is to be done.
#[derive(Debug)]
pub(super) enum Request {
    /// List interfaces and addresses, and routes.
    List,
    /// Look at these interfaces.
    Look(BTreeSet<u32>),
    /// List routes, by the uplinks of the last list.
    Routes,
    /// Attach a program, or put it in the place of an earlier one. The number is told with the answer.
    Attach(AttachPoint, u64),
    /// Take a program away. Not there is fine.
    Detach(AttachPoint),
    /// Remove what another version has left.
    Remove(Pins),
    /// Remove what agents that are gone have left.
    RemoveAbandoned,
}

impl Request {
    fn place(&self) -> Option<AttachPoint> {
        match self {
            Self::Attach(place, _) | Self::Detach(place) => Some(*place),
            _ => None,
        }
    }
}

/// What routes lead to by each uplink.
#[derive(Debug)]
pub(super) enum UplinkNetworks {
    /// It, as of now.
    Told(BTreeMap<u32, Networks>),
    /// There are so many that they are not listed again before then.
    Later(Instant),
}

/// The interfaces, and what routes lead to by the uplinks among them.
pub(super) type InterfaceList = (
    BTreeMap<u32, Interface>,
    Result<UplinkNetworks, NetlinkError>,
);

/// What came of a request.
#[derive(Debug)]
pub(super) enum Reply {
    /// All there is.
    Listed(Result<InterfaceList, NetlinkError>),
    /// Some interfaces without their addresses; none where there is none any more.
    Looked(Result<BTreeMap<u32, Option<Interface>>, NetlinkError>),
    /// Routes alone.
    Routed(Result<UplinkNetworks, NetlinkError>),
    /// A program is attached, or not.
    Attached(AttachPoint, u64, Result<(), KernelPathError>),
}

/// What the thread works with.
pub(super) struct Worker {
    pub(super) object: Ebpf,
    pub(super) pins: Pins,
    pub(super) predecessors: Vec<Pins>,
    pub(super) method: AttachMethod,
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

    fn list(&mut self) -> Result<UplinkNetworks, NetlinkError> {
        let began = Instant::now();
        if let Some(next) = self.next.filter(|it| began < *it) {
            return Ok(UplinkNetworks::Later(next));
        }
        let before = thread_cpu();
        let listed = self.routes.list(&self.uplinks)?;
        // What was waited for, like a lock of the kernel's, costs nothing.
        let took = thread_cpu().saturating_sub(before);
        self.next = Some(Instant::now() + took.saturating_sub(ROUTES_TAKE) * ROUTES_REST);
        Ok(UplinkNetworks::Told(listed))
    }
}

impl Worker {
    fn carry_out(&mut self, request: Request) -> Option<Reply> {
        match request {
            Request::List => Some(Reply::Listed(self.interfaces.list().map(|interfaces| {
                self.routes.uplinks = eligibility::uplinks(&interfaces);
                (interfaces, self.routes.list())
            }))),
            Request::Look(links) => {
                let one = |index| Ok((index, self.interfaces.one(index)?));
                Some(Reply::Looked(links.into_iter().map(one).collect()))
            }
            Request::Routes => Some(Reply::Routed(self.routes.list())),
            Request::Attach(place, number) => {
                Some(Reply::Attached(place, number, self.attach(place)))
            }
            Request::Detach((side, index)) => {
                let name = self.names.name(index);
                if let Err(err) = attach::detach(&self.pins, side, index, name.as_deref()) {
                    tracing::warn!(
                        interface = index,
                        err = chain(&err),
                        "a link stays attached"
                    );
                }
                None
            }
            Request::Remove(predecessor) => {
                attach::remove_filters(&predecessor, &self.names);
                let pins = predecessor.directory().display();
                match predecessor.remove() {
                    Ok(()) => tracing::info!(%pins, "another version's programs are gone"),
                    Err(err) => tracing::warn!(%pins, err = chain(&err), "pins stay"),
                }
                None
            }
            Request::RemoveAbandoned => {
                pins::remove_abandoned(&self.names);
                None
            }
        }
    }

    fn attach(&mut self, (side, index): AttachPoint) -> Result<(), KernelPathError> {
        // By its name of now: the request may be old.
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
        let pins = (&self.pins, self.predecessors.as_slice());
        attach::attach(program, pins, self.method, side, index, &interface)
    }
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Request>,
    /// Since when the request under way is.
    since: Option<Instant>,
    replies: Vec<Reply>,
    /// The one who asks waits for all of it.
    waited: bool,
    stop: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.since.is_none()
    }
}

/// The thread's handle. Dropping it tells the thread to end, and does not wait.
#[derive(Debug)]
pub(super) struct RtnlThread {
    state: Arc<Mailbox<State>>,
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

impl RtnlThread {
    /// Starts the thread; `wake` tells of replies that nobody waits for.
    ///
    /// # Errors
    /// No thread.
    pub(super) fn start(
        mut worker: Worker,
        wake: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        Self::with(move |request| worker.carry_out(request), wake)
    }

    fn with(
        work: impl FnMut(Request) -> Option<Reply> + Send + 'static,
        wake: impl Fn() + Send + 'static,
    ) -> std::io::Result<Self> {
        let state = Arc::new(Mailbox::<State>::default());
        let own = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("rtnl".into());
        Ok(Self {
            thread: thread.spawn(move || serve(&own, work, wake))?,
            state,
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

    /// At the last look a request had been under way for so long that somebody must hold the lock.
    pub(super) fn hangs(&self) -> bool {
        self.hangs
    }

    /// Has interfaces listed. False when that waits to be done already.
    pub(super) fn list(&mut self) -> bool {
        self.put_once(Request::List, |it| matches!(it, Request::List))
    }

    /// Has some interfaces looked at. False when that comes with what waits to be done already.
    pub(super) fn look(&mut self, links: BTreeSet<u32>) -> bool {
        let mut state = self.state.lock();
        for request in &mut state.waiting {
            if let Request::Look(waiting) = request {
                waiting.extend(links);
                return false;
            }
        }
        state.waiting.push_back(Request::Look(links));
        drop(state);
        self.state.wake();
        true
    }

    /// Has routes listed.
    pub(super) fn list_routes(&mut self) {
        let does = |it: &Request| matches!(it, Request::List | Request::Routes);
        self.put_once(Request::Routes, does);
    }

    /// Puts a request unless one that waits does the same.
    fn put_once(&mut self, request: Request, does: impl Fn(&Request) -> bool) -> bool {
        let mut state = self.state.lock();
        let fresh = !state.waiting.iter().any(does);
        if fresh {
            state.waiting.push_back(request);
            drop(state);
            self.state.wake();
        }
        fresh
    }

    /// Has a program attached. Answers the number that the answer will have.
    pub(super) fn attach(&mut self, place: AttachPoint) -> u64 {
        self.number += 1;
        self.put(Request::Attach(place, self.number));
        self.number
    }

    /// Has a program taken away.
    pub(super) fn detach(&mut self, place: AttachPoint) {
        self.put(Request::Detach(place));
    }

    /// Has removed what another version has left.
    pub(super) fn remove(&mut self, predecessor: Pins) {
        self.put(Request::Remove(predecessor));
    }

    /// Has removed what agents that are gone have left.
    pub(super) fn remove_abandoned(&mut self) {
        self.put(Request::RemoveAbandoned);
    }

    fn put(&mut self, request: Request) {
        let place = request.place();
        self.state.change(|state| {
            if place.is_some() {
                state.waiting.retain(|it| it.place() != place);
            }
            state.waiting.push_back(request);
        });
    }

    /// What came of requests since the last look. Never waits.
    pub(super) fn replies(&mut self) -> Vec<Reply> {
        let mut state = self.state.lock();
        let replies = std::mem::take(&mut state.replies);
        let hangs = state.since.is_some_and(|it| it.elapsed() >= PATIENCE);
        drop(state);
        self.tell(hangs);
        replies
    }

    /// The same after all requests are carried out, if that doesn't take too long.
    pub(super) fn wait(&mut self) -> Vec<Reply> {
        let began = Instant::now();
        let rested = began.saturating_duration_since(self.rests_since);
        self.patience = (self.patience + rested / REST).min(PATIENCE);
        let mut state = self.state.lock();
        while !state.is_idle() {
            let until = began + self.patience;
            let until = state.since.map_or(until, |it| until.min(it + PATIENCE));
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state.waited = true;
            state = self.state.wait_for(state, left);
        }
        state.waited = false;
        drop(state);
        self.rests_since = Instant::now();
        self.patience = self
            .patience
            .saturating_sub(self.rests_since.saturating_duration_since(began));
        self.replies()
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

impl Drop for RtnlThread {
    fn drop(&mut self) {
        self.state.change(|state| state.stop = true);
    }
}

/// Carries out requests until the end.
fn serve(state: &Mailbox<State>, mut work: impl FnMut(Request) -> Option<Reply>, wake: impl Fn()) {
    let mut held = state.lock();
    loop {
        if held.stop {
            return;
        }
        let Some(request) = held.waiting.pop_front() else {
            held = state.wait(held);
            continue;
        };
        held.since = Some(Instant::now());
        drop(held);
        let reply = work(request);
        held = state.lock();
        held.since = None;
        if held.waited {
            if held.waiting.is_empty() {
                state.wake();
            }
        } else if reply.is_some() {
            wake();
        }
        held.replies.extend(reply);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::mpsc::{self, Receiver};

    const FIRST: AttachPoint = (Side::Container, 1);
    const SECOND: AttachPoint = (Side::Container, 2);

    /// A thread whose requests to list hang while the lock is held, what it has done, and its bell.
    fn rtnl(gate: &Arc<Mutex<()>>) -> (RtnlThread, Arc<Mutex<Vec<String>>>, Receiver<()>) {
        let done = Arc::new(Mutex::new(Vec::new()));
        let (own, gate) = (Arc::clone(&done), Arc::clone(gate));
        let (bell, rung) = mpsc::channel();
        let work = move |request: Request| {
            own.lock().unwrap().push(format!("{request:?}"));
            match request {
                Request::List => {
                    drop(gate.lock());
                    let none = (BTreeMap::new(), Ok(UplinkNetworks::Told(BTreeMap::new())));
                    Some(Reply::Listed(Ok(none)))
                }
                Request::Attach(place, number) => Some(Reply::Attached(place, number, Ok(()))),
                _ => None,
            }
        };
        let wake = move || bell.send(()).unwrap_or_default();
        (RtnlThread::with(work, wake).unwrap(), done, rung)
    }

    fn numbers(replies: &[Reply]) -> Vec<u64> {
        let number = |reply: &Reply| match reply {
            Reply::Attached(_, number, _) => *number,
            Reply::Listed(_) | Reply::Looked(_) | Reply::Routed(_) => 0,
        };
        replies.iter().map(number).collect()
    }

    #[test]
    fn nobody_waits_for_what_hangs_and_the_last_order_of_each_place_is_carried_out_later() {
        let gate = Arc::new(Mutex::new(()));
        let (mut rtnl, done, rung) = rtnl(&gate);
        let first = rtnl.attach(FIRST);
        assert_eq!(numbers(&rtnl.wait()), [first]);
        assert!(!rtnl.hangs());
        let held = gate.lock().unwrap();
        assert!(rtnl.list());
        assert!(numbers(&rtnl.wait()).is_empty());
        // It hangs: from now on nobody waits at all, however often.
        for _ in 0..10_000 {
            rtnl.list();
            rtnl.detach(FIRST);
            rtnl.attach(SECOND);
            rtnl.detach(SECOND);
            rtnl.attach(FIRST);
            assert!(numbers(&rtnl.wait()).is_empty());
        }
        assert!(!rtnl.list(), "one waits already");
        assert!(rtnl.hangs());
        let (second, third) = (rtnl.attach(FIRST), rtnl.attach(SECOND));
        drop(held);
        let mut heard = Vec::new();
        while heard.len() < 4 {
            let until = Duration::from_secs(30);
            rung.recv_timeout(until).expect("the bell, for each word");
            heard.extend(numbers(&rtnl.replies()));
        }
        assert_eq!(heard, [0, 0, second, third]);
        assert!(!rtnl.hangs());
        // Patience has been used up, and comes back with time.
        assert!(rtnl.patience < PATIENCE / 10);
        rtnl.rests_since -= PATIENCE * REST;
        let last = rtnl.attach(SECOND);
        assert_eq!(numbers(&rtnl.wait()), [last]);
        let done = done.lock().unwrap();
        assert_eq!(done.len(), 6, "{done:?}");
        assert!(rtnl.healthy());
    }

    #[test]
    fn what_is_only_slow_is_not_waited_for_either_once_patience_is_used_up() {
        let gate = Arc::new(Mutex::new(()));
        let (mut rtnl, _done, rung) = rtnl(&gate);
        // On a loaded machine any moment may take long.
        let at_once = (0..10).any(|_| {
            let held = gate.lock().unwrap();
            rtnl.patience = Duration::ZERO;
            rtnl.rests_since = Instant::now();
            rtnl.list();
            let number = rtnl.attach(FIRST);
            let began = Instant::now();
            let early = numbers(&rtnl.wait());
            let quick = began.elapsed() < PATIENCE / 2 && !rtnl.hangs();
            drop(held);
            // Told without being asked for, and in their order.
            let mut heard = early.clone();
            while heard.len() < 2 {
                let until = Duration::from_secs(30);
                rung.recv_timeout(until).expect("the bell, for each word");
                heard.extend(numbers(&rtnl.replies()));
            }
            assert_eq!(heard, [0, number]);
            assert!(!rtnl.hangs());
            while rung.try_recv().is_ok() {}
            early.is_empty() && quick
        });
        assert!(at_once);
    }
}
