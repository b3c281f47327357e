//! The engine as the agent finds it at its start.
//!
//! In: the engine, the configuration. Out: that it answers; what it can do for devices, and who it runs as. Invariant:
//! the first is waited for, which is told; the rest is not, it is asked again in the background.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use config::{Config, CudaInjection};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::AppError;
use crate::accelerator::engine::{EngineDevices, EngineFacts};
use crate::blocking::blocking;
use crate::causes::chain;
use crate::cluster::Starting;
use crate::docker::{Docker, DockerError};

/// Pauses between attempts to reach Docker at start: doubled up to the second.
const DOCKER_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));

/// What the engine can do for devices, and whether it or its containers' users may be others than root. Where it
/// does not say so it is asked again in the background: kernels start all the same.
pub(super) async fn ask_engine(
    docker: &Docker,
    config: &Arc<Config>,
    tasks: &TaskTracker,
    stopping: &CancellationToken,
) -> (EngineFacts, Arc<AtomicBool>) {
    match engine_facts(docker, config).await {
        Ok((devices, own_users)) => (devices.into(), Arc::new(own_users.into())),
        Err(err) => {
            tracing::warn!(
                err = chain(&err),
                "the engine does not say what it can do for devices; it is asked again, and until then containers get CUDA devices by device requests"
            );
            let engine = EngineFacts::default();
            // Else containers might not start.
            let own_users = Arc::new(AtomicBool::new(true));
            let (docker, config) = (docker.clone(), config.clone());
            let (told, stopping) = ((engine.clone(), own_users.clone()), stopping.clone());
            tasks.spawn(async move {
                let again = ask_again(&docker, &config, &told.0, &told.1);
                stopping.run_until_cancelled(again).await;
            });
            (engine, own_users)
        }
    }
}

/// Waits for Docker, saying so, until it answers or the agent is told to stop.
pub(super) async fn reach_docker(
    docker: &Docker,
    starting: &Starting,
    stopping: &CancellationToken,
) -> Result<(), AppError> {
    let began = Instant::now();
    let mut pause = DOCKER_PAUSES.0;
    loop {
        match docker.ping().await {
            Ok(()) => {
                starting.step("starting");
                return Ok(());
            }
            Err(err) => {
                starting.waiting("Docker", &chain(&err));
                tracing::error!(
                    err = chain(&err),
                    waited_s = began.elapsed().as_secs(),
                    retry_s = pause.as_secs(),
                    "Docker does not answer; the node is not ready"
                );
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopping.cancelled() => return Err(AppError::Interrupted),
        }
        pause = (pause * 2).min(DOCKER_PAUSES.1);
    }
}

/// Asks the engine the same until it says so: it was asked when the agent started, and did not.
async fn ask_again(docker: &Docker, config: &Config, engine: &EngineFacts, own_users: &AtomicBool) {
    let mut pause = DOCKER_PAUSES.0;
    loop {
        tokio::time::sleep(pause).await;
        if let Ok((devices, users)) = engine_facts(docker, config).await {
            engine.tell(devices);
            own_users.store(users, Ordering::Relaxed);
            tracing::info!(?devices, "the engine has said what it can do for devices");
            return;
        }
        pause = (pause * 2).min(DOCKER_PAUSES.1);
    }
}

/// What the engine can do for devices, and whether it, or its containers' users, are others than root on its host;
/// as it says.
async fn engine_facts(
    docker: &Docker,
    config: &Config,
) -> Result<(EngineDevices, bool), DockerError> {
    let info = docker.info().await?;
    let mut options = info.security_options.iter().flatten();
    let own_users = options.any(|option| {
        let name = option.split(',').next();
        matches!(name, Some("name=rootless" | "name=userns"))
    });
    let local = docker.is_local();
    let engine = blocking(move || EngineDevices::of(&info, local)).await;
    if config.node.accelerators.cuda_injection == CudaInjection::Cdi && !engine.cdi {
        tracing::warn!(
            "node.accelerators.cuda-injection is \"cdi\", and this engine has no CDI or has it switched off; kernels with CUDA devices will not start"
        );
    }
    Ok((engine, own_users))
}
