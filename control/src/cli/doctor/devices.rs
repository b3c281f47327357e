//! What the host lacks for accelerators.

use std::path::Path;
use std::time::Duration;

use config::{Config, CudaInjection};

use super::{Finding, Level};
use crate::accelerator::engine::EngineDevices;
use crate::docker::{Docker, DockerOptions};

/// Whether running containers keep their NVIDIA devices when systemd reads its units anew; nothing where
/// there is no such driver, or the engine does not say how it makes its control groups (it is told of
/// elsewhere then).
pub(super) async fn nvidia_links(config: &Config) -> Option<Finding> {
    let look = || {
        // The file is not read: a driver that hangs would not answer.
        let driver = Path::new("/proc/driver/nvidia/version").exists();
        driver.then(|| has_links(Path::new("/dev/char")))
    };
    let links = tokio::task::spawn_blocking(look).await.ok()??;
    let options = DockerOptions {
        host: config.node.engine.host.clone(),
        ..DockerOptions::default()
    };
    let asked = async {
        let docker = Docker::connect(&options).await.ok()?;
        Some((docker.info().await.ok()?, docker.is_local()))
    };
    let (info, local) = tokio::time::timeout(Duration::from_secs(10), asked)
        .await
        .ok()??;
    let by_systemd = info.cgroup_driver.map(|driver| driver.to_string());
    let by_systemd = by_systemd.as_deref() == Some("systemd");
    let engine = tokio::task::spawn_blocking(move || EngineDevices::of(&info, local));
    let wanted = config.node.accelerators.cuda_injection;
    let injection = engine.await.ok()?.injection(wanted);
    links_to_devices(by_systemd, injection, links)
}

/// NVIDIA's character devices have the major number 195.
fn has_links(directory: &Path) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name());
    names.any(|name| name.to_string_lossy().starts_with("195:"))
}

/// NVIDIA's hook adds devices to a control group behind systemd's back; systemd sets them up anew when it
/// reads its units, and knows those that it finds in /dev/char.
fn links_to_devices(by_systemd: bool, injection: CudaInjection, links: bool) -> Option<Finding> {
    const CHECK: &str = "NVIDIA device links";
    let by_hook = matches!(
        injection,
        CudaInjection::Auto | CudaInjection::DeviceRequests
    );
    if !(by_systemd && by_hook) {
        return None;
    }
    Some(match links {
        true => Finding::good(CHECK, "in /dev/char"),
        false => Finding::bad(
            CHECK,
            Level::Warning,
            "none in /dev/char, and the engine's control groups are systemd's",
            "any `systemctl daemon-reload` takes the devices away from running containers; run at every boot, after the driver is loaded: nvidia-ctk system create-dev-char-symlinks --create-all",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_needed_where_systemd_makes_the_groups_and_a_hook_adds_devices() {
        let level = |by_systemd, injection, links| {
            links_to_devices(by_systemd, injection, links).map(|it| it.level)
        };
        let requests = CudaInjection::DeviceRequests;
        assert_eq!(level(true, requests, false), Some(Level::Warning));
        assert_eq!(level(true, requests, true), Some(Level::Good));
        assert_eq!(level(false, requests, false), None);
        for other in [CudaInjection::Cdi, CudaInjection::DeviceNodes] {
            assert_eq!(level(true, other, false), None);
        }
        let told = links_to_devices(true, requests, false).map(|it| it.remedy);
        assert!(told.is_some_and(|it| {
            it.contains("nvidia-ctk system create-dev-char-symlinks --create-all")
        }));
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("1:3"), "").unwrap();
        std::fs::write(place.path().join("1195:0"), "").unwrap();
        assert!(!has_links(place.path()) && !has_links(&place.path().join("nowhere")));
        std::fs::write(place.path().join("195:255"), "").unwrap();
        assert!(has_links(place.path()));
    }
}
