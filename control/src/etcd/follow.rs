//! A prefix that is followed: read once, then kept up to date by a watch.
//!
//! In: a physical prefix. Out: what lies below it, as of a revision, and whether the watch stands.
//! Invariants: a watch that broke goes on from the revision it had come to, so no change is missed;
//! when etcd has compacted that revision away, or its history is another one (its cluster's id has
//! changed, or its revisions have gone back), the prefix is read again; while etcd is away the last
//! state stays.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{EventType, GetOptions, WatchOptions, WatchResponse};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::error::{EtcdError, Verdict, reason, verdict};
use super::{Etcd, text_pair};

/// Pauses before a broken watch is taken up again: doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// How long etcd may take to say that a watch stands.
const OPEN: Duration = Duration::from_secs(5);

/// What is known of a followed prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Values by physical key.
    pub entries: BTreeMap<String, String>,
    /// The revision they are of; 0 before the first reading.
    pub revision: i64,
    /// Whether the watch stands, so that changes arrive at once.
    pub live: bool,
    /// How often the prefix was read as a whole.
    pub readings: u64,
}

/// A followed prefix. Dropping it ends the watch.
#[derive(Debug)]
pub struct Followed {
    state: watch::Receiver<Arc<Seen>>,
    task: JoinHandle<()>,
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Followed {
    pub(super) fn start(etcd: Etcd, prefix: String) -> Followed {
        let (sender, state) = watch::channel(Arc::new(Seen::default()));
        let task = tokio::spawn(async move {
            Follower {
                etcd,
                prefix,
                sender,
                seen: Seen::default(),
                cluster: 0,
                denied_by: BTreeSet::new(),
            }
            .run()
            .await;
        });
        Followed { state, task }
    }

    /// The state now.
    pub fn now(&self) -> Arc<Seen> {
        self.state.borrow().clone()
    }

    /// Waits for the next change of the state and gives it.
    pub async fn changed(&mut self) -> Arc<Seen> {
        if self.state.changed().await.is_err() {
            // The task only ends when this handle does.
            std::future::pending::<()>().await;
        }
        self.state.borrow_and_update().clone()
    }

    /// A receiver for others that want to look.
    pub fn receiver(&self) -> watch::Receiver<Arc<Seen>> {
        self.state.clone()
    }
}

struct Follower {
    etcd: Etcd,
    prefix: String,
    sender: watch::Sender<Arc<Seen>>,
    seen: Seen,
    /// The id of the etcd cluster it was read from; 0 before.
    cluster: u64,
    /// The members that have denied the watch since it stood, or since new log-ins did not help.
    denied_by: BTreeSet<usize>,
}

/// How a watch ended.
enum End {
    /// The connection or the member, which is the one of this generation.
    Lost {
        member: usize,
        generation: u64,
        err: EtcdError,
    },
    /// What was not seen yet is no longer there to be told.
    Compacted,
    /// The member knows less than was seen: it is behind the others, or etcd was restored or made anew.
    Behind,
    /// Another cluster answers, whose revisions say nothing of what was seen.
    OtherCluster(u64),
}

impl Follower {
    async fn run(mut self) {
        let mut pause = PAUSES.0;
        let mut must_read = true;
        loop {
            if must_read {
                match self.read().await {
                    Ok(()) => must_read = false,
                    Err(err) => {
                        tracing::debug!(
                            prefix = self.prefix,
                            err = &err as &dyn std::error::Error,
                            "cannot read a followed prefix"
                        );
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(PAUSES.1);
                        continue;
                    }
                }
            }
            let before = self.seen.revision;
            let end = self.watch().await;
            if self.seen.live || self.seen.revision > before {
                pause = PAUSES.0;
            }
            self.seen.live = false;
            self.tell();
            match end {
                End::Lost {
                    member,
                    generation,
                    err,
                } => {
                    self.leave(member, generation, &err);
                    self.etcd.lost(&err);
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
                End::Compacted => {
                    tracing::info!(
                        prefix = self.prefix,
                        revision = self.seen.revision,
                        "etcd has compacted what was missed; reading the keys again"
                    );
                    must_read = true;
                }
                End::Behind => {
                    // The reading tells which: before it answers, a member asks the others.
                    must_read = true;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
                End::OtherCluster(now) => {
                    self.etcd.answered_by(now);
                    must_read = true;
                    // Two clusters behind one address must not be asked in turn at full speed.
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSES.1);
                }
            }
        }
    }

    /// Gives up the connection that a watch was lost with, if another may help.
    fn leave(&mut self, member: usize, generation: u64, err: &EtcdError) {
        let EtcdError::Refused { step, remedy, .. } = err else {
            return self.etcd.leave(generation, true);
        };
        let again = !self.denied_by.insert(member);
        if !self.etcd.leave_denied(generation, (step, remedy), again) {
            self.denied_by.clear();
        }
    }

    fn tell(&self) {
        self.sender.send_if_modified(|told| {
            let changed = **told != self.seen;
            if changed {
                *told = Arc::new(self.seen.clone());
            }
            changed
        });
    }

    async fn read(&mut self) -> Result<(), EtcdError> {
        let prefix = self.prefix.as_str();
        let mut answer = self
            .etcd
            .call("read a prefix", |mut client| {
                let options = GetOptions::new().with_prefix();
                async move { client.get(prefix, Some(options)).await }
            })
            .await?;
        let known = (self.cluster, self.seen.revision);
        self.seen.revision = answer.header().map_or(0, |header| header.revision());
        self.cluster = answer.header().map_or(0, |header| header.cluster_id());
        self.etcd.answered_by(self.cluster);
        if has_gone_back(known, (self.cluster, self.seen.revision)) {
            tracing::warn!(
                prefix = self.prefix,
                known = known.1,
                now = self.seen.revision,
                "etcd has gone back in its history (restored or new?); what is there now counts"
            );
        }
        self.seen.entries = answer.take_kvs().into_iter().map(text_pair).collect();
        self.seen.readings += 1;
        self.tell();
        Ok(())
    }

    /// Watches from the revision after the known one until the watch ends.
    async fn watch(&mut self) -> End {
        let (member, generation, _) = self.etcd.current();
        let lost_with = |generation, err| End::Lost {
            member,
            generation,
            err,
        };
        let options = WatchOptions::new()
            .with_prefix()
            .with_progress_notify()
            .with_start_revision(self.seen.revision + 1);
        let prefix = self.prefix.clone();
        let etcd = self.etcd.clone();
        let endpoints = etcd.endpoints();
        let lost = |source: etcd_client::Error| {
            let endpoints = endpoints.clone();
            match verdict(&source) {
                Verdict::Final(remedy) | Verdict::Denied(remedy) => {
                    super::refused(etcd.endpoint(member), "watch a prefix", remedy, source)
                }
                _ => EtcdError::Unreachable {
                    endpoints,
                    reason: reason(&source),
                },
            }
        };
        let late = || EtcdError::Deadline {
            endpoints: endpoints.clone(),
            seconds: OPEN.as_secs(),
        };
        let opened = async {
            let (client, generation) = etcd.client().await?;
            let mut client = client.watch_client();
            let mut stream = Box::pin(client.watch(prefix, Some(options))).await?;
            let first = stream.message().await?;
            Ok::<_, etcd_client::Error>((generation, stream, first))
        };
        let (generation, mut stream, first) = match tokio::time::timeout(OPEN, opened).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(err)) => return lost_with(generation, lost(err)),
            Err(_) => return lost_with(generation, late()),
        };
        let mut next = first;
        loop {
            let Some(response) = next else {
                let closed = etcd_client::Error::WatchError("the stream was closed".to_owned());
                return lost_with(generation, lost(closed));
            };
            match self.take(&response) {
                Ok(None) => {}
                Ok(Some(end)) => return end,
                Err(err) => return lost_with(generation, lost(err)),
            }
            if !self.seen.live {
                self.seen.live = true;
                self.denied_by.clear();
                self.etcd.reached(member);
            }
            self.tell();
            // Pings find out when nobody is there any more.
            next = match stream.message().await {
                Ok(next) => next,
                Err(err) => return lost_with(generation, lost(err)),
            };
        }
    }

    /// Takes what a watch has told; the error is how etcd has ended it.
    fn take(&mut self, response: &WatchResponse) -> Result<Option<End>, etcd_client::Error> {
        let revision = response.header().map_or(0, |header| header.revision());
        let cluster = response.header().map_or(0, |header| header.cluster_id());
        if cluster != 0 && cluster != self.cluster {
            return Ok(Some(End::OtherCluster(cluster)));
        }
        if response.compact_revision() > 0 {
            return Ok(Some(End::Compacted));
        }
        if response.canceled() {
            let reason = response.cancel_reason().to_owned();
            return Err(etcd_client::Error::WatchError(reason));
        }
        if response.created() && revision > 0 && revision < self.seen.revision {
            return Ok(Some(End::Behind));
        }
        for event in response.events() {
            let Some(pair) = event.kv() else { continue };
            let key = String::from_utf8_lossy(pair.key()).into_owned();
            match event.event_type() {
                EventType::Put => {
                    let value = String::from_utf8_lossy(pair.value()).into_owned();
                    self.seen.entries.insert(key, value);
                }
                EventType::Delete => {
                    self.seen.entries.remove(&key);
                }
            }
            self.seen.revision = self.seen.revision.max(pair.mod_revision());
        }
        // A message without changes says up to where there were none. The one that says that the
        // watch stands does not: older changes are still to come.
        if !response.created() && response.events().is_empty() {
            self.seen.revision = self.seen.revision.max(revision);
        }
        Ok(None)
    }
}

/// Whether etcd, of which a cluster's id and revision were known, has a shorter history now than it had.
/// Another cluster's revisions say nothing of that.
fn has_gone_back(known: (u64, i64), read: (u64, i64)) -> bool {
    known.0 == read.0 && read.1 < known.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_denies_a_watch_is_left_once_in_a_while() {
        let etcd = crate::etcd::tests::two_members();
        let mut follower = Follower {
            etcd: etcd.clone(),
            prefix: "/p".to_owned(),
            sender: watch::channel(Arc::default()).0,
            seen: Seen::default(),
            cluster: 0,
            denied_by: BTreeSet::new(),
        };
        let denied = || {
            let source = etcd_client::Error::WatchError("permission denied".to_owned());
            super::super::refused(String::new(), "watch a prefix", "set rights", source)
        };
        let away = EtcdError::Deadline {
            endpoints: String::new(),
            seconds: 5,
        };
        let mut member_after = |err: &EtcdError| {
            let (member, generation, _) = etcd.current();
            follower.leave(member, generation, err);
            etcd.current().0
        };
        // A new log-in at each may help.
        assert_eq!([0; 2].map(|_| member_after(&denied())), [1, 0]);
        // Not so soon after all have denied it; others use this connection.
        let (_, generation, _) = etcd.current();
        assert_eq!([0; 3].map(|_| member_after(&denied())), [0, 0, 0]);
        assert_eq!(etcd.current().1, generation);
        assert_eq!(member_after(&away), 1);
        // A while later.
        super::super::lock(&etcd.inner.all_refused).clear();
        assert_eq!([0; 3].map(|_| member_after(&denied())), [0, 1, 1]);
        // The other one is away: one new log-in has been tried when this one denies it again.
        super::super::lock(&etcd.inner.all_refused).clear();
        assert_eq!(member_after(&denied()), 0);
        assert_eq!(member_after(&away), 1);
        assert_eq!([0; 3].map(|_| member_after(&denied())), [1; 3]);
    }

    #[test]
    fn a_watch_that_ends_again_is_no_change() {
        let (sender, mut told) = watch::channel(Arc::default());
        let mut follower = Follower {
            etcd: crate::etcd::tests::two_members(),
            prefix: "/p".to_owned(),
            sender,
            seen: Seen::default(),
            cluster: 0,
            denied_by: BTreeSet::new(),
        };
        for live in [true, false] {
            follower.seen.live = live;
            follower.tell();
            assert!(told.has_changed().unwrap());
            assert_eq!(told.borrow_and_update().live, live);
            follower.tell();
            assert!(!told.has_changed().unwrap());
        }
    }

    #[test]
    fn only_a_reading_of_the_same_cluster_shows_that_etcd_has_gone_back() {
        assert!(has_gone_back((7, 120), (7, 119)));
        // A member that was behind has caught up before it answered.
        assert!(!has_gone_back((7, 120), (7, 120)));
        assert!(!has_gone_back((7, 120), (7, 130)));
        assert!(!has_gone_back((7, 120), (8, 4)));
        assert!(!has_gone_back((0, 0), (7, 1)), "the first reading");
    }
}
