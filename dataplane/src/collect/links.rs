//! What links have counted, asked of the kernel under its interface lock: only in passes that need it, for
//! what the kernel program reads and is believed ([`super::veths`]) needs no question.
//!
//! In: containers whose own namespaces may have links that have no end on this host. Out: the counters
//! of all links of this host, and of those. Invariant: one question may take for as long as somebody
//! holds that lock (a driver that resets its card, for one), and no signal or time limit ends the wait:
//! the kernel takes the lock inside send(2). So nothing else is asked for here, and
//! [`super::threads`] lets go of a thread that waits.

use std::collections::HashMap;
#[cfg(test)]
use std::sync::{Arc, Mutex};

use shared::desired::ContainerRow;
use shared::ids::ContainerId;
use shared::log_limit::LogLimit;

use crate::sys::netlink::inner::{InnerLinks, InnerStatistics};
use crate::sys::netlink::{LinkCounters, LinkStatistics, NetlinkError};

/// Links of a container are looked for so often while the kernel gives no answer.
const TRIES: u8 = 5;

/// How other links of a container are looked for.
#[derive(Debug)]
pub(super) struct Seek {
    /// Its process and the host's ends of its links; none when it has no others.
    by: Option<(u32, Vec<u32>)>,
    /// So often the kernel gave no answer.
    failed: u8,
}

impl Seek {
    /// How other links of this container are looked for.
    pub(super) fn of(row: &ContainerRow) -> Self {
        let may = !row.host_network && row.init_pid != 0 && !row.link_indexes.is_empty();
        Self {
            by: may.then(|| (row.init_pid, row.link_indexes.clone())),
            failed: 0,
        }
    }
}

#[derive(Debug)]
struct Inner {
    links: InnerLinks,
    /// `None`: they could not be read.
    counted: Option<LinkCounters>,
}

/// Asks, and keeps what was answered last.
#[derive(Debug, Default)]
pub(super) struct LinkReader {
    statistics: Option<LinkStatistics>,
    log: LogLimit,
    /// Links that only the container's namespace has, of the few containers with such.
    inner: HashMap<ContainerId, Inner>,
    /// What is to be looked for again.
    unanswered: HashMap<ContainerId, Seek>,
    inner_statistics: Option<InnerStatistics>,
    /// Who holds this lets the reader wait, as the kernel would.
    #[cfg(test)]
    pub(super) gate: Option<Arc<Mutex<()>>>,
}

impl LinkReader {
    /// Nothing is read yet.
    pub(super) fn new() -> Self {
        Self {
            // From the start, so that the number of descriptors stays what it is.
            inner_statistics: InnerStatistics::open().ok(),
            ..Self::default()
        }
    }

    /// Reads the counters of all links; looks first for links of these containers. Whether the
    /// counters of this host's links were read. It may wait for ever.
    pub(super) fn read(&mut self, sought: HashMap<ContainerId, Seek>) -> bool {
        #[cfg(test)]
        if let Some(gate) = &self.gate {
            drop(gate.lock());
        }
        for (id, seek) in sought {
            self.find_inner(id, seek);
        }
        let read = match &mut self.statistics {
            Some(links) => links.read().map(|_| ()),
            none => LinkStatistics::open().and_then(|links| none.insert(links).read().map(|_| ())),
        };
        for (id, inner) in &mut self.inner {
            let counted = asked(&mut self.inner_statistics, |it| it.read(&inner.links));
            inner.counted = counted
                .inspect_err(|err| {
                    tracing::debug!(
                        container_id = %id,
                        err = err as &dyn std::error::Error,
                        "links of a container's own namespace can't be read"
                    );
                })
                .ok();
        }
        if let Err(err) = &read {
            // A fresh socket next time: what is still under way on this one is dropped.
            self.statistics = None;
            if let Some(suppressed) = self.log.pass() {
                tracing::warn!(
                    err = err as &dyn std::error::Error,
                    suppressed,
                    "the kernel can't be asked for link counters; \
                     network numbers that only it tells are absent"
                );
            }
        }
        read.is_ok()
    }

    /// What was read last of this host's links.
    pub(super) fn statistics(&self) -> Option<&LinkStatistics> {
        self.statistics.as_ref()
    }

    /// The same, to add to it.
    pub(super) fn statistics_mut(&mut self) -> Option<&mut LinkStatistics> {
        self.statistics.as_mut()
    }

    /// What was read last of the links that only this container's namespace has, if there are such.
    pub(super) fn inner(&self, container: ContainerId) -> Option<Option<&LinkCounters>> {
        // Most nodes have none.
        if self.inner.is_empty() {
            return None;
        }
        let inner = self.inner.get(&container)?;
        Some(inner.counted.as_ref())
    }

    /// The containers that have links which only their own namespaces have.
    pub(super) fn with_inner(&self) -> impl Iterator<Item = &ContainerId> {
        self.inner.keys()
    }

    /// Lets go of other containers.
    pub(super) fn keep(&mut self, wanted: impl Fn(&ContainerId) -> bool) {
        if !self.inner.is_empty() {
            self.inner.retain(|id, _| wanted(id));
        }
    }

    /// Looks for links of a container that have no end on this host.
    fn find_inner(&mut self, id: ContainerId, seek: Seek) {
        self.inner.remove(&id);
        let Some((pid, outside)) = &seek.by else {
            return;
        };
        let found = asked(&mut self.inner_statistics, |it| it.find(*pid, outside));
        self.take_found(id, seek, found);
    }

    fn take_found(
        &mut self,
        id: ContainerId,
        mut seek: Seek,
        found: Result<Option<InnerLinks>, NetlinkError>,
    ) {
        match found {
            Ok(Some(links)) => {
                let counted = None;
                self.inner.insert(id, Inner { links, counted });
            }
            Ok(None) => {}
            Err(err) => {
                tracing::debug!(
                    container_id = %id,
                    err = &err as &dyn std::error::Error,
                    "links of a container's own namespace can't be looked for"
                );
                seek.failed += 1;
                if seek.failed < TRIES {
                    self.unanswered.insert(id, seek);
                }
            }
        }
    }

    /// Of whom the kernel gave no answer, to be asked for again.
    pub(super) fn unanswered(&mut self) -> impl Iterator<Item = (ContainerId, Seek)> {
        self.unanswered.drain()
    }
}

/// Asks by the socket that is kept. After a failure it is a fresh one: what is still under way on the
/// old one is dropped.
fn asked<T>(
    statistics: &mut Option<InnerStatistics>,
    ask: impl FnOnce(&mut InnerStatistics) -> Result<T, NetlinkError>,
) -> Result<T, NetlinkError> {
    let mut open = match statistics.take() {
        Some(open) => open,
        None => InnerStatistics::open()?,
    };
    let answer = ask(&mut open);
    *statistics = match answer {
        Ok(_) => Some(open),
        Err(_) => InnerStatistics::open().ok(),
    };
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_that_could_not_be_looked_for_are_looked_for_again_and_not_for_ever() {
        let row = ContainerRow {
            init_pid: 7,
            link_indexes: vec![3],
            ..ContainerRow::default()
        };
        let mut reader = LinkReader::default();
        let mut tries = vec![(row.container_id, Seek::of(&row))];
        let mut asked = 0;
        while let Some((id, seek)) = tries.pop() {
            asked += 1;
            reader.take_found(id, seek, Err(NetlinkError::Unsteady));
            tries.extend(reader.unanswered());
        }
        assert_eq!(asked, TRIES);
        reader.take_found(row.container_id, Seek::of(&row), Ok(None));
        assert_eq!(reader.unanswered().count(), 0);
    }
}
