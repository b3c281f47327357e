//! etcd, in which a cluster keeps its configuration and its nodes register.
//!
//! In: logical keys with a scope. Out: values, nested maps, and followed prefixes. Invariants: every
//! call ends by its deadline; the members are asked one after the other, also when one refuses, and the
//! one that does what it is asked is kept; whether etcd can be reached is always known
//! ([`Etcd::health`]) and each change is told once.

mod error;
mod follow;
mod keys;
mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, GetOptions, Identity, TlsOptions, Txn, TxnOp,
    TxnOpResponse,
};
use tokio::sync::watch;
use tokio::time::Instant;

pub use error::EtcdError;
pub use follow::{Followed, Seen};
pub use keys::{Keys, Scope, quote, unquote};
pub use tree::Tree;

use error::{Verdict, verdict};

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(3);
/// How long a call may take, other members and a new log-in included.
const CALL: Duration = Duration::from_secs(6);
/// Pings on connections with something under way, and how long an answer may take. etcd closes
/// connections that ping more often than every 5 s.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// Between two calls that go to all members although one has refused, after all of them had refused the
/// same: each would log in again.
const ROUND_PAUSE: Duration = Duration::from_secs(60);
/// Between two lines in the log that say that etcd refuses.
const DENIAL_PAUSE: Duration = Duration::from_secs(600);
/// How long a refusal counts for more than that nobody answers: where some members refuse and others are
/// away, each is found in its turn.
const DENIAL_LASTS: Duration = Duration::from_secs(60);
/// Puts in one transaction; etcd takes 128 by default.
const TRANSACTION: usize = 100;

/// Whether etcd can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It was not asked yet.
    Untried,
    /// It answers.
    Reachable {
        /// The member that does.
        endpoint: String,
    },
    /// It answers, and lets this node in no more: users, passwords or rights were changed. Other members
    /// may be away.
    Refused {
        /// Since when.
        since: Instant,
        /// Its words, and what to do.
        error: String,
    },
    /// It does not.
    Lost {
        /// Since when.
        since: Instant,
        /// Why, with all causes.
        error: String,
    },
}

/// A handle on the cluster's etcd; clones share everything.
#[derive(Clone)]
pub struct Etcd {
    inner: Arc<Inner>,
}

struct Inner {
    endpoints: Vec<String>,
    options: ConnectOptions,
    keys: Keys,
    scaling_group: RwLock<String>,
    current: Mutex<Current>,
    /// The id of the etcd cluster that answered a follower last; 0 before.
    cluster: AtomicU64,
    health: watch::Sender<Health>,
    /// When etcd let this node in no more last.
    denied: Mutex<Option<Instant>>,
    /// When the log said last that etcd refuses.
    denial_told: Mutex<Option<Instant>>,
    /// When all members had refused a call last, or one a watch with a new log-in, by its step and what the last of them said to do.
    all_refused: Mutex<BTreeMap<(&'static str, &'static str), Instant>>,
}

/// The member that is asked, and the connection to it.
#[derive(Default)]
struct Current {
    member: usize,
    client: Option<Arc<Client>>,
    /// Counts connections, so that a failure of an old one does not close its successor.
    generation: u64,
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd")
            .field("endpoints", &self.inner.endpoints)
            .field("keys", &self.inner.keys)
            .finish_non_exhaustive()
    }
}

impl Etcd {
    /// Prepares a handle. Reads certificate files; the network is not touched.
    ///
    /// # Errors
    /// A certificate or key file cannot be read.
    pub fn new(
        settings: &config::Etcd,
        agent_id: &str,
        scaling_group: &str,
    ) -> Result<Etcd, EtcdError> {
        let scheme = if settings.tls.is_some() {
            "https"
        } else {
            "http"
        };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            // Idle connections may not ping by etcd's rules; the next call finds out.
            .with_keep_alive_while_idle(false)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((user, password)) = &settings.credentials {
            options = options.with_user(user.as_str(), password.reveal());
        }
        if let Some(tls) = &settings.tls {
            options = options.with_tls(tls_options(tls)?);
        }
        Ok(Etcd {
            inner: Arc::new(Inner {
                endpoints: settings
                    .addr
                    .iter()
                    .map(|addr| format!("{scheme}://{addr}"))
                    .collect(),
                options,
                keys: Keys::new(&settings.namespace, agent_id),
                scaling_group: RwLock::new(scaling_group.to_owned()),
                current: Mutex::default(),
                cluster: AtomicU64::new(0),
                health: watch::Sender::new(Health::Untried),
                denied: Mutex::default(),
                denial_told: Mutex::default(),
                all_refused: Mutex::default(),
            }),
        })
    }

    /// Whether etcd can be reached, and each change of that.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.inner.health.subscribe()
    }

    /// The addresses, for people.
    pub fn endpoints(&self) -> String {
        self.inner.endpoints.join(", ")
    }

    /// The address that answers, or all when none does, for people.
    pub fn asked(&self) -> String {
        match &*self.inner.health.borrow() {
            Health::Reachable { endpoint } => endpoint.clone(),
            _ => self.endpoints(),
        }
    }

    /// The scaling group whose keys are read.
    pub fn scaling_group(&self) -> String {
        let group = self.inner.scaling_group.read();
        group.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on reads the keys of another scaling group.
    pub fn set_scaling_group(&self, name: &str) {
        let group = self.inner.scaling_group.write();
        name.clone_into(&mut group.unwrap_or_else(PoisonError::into_inner));
    }

    /// The key as etcd has it.
    pub fn physical(&self, scope: Scope, key: &str) -> String {
        self.inner.keys.physical(scope, &self.scaling_group(), key)
    }

    /// The value of a key: of the node's scope, else the scaling group's, else the global one.
    ///
    /// # Errors
    /// etcd does not answer, or refuses.
    pub async fn get(&self, key: &str) -> Result<Option<String>, EtcdError> {
        let ranges = Scope::BY_PRECEDENCE.map(|scope| (self.physical(scope, key), false));
        let found = self.read(&ranges).await?;
        Ok(found
            .into_iter()
            .find_map(|pairs| pairs.into_iter().next().map(|(_, value)| value)))
    }

    /// What lies below a key. Scopes are merged member by member at the first level: a member of a
    /// narrower scope hides the whole of its namesake in a wider one, as in the original.
    ///
    /// # Errors
    /// etcd does not answer, or refuses.
    pub async fn tree(&self, key: &str) -> Result<Scoped, EtcdError> {
        let [found] = self.trees([key]).await?;
        Ok(found)
    }

    /// Several trees as they are at one moment.
    ///
    /// # Errors
    /// etcd does not answer, or refuses.
    pub async fn trees<const N: usize>(&self, keys: [&str; N]) -> Result<[Scoped; N], EtcdError> {
        let prefixes: Vec<(String, bool)> = keys
            .iter()
            .flat_map(|key| {
                let key = key.trim_end_matches('/');
                Scope::BY_PRECEDENCE.map(|scope| (self.physical(scope, key), true))
            })
            .collect();
        let found = self.read(&prefixes).await?;
        let mut trees = prefixes.iter().zip(&found).map(|((prefix, _), pairs)| {
            let pairs = pairs
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()));
            Tree::below(prefix, pairs)
        });
        Ok(keys.map(|_| Scoped::merge(trees.by_ref().take(Scope::BY_PRECEDENCE.len()))))
    }

    /// Reads keys (`false`) and prefixes (`true`) as they are at one moment.
    async fn read(
        &self,
        ranges: &[(String, bool)],
    ) -> Result<Vec<Vec<(String, String)>>, EtcdError> {
        let operations: Vec<TxnOp> = ranges
            .iter()
            .map(|(key, prefix)| {
                let options = prefix.then(|| GetOptions::new().with_prefix());
                TxnOp::get(key.as_str(), options)
            })
            .collect();
        let answer = self
            .call("read a key", |mut client| {
                let transaction = Txn::new().and_then(operations.clone());
                async move { client.txn(transaction).await }
            })
            .await?;
        let pairs = |(response, (range, _)): (TxnOpResponse, &(String, bool))| match response {
            TxnOpResponse::Get(mut found) => {
                let pairs = found.take_kvs().into_iter();
                let ours = pairs.filter(|pair| is_within(range, pair.key()));
                ours.map(checked_pair).collect()
            }
            _ => Ok(Vec::new()),
        };
        let responses = answer.op_responses().into_iter().zip(ranges).map(pairs);
        let mut found: Vec<_> = responses.collect::<Result<_, _>>()?;
        found.resize_with(ranges.len(), Vec::new);
        Ok(found)
    }

    /// Writes a value in one scope.
    ///
    /// # Errors
    /// etcd does not answer, or refuses.
    pub async fn put(&self, scope: Scope, key: &str, value: &str) -> Result<(), EtcdError> {
        self.put_all(scope, &[(key.to_owned(), value.to_owned())])
            .await
    }

    /// Writes several values in one scope, together as far as etcd takes as many at once.
    ///
    /// # Errors
    /// etcd does not answer, or refuses.
    pub async fn put_all(&self, scope: Scope, pairs: &[(String, String)]) -> Result<(), EtcdError> {
        for chunk in pairs.chunks(TRANSACTION) {
            let operations: Vec<TxnOp> = chunk
                .iter()
                .map(|(key, value)| TxnOp::put(self.physical(scope, key), value.as_str(), None))
                .collect();
            self.call("write a key", |mut client| {
                let transaction = Txn::new().and_then(operations.clone());
                async move { client.txn(transaction).await }
            })
            .await?;
        }
        Ok(())
    }

    /// Removes a key of one scope.
    ///
    /// # Errors
    /// etcd does not answer, or refuses.
    pub async fn delete(&self, scope: Scope, key: &str) -> Result<(), EtcdError> {
        let key = self.physical(scope, key);
        self.call("remove a key", |mut client| {
            let key = key.clone();
            async move { client.delete(key, None).await }
        })
        .await
        .map(drop)
    }

    /// Follows the keys that begin with a physical key, until the handle is dropped.
    pub fn follow(&self, prefix: String) -> Followed {
        Followed::start(self.clone(), prefix)
    }

    /// Carries out a call, on other members and after another log-in where that may help. All calls
    /// made here may be repeated: they read, or write the same again. A refusal is final when every
    /// member refuses: one alone may belong to another cluster, or be behind.
    async fn call<T, F: Future<Output = Result<T, etcd_client::Error>>>(
        &self,
        step: &'static str,
        work: impl Fn(Client) -> F,
    ) -> Result<T, EtcdError> {
        let deadline = Instant::now() + CALL;
        let members = self.inner.endpoints.len().max(1);
        let mut tries = members + 1;
        // A member that hangs leaves time for the others.
        let share = CALL / u32::try_from(members.min(3)).unwrap_or(1);
        let (mut last, mut refusal) = (None, None);
        let mut refused_by = BTreeSet::new();
        // The member that was logged in to again.
        let mut renewed = None;
        while tries > 0 {
            let now = Instant::now();
            if now >= deadline {
                break;
            }
            tries -= 1;
            let (member, generation, client) = self.current();
            let attempt = async {
                let client = match client {
                    Some(client) => client,
                    None => self.connect(member, generation).await?,
                };
                // A client is some kilobytes, and so is what is made of it.
                Box::pin(work(Client::clone(&client))).await
            };
            let source = match tokio::time::timeout(share.min(deadline - now), attempt).await {
                Ok(Ok(answer)) => {
                    self.reached(member);
                    return Ok(answer);
                }
                Ok(Err(source)) => source,
                Err(_) => {
                    self.leave(generation, true);
                    continue;
                }
            };
            let remedy = match verdict(&source) {
                Verdict::Elsewhere => {
                    self.leave(generation, true);
                    last = Some(source);
                    continue;
                }
                Verdict::LogIn if renewed != Some(member) => {
                    self.leave(generation, false);
                    renewed = Some(member);
                    last = Some(source);
                    tries += 1;
                    continue;
                }
                Verdict::LogIn => "check etcd.user and etcd.password",
                Verdict::Denied(remedy) | Verdict::Final(remedy) => remedy,
            };
            refused_by.insert(member);
            let endpoint = self.endpoint(member);
            let refused = refused(endpoint, step, remedy, source);
            let first = refusal.take().unwrap_or(refused);
            if self.is_refused_by_all((step, remedy), refused_by.len()) {
                if first.is_denial() {
                    self.lost(&first);
                }
                return Err(first);
            }
            refusal = Some(first);
            self.leave(generation, true);
        }
        let endpoints = self.endpoints();
        let refused = refusal.as_ref().map(|err| crate::causes::chain(err));
        let failed = last.as_ref().map(error::reason);
        let reasons: Vec<String> = refused.into_iter().chain(failed).collect();
        let error = if reasons.is_empty() {
            EtcdError::Deadline {
                endpoints,
                seconds: CALL.as_secs(),
            }
        } else {
            EtcdError::Unreachable {
                endpoints,
                reason: reasons.join("; "),
            }
        };
        // Of members that refuse and others that are away, the former are what there is to mend.
        self.lost(
            refusal
                .as_ref()
                .filter(|err| err.is_denial())
                .unwrap_or(&error),
        );
        Err(error)
    }

    /// Whether as many refusals of a call are those of all members; or would be, as those of such a step with
    /// this remedy were lately. Another call, or other words, may be one member's own.
    fn is_refused_by_all(&self, refusal: (&'static str, &'static str), refusals: usize) -> bool {
        let mut last = lock(&self.inner.all_refused);
        if refusals >= self.inner.endpoints.len() {
            last.insert(refusal, Instant::now());
            return true;
        }
        last.get(&refusal)
            .is_some_and(|last| last.elapsed() < ROUND_PAUSE)
    }

    /// Gives up the connection on which a watch was denied, and the member: where only the log-in is old, etcd
    /// says the same, and a new one helps. But when a member has denied it `again`, with a new log-in, only once in
    /// a while. Answers whether it was given up.
    fn leave_denied(
        &self,
        generation: u64,
        refusal: (&'static str, &'static str),
        again: bool,
    ) -> bool {
        let mut last = lock(&self.inner.all_refused);
        if last
            .get(&refusal)
            .is_some_and(|last| last.elapsed() < ROUND_PAUSE)
        {
            return false;
        }
        if again {
            last.insert(refusal, Instant::now());
            return false;
        }
        drop(last);
        self.leave(generation, true);
        true
    }

    fn endpoint(&self, member: usize) -> String {
        self.inner
            .endpoints
            .get(member)
            .cloned()
            .unwrap_or_default()
    }

    fn current(&self) -> (usize, u64, Option<Arc<Client>>) {
        let current = self.lock();
        (current.member, current.generation, current.client.clone())
    }

    /// A connection to the member in use, for a stream.
    async fn client(&self) -> Result<(Arc<Client>, u64), etcd_client::Error> {
        let (member, generation, client) = self.current();
        match client {
            Some(client) => Ok((client, generation)),
            None => Ok((self.connect(member, generation).await?, generation)),
        }
    }

    async fn connect(
        &self,
        member: usize,
        generation: u64,
    ) -> Result<Arc<Client>, etcd_client::Error> {
        let endpoint = self.endpoint(member);
        let connecting = Client::connect([endpoint], Some(self.inner.options.clone()));
        let client = Arc::new(Box::pin(connecting).await?);
        let mut current = self.lock();
        if current.generation == generation && current.client.is_none() {
            current.client = Some(client.clone());
        }
        Ok(client)
    }

    /// Gives a connection up, and with it the member when that is at fault.
    fn leave(&self, generation: u64, next_member: bool) {
        let mut current = self.lock();
        if current.generation != generation {
            return;
        }
        current.generation += 1;
        current.client = None;
        if next_member {
            current.member = (current.member + 1) % self.inner.endpoints.len().max(1);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        lock(&self.inner.current)
    }

    /// Takes note of the cluster that a follower was answered by; a change is told once.
    fn answered_by(&self, cluster: u64) {
        let known = self.inner.cluster.swap(cluster, Ordering::Relaxed);
        if known != 0 && known != cluster {
            tracing::warn!(
                known = format!("{known:x}"),
                now = format!("{cluster:x}"),
                "etcd is another cluster now (made anew?); all that is followed there is read again"
            );
        }
    }

    fn reached(&self, member: usize) {
        let endpoint = self.endpoint(member);
        self.inner.health.send_if_modified(|health| {
            let now = Health::Reachable { endpoint };
            let changed = *health != now;
            match health {
                Health::Lost { since, .. } => {
                    tracing::info!(away_s = since.elapsed().as_secs(), "etcd answers again");
                }
                Health::Refused { since, .. } => {
                    tracing::info!(
                        refused_s = since.elapsed().as_secs(),
                        "etcd does again what it is asked"
                    );
                }
                Health::Untried | Health::Reachable { .. } => {}
            }
            *health = now;
            changed
        });
    }

    /// Takes note of a failure: no answer, or one that shuts this node out.
    fn lost(&self, error: &EtcdError) {
        let is_denial = error.is_denial();
        let error = crate::causes::chain(error);
        if is_denial {
            return self.denied(error);
        }
        self.inner.health.send_if_modified(|health| {
            if let Health::Lost { error: known, .. } = health {
                *known = error;
                return false;
            }
            if matches!(health, Health::Refused { .. }) && self.was_denied_lately() {
                return false;
            }
            if matches!(health, Health::Reachable { .. } | Health::Refused { .. }) {
                tracing::warn!(
                    err = error,
                    "etcd does not answer; the node goes on with what it knows"
                );
            }
            *health = Health::Lost {
                since: Instant::now(),
                error,
            };
            true
        });
    }

    fn was_denied_lately(&self) -> bool {
        lock(&self.inner.denied).is_some_and(|denied| denied.elapsed() < DENIAL_LASTS)
    }

    fn denied(&self, error: String) {
        *lock(&self.inner.denied) = Some(Instant::now());
        self.inner.health.send_if_modified(|health| {
            if let Health::Refused { error: known, .. } = health {
                *known = error;
                return false;
            }
            // At the start whoever asked says it. A user that may do some things and not others
            // would be told of again and again.
            if !matches!(health, Health::Untried) && self.tells_denial() {
                tracing::warn!(
                    err = error,
                    "etcd refuses what this node asks for; it goes on with what it knows"
                );
            }
            *health = Health::Refused {
                since: Instant::now(),
                error,
            };
            true
        });
    }

    /// Whether the log has not said for a while that etcd refuses.
    fn tells_denial(&self) -> bool {
        let mut told = lock(&self.inner.denial_told);
        let due = told.is_none_or(|told| told.elapsed() >= DENIAL_PAUSE);
        if due {
            *told = Some(Instant::now());
        }
        due
    }
}

/// A tree merged from the scopes, and where each of its members came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scoped {
    /// The merged tree.
    pub tree: Tree,
    /// The scope of each member of the first level.
    pub scopes: BTreeMap<String, Scope>,
}

impl Scoped {
    fn merge(by_precedence: impl Iterator<Item = Tree>) -> Scoped {
        let mut merged = Scoped::default();
        for (scope, tree) in Scope::BY_PRECEDENCE.into_iter().zip(by_precedence) {
            merged.tree.value = merged.tree.value.or(tree.value);
            for (name, member) in tree.members {
                merged.tree.members.entry(name.clone()).or_insert(member);
                merged.scopes.entry(name).or_insert(scope);
            }
        }
        merged
    }
}

fn lock<T>(held: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refused(
    endpoint: String,
    step: &'static str,
    remedy: &'static str,
    source: etcd_client::Error,
) -> EtcdError {
    EtcdError::Refused {
        endpoint,
        step,
        remedy,
        source,
    }
}

/// Whether a key is the one asked for or lies below it, and does not merely begin like it.
fn is_within(range: &str, key: &[u8]) -> bool {
    key.strip_prefix(range.as_bytes())
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

/// A key and its value. What is not text is nobody's setting: a password or a path with replacement
/// characters in it would be taken for one.
fn checked_pair(pair: etcd_client::KeyValue) -> Result<(String, String), EtcdError> {
    let (key, value) = pair.into_key_value();
    let key = String::from_utf8_lossy(&key).into_owned();
    match String::from_utf8(value) {
        Ok(value) => Ok((key, value)),
        Err(_) => Err(EtcdError::NotText { key }),
    }
}

/// The same for what is followed, which is only compared with texts of ours.
fn text_pair(pair: etcd_client::KeyValue) -> (String, String) {
    let (key, value) = pair.into_key_value();
    (
        String::from_utf8_lossy(&key).into_owned(),
        String::from_utf8_lossy(&value).into_owned(),
    )
}

fn tls_options(settings: &config::EtcdTls) -> Result<TlsOptions, EtcdError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|source| EtcdError::Certificate {
            path: path.to_owned(),
            source,
        })
    };
    let mut tls = TlsOptions::new();
    tls = match &settings.ca_file {
        Some(file) => tls.ca_certificate(Certificate::from_pem(read(file)?)),
        None => tls.with_native_roots(),
    };
    if let Some((certificate, key)) = &settings.identity {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    if let Some(name) = &settings.server_name {
        tls = tls.domain_name(name);
    }
    Ok(tls)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn two_members() -> Etcd {
        let settings = config::Etcd {
            namespace: "local".to_owned(),
            addr: ["etcd-1", "etcd-2"]
                .map(|host| config::HostPort::new(host, 2379))
                .to_vec(),
            credentials: None,
            tls: None,
        };
        Etcd::new(&settings, "i-node", "gpu").unwrap()
    }

    #[test]
    fn a_member_that_is_away_does_not_hide_that_another_refuses() {
        let etcd = two_members();
        let source = etcd_client::Error::WatchError("permission denied".to_owned());
        let denial = refused(etcd.endpoint(0), "watch a prefix", "set rights", source);
        let away = EtcdError::Deadline {
            endpoints: etcd.endpoint(1),
            seconds: 5,
        };
        let mut health = etcd.health();
        for error in [&away, &denial, &away, &denial] {
            etcd.lost(error);
        }
        let state = health.borrow_and_update().clone();
        assert!(matches!(state, Health::Refused { .. }), "{state:?}");
        etcd.lost(&away);
        assert!(!health.has_changed().unwrap());
        // Nobody refuses any more: the lot is away.
        *lock(&etcd.inner.denied) = None;
        etcd.lost(&away);
        let state = health.borrow_and_update().clone();
        assert!(matches!(state, Health::Lost { .. }), "{state:?}");
    }

    #[test]
    fn what_all_members_refused_says_nothing_of_other_refusals() {
        let etcd = two_members();
        let (rights, user) = ("give it rights", "set etcd.user");
        let read = "read a key";
        assert!(!etcd.is_refused_by_all((read, rights), 1));
        assert!(etcd.is_refused_by_all((read, rights), 2));
        assert!(etcd.is_refused_by_all((read, rights), 1));
        assert!(!etcd.is_refused_by_all((read, user), 1));
        assert!(!etcd.is_refused_by_all(("write a key", rights), 1));
        // Another remembered one takes nothing away.
        assert!(etcd.is_refused_by_all((read, user), 2));
        assert!(etcd.is_refused_by_all((read, rights), 1));
    }

    #[test]
    fn a_member_of_a_narrower_scope_hides_all_of_its_namesake() {
        let tree = |pairs: &[(&str, &str)]| Tree::below("/p", pairs.iter().copied());
        let merged = Scoped::merge(
            [
                tree(&[]),
                tree(&[("/p/api/pull-timeout", "1")]),
                tree(&[("/p/api/push-timeout", "2"), ("/p/logs/x", "3")]),
            ]
            .into_iter(),
        );
        assert_eq!(merged.tree.text(&["api", "pull-timeout"]), Some("1"));
        assert_eq!(merged.tree.text(&["api", "push-timeout"]), None);
        assert_eq!(merged.tree.text(&["logs", "x"]), Some("3"));
        assert_eq!(merged.scopes["api"], Scope::ScalingGroup);
        assert_eq!(merged.scopes["logs"], Scope::Global);
    }
}
