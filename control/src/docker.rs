//! The Docker engine: the only module that talks to it.
//!
//! In: typed calls of the other modules. Out: bollard's plain model structs, a few of our own, and
//! [`DockerError`]. One pooled connection set, the API version negotiated with this engine, a
//! deadline on every call (by kind, see [`Deadlines`]) and a bound on the calls in flight. bollard
//! gives the models; the requests are made by `transport`, which says why.
//!
//! Dropping a future cancels our wait, not the engine's work: a create that was dropped or timed
//! out may still happen, so callers look the object up by name before they try again.

mod archive;
mod commit;
mod error;
mod events;
mod exec;
mod lines;
mod liveness;
mod logs;
mod progress;
mod transport;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Method;
use serde::Deserialize;

pub use bollard::models;
pub use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerSummary, EndpointSettings, HostConfig,
    NetworkInspect, NetworkingConfig, SystemInfo, Volume,
};

pub use self::commit::{CommitRequest, ImageExport};
pub use self::error::{Cause, DockerError};
pub use self::events::{ContainerEvent, EngineEvent, EventStream, NetworkEvent};
pub use self::exec::{ExecOutput, ExecRequest};
pub use self::liveness::Liveness;
pub use self::logs::{ContainerLog, LogOptions};
pub use self::progress::{Progress, RegistryAuth};
pub use self::transport::DEFAULT_HOST;

use self::logs::{Demultiplexer, Tail};
use self::transport::{Call, Class, Transport, image_path, segment};

/// Longest wait per kind of call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deadlines {
    /// ping, inspect, list, version.
    pub query: Duration,
    /// create of a container.
    pub create: Duration,
    /// start of a container.
    pub start: Duration,
    /// kill, unpause, changes of networks.
    pub change: Duration,
    /// What a stop may take beyond its grace period.
    pub stop_margin: Duration,
    /// remove of a container or image (deleting layers and volumes).
    pub remove: Duration,
    /// reading a log.
    pub logs: Duration,
    /// one exec, from create to its exit code.
    pub exec: Duration,
    /// reading an archive.
    pub archive: Duration,
    /// a whole pull; `None` waits for ever (`api.pull-timeout` null).
    pub transfer: Option<Duration>,
    /// a whole push; `None` waits for ever (`api.push-timeout` null).
    pub push: Option<Duration>,
    /// a commit (without `api.commit-timeout` too: it pauses the kernel), and the engine's preparation
    /// of an export.
    pub commit: Duration,
    /// a pull or push whose progress stands still; then the engine is pinged, as one that waits its
    /// turn in the engine is silent too. Also until its first word, with the wait for a place; and a piece
    /// of an export.
    pub transfer_silence: Duration,
    /// an event stream without an event; then the engine is pinged, as one that hangs closes
    /// nothing.
    pub event_silence: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            query: Duration::from_secs(10),
            create: Duration::from_secs(60),
            start: Duration::from_secs(60),
            change: Duration::from_secs(60),
            stop_margin: Duration::from_secs(20),
            remove: Duration::from_secs(90),
            logs: Duration::from_secs(60),
            exec: Duration::from_secs(60),
            archive: Duration::from_secs(120),
            transfer: Some(Duration::from_secs(7200)),
            push: None,
            commit: Duration::from_secs(7200),
            transfer_silence: Duration::from_secs(600),
            event_silence: Duration::from_secs(15),
        }
    }
}

/// How to reach the engine and how much to ask of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DockerOptions {
    /// `unix:///PATH` or `tcp://HOST:PORT`; `None`: `DOCKER_HOST`, else [`DEFAULT_HOST`].
    pub host: Option<String>,
    /// Longest wait per kind of call.
    pub deadlines: Deadlines,
    /// Queries in flight.
    pub query_limit: usize,
    /// Changes in flight: dockerd starts containers little faster with more.
    pub change_limit: usize,
    /// Removals in flight, beside the changes.
    pub removal_limit: usize,
    /// Stops, waits, commands, last logs and event streams in flight.
    pub slow_limit: usize,
    /// What users ask of containers, in flight: logs, archives and lists of files. Beside the others, so
    /// that a crowd of them keeps no kernel from ending.
    pub read_limit: usize,
    /// Pulls, pushes, commits and exports in flight, which may last for hours.
    pub transfer_limit: usize,
}

impl Default for DockerOptions {
    fn default() -> Self {
        Self {
            host: None,
            deadlines: Deadlines::default(),
            query_limit: 32,
            change_limit: 16,
            removal_limit: 8,
            slow_limit: 128,
            read_limit: 64,
            transfer_limit: 128,
        }
    }
}

/// A handle on the engine; clones share the pool and the bounds.
#[derive(Debug, Clone)]
pub struct Docker {
    transport: Arc<Transport>,
    deadlines: Arc<Deadlines>,
}

/// Version of the engine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct EngineVersion {
    /// Release, e.g. `20.10.24`.
    #[serde(rename = "Version", default)]
    pub version: String,
    /// API the engine offers.
    #[serde(rename = "ApiVersion", default)]
    pub api_version: String,
    /// CPU architecture in Go's words, e.g. `amd64`.
    #[serde(rename = "Arch", default)]
    pub arch: String,
    /// Kernel release of the engine's host.
    #[serde(rename = "KernelVersion", default)]
    pub kernel_version: String,
}

/// An image as inspected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// `sha256:` and 64 hex digits: the config digest; where the engine keeps images in containerd's
    /// store, the digest of the image's index or manifest.
    pub id: String,
    /// Go's words: `amd64`, `arm64`.
    pub architecture: String,
    /// Labels of the image's config.
    pub labels: HashMap<String, String>,
    /// Bytes.
    pub size: u64,
    /// `name:tag` of this image.
    pub repo_tags: Vec<String>,
    /// `name@sha256:...` of this image.
    pub repo_digests: Vec<String>,
    /// The image's own command.
    pub cmd: Vec<String>,
    /// What was said of it when it was made; not of the image it was made from.
    pub comment: String,
}

impl ImageRecord {
    /// Whether the id is the digest by which registries know the image: so it is in containerd's store
    /// alone, where it has that of its index or manifest.
    pub fn has_manifest_id(&self) -> bool {
        let digests = self.repo_digests.iter();
        let mut digests = digests.filter_map(|name| Some(name.rsplit_once('@')?.1));
        digests.any(|digest| digest == self.id)
    }
}

/// An image as listed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ListedImage {
    /// As that of an [`ImageRecord`].
    #[serde(rename = "Id")]
    pub id: String,
    /// `name:tag` of this image; null and absent are empty.
    #[serde(rename = "RepoTags", default, deserialize_with = "or_default")]
    pub repo_tags: Vec<String>,
    /// `name@sha256:...` of this image.
    #[serde(rename = "RepoDigests", default, deserialize_with = "or_default")]
    pub repo_digests: Vec<String>,
    /// Labels; `None` when the image has none at all.
    #[serde(rename = "Labels", default)]
    pub labels: Option<HashMap<String, String>>,
    /// Bytes.
    #[serde(rename = "Size", default)]
    pub size: i64,
}

fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[derive(Debug, Deserialize)]
struct Created {
    #[serde(rename = "Id")]
    id: String,
    #[serde(rename = "Warnings", default, deserialize_with = "or_default")]
    warnings: Vec<String>,
}

impl Docker {
    /// Prepares a handle without asking the engine; the first call negotiates.
    ///
    /// # Errors
    /// [`DockerError::BadHost`].
    pub fn new(options: &DockerOptions) -> Result<Self, DockerError> {
        let host = match &options.host {
            Some(host) => host.clone(),
            None => std::env::var("DOCKER_HOST")
                .ok()
                .filter(|host| !host.is_empty())
                .unwrap_or_else(|| DEFAULT_HOST.to_owned()),
        };
        Ok(Self {
            transport: Arc::new(Transport::new(&host, options)?),
            deadlines: Arc::new(options.deadlines.clone()),
        })
    }

    /// Prepares a handle and negotiates the API version.
    ///
    /// # Errors
    /// [`DockerError::BadHost`], or why the engine can't be reached.
    pub async fn connect(options: &DockerOptions) -> Result<Self, DockerError> {
        let docker = Self::new(options)?;
        docker.transport.negotiate("connect").await?;
        Ok(docker)
    }

    /// The engine's address.
    pub fn host(&self) -> &str {
        self.transport.host()
    }

    /// True when the engine shares our network namespace and files, as far as the address tells.
    pub fn is_local(&self) -> bool {
        self.host().starts_with("unix://")
    }

    fn query<'a>(&self, step: impl Into<String>, path: impl Into<String>) -> Call<'a> {
        Call::new(
            step.into(),
            Class::Query,
            self.deadlines.query,
            Method::GET,
            path.into(),
        )
    }

    fn change<'a>(
        &self,
        step: impl Into<String>,
        deadline: Duration,
        path: impl Into<String>,
    ) -> Call<'a> {
        Call::new(
            step.into(),
            Class::Change,
            deadline,
            Method::POST,
            path.into(),
        )
    }

    // ---- engine ----

    /// Asks whether the engine answers.
    ///
    /// # Errors
    /// The engine cannot be reached, refuses, or does not answer by its deadline ([`DockerError`]).
    pub async fn ping(&self) -> Result<(), DockerError> {
        self.transport.unit(self.query("ping", "/_ping")).await
    }

    /// The engine's own description of itself.
    ///
    /// # Errors
    /// The engine cannot be reached, refuses, or does not answer by its deadline ([`DockerError`]).
    pub async fn info(&self) -> Result<SystemInfo, DockerError> {
        let mut call = self.query("engine info", "/info");
        // Engines tell the devices that they know by CDI from this version on.
        call.newest = (1, 50);
        self.transport.json(call).await
    }

    /// The engine's release.
    ///
    /// # Errors
    /// The engine cannot be reached, refuses, or does not answer by its deadline ([`DockerError`]).
    pub async fn version(&self) -> Result<EngineVersion, DockerError> {
        self.transport
            .json(self.query("engine version", "/version"))
            .await
    }

    /// Follows container and network events; see [`EventStream`]. Needs a tokio runtime.
    pub fn events(&self, capacity: usize) -> EventStream {
        events::subscribe(self.clone(), capacity)
    }

    // ---- containers ----

    /// Containers, running ones only unless `all`; with `owner` only those whose label
    /// `ai.backend.owner` is that agent id.
    ///
    /// # Errors
    /// The engine cannot be reached, refuses, or does not answer by its deadline ([`DockerError`]).
    pub async fn list_containers(
        &self,
        all: bool,
        owner: Option<&str>,
    ) -> Result<Vec<ContainerSummary>, DockerError> {
        match owner {
            Some(owner) => {
                self.list_labelled(all, &format!("ai.backend.owner={owner}"))
                    .await
            }
            None => self.transport.json(self.list_call(all)).await,
        }
    }

    /// Containers with a label, given as `key` or `key=value`.
    ///
    /// # Errors
    /// The engine cannot be reached, refuses, or does not answer by its deadline ([`DockerError`]).
    pub async fn list_labelled(
        &self,
        all: bool,
        label: &str,
    ) -> Result<Vec<ContainerSummary>, DockerError> {
        let filters = serde_json::json!({ "label": [label] });
        let call = self.list_call(all).query("filters", filters.to_string());
        self.transport.json(call).await
    }

    fn list_call<'a>(&self, all: bool) -> Call<'a> {
        self.query("list containers", "/containers/json")
            .query("all", all.to_string())
    }

    /// A container, by id or name.
    ///
    /// # Errors
    /// As for [`ping`](Self::ping); there is no such container.
    pub async fn inspect(&self, container: &str) -> Result<ContainerInspectResponse, DockerError> {
        let step = format!("inspect container {container}");
        let name = segment(&step, container)?;
        let path = format!("/containers/{name}/json");
        self.transport.json(self.query(step, path)).await
    }

    /// Creates a container and returns its id. The engine's warnings are logged.
    ///
    /// # Errors
    /// `NotFound` when the image is missing, `Conflict` when the name is taken.
    pub async fn create(
        &self,
        name: &str,
        body: &ContainerCreateBody,
    ) -> Result<String, DockerError> {
        let step = format!("create container {name}");
        let name = segment(&step, name)?;
        let call = self
            .change(step.clone(), self.deadlines.create, "/containers/create")
            .query("name", name)
            .json(body)?;
        let created: Created = self.transport.json(call).await?;
        for warning in &created.warnings {
            tracing::debug!(container_id = %created.id, warning, "Docker warned on create");
        }
        Ok(created.id)
    }

    /// Starts a container; one that runs already is a success.
    ///
    /// # Errors
    /// As for [`ping`](Self::ping); there is no such container.
    pub async fn start(&self, container: &str) -> Result<(), DockerError> {
        let step = format!("start container {container}");
        let path = format!("/containers/{}/start", segment(&step, container)?);
        let call = self.change(step, self.deadlines.start, path);
        self.transport.unit(call).await
    }

    /// Sends the stop signal, waits `grace`, kills. One that is stopped already is a success.
    ///
    /// # Errors
    /// As for [`ping`](Self::ping); there is no such container.
    pub async fn stop(&self, container: &str, grace: Duration) -> Result<(), DockerError> {
        let step = format!("stop container {container}");
        let path = format!("/containers/{}/stop", segment(&step, container)?);
        let deadline = grace + self.deadlines.stop_margin;
        let call = Call::new(step, Class::Slow, deadline, Method::POST, path)
            .query("t", grace.as_secs().to_string());
        self.transport.unit(call).await
    }

    /// Sends a signal, e.g. `SIGKILL`.
    ///
    /// # Errors
    /// `Conflict` when the container does not run.
    pub async fn kill(&self, container: &str, signal: &str) -> Result<(), DockerError> {
        let step = format!("kill container {container}");
        let path = format!("/containers/{}/kill", segment(&step, container)?);
        let call = self
            .change(step, self.deadlines.change, path)
            .query("signal", signal);
        self.transport.unit(call).await
    }

    /// Lets a container's memory lie on these NUMA nodes (`0,1`); what it has stays where it is.
    ///
    /// # Errors
    /// Why the engine refused, as where the host has no such node.
    pub async fn set_memory_nodes(&self, container: &str, nodes: &str) -> Result<(), DockerError> {
        let step = format!("update container {container}");
        let path = format!("/containers/{}/update", segment(&step, container)?);
        let body = serde_json::json!({ "CpusetMems": nodes });
        let call = self.change(step, self.deadlines.change, path).json(&body)?;
        self.transport.unit(call).await
    }

    /// Removes a container with its anonymous volumes.
    ///
    /// # Errors
    /// `NotFound` when it is gone, `AlreadyInProgress` when someone else is removing it.
    pub async fn remove(&self, container: &str, force: bool) -> Result<(), DockerError> {
        let step = format!("remove container {container}");
        let path = format!("/containers/{}", segment(&step, container)?);
        let mut call = self
            .change(step, self.deadlines.remove, path)
            .query("force", force.to_string())
            .query("v", "true");
        call.method = Method::DELETE;
        call.class = Class::Removal;
        self.transport.unit(call).await
    }

    /// Waits until the container does not run and returns its exit code.
    ///
    /// # Errors
    /// As for [`ping`](Self::ping); there is no such container, or it still runs after `deadline`.
    pub async fn wait(&self, container: &str, deadline: Duration) -> Result<i64, DockerError> {
        #[derive(Deserialize)]
        struct Ended {
            #[serde(rename = "StatusCode")]
            status: i64,
        }
        let step = format!("wait for container {container}");
        let path = format!("/containers/{}/wait", segment(&step, container)?);
        let call = Call::new(step, Class::Slow, deadline, Method::POST, path)
            .query("condition", "not-running");
        let ended: Ended = self.transport.json(call).await?;
        Ok(ended.status)
    }

    /// What the container has printed so far (never follows), within `options.limit` or `deadlines.logs`.
    ///
    /// # Errors
    /// `LogsNotReadable` when the log driver keeps nothing on this node.
    pub async fn logs(
        &self,
        container: &str,
        options: LogOptions,
    ) -> Result<ContainerLog, DockerError> {
        let step = format!("read log of container {container}");
        let begun = tokio::time::Instant::now();
        let limit = options.limit.unwrap_or(self.deadlines.logs);
        let class = Class::asked(options.for_user);
        let path = format!("/containers/{}/logs", segment(&step, container)?);
        let opened = Box::pin(transport::within(&step, limit, async {
            let found = self.inspect(container).await?;
            let tty = found.config.and_then(|config| config.tty);
            let call = Call::new(step.clone(), class, limit, Method::GET, path)
                .query("stdout", "true")
                .query("stderr", "true")
                .query("follow", "false");
            Ok((tty.unwrap_or(false), self.transport.stream(&call).await?))
        }));
        let (tty, streaming) = match opened.await {
            // 501 is dockerd's own status; older ones answer 500 with the same words.
            Err(DockerError::Engine { message, .. })
                if message.contains("does not support reading") =>
            {
                return Err(DockerError::LogsNotReadable { step, message });
            }
            other => other?,
        };
        let mut body = streaming.response.into_body();
        let mut tail = Tail::new(options.keep);
        let mut frames = Demultiplexer::default();
        let read = transport::within_since(&step, begun, limit, async {
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|source| DockerError::Broken {
                    step: step.clone(),
                    source: source.into(),
                })?;
                let Ok(chunk) = frame.into_data() else {
                    continue;
                };
                if tty {
                    tail.push(&chunk);
                } else {
                    frames.push(chunk, |_, piece| tail.push(&piece));
                }
            }
            Ok(())
        })
        .await;
        let complete = match read {
            Ok(()) => true,
            Err(DockerError::Timeout { .. }) if options.partial => false,
            Err(err) => return Err(err),
        };
        let (bytes, cut) = tail.finish();
        Ok(ContainerLog {
            text: String::from_utf8_lossy(&bytes).into_owned(),
            cut,
            complete,
        })
    }

    // ---- images ----

    /// An image, by id or reference.
    ///
    /// # Errors
    /// As for [`ping`](Self::ping); there is no such image.
    pub async fn inspect_image(&self, image: &str) -> Result<ImageRecord, DockerError> {
        #[derive(Deserialize)]
        struct Inspected {
            #[serde(flatten)]
            listed: ListedImage,
            #[serde(rename = "Architecture", default)]
            architecture: String,
            #[serde(rename = "Config", default)]
            config: Option<Config>,
            #[serde(rename = "Comment", default, deserialize_with = "or_default")]
            comment: String,
        }
        #[derive(Default, Deserialize)]
        struct Config {
            #[serde(rename = "Labels", default, deserialize_with = "or_default")]
            labels: HashMap<String, String>,
            #[serde(rename = "Cmd", default, deserialize_with = "or_default")]
            cmd: Vec<String>,
        }
        let step = format!("inspect image {image}");
        let path = format!("/images/{}/json", image_path(&step, image)?);
        let found: Inspected = self.transport.json(self.query(step, path)).await?;
        let config = found.config.unwrap_or_default();
        Ok(ImageRecord {
            id: found.listed.id,
            architecture: found.architecture,
            labels: config.labels,
            size: u64::try_from(found.listed.size).unwrap_or(0),
            repo_tags: found.listed.repo_tags,
            repo_digests: found.listed.repo_digests,
            cmd: config.cmd,
            comment: found.comment,
        })
    }

    /// All tagged and untagged top-level images.
    ///
    /// # Errors
    /// The engine cannot be reached, refuses, or does not answer by its deadline ([`DockerError`]).
    pub async fn list_images(&self) -> Result<Vec<ListedImage>, DockerError> {
        self.transport
            .json(
                self.query("list images", "/images/json")
                    .query("all", "false"),
            )
            .await
    }

    /// Images without a name that have a label, given as `key=value`.
    ///
    /// # Errors
    /// The engine cannot be reached, refuses, or does not answer by its deadline ([`DockerError`]).
    pub async fn list_unnamed(&self, label: &str) -> Result<Vec<ListedImage>, DockerError> {
        let filters = serde_json::json!({ "dangling": ["true"], "label": [label] });
        let call = self.query("list images without a name", "/images/json");
        let call = call.query("filters", filters.to_string());
        self.transport.json(call).await
    }

    /// Removes an image (untags it when it has other names).
    ///
    /// # Errors
    /// `NotFound`; `Conflict` when a container uses it and `force` does not help.
    pub async fn remove_image(
        &self,
        image: &str,
        force: bool,
        noprune: bool,
    ) -> Result<(), DockerError> {
        let step = format!("remove image {image}");
        let path = format!("/images/{}", image_path(&step, image)?);
        let mut call = self
            .change(step, self.deadlines.remove, path)
            .query("force", force.to_string())
            .query("noprune", noprune.to_string());
        call.method = Method::DELETE;
        call.class = Class::Removal;
        self.transport.unit(call).await
    }

    // ---- networks ----

    /// Creates a network of a driver with labels and returns its id.
    ///
    /// # Errors
    /// `Conflict` when the name is taken.
    pub async fn create_network(
        &self,
        name: &str,
        driver: &str,
        labels: HashMap<String, String>,
    ) -> Result<String, DockerError> {
        let step = format!("create network {name}");
        let name = segment(&step, name)?;
        let body = serde_json::json!({
            "Name": name,
            "Driver": driver,
            "Labels": labels,
            // Without this, two concurrent creations make two networks of one name.
            "CheckDuplicate": true,
        });
        let call = self
            .change(step.clone(), self.deadlines.change, "/networks/create")
            .json(&body)?;
        let created: Created = self.transport.json(call).await?;
        Ok(created.id)
    }

    /// Removes a network.
    ///
    /// # Errors
    /// As for [`ping`](Self::ping); there is no such network, or it is in use.
    pub async fn remove_network(&self, network: &str) -> Result<(), DockerError> {
        let step = format!("remove network {network}");
        let path = format!("/networks/{}", segment(&step, network)?);
        let mut call = self.change(step, self.deadlines.change, path);
        call.method = Method::DELETE;
        self.transport.unit(call).await
    }

    /// A network with the containers on it.
    ///
    /// # Errors
    /// As for [`ping`](Self::ping); there is no such network.
    pub async fn inspect_network(&self, network: &str) -> Result<NetworkInspect, DockerError> {
        let step = format!("inspect network {network}");
        let path = format!("/networks/{}", segment(&step, network)?);
        self.transport.json(self.query(step, path)).await
    }

    // ---- volumes ----

    /// A volume with its mount point.
    ///
    /// # Errors
    /// As for [`ping`](Self::ping); there is no such volume.
    pub async fn inspect_volume(&self, name: &str) -> Result<Volume, DockerError> {
        let step = format!("inspect volume {name}");
        let path = format!("/volumes/{}", segment(&step, name)?);
        self.transport.json(self.query(step, path)).await
    }
}
