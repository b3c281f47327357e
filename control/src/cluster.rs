//! A node's place in a cluster: what it is told by etcd, and how it registers there.
//!
//! In: the configuration of the file, etcd. Out: the configuration with what the cluster sets, the
//! settings of the bus, and the keys by which managers find this node. Invariants: nothing is started
//! before a manager and complete settings are there (unless told not to look for managers); every wait
//! is in the log, in the service manager's status and in a file that `bai-agent status` reads; an
//! outage of etcd after the start changes nothing for kernels.

mod changes;
pub mod notices;
mod overlay;
mod redis;
mod registration;
mod startup_status;

use std::sync::Arc;
use std::time::Duration;

use config::{Config, LoadOptions, Loaded};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::blocking::blocking;
use crate::causes::chain;
use crate::etcd::{Etcd, EtcdError, Scope, Scoped};
use crate::events::bus::{Bus, BusSettings};

pub use changes::Changes;
pub use redis::{RedisError, bus_settings};
pub use startup_status::{Starting, Waiting, read_waiting};

/// Where managers say that they are up.
const MANAGERS: &str = "nodes/manager";
/// Pauses between attempts while something is waited for: doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// The cluster as a running node knows it.
#[derive(Debug)]
pub struct Cluster {
    /// etcd.
    pub etcd: Etcd,
    /// The event bus.
    pub bus: Bus,
    /// Whether etcd's settings differ from the ones in effect, and which managers are up.
    pub changes: Changes,
    registered: watch::Sender<bool>,
}

impl Cluster {
    /// A node that has joined and is not registered yet.
    pub fn new(etcd: Etcd, bus: Bus, changes: Changes) -> Cluster {
        Cluster {
            etcd,
            bus,
            changes,
            registered: watch::Sender::new(false),
        }
    }

    /// Writes this node's keys, and again when they go. To be called when the RPC is served.
    pub async fn register(&self, config: &Config, stopping: CancellationToken) {
        registration::register(self.etcd.clone(), config, self.registered.clone(), stopping).await;
    }

    /// Whether this node's keys stood in etcd when last looked.
    pub fn is_registered(&self) -> bool {
        *self.registered.borrow()
    }
}

/// What a node learns when it joins.
#[derive(Debug)]
pub struct Joined {
    /// The configuration with what etcd sets.
    pub loaded: Loaded,
    /// Where the bus is.
    pub bus: BusSettings,
    /// etcd.
    pub etcd: Etcd,
    /// What etcd said.
    pub settings: Settings,
}

/// What etcd sets for agents, as it was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `config/redis`.
    pub redis: Scoped,
    /// `config/agent`.
    pub agent: Scoped,
    /// `config/container`.
    pub container: Scoped,
    /// `config/network/subnet`.
    pub subnet: Scoped,
    /// `config/plugins/accelerator`.
    pub accelerator: Scoped,
}

/// Why a node could not join.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// The configuration names no etcd.
    #[error("the configuration has no [etcd] section; write one, or use --standalone")]
    NoEtcd,
    /// etcd answered that it will not, or a certificate cannot be read.
    #[error("etcd cannot be used")]
    Etcd(#[source] EtcdError),
    /// Told to stop while waiting.
    #[error("stopped before the node had joined its cluster")]
    Interrupted,
}

/// Why the settings in etcd cannot be used yet.
#[derive(Debug, Error)]
pub enum Unfit {
    /// There is no etcd to be asked.
    #[error(transparent)]
    Alone(ClusterError),
    /// etcd does not answer, or refuses.
    #[error(transparent)]
    Etcd(EtcdError),
    /// What it says of the bus.
    #[error("config/redis of etcd cannot be used")]
    Redis(#[source] RedisError),
    /// What it sets over the file.
    #[error(transparent)]
    Config(config::Errors),
}

/// Joins the cluster: waits for etcd, for a manager and for complete settings.
///
/// # Errors
/// etcd refuses, or the node is told to stop.
pub async fn join(
    options: Arc<LoadOptions>,
    base: &Config,
    starting: &Starting,
    stopping: &CancellationToken,
) -> Result<Joined, ClusterError> {
    let settings = base.etcd.clone().ok_or(ClusterError::NoEtcd)?;
    let (id, group) = (base.agent.id.clone(), base.agent.scaling_group.clone());
    let etcd = blocking(move || Etcd::new(&settings, &id, &group))
        .await
        .map_err(ClusterError::Etcd)?;
    let wait = Wait { starting, stopping };
    wait.until("etcd", async || {
        let put = etcd.put(Scope::Node, "", registration::STARTING).await;
        put.map_err(Trouble::from)
    })
    .await?;
    if base.agent.skip_manager_detection {
        tracing::info!("managers are not looked for, as agent.skip-manager-detection says");
    } else {
        wait_for_manager(&etcd, &wait).await?;
    }
    let (loaded, bus, settings) = wait
        .until("settings in etcd", async || {
            match read(&etcd, &options, base).await {
                Err(Unfit::Etcd(err)) => Err(err.into()),
                Err(err) => Err(Trouble::Later(chain(&err))),
                Ok(found) => Ok(found),
            }
        })
        .await?;
    starting.step("starting");
    Ok(Joined {
        loaded,
        bus,
        etcd,
        settings,
    })
}

/// Reads what the cluster sets, without registering or waiting; for checks.
///
/// # Errors
/// etcd cannot be asked, or what it says cannot be used.
pub async fn look(options: Arc<LoadOptions>, base: &Config) -> Result<Loaded, Unfit> {
    let settings = base.etcd.as_ref();
    let settings = settings.ok_or(Unfit::Alone(ClusterError::NoEtcd))?;
    let etcd =
        Etcd::new(settings, &base.agent.id, &base.agent.scaling_group).map_err(Unfit::Etcd)?;
    let (loaded, ..) = read(&etcd, &options, base).await?;
    Ok(loaded)
}

async fn wait_for_manager(etcd: &Etcd, wait: &Wait<'_>) -> Result<(), ClusterError> {
    // Any key counts at first, as in the original; later one that says `up`.
    let first = wait
        .until("etcd", async || {
            etcd.tree(MANAGERS).await.map_err(Trouble::from)
        })
        .await?;
    if !first.tree.is_empty() {
        return Ok(());
    }
    let mut followed = etcd.follow(etcd.physical(Scope::Global, MANAGERS));
    let began = Instant::now();
    let tell = || {
        let (key, endpoint) = (etcd.physical(Scope::Global, MANAGERS), etcd.asked());
        let why = format!("none has registered below {key} in etcd at {endpoint}");
        wait.tell("a manager", &why, began)
    };
    let mut told = tell();
    loop {
        if followed.now().entries.values().any(|value| value == "up") {
            tracing::info!(waited_s = began.elapsed().as_secs(), "a manager is up");
            return Ok(());
        }
        tokio::select! {
            _ = followed.changed() => {}
            () = tokio::time::sleep_until(told + PAUSES.1 * 3) => {
                told = tell();
            }
            () = wait.stopping.cancelled() => return Err(ClusterError::Interrupted),
        }
    }
}

/// All settings as they are at one moment, checked.
async fn read(
    etcd: &Etcd,
    options: &Arc<LoadOptions>,
    base: &Config,
) -> Result<(Loaded, BusSettings, Settings), Unfit> {
    let settings = Settings::read(etcd).await.map_err(Unfit::Etcd)?;
    let state = base.agent.var_base_path.clone();
    let ca_file = base.node.redis_ca_file.as_deref();
    let redis = &settings.redis.tree;
    let bus = bus_settings(redis, &base.agent.id, Some(&state), ca_file).map_err(Unfit::Redis)?;
    let (options, overlay) = (options.clone(), overlay::overlay(&settings));
    let loaded = blocking(move || config::load_over(&options, &overlay))
        .await
        .map_err(Unfit::Config)?;
    Ok((loaded, bus, settings))
}

impl Settings {
    /// Reads them as they are at one moment.
    ///
    /// # Errors
    /// etcd does not answer, or refuses.
    pub async fn read(etcd: &Etcd) -> Result<Settings, EtcdError> {
        let [redis, agent, container, subnet, accelerator] = etcd
            .trees([
                "config/redis",
                "config/agent",
                "config/container",
                "config/network/subnet",
                "config/plugins/accelerator",
            ])
            .await?;
        Ok(Settings {
            redis,
            agent,
            container,
            subnet,
            accelerator,
        })
    }
}

/// What an attempt says when it did not succeed.
enum Trouble {
    /// Another attempt may succeed.
    Later(String),
    /// None will.
    Final(ClusterError),
}

impl From<EtcdError> for Trouble {
    fn from(err: EtcdError) -> Trouble {
        if err.is_transient() {
            Trouble::Later(chain(&err))
        } else {
            Trouble::Final(ClusterError::Etcd(err))
        }
    }
}

/// Waiting that everybody can see.
struct Wait<'a> {
    starting: &'a Starting,
    stopping: &'a CancellationToken,
}

impl Wait<'_> {
    /// Tries until something is there.
    async fn until<T>(
        &self,
        what: &'static str,
        attempt: impl AsyncFn() -> Result<T, Trouble>,
    ) -> Result<T, ClusterError> {
        let began = Instant::now();
        let mut pause = PAUSES.0;
        loop {
            let tried = tokio::select! {
                tried = attempt() => tried,
                () = self.stopping.cancelled() => return Err(ClusterError::Interrupted),
            };
            match tried {
                Ok(found) => {
                    if pause > PAUSES.0 {
                        tracing::info!(
                            what,
                            waited_s = began.elapsed().as_secs(),
                            "what was waited for is there"
                        );
                    }
                    return Ok(found);
                }
                Err(Trouble::Final(err)) => return Err(err),
                Err(Trouble::Later(why)) => self.tell(what, &why, began),
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.stopping.cancelled() => return Err(ClusterError::Interrupted),
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    fn tell(&self, what: &'static str, why: &str, began: Instant) -> Instant {
        let waited_s = began.elapsed().as_secs();
        tracing::warn!(what, waited_s, err = why, "the node waits; it is not ready");
        self.starting.waiting(what, why);
        Instant::now()
    }
}
