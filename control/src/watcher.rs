//! The watcher: a service beside the agent, by which managers start and stop the agent's unit and
//! mount volumes on the node.
//!
//! In: requests of a manager, with a token. Out: calls of systemctl(1), mounts. Invariants: the
//! agent need not run; without a token of its own it listens on the loopback address only; what it
//! does to units and mounts is fixed by the configuration, a request only chooses.

mod routes;
mod systemctl;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex as Lock;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use config::{Config, SecretFileError, read_secret_file};
use sha2::{Digest, Sha256};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::blocking::blocking;
use crate::causes::chain;
use crate::docker::{Docker, DockerError, DockerOptions};
use crate::etcd::{Etcd, EtcdError};
use crate::http;
use crate::kernel::container_request::HELD_FOLDERS_LABEL;
use crate::volumes::{UsedFolder, Volumes};

/// The token of a cluster that sets none.
const INSECURE: &str = "insecure";
/// The name that the original's examples give to the Python agent's unit.
const PYTHON_UNIT: &str = "backendai-agent.service";
/// What the command line of this agent's unit has in it.
const PROGRAM: &str = "bai-agent";
/// Where volumes are mounted in a cluster that does not say.
const PREFIX: &str = "/mnt";
/// Pauses between attempts to reach etcd: doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// How often somebody without the token is told of in the log.
const TOLD: Duration = Duration::from_secs(60);

/// Why the watcher does not run.
#[derive(Debug, Error)]
pub enum WatcherError {
    /// There is no token.
    #[error("a watcher without a cluster needs node.watcher.token-file")]
    NoToken,
    /// The token's file cannot be used.
    #[error("cannot read the token in {path}", path = path.display())]
    TokenFile {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: SecretFileError,
    },
    /// The token is the one everybody knows.
    #[error(
        "the watcher would obey everybody who reaches {0}: its token is \"insecure\". Set config/watcher/token in etcd (and watcher.token of the manager), listen on 127.0.0.1, or allow it with node.watcher.insecure-token"
    )]
    Insecure(String),
    /// It would start and stop the Python agent.
    #[error(
        "watcher.target-service is {PYTHON_UNIT}, which does not start bai-agent: it is the Python agent's unit, and that one removes this agent's kernels. Write target-service = \"bai-agent.service\" in [watcher]"
    )]
    PythonUnit,
    /// etcd cannot be used.
    #[error("etcd cannot be used")]
    Etcd(#[source] EtcdError),
    /// It cannot listen.
    #[error("cannot listen on watcher.service-addr {address}; does another program listen there?")]
    Bind {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[source] std::io::Error),
    /// The engine's address is wrong.
    #[error(transparent)]
    Docker(#[from] DockerError),
}

impl WatcherError {
    /// Whether only a change of the configuration helps.
    pub fn is_of_configuration(&self) -> bool {
        matches!(
            self,
            Self::NoToken
                | Self::TokenFile { .. }
                | Self::Insecure(_)
                | Self::PythonUnit
                | Self::Docker(_)
        )
    }
}

/// A token, compared in the same time whatever is compared with it.
struct Token([u8; 32]);

impl Token {
    fn new(text: &str) -> Token {
        Token(Sha256::digest(text).into())
    }

    /// Hashes have one length, and where two differ says nothing about the texts.
    fn is(&self, given: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(given).into();
        let differing = self.0.iter().zip(given);
        let differing = differing.fold(0, |all, (one, other)| all | (one ^ other));
        std::hint::black_box(differing) == 0
    }
}

/// What of the configuration the routes depend on.
#[derive(Debug)]
struct Settings {
    unit: String,
    soft_reset: bool,
    shutdown: bool,
    timeout: Duration,
}

/// The service.
struct Watcher {
    settings: Settings,
    token: Token,
    volumes: Volumes,
    docker: Docker,
    /// Actions on units are carried out one by one.
    turn: Mutex<()>,
    stopping: CancellationToken,
    told: Lock<Option<Instant>>,
}

impl Watcher {
    /// Somebody came without the token.
    fn turned_away(&self) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.is_none_or(|told| told.elapsed() >= TOLD) {
            *told = Some(Instant::now());
            tracing::warn!(
                "a request came without the right token; it must be config/watcher/token of etcd"
            );
        }
    }

    /// What kernels have mounted, by the engine's word: the agent may be down.
    async fn sources(&self) -> Result<Vec<UsedFolder>, DockerError> {
        const KERNEL: &str = "ai.backend.kernel-id";
        let containers = self.docker.list_labelled(true, KERNEL).await?;
        let sources = containers.into_iter().flat_map(|container| {
            let labels = container.labels.unwrap_or_default();
            let kernel = labels.get(KERNEL).cloned().unwrap_or_default();
            // Of these the engine knows only where they are held.
            let held = labels.get(HELD_FOLDERS_LABEL);
            let held: Vec<String> = held
                .and_then(|paths| serde_json::from_str(paths).ok())
                .unwrap_or_default();
            let mounts = container.mounts.unwrap_or_default().into_iter();
            mounts
                .filter_map(|mount| mount.source)
                .chain(held)
                .map(move |source| (PathBuf::from(source), kernel.clone()))
        });
        Ok(sources.collect())
    }
}

/// Runs the watcher until it is told to stop.
///
/// # Errors
/// It cannot begin.
pub async fn run(config: Arc<Config>) -> Result<(), WatcherError> {
    let stopping = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).map_err(WatcherError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(WatcherError::Signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(WatcherError::Signals)?;
    let signals = stopping.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => tracing::warn!(
                    "SIGHUP was received; the configuration is read at start only, restart the watcher to apply changes"
                ),
            }
        }
        signals.cancel();
    });
    not_the_python_agent(&config).await?;
    let found = tokio::select! {
        found = cluster(&config) => found?,
        () = stopping.cancelled() => return Ok(()),
    };
    let address = config.watcher.service_addr.to_string();
    let listener = listen(&config, &address, &found.token).await?;
    let docker = Docker::new(&DockerOptions {
        host: config.node.engine.host.clone(),
        ..DockerOptions::default()
    })?;
    let own = &config.node.watcher;
    let watcher = Arc::new(Watcher {
        settings: Settings {
            unit: config.watcher.target_service.clone(),
            soft_reset: config.watcher.soft_reset_available,
            shutdown: own.shutdown,
            timeout: own.timeout,
        },
        token: Token::new(&found.token),
        volumes: Volumes::right_below(Path::new(PREFIX), found.etcd, config.node.volumes.clone()),
        docker,
        turn: Mutex::default(),
        stopping: stopping.clone(),
        told: Lock::default(),
    });
    tracing::info!(
        address,
        unit = watcher.settings.unit,
        "the watcher is ready"
    );
    // Not under systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        () = http::accept(listener, routes::router(watcher)) => {}
        () = stopping.cancelled() => {}
    }
    Ok(())
}

/// A file that was the Python agent's names its unit. Whoever has given that name to this agent's unit may
/// go on.
async fn not_the_python_agent(config: &Config) -> Result<(), WatcherError> {
    if config.watcher.target_service != PYTHON_UNIT {
        return Ok(());
    }
    match systemctl::program_of(PYTHON_UNIT, config.node.watcher.timeout).await {
        Ok(program) if program.contains(PROGRAM) => Ok(()),
        Ok(_) => Err(WatcherError::PythonUnit),
        Err(err) => {
            tracing::warn!(
                err = chain(&err),
                unit = PYTHON_UNIT,
                "cannot see whether watcher.target-service starts bai-agent; if it is the Python agent's unit, write bai-agent.service"
            );
            Ok(())
        }
    }
}

/// What the cluster says to watchers.
struct ClusterSettings {
    token: String,
    /// Where it says the rest.
    etcd: Option<Etcd>,
}

async fn cluster(config: &Config) -> Result<ClusterSettings, WatcherError> {
    let file = config.node.watcher.token_file.clone();
    let own = match file {
        None => None,
        Some(path) => {
            let read = path.clone();
            let token = blocking(move || read_secret_file(&read))
                .await
                .map_err(|source| WatcherError::TokenFile { path, source })?;
            Some(token.reveal().to_owned())
        }
    };
    let Some(settings) = config.etcd.clone() else {
        return Ok(ClusterSettings {
            token: own.ok_or(WatcherError::NoToken)?,
            etcd: None,
        });
    };
    let (id, group) = (config.agent.id.clone(), config.agent.scaling_group.clone());
    let etcd = blocking(move || Etcd::new(&settings, &id, &group))
        .await
        .map_err(WatcherError::Etcd)?;
    if let Some(token) = own {
        // Nothing else is read at the start.
        return Ok(ClusterSettings {
            token,
            etcd: Some(etcd),
        });
    }
    let mut pause = PAUSES.0;
    loop {
        match etcd.get("config/watcher/token").await {
            Ok(token) => {
                return Ok(ClusterSettings {
                    token: token
                        .filter(|token| !token.is_empty())
                        .unwrap_or_else(|| INSECURE.to_owned()),
                    etcd: Some(etcd),
                });
            }
            Err(err) => tracing::error!(
                err = chain(&err),
                retry_s = pause.as_secs(),
                "the cluster's settings cannot be had; the watcher is not ready"
            ),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

async fn listen(config: &Config, address: &str, token: &str) -> Result<TcpListener, WatcherError> {
    let failed = |source| WatcherError::Bind {
        address: address.to_owned(),
        source,
    };
    let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address)
        .await
        .map_err(failed)?
        .collect();
    let near = resolved.iter().all(|it| it.ip().is_loopback());
    if token == INSECURE && !near && !config.node.watcher.insecure_token {
        return Err(WatcherError::Insecure(address.to_owned()));
    }
    TcpListener::bind(resolved.as_slice()).await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_itself_is_the_token() {
        let token = Token::new("secret");
        assert!(token.is(b"secret"));
        for other in [b"" as &[u8], b"secre", b"secrets", b"Secret", b"secret\0"] {
            assert!(!token.is(other));
        }
    }
}
