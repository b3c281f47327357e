//! Containers that lose an address while they run, as one that is taken off a network by hand: what it
//! has connections with by that address hears nothing of it any more, nor it of them, and it would send
//! into them for a quarter of an hour.
//!
//! In: rows of containers, new or changed. Out: their connections from addresses they have lost are
//! reset. Invariants: only addresses that were seen at the container are ever taken for lost ones; the
//! kernel is asked by a thread of its own, for which the link waits no longer than [`PATIENCE`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use shared::desired::ContainerRow;
use shared::ids::ContainerId;

use crate::forward::relay::namespaces::ContainerNamespaces;
use crate::mailbox::Mailbox;
use crate::sys::netlink::stale_connections::{self, Inspection, StaleConnectionsError};

/// How long the ends of connections may keep the link from its answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// A container to look at.
#[derive(Debug)]
struct Order {
    pid: u32,
    /// It has lost a link.
    moved: bool,
    /// Dropped with the order, for who waits.
    _waiter: Option<Sender<Infallible>>,
}

/// At most one order per container: a later one takes the place of an earlier one.
#[derive(Debug, Default)]
struct Orders {
    looks: BTreeMap<ContainerId, Order>,
    /// Containers there are, with what was seen at them.
    known: HashMap<ContainerId, Option<Seen>>,
    stop: bool,
}

/// A container's row that came, went or changed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Changed<'a> {
    pub(super) id: ContainerId,
    pub(super) before: Option<&'a ContainerRow>,
    pub(super) now: Option<&'a ContainerRow>,
}

/// The thread's handle. Dropping it tells the thread to end, and does not wait.
#[derive(Debug)]
pub(super) struct StaleConnections {
    desk: Arc<Mailbox<Orders>>,
}

/// Addresses of a container, with its process, so that another one is never taken for it.
type Seen = (u32, HashSet<IpAddr>);

impl StaleConnections {
    /// Starts the thread. It tells `namespaces` where the containers are, too.
    pub(super) fn start(namespaces: Arc<ContainerNamespaces>) -> Self {
        let desk = Arc::new(Mailbox::<Orders>::default());
        let own = Arc::clone(&desk);
        let thread = std::thread::Builder::new().name("stale-conns".into());
        let look = move |pid, id, before: &HashSet<IpAddr>| {
            namespaces.find(id, pid);
            stale_connections::reset(pid, id, before)
        };
        if let Err(err) = thread.spawn(move || serve(&own, look)) {
            desk.lock().stop = true;
            tracing::warn!(
                %err,
                "no thread to look at addresses of containers; those that leave a network will notice late that their connections there have ended"
            );
        }
        Self { desk }
    }

    /// Notes changes of rows, and has the connections of containers ended that have lost a link.
    pub(super) fn note<'a>(&self, changes: impl Iterator<Item = Changed<'a>>) {
        let (sender, ended) = mpsc::channel();
        let mut moved = 0_usize;
        {
            let mut orders = self.desk.lock();
            if orders.stop {
                return;
            }
            for Changed { id, before, now } in changes {
                let Some(row) = now else {
                    orders.looks.remove(&id);
                    orders.known.remove(&id);
                    continue;
                };
                orders.known.entry(id).or_default();
                if row.init_pid == 0 || row.host_network {
                    continue;
                }
                let earlier = before.filter(|it| it.init_pid == row.init_pid);
                if earlier.is_some_and(|it| it.link_indexes == row.link_indexes) {
                    continue;
                }
                let here = |link| row.link_indexes.contains(link);
                let left = earlier.is_some_and(|it| !it.link_indexes.iter().all(here));
                moved += usize::from(left);
                let waiting = orders.looks.get(&id);
                let order = Order {
                    pid: row.init_pid,
                    moved: left || waiting.is_some_and(|it| it.moved && it.pid == row.init_pid),
                    _waiter: left.then(|| sender.clone()),
                };
                orders.looks.insert(id, order);
            }
        }
        drop(sender);
        self.desk.wake();
        if moved > 0 && ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(
                containers = moved,
                "containers have left a network, and it takes long to end their connections there"
            );
        }
    }
}

impl Drop for StaleConnections {
    fn drop(&mut self) {
        self.desk.change(|orders| orders.stop = true);
    }
}

/// Carries out orders; those first that somebody waits for.
fn serve(
    desk: &Mailbox<Orders>,
    look: impl Fn(u32, ContainerId, &HashSet<IpAddr>) -> Result<Inspection, StaleConnectionsError>,
) {
    loop {
        let (id, order, known) = {
            let mut orders = desk.lock();
            loop {
                if orders.stop {
                    return;
                }
                let urgent = orders.looks.iter().find(|(_, it)| it.moved);
                let next = urgent.or(orders.looks.first_key_value()).map(|(id, _)| *id);
                if let Some((id, order)) = next.and_then(|id| orders.looks.remove_entry(&id)) {
                    let known = orders.known.get(&id).cloned().flatten();
                    break (id, order, known);
                }
                orders = desk.wait(orders);
            }
        };
        if let Some(seen) = carry_out(known, id, &order, &look)
            && let Some(known) = desk.lock().known.get_mut(&id)
        {
            *known = Some(seen);
        }
    }
}

/// Answers what was seen.
fn carry_out(
    known: Option<Seen>,
    id: ContainerId,
    order: &Order,
    look: &impl Fn(u32, ContainerId, &HashSet<IpAddr>) -> Result<Inspection, StaleConnectionsError>,
) -> Option<Seen> {
    let before = known.filter(|(pid, _)| order.moved && *pid == order.pid);
    let before = before.map(|(_, addresses)| addresses).unwrap_or_default();
    let began = Instant::now();
    match look(order.pid, id, &before) {
        Ok(Inspection { addresses, cut }) => {
            if order.moved {
                tracing::info!(
                    container_id = %id,
                    cut,
                    "a container has left a network; its connections there are ended"
                );
            }
            tracing::debug!(
                container_id = %id,
                addresses = addresses.len(),
                took_us = began.elapsed().as_micros(),
                "the addresses of a container are known"
            );
            return Some((order.pid, addresses));
        }
        Err(err) if order.moved => tracing::warn!(
            container_id = %id,
            err = &err as &dyn std::error::Error,
            "a container has left a network; it will notice late that its connections there have ended"
        ),
        Err(err) => {
            // One that ends at once is gone before it is looked at.
            tracing::debug!(
                container_id = %id,
                err = &err as &dyn std::error::Error,
                "the addresses of a container are not known"
            );
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn row(links: &[u32]) -> Option<ContainerRow> {
        Some(ContainerRow {
            container_id: ContainerId([1; 32]),
            init_pid: 7,
            link_indexes: links.to_vec(),
            ..ContainerRow::default()
        })
    }

    fn note(
        stale_connections: &StaleConnections,
        before: &Option<ContainerRow>,
        now: &Option<ContainerRow>,
    ) {
        let changed = Changed {
            id: ContainerId([1; 32]),
            before: before.as_ref(),
            now: now.as_ref(),
        };
        stale_connections.note([changed].into_iter());
    }

    #[test]
    fn the_link_does_not_wait_for_a_kernel_that_does_not_answer() {
        let desk = Arc::new(Mailbox::<Orders>::default());
        let (gate, released) = mpsc::channel::<Infallible>();
        let returned = Arc::new(AtomicBool::new(false));
        let thread = {
            let (desk, returned) = (Arc::clone(&desk), Arc::clone(&returned));
            std::thread::spawn(move || {
                serve(&desk, |_, _, _| {
                    let _ = released.recv();
                    returned.store(true, Ordering::SeqCst);
                    Ok(Inspection::default())
                });
            })
        };
        let stale_connections = StaleConnections { desk };
        note(&stale_connections, &None, &row(&[4]));
        note(&stale_connections, &row(&[4]), &row(&[5]));
        assert!(!returned.load(Ordering::SeqCst), "it waits no more");
        drop(gate);
        drop(stale_connections);
        thread.join().unwrap();
    }

    #[test]
    fn only_what_was_seen_at_a_container_is_lost_by_it() {
        let before = Arc::new(Mutex::new(Vec::new()));
        let desk = Arc::new(Mailbox::<Orders>::default());
        let thread = {
            let (desk, before) = (Arc::clone(&desk), Arc::clone(&before));
            std::thread::spawn(move || {
                serve(&desk, |pid, _, known| {
                    let mut before = before.lock().unwrap();
                    let mut known: Vec<IpAddr> = known.iter().copied().collect();
                    known.sort();
                    before.push((pid, known));
                    let number = u8::try_from(before.len()).unwrap();
                    Ok(Inspection {
                        addresses: HashSet::from([[10, 0, 0, number].into()]),
                        cut: 0,
                    })
                });
            })
        };
        let stale_connections = StaleConnections { desk };
        let looked = |count: usize| {
            let deadline = Instant::now() + Duration::from_secs(30);
            while before.lock().unwrap().len() < count {
                assert!(Instant::now() < deadline, "not looked at");
                std::thread::sleep(Duration::from_millis(2));
            }
        };
        let address = |number: u8| IpAddr::from([10, 0, 0, number]);
        note(&stale_connections, &None, &row(&[4]));
        looked(1);
        // The same again is not looked at; another link is, and nothing is lost by that.
        note(&stale_connections, &row(&[4]), &row(&[4]));
        note(&stale_connections, &row(&[4]), &row(&[4, 5]));
        looked(2);
        note(&stale_connections, &row(&[4, 5]), &row(&[5]));
        // Gone and back: nothing is known of it.
        note(&stale_connections, &row(&[5]), &None);
        note(&stale_connections, &None, &row(&[5, 6]));
        looked(4);
        note(&stale_connections, &row(&[5, 6]), &row(&[6]));
        // Another process with the same name.
        let other = row(&[]).map(|row| ContainerRow { init_pid: 8, ..row });
        note(&stale_connections, &row(&[6]), &other);
        looked(6);
        let seen = before.lock().unwrap().clone();
        assert_eq!(
            seen,
            [
                (7, vec![]),
                (7, vec![]),
                (7, vec![address(2)]),
                (7, vec![]),
                (7, vec![address(4)]),
                (8, vec![]),
            ]
        );
        drop(stale_connections);
        thread.join().unwrap();
    }
}
