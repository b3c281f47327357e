//! The base distribution of an image, which decides what is mounted into its kernels.
//!
//! In: an image and its labels, the file names of the installed runner. Out: a distro name such as
//! `ubuntu22.04`, and the packaged file that fits it. A label
//! decides; else what was found for the same image id before; else a throw-away container that runs
//! `ldd --version`. Invariant: that container is removed however the question ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::journal::now_unix;
use crate::docker::{ContainerCreateBody, Docker, DockerError, HostConfig, LogOptions};

/// Label of an image that names its distro.
pub const BASE_DISTRO_LABEL: &str = "ai.backend.base-distro";

/// Label of the throw-away containers; its value is the agent they belong to.
pub const PROBE_LABEL: &str = "ai.backend.distro-probe";

/// `ldd --version` takes milliseconds; an image with an odd `ldd` must not hold a creation.
const PROBE_DEADLINE: Duration = Duration::from_secs(30);

/// How often, and how many times, a container that was given up while the engine made it is looked for.
const GIVEN_UP: (Duration, u32) = (Duration::from_secs(1), 60);

/// After this long a probe is left over, whichever agent made it: many times its deadline.
const ABANDONED_AFTER: Duration = Duration::from_secs(3600);

/// Probes at a time on a node.
const PROBES: usize = 4;

/// glibc releases and the distro whose packaged files are used for them, ascending.
const GLIBC: [((u32, u32), &str); 8] = [
    ((2, 17), "centos7.6"),
    ((2, 27), "ubuntu18.04"),
    ((2, 28), "centos8.0"),
    ((2, 31), "ubuntu20.04"),
    ((2, 34), "centos9.0"),
    ((2, 35), "ubuntu22.04"),
    ((2, 39), "ubuntu24.04"),
    // Everything newer is served by the last entry.
    ((u32::MAX, 0), "ubuntu24.04"),
];

/// The name used for every musl image.
const MUSL: &str = "alpine3.8";

/// Why no distro could be told.
#[derive(Debug, thiserror::Error)]
pub enum DistroError {
    /// The throw-away container failed.
    #[error("find the base distro of image {image}")]
    Probe {
        /// Image reference.
        image: String,
        /// The engine's refusal.
        #[source]
        source: DockerError,
    },
    /// The container did not end in time.
    #[error("find the base distro of image {image}: `ldd --version` did not end in {} s; label the image with {BASE_DISTRO_LABEL}", after.as_secs_f32())]
    Timeout {
        /// Image reference.
        image: String,
        /// The deadline that passed.
        after: Duration,
    },
    /// What the container printed names no C library.
    #[error(
        "Could not determine the C library variant of image {image}; label it with {BASE_DISTRO_LABEL}, e.g. ubuntu22.04 (it printed {printed:?})"
    )]
    Unknown {
        /// Image reference.
        image: String,
        /// First line of the output, cut.
        printed: String,
    },
}

/// Answers for the images of one engine; clones share what was found.
#[derive(Debug, Clone)]
pub struct Distros {
    docker: Docker,
    agent_id: Arc<str>,
    found: Arc<Mutex<HashMap<String, String>>>,
    probes: Arc<Semaphore>,
    deadline: Duration,
}

impl Distros {
    /// Starts with what earlier lives found, image id to distro. `agent_id` is the owner of the
    /// throw-away containers.
    pub fn new(docker: Docker, agent_id: &str, known: HashMap<String, String>) -> Self {
        Self {
            docker,
            agent_id: agent_id.into(),
            found: Arc::new(Mutex::new(known)),
            probes: Arc::new(Semaphore::new(PROBES)),
            deadline: PROBE_DEADLINE,
        }
    }

    /// Gives a throw-away container another deadline than 30 s.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Everything found so far, image id to distro, to be kept on disk.
    pub fn known(&self) -> HashMap<String, String> {
        self.found().clone()
    }

    fn found(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The distro of a local image; `labels` are those of the request.
    ///
    /// # Errors
    /// [`DistroError`].
    pub async fn resolve(
        &self,
        image: &str,
        labels: &HashMap<String, String>,
    ) -> Result<String, DistroError> {
        if let Some(label) = labels
            .get(BASE_DISTRO_LABEL)
            .map(|label| label.trim())
            .filter(|label| !label.is_empty())
        {
            return Ok(label.to_owned());
        }
        let failed = |source| DistroError::Probe {
            image: image.to_owned(),
            source,
        };
        let id = self.docker.inspect_image(image).await.map_err(failed)?.id;
        if let Some(known) = self.found().get(&id) {
            return Ok(known.clone());
        }
        let _place = self.probes.acquire().await.ok();
        // Whoever was in front may have asked the same.
        if let Some(known) = self.found().get(&id) {
            return Ok(known.clone());
        }
        let printed = self.probe(image, &id).await?;
        let distro = from_ldd(&printed).ok_or_else(|| DistroError::Unknown {
            image: image.to_owned(),
            printed: printed
                .lines()
                .next()
                .unwrap_or_default()
                .chars()
                .take(120)
                .collect(),
        })?;
        self.found().insert(id, distro.to_owned());
        Ok(distro.to_owned())
    }

    /// Runs `ldd --version` in a throw-away container and returns what it printed.
    async fn probe(&self, image: &str, id: &str) -> Result<String, DistroError> {
        let failed = |source| DistroError::Probe {
            image: image.to_owned(),
            source,
        };
        let body = ContainerCreateBody {
            // By id: the name may move while we look.
            image: Some(id.to_owned()),
            entrypoint: Some(vec![String::new()]),
            cmd: Some(vec!["ldd".into(), "--version".into()]),
            tty: Some(true),
            network_disabled: Some(true),
            labels: Some(HashMap::from([(
                PROBE_LABEL.to_owned(),
                self.agent_id.to_string(),
            )])),
            host_config: Some(HostConfig {
                init: Some(true),
                network_mode: Some("none".into()),
                memory: Some(256 << 20),
                pids_limit: Some(64),
                cap_drop: Some(vec!["ALL".into()]),
                ..Default::default()
            }),
            ..Default::default()
        };
        let name = format!("bai-distro-{}", uuid::Uuid::new_v4().simple());
        // From here on the container may exist, whatever the engine answers or whoever gives up.
        let removal = Removal {
            docker: self.docker.clone(),
            name: name.clone(),
        };
        let ran = tokio::time::timeout(self.deadline, async {
            self.docker.create(&name, &body).await?;
            match self.docker.start(&name).await {
                Ok(()) => {}
                // No `ldd` in the image: the engine refuses to start it.
                Err(DockerError::Engine { status: 400, .. } | DockerError::NotFound { .. }) => {
                    return Ok(String::new());
                }
                Err(err) => return Err(err),
            }
            self.docker.wait(&name, self.deadline).await?;
            let options = LogOptions {
                keep: 16 << 10,
                ..LogOptions::default()
            };
            Ok(self.docker.logs(&name, options).await?.text)
        })
        .await;
        // In the background: its answer waits in line with the removals of kernels.
        drop(removal);
        match ran {
            Ok(Err(DockerError::Timeout { .. })) | Err(_) => Err(DistroError::Timeout {
                image: image.to_owned(),
                after: self.deadline,
            }),
            Ok(printed) => printed.map_err(failed),
        }
    }

    /// Removes throw-away containers that an earlier life of this agent left behind, and those that
    /// are too old to be at work; returns how many. Others of the same engine may be at work.
    ///
    /// # Errors
    /// The engine's refusal to list.
    pub async fn remove_leftovers(&self) -> Result<usize, DockerError> {
        let found = self.docker.list_labelled(true, PROBE_LABEL).await?;
        let now = now_unix();
        let left = found.iter().filter(|probe| {
            let owner = probe.labels.as_ref().and_then(|it| it.get(PROBE_LABEL));
            is_left_over(owner, probe.created, &self.agent_id, now)
        });
        let mut removed = 0;
        for id in left.filter_map(|container| container.id.as_deref()) {
            match self.docker.remove(id, true).await {
                Ok(()) => removed += 1,
                Err(err) => {
                    tracing::debug!(container_id = id, err = %err, "a probe was not removed");
                }
            }
        }
        Ok(removed)
    }
}

/// Whether nobody waits for a probe of this owner any more. Times in seconds since 1970; releases that
/// did not name the owner gave a number, whose probes go by their age.
fn is_left_over(owner: Option<&String>, created: Option<i64>, agent_id: &str, now: f64) -> bool {
    #[allow(clippy::cast_precision_loss, reason = "exact for all dates")]
    let age = created.map(|created| now - created as f64);
    owner.is_some_and(|owner| owner == agent_id)
        || age.is_some_and(|age| age > ABANDONED_AFTER.as_secs_f64())
}

/// Removes the container, also when the future that owns it is dropped.
#[derive(Debug)]
struct Removal {
    docker: Docker,
    name: String,
}

impl Drop for Removal {
    fn drop(&mut self) {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (docker, name) = (self.docker.clone(), std::mem::take(&mut self.name));
            runtime.spawn(async move {
                // The engine may still be making it.
                for _ in 0..GIVEN_UP.1 {
                    if remove(&docker, &name).await {
                        return;
                    }
                    tokio::time::sleep(GIVEN_UP.0).await;
                }
            });
        }
    }
}

/// Whether it was there.
async fn remove(docker: &Docker, name: &str) -> bool {
    match docker.remove(name, true).await {
        Ok(()) | Err(DockerError::AlreadyInProgress { .. }) => {}
        Err(DockerError::NotFound { .. }) => return false,
        Err(err) => tracing::warn!(container = name, err = %err, "a probe could not be removed"),
    }
    true
}

/// The distro told by the output of `ldd --version`.
fn from_ldd(printed: &str) -> Option<&'static str> {
    let line = printed
        .lines()
        .map(str::trim)
        .find(|line| !line.is_empty())?;
    if line.starts_with("musl libc") {
        return Some(MUSL);
    }
    let version = line
        .strip_prefix("ldd ")?
        .rsplit_once(')')
        .filter(|(before, _)| before.starts_with('('))?
        .1
        .trim();
    let (major, minor) = version.split_once('.')?;
    let minor: String = minor.chars().take_while(char::is_ascii_digit).collect();
    Some(from_glibc((major.parse().ok()?, minor.parse().ok()?)))
}

/// The entry at or just below a glibc release. Below the first one the first is used: its files
/// have the best chance. (The original wraps around to the newest.)
fn from_glibc(version: (u32, u32)) -> &'static str {
    GLIBC
        .iter()
        .rev()
        .find(|(release, _)| *release <= version)
        .map_or(GLIBC[0].1, |(_, distro)| distro)
}

/// The entry of `available` (keys like `ubuntu22.04`, `static-gnu`) that fits `distro`.
/// `None` is the original's `UnsupportedBaseDistroError`.
pub fn match_distro<'m, T>(
    available: impl IntoIterator<Item = (&'m str, T)>,
    distro: &str,
) -> Option<(&'m str, T)> {
    let (family, wanted) = split(distro);
    let fixed = if family == "alpine" {
        "static-musl"
    } else {
        "static-gnu"
    };
    let mut versions = Vec::new();
    for (key, value) in available {
        if key == fixed {
            return Some((key, value));
        }
        let (other, version) = split(key);
        if other == family && !family.is_empty() {
            versions.push((version, (key, value)));
        }
    }
    versions.sort_by(|a, b| b.0.cmp(&a.0));
    let place = if wanted.is_empty() {
        0
    } else {
        versions
            .iter()
            .position(|(version, _)| *version <= wanted)
            .unwrap_or(versions.len().saturating_sub(1))
    };
    versions.into_iter().nth(place).map(|(_, entry)| entry)
}

/// Name without digits, and the numbers of the version.
fn split(distro: &str) -> (&str, Vec<u32>) {
    let at = distro
        .find(|it: char| it.is_ascii_digit())
        .unwrap_or(distro.len());
    let (family, version) = distro.split_at(at);
    let numbers = version
        .split('.')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap_or(0)
        })
        .collect();
    (family, numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_output_names_the_distro() {
        for (printed, distro) in [
            (
                "ldd (Debian GLIBC 2.36-9+deb12u10) 2.36\r\nCopyright",
                Some("ubuntu22.04"),
            ),
            ("ldd (Ubuntu GLIBC 2.39-0ubuntu8) 2.39", Some("ubuntu24.04")),
            ("ldd (GNU libc) 2.17", Some("centos7.6")),
            ("ldd (GNU libc) 2.29.9000", Some("centos8.0")),
            ("ldd (GNU libc) 2.43", Some("ubuntu24.04")),
            ("ldd (GNU libc) 3.0", Some("ubuntu24.04")),
            ("\r\nmusl libc (x86_64)\r\nVersion 1.2.3", Some("alpine3.8")),
            ("", None),
            ("sh: ldd: not found", None),
            ("ldd 2.36", None),
            ("ldd (x) two", None),
        ] {
            assert_eq!(from_ldd(printed), distro, "{printed}");
        }
    }

    #[test]
    fn probes_of_other_agents_are_left_unless_they_are_old() {
        let left = |owner: Option<&str>, created: Option<i64>| {
            is_left_over(owner.map(str::to_owned).as_ref(), created, "i-own", 1e9)
        };
        let young = Some(999_999_990);
        let old = Some(1_000_000_000 - 3601);
        assert!(left(Some("i-own"), young) && left(Some("i-own"), None));
        for owner in [Some("i-other"), Some("1"), None] {
            assert!(!left(owner, young) && left(owner, old) && !left(owner, None));
        }
    }

    #[test]
    fn glibc_below_the_table_does_not_wrap_to_the_newest() {
        assert_eq!(from_glibc((2, 12)), "centos7.6");
        assert_eq!(from_glibc((2, 5)), "centos7.6");
        // As a floating point number 2.4 would be above 2.39.
        assert_eq!(from_glibc((2, 4)), "centos7.6");
        assert_eq!(from_glibc((2, 38)), "ubuntu22.04");
    }

    #[test]
    fn a_distro_is_matched_to_the_packaged_file_at_or_below() {
        let hooks = [
            "alpine3.8",
            "centos7.6",
            "centos7.9",
            "centos8.0",
            "ubuntu18.04",
            "ubuntu20.04",
            "ubuntu22.04",
        ];
        let found = |distro| match_distro(hooks.map(|key| (key, ())), distro).map(|it| it.0);
        for (distro, expected) in [
            ("ubuntu24.04", Some("ubuntu22.04")),
            ("ubuntu22.04", Some("ubuntu22.04")),
            ("ubuntu21.10", Some("ubuntu20.04")),
            ("ubuntu16.04", Some("ubuntu18.04")),
            ("ubuntu", Some("ubuntu22.04")),
            ("centos9.0", Some("centos8.0")),
            ("centos7.8", Some("centos7.6")),
            ("centos7.10", Some("centos7.9")),
            ("alpine3.20", Some("alpine3.8")),
            ("debian12", None),
            ("", None),
        ] {
            assert_eq!(found(distro), expected, "{distro}");
        }
        let volumes = [("static-gnu", 1), ("static-musl", 2), ("ubuntu20.04", 3)];
        assert_eq!(
            match_distro(volumes, "ubuntu24.04"),
            Some(("static-gnu", 1))
        );
        assert_eq!(match_distro(volumes, "alpine3.8"), Some(("static-musl", 2)));
        assert_eq!(match_distro([("static-gnu", 1)], "alpine3.8"), None);
    }
}
