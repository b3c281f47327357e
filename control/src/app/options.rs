//! What the configuration says, as the parts of the agent take it. Reads key files, and nothing else.

use std::path::PathBuf;
use std::time::Duration;

use config::{Config, CurveFiles};
use shared::Sizes;
use shared::desired::NodeRow;

use super::AppError;
use crate::docker::{Deadlines, DockerOptions};
use crate::rpc::{CurveServer, KeyPair, Limits, PublicKey};

pub(super) fn docker_options(config: &Config) -> DockerOptions {
    let engine = &config.node.engine;
    let unlimited = Deadlines::default();
    DockerOptions {
        host: engine.host.clone(),
        deadlines: Deadlines {
            query: engine.request_timeout,
            create: engine.create_timeout,
            start: engine.start_timeout,
            remove: engine.remove_timeout,
            transfer: config.api.pull_timeout,
            push: config.api.push_timeout,
            commit: config.api.commit_timeout.unwrap_or(unlimited.commit),
            ..unlimited
        },
        ..DockerOptions::default()
    }
}

pub(super) fn sizes(config: &Config) -> Sizes {
    let range = config.container.port_range;
    Sizes {
        ports: u32::from(range.last - range.first) + 1,
        containers: config.node.max_containers,
        ..Sizes::default()
    }
}

pub(super) fn node_row(config: &Config) -> NodeRow {
    let limits = config.node.dataplane;
    let ms = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
    NodeRow {
        sample_interval_ms: ms(limits.stats_interval),
        drain_ms: ms(limits.drain),
        default_max_sessions: limits.max_sessions_per_port,
        total_max_sessions: limits.max_sessions,
        idle_timeout_ms: ms(limits.idle_timeout),
        connect_timeout_ms: ms(limits.connect_timeout),
    }
}

pub(super) fn limits(config: &Config) -> Limits {
    let wanted = config.node.rpc;
    let calls = usize::try_from(wanted.max_in_flight).unwrap_or(usize::MAX);
    Limits {
        message_bytes: usize::try_from(wanted.max_message.0).unwrap_or(usize::MAX),
        calls,
        // A manager has one connection.
        calls_per_connection: calls,
        ..Limits::default()
    }
}

pub(super) fn curve(files: Option<&CurveFiles>) -> Result<Option<CurveServer>, AppError> {
    let Some(files) = files else {
        return Ok(None);
    };
    let failed = |path: &PathBuf| {
        let path = path.clone();
        move |source| AppError::Key { path, source }
    };
    let own = &files.agent_keypair;
    let own_is_private = KeyPair::is_private(own).map_err(failed(own))?;
    if !own_is_private {
        tracing::warn!(
            path = %own.display(),
            "others than root and the agent may read the agent's key pair, so that the commands are not let in by it; chmod 600 it, chown it to root and restart the agent"
        );
    }
    Ok(Some(CurveServer {
        own_is_private,
        pair: KeyPair::from_file(own).map_err(failed(own))?,
        manager: PublicKey::from_file(&files.manager_public_key)
            .map_err(failed(&files.manager_public_key))?,
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_agents_own_key_is_let_in_only_where_its_file_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("agent.key_secret");
        let pair = KeyPair::generate();
        std::fs::write(&file, pair.secret_file_text()).unwrap();
        let files = CurveFiles {
            agent_keypair: file.clone(),
            manager_public_key: file.clone(),
        };
        for (mode, private) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            let curve = curve(Some(&files)).unwrap().unwrap();
            assert_eq!(curve.own_is_private, private, "{mode:o}");
            assert_eq!(curve.pair, pair);
        }
        assert!(curve(None).unwrap().is_none());
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(curve(Some(&files)), Err(AppError::Key { .. })));
    }
}
