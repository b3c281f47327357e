//! What the journal holds of one kernel: everything that Docker and the labels cannot tell.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};
use shared::ids::{ContainerId, KernelId, SessionId};
use uuid::Uuid;

use super::batch;
use super::journal::{Phase, StoredEnding};
use super::mounts::Mount;
use super::request::{ClusterInfo, KernelCreationConfig, SessionType, TextMap};
use super::runner_link::runs::RunIds;
use super::runner_link::{AppRecord, Owed, RunnerAddress};
use super::service_ports::ServicePort;
use super::services::ServiceRecord;
use crate::json_text::JsonText;
use crate::resource::Allocation;

/// Who holds the host ports of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PublishedBy {
    /// The dataplane, by rows.
    Rows,
    /// The engine, by port bindings; rows only observe.
    Engine,
    /// The container itself, on the host's network.
    Host,
}

/// How far the command of a batch session has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BatchStep {
    /// It has not been sent.
    Waiting,
    /// It is being sent: after a restart it may have been.
    Sending,
    /// The runner has it.
    Sent,
    /// The runner had it when the kernel was restarted: the manager is expected to start it again.
    Dropped,
}

/// The job of a batch session as the journal knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BatchRecord {
    /// How far it has come.
    pub step: BatchStep,
    /// The command, until it was sent.
    pub command: Option<String>,
    /// When its time is up, seconds since the host's start: no step of the clock brings that nearer,
    /// and no job outlives the host.
    #[serde(default)]
    pub time_up: Option<f64>,
}

impl BatchRecord {
    /// One whose kernel is being restarted.
    pub fn dropped() -> BatchRecord {
        BatchRecord {
            step: BatchStep::Dropped,
            command: None,
            time_up: None,
        }
    }
}

/// One kernel as the journal knows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The kernel id.
    pub kernel_id: Uuid,
    /// Its session.
    pub session_id: Uuid,
    /// How far it had come.
    pub phase: Phase,
    /// The end that was decided.
    pub ending: Option<StoredEnding>,
    /// When the creation was accepted, seconds since the epoch.
    pub created_at: f64,
    /// What was asked for; `None` for a kernel found without a journal.
    pub request: Option<KernelCreationConfig>,
    /// The environment of its container; `None` for a kernel of an earlier release.
    pub environ: Option<TextMap>,
    /// The cluster it belongs to.
    pub cluster: Option<ClusterInfo>,
    /// Canonical image name.
    pub image: String,
    /// What the session is for.
    pub session_type: SessionType,
    /// Name inside the cluster.
    pub hostname: String,
    /// `kernel.<image>.<id>`.
    pub container_name: String,
    /// The container, once it exists.
    pub container_id: Option<String>,
    /// The slots it was given, amounts as text.
    pub slots: serde_json::Map<String, serde_json::Value>,
    /// The devices it holds.
    pub allocation: Option<Allocation>,
    /// The agent has pinned the memory of its container to a NUMA node. Records of agents before this field do
    /// not tell.
    #[serde(default)]
    pub memory_pinned: Option<bool>,
    /// Its services with their host ports.
    pub services: Vec<ServicePort>,
    /// Host ports that are taken for services of its next container, while it is restarted. Records of
    /// agents before this field have none.
    #[serde(default)]
    pub ports_ahead: Vec<u16>,
    /// Who holds the host ports.
    pub published_by: PublishedBy,
    /// Host ports of the runner's two sockets, when they are not the container's own.
    pub repl_ports: Option<(u16, u16)>,
    /// No service may be started from outside.
    pub block_service_ports: bool,
    /// The network it was put on besides the default one: mode and name.
    pub network: Option<(String, String)>,
    /// The C library of the image, in the runner's words.
    pub distro: Option<String>,
    /// What is mounted.
    pub mounts: Vec<Mount>,
    /// Its models (inference), as the runner is told.
    pub models: Vec<serde_json::Value>,
    /// They are to be started, and the runner's answers have not all been told. Records of agents
    /// before this field have none pending.
    #[serde(default)]
    pub models_pending: bool,
    /// The version of the runner packages it was made with.
    pub runner_version: Option<String>,
    /// What `create_kernels` answered.
    pub result: Option<JsonText>,
    /// A batch job was started and its end has not been announced.
    pub batch_running: bool,
    /// That job. Records of agents before this field have none: their job counts as sent.
    #[serde(default)]
    pub batch_job: Option<BatchRecord>,
    /// Others than the managers want its end: an operator, or who reports abuse.
    #[serde(default)]
    pub condemned: bool,
    /// The engine makes an image of it, and pauses it meanwhile.
    #[serde(default)]
    pub pausing: bool,
    /// Runs that were told to have started and not to have ended.
    #[serde(default)]
    pub runs_owed: u32,
    /// Whose those are. Records of agents before this field name none.
    #[serde(default)]
    pub run_ids: RunIds,
    /// The runner has yet to answer the start of a service.
    #[serde(default)]
    pub service_owed: bool,
}

impl Record {
    /// The kernel id.
    pub fn id(&self) -> KernelId {
        KernelId(self.kernel_id.into_bytes())
    }

    /// Its session.
    pub fn session(&self) -> SessionId {
        SessionId(self.session_id.into_bytes())
    }

    /// Its container.
    pub fn container(&self) -> Option<ContainerId> {
        self.container_id.as_deref()?.parse().ok()
    }

    /// Where its runner listens while the container is at `address`.
    pub fn runner_address(&self, address: IpAddr) -> RunnerAddress {
        match self.repl_ports {
            Some((repl_in, repl_out)) => RunnerAddress {
                ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
                repl_in,
                repl_out,
            },
            None => RunnerAddress::container(address),
        }
    }

    /// All host ports it holds, in the order of its services; then those of its next container.
    pub fn host_ports(&self) -> impl Iterator<Item = u16> + '_ {
        let repl = self.repl_ports.into_iter().flat_map(|(i, o)| [i, o]);
        let services = self.services.iter();
        repl.chain(services.flat_map(|service| service.host_ports.iter().copied()))
            .chain(self.ports_ahead.iter().copied())
    }

    /// What the link to its runner has left.
    pub fn owed(&self) -> Owed {
        Owed {
            runs: self.runs_owed,
            ids: self.run_ids.clone(),
            service: self.service_owed,
        }
    }

    /// Takes over what the link to its runner would leave.
    pub fn set_owed(&mut self, owed: Owed) {
        self.runs_owed = owed.runs;
        self.run_ids = owed.ids;
        self.service_owed = owed.service;
    }

    /// The same as far as the journal knows: a batch job that was sent is a run that is under way.
    pub fn under_way(&self) -> Owed {
        let job = self.batch_job.as_ref();
        let mut owed = self.owed();
        if self.batch_running && job.is_none_or(|job| job.step == BatchStep::Sent) {
            owed.runs = owed.runs.max(1);
            let at_work = || batch::RUN_ID.to_owned();
            owed.ids.current.get_or_insert_with(at_work);
        }
        owed
    }

    /// Keeps what is shown after the end: no secrets, and nothing big.
    pub fn forget_details(&mut self) {
        self.request = None;
        self.environ = None;
        self.cluster = None;
        self.batch_job = None;
        self.allocation = None;
        self.mounts = Vec::new();
        self.models = Vec::new();
        self.result = None;
        self.run_ids = RunIds::default();
    }
}

impl ServiceRecord for ServicePort {
    fn name(&self) -> &str {
        &self.name
    }

    fn describe(&mut self, app: &AppRecord) {
        self.url_template.clone_from(&app.url_template);
        self.allowed_arguments.clone_from(&app.allowed_arguments);
        self.allowed_envs.clone_from(&app.allowed_envs);
    }
}
