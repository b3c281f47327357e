//! The relay: service ports forwarded by this process.
//!
//! In: ports to open, change and close. Out: their counters. One or a few threads, each with its
//! own event loop on mio ([`worker`]); a port's listener belongs to one of them, its sessions are
//! dealt out to all. Their connections begin inside the container where that is possible ([`namespaces`]). A session ([`session`]) is two sockets and two directions; a direction
//! ([`flow`]) copies small messages through the worker's one buffer and moves bulk by splice, driven
//! by epoll ([`adaptive`]). With [`Engine::Uring`] sessions of messages are on io_uring ([`ring`]).
//! Ports of UDP have a thread of their own ([`datagrams`]).
//! Invariant: a port that [`Relay::open`] returned accepts clients until it is closed.

pub mod adaptive;
pub mod datagrams;
pub mod flow;
pub mod namespaces;
pub mod port;
pub mod ring;
pub mod session;
pub mod slab;
pub mod wheel;
pub mod worker;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use shared::ids::ContainerId;

use self::datagrams::Datagrams;
use self::namespaces::ContainerNamespaces;
use self::port::{Port, Rules, Totals};
use self::ring::RingEngine;
use self::worker::{Inbox, Message, SessionCounts, Worker};
use crate::causes::chain;
use crate::sys::datagram;
use crate::sys::socket::{self, ListenError};

/// Clients that may wait to be accepted per port; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 1024;
/// How long a worker may take to answer. It answers within one round of its loop, which is
/// milliseconds; this only keeps the caller alive should a worker have died.
const ANSWER: Duration = Duration::from_secs(5);

/// How bytes of connections are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// By reads and writes, only to compare.
    Copy,
    /// Messages by reads and writes, bulk by splice.
    Splice,
    /// Messages by io_uring, bulk by splice; like [`Engine::Splice`] where there is no io_uring.
    Uring,
}

/// How the relay is built.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of threads, at least one.
    pub threads: usize,
    /// How bytes of connections are moved.
    pub engine: Engine,
    /// Sessions of all ports at once; 0 means no limit.
    pub total_sessions: u32,
    /// Connections begin in the namespaces of their containers, where these are known.
    pub inside: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: 1,
            engine: Engine::Splice,
            total_sessions: 0,
            inside: true,
        }
    }
}

/// Where sessions are led.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The container's address.
    pub address: SocketAddr,
    /// Whose it is; all zeros when that is not known.
    pub container: ContainerId,
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self {
            address,
            container: ContainerId::default(),
        }
    }
}

/// Why the relay could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No epoll or eventfd descriptor.
    #[error("cannot make the event loop of a relay thread")]
    Poll(#[source] io::Error),
    /// No thread.
    #[error("cannot start a relay thread")]
    Thread(#[source] io::Error),
}

/// Why a port could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No listener.
    #[error("cannot open the listener")]
    Listen(#[source] ListenError),
    /// The listener's own address could not be read.
    #[error("cannot read the address of the listener")]
    Address(#[source] rustix::io::Errno),
}

/// The running relay.
#[derive(Debug)]
pub struct Relay {
    /// The threads of connections, then that of datagrams.
    inboxes: Vec<Arc<Inbox>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    totals: Arc<Totals>,
    namespaces: Arc<ContainerNamespaces>,
    engine: Engine,
    /// Why it is not the engine that was asked for.
    refused: Option<String>,
}

impl Relay {
    /// Starts the threads.
    ///
    /// # Errors
    /// No descriptors or no threads.
    pub fn start(options: Options) -> Result<Self, StartError> {
        let totals = Arc::new(Totals::default());
        totals.set_limit(options.total_sessions);
        let mut polls = Vec::new();
        let mut inboxes = Vec::new();
        for _ in 0..options.threads.max(1) {
            let (poll, inbox) = worker::mailbox().map_err(StartError::Poll)?;
            polls.push(poll);
            inboxes.push(inbox);
        }
        let (datagram_poll, datagram_inbox) = worker::mailbox().map_err(StartError::Poll)?;
        let workers = inboxes.clone();
        inboxes.push(Arc::clone(&datagram_inbox));
        let mut relay = Self {
            inboxes,
            threads: Vec::new(),
            totals,
            namespaces: Arc::new(if options.inside {
                ContainerNamespaces::new()
            } else {
                ContainerNamespaces::default()
            }),
            engine: options.engine,
            refused: None,
        };
        let (tell, told) = sync_channel(workers.len());
        for (own, poll) in polls.into_iter().enumerate() {
            let (workers, tell) = (workers.clone(), tell.clone());
            relay.spawn(&format!("relay-{own}"), move || {
                let ring = (options.engine == Engine::Uring).then(RingEngine::new);
                let ring = ring.transpose().map_err(|err| chain(&err));
                let _ = tell.try_send(ring.as_ref().err().cloned());
                drop(tell);
                let splice = options.engine != Engine::Copy;
                Worker::new(poll, workers, own, splice, ring.ok().flatten()).run()
            })?;
        }
        drop(tell);
        if let Some(why) = told.iter().flatten().next() {
            tracing::warn!(why, "no io_uring, the relay goes without");
            relay.engine = Engine::Splice;
            relay.refused = Some(why);
        }
        let datagrams = Datagrams::new(datagram_poll, datagram_inbox);
        relay.spawn("relay-datagrams", move || datagrams.run())?;
        Ok(relay)
    }

    fn spawn(
        &mut self,
        name: &str,
        run: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<(), StartError> {
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .map_err(StartError::Thread)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Opens a listener at `bind` that leads to `target`. Clients are accepted from the moment
    /// this returns.
    ///
    /// # Errors
    /// The port is taken, the address is not of this host, or there are no descriptors.
    pub fn open(
        &self,
        bind: SocketAddr,
        target: impl Into<Target>,
        rules: Rules,
    ) -> Result<Arc<Port>, OpenError> {
        let target = target.into();
        let fd = socket::listen(bind, BACKLOG).map_err(OpenError::Listen)?;
        let bound = socket::local_address(&fd).map_err(OpenError::Address)?;
        let port = Port::new(bound, target.address, rules, Arc::clone(&self.totals));
        let port = Arc::new(port.at_home(target.container, &self.namespaces));
        self.inbox_of(&port)
            .send(Message::Listen(fd, Arc::clone(&port)));
        Ok(port)
    }

    /// Opens a port of datagrams at `bind` that leads to `target`.
    ///
    /// # Errors
    /// The port is taken, the address is not of this host, or there are no descriptors.
    pub fn open_datagrams(
        &self,
        bind: SocketAddr,
        target: impl Into<Target>,
        rules: Rules,
    ) -> Result<Arc<Port>, OpenError> {
        let target = target.into();
        let fd = datagram::bind(bind).map_err(OpenError::Listen)?;
        let bound = socket::local_address(&fd).map_err(OpenError::Address)?;
        let totals = Arc::clone(&self.totals);
        let port = Port::of_datagrams(bound, target.address, rules, totals);
        let port = Arc::new(port.at_home(target.container, &self.namespaces));
        self.inbox_of(&port)
            .send(Message::Listen(fd, Arc::clone(&port)));
        Ok(port)
    }

    /// Closes listeners, after those who had already connected were accepted. Sessions go on, but
    /// for those of datagrams, which have no end to wait for.
    pub fn close(&self, ports: &[Arc<Port>]) {
        let mut per_inbox = vec![Vec::new(); self.inboxes.len()];
        for port in ports {
            per_inbox[self.place_of(port)].push(Arc::clone(port));
        }
        let answers: Vec<_> = self
            .inboxes
            .iter()
            .zip(per_inbox)
            .filter(|(_, ports)| !ports.is_empty())
            .map(|(inbox, ports)| {
                let (done, answer) = sync_channel(1);
                inbox.send(Message::Unlisten(ports, done));
                answer
            })
            .collect();
        for answer in &answers {
            wait(answer);
        }
    }

    /// Resets all sessions of the ports, whose listeners must be closed or refusing.
    pub fn cut(&self, ports: &[Arc<Port>]) {
        // A client accepted by one worker may still be in another's inbox. Messages are read in
        // order, so a sweep comes after it; it was counted when it was admitted.
        let live: Vec<_> = ports.iter().filter(|port| port.active() > 0).collect();
        for port in &live {
            port.cut();
        }
        if live.is_empty() {
            return;
        }
        self.sweep();
        for port in &live {
            port.settle_refusing();
        }
    }

    /// Resets the sessions of clients that the ports let in no more.
    pub fn shut_out(&self, ports: &[Arc<Port>]) {
        if ports.is_empty() {
            return;
        }
        // As for [`Self::disable`]: no worker judges by the old rules any more, and who was let in by them
        // is counted.
        self.session_counts();
        if ports.iter().any(|port| port.active() > 0) {
            self.sweep();
        }
        for port in ports {
            port.settle_narrowed();
        }
    }

    fn sweep(&self) {
        let answers: Vec<_> = self
            .inboxes
            .iter()
            .map(|inbox| {
                let (done, answer) = sync_channel(1);
                inbox.send(Message::Sweep(done));
                answer
            })
            .collect();
        for answer in &answers {
            wait(answer);
        }
    }

    /// Turns new clients away and resets the sessions; the listener stays and keeps the port.
    pub fn disable(&self, ports: &[Arc<Port>]) {
        for port in ports {
            port.refuse();
        }
        // A worker may be between judging a client and counting it on the thread that accepts;
        // an exchange of messages with every worker puts that behind us.
        self.session_counts();
        self.cut(ports);
    }

    /// What all sessions are doing.
    pub fn session_counts(&self) -> SessionCounts {
        let mut sum = SessionCounts::default();
        for inbox in &self.inboxes {
            let (tell, answer) = sync_channel(1);
            inbox.send(Message::SessionCounts(tell));
            if let Some(part) = wait(&answer) {
                sum.sessions += part.sessions;
                sum.splicing += part.splicing;
                sum.on_ring += part.on_ring;
                sum.timers += part.timers;
            }
        }
        sum
    }

    /// The engine of connections.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Why it is not the one that was asked for.
    pub fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// The namespaces of containers.
    pub fn namespaces(&self) -> &Arc<ContainerNamespaces> {
        &self.namespaces
    }

    /// Session counts of the process.
    pub fn totals(&self) -> &Arc<Totals> {
        &self.totals
    }

    /// False when a thread has ended by itself: the process must be restarted.
    pub fn healthy(&self) -> bool {
        self.threads.iter().all(|thread| !thread.is_finished())
    }

    fn place_of(&self, port: &Port) -> usize {
        let workers = self.inboxes.len() - 1;
        if port.takes_datagrams() {
            workers
        } else {
            usize::from(port.bind().port()) % workers
        }
    }

    fn inbox_of(&self, port: &Port) -> &Inbox {
        &self.inboxes[self.place_of(port)]
    }
}

fn wait<T>(answer: &Receiver<T>) -> Option<T> {
    match answer.recv_timeout(ANSWER) {
        Ok(value) => Some(value),
        Err(err) => {
            tracing::error!(%err, "a relay thread does not answer");
            None
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for inbox in &self.inboxes {
            inbox.send(Message::Stop);
        }
        for thread in self.threads.drain(..) {
            // A thread that panicked has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}
