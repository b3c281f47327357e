//! What the manager asks for: the typed form of the `create_kernels` and `restart_kernel` arguments.
//!
//! In: the decoded RPC values (any serde source). Out: plain data the rest of `kernel` reads, and
//! that the journal stores again. Invariant: every field the manager may leave out, send as null,
//! or send in two forms (enum or text, text or number) has one form here.

mod text_map;
mod tolerant;

use serde::{Deserialize, Serialize};
use shared::ids::KernelId;
use uuid::Uuid;

pub use text_map::{SecretText, TextMap};
use tolerant::{list, null_default, optional_text, text, truth, whole};

/// One kernel to create (`KernelCreationConfig`).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KernelCreationConfig {
    pub image: ImageConfig,
    pub kernel_id: Uuid,
    pub session_id: Uuid,
    #[serde(default, deserialize_with = "optional_text")]
    pub owner_user_id: Option<String>,
    #[serde(default, deserialize_with = "optional_text")]
    pub owner_project_id: Option<String>,
    #[serde(default, deserialize_with = "optional_text")]
    pub network_id: Option<String>,
    #[serde(default, deserialize_with = "null_default")]
    pub session_type: SessionType,
    #[serde(default, deserialize_with = "null_default")]
    pub cluster_mode: ClusterMode,
    /// `main` (older managers: `master`) or any other role of the cluster.
    #[serde(default = "main_role", deserialize_with = "text")]
    pub cluster_role: String,
    /// Number among the kernels of its role, from 1.
    #[serde(default, deserialize_with = "whole::or_zero")]
    pub cluster_idx: i64,
    /// Number among the kernels of its session, from 0.
    #[serde(default, deserialize_with = "whole::or_zero")]
    pub local_rank: i64,
    #[serde(default, deserialize_with = "optional_text")]
    pub cluster_hostname: Option<String>,
    /// User id in the container; the node's own without it.
    #[serde(default, deserialize_with = "whole::optional")]
    pub uid: Option<u32>,
    /// Group id in the container; the node's own without it.
    #[serde(default, deserialize_with = "whole::optional")]
    pub main_gid: Option<u32>,
    #[serde(default, deserialize_with = "whole::list")]
    pub supplementary_gids: Vec<u32>,
    /// Slot name to decimal text; memory in bytes. The order is the manager's.
    #[serde(default, deserialize_with = "null_default")]
    pub resource_slots: TextMap,
    /// Free JSON; read with [`KernelCreationConfig::shared_memory`].
    #[serde(default, deserialize_with = "null_default")]
    pub resource_opts: serde_json::Map<String, serde_json::Value>,
    #[serde(default, deserialize_with = "null_default")]
    pub environ: TextMap,
    #[serde(default, deserialize_with = "list")]
    pub mounts: Vec<VfolderMount>,
    /// Seconds; the manager's matter.
    #[serde(default, deserialize_with = "whole::optional")]
    pub idle_timeout: Option<i64>,
    #[serde(default, deserialize_with = "optional_text")]
    pub bootstrap_script: Option<String>,
    #[serde(default, deserialize_with = "optional_text")]
    pub startup_command: Option<String>,
    #[serde(default, deserialize_with = "null_default")]
    pub internal_data: InternalData,
    #[serde(default, deserialize_with = "null_default")]
    pub auto_pull: AutoPull,
    #[serde(default, deserialize_with = "whole::list")]
    pub preopen_ports: Vec<u16>,
    #[serde(default, deserialize_with = "whole::list")]
    pub allocated_host_ports: Vec<u16>,
    #[serde(default, deserialize_with = "text")]
    pub agent_addr: String,
    #[serde(default, deserialize_with = "text")]
    pub scaling_group: String,
    #[serde(default, deserialize_with = "optional_text")]
    pub endpoint_id: Option<String>,
}

fn main_role() -> String {
    "main".to_owned()
}

impl KernelCreationConfig {
    /// Whether this kernel carries the image's services (`main`, formerly `master`).
    pub fn is_main(&self) -> bool {
        matches!(self.cluster_role.as_str(), "main" | "master")
    }

    /// The host name inside the cluster; the manager always sends one, `main1` stands in.
    pub fn hostname(&self) -> &str {
        self.cluster_hostname.as_deref().unwrap_or("main1")
    }

    /// Size of `/dev/shm` in bytes from `resource_opts.shmem` (text or number), if one is asked for.
    ///
    /// # Errors
    /// The text itself when it is neither a number of bytes nor a size such as `64m`.
    pub fn shared_memory(&self) -> Result<Option<u64>, String> {
        use serde_json::Value;
        let bytes = match self.resource_opts.get("shmem") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Number(number)) => tolerant::whole_number(number),
            Some(Value::String(written)) if written.trim().is_empty() => return Ok(None),
            Some(Value::String(written)) => super::resource_text::parse_binary_size(written),
            Some(_) => None,
        };
        match bytes {
            Some(0) => Ok(None),
            Some(bytes) => Ok(Some(bytes)),
            None => Err(self.resource_opts["shmem"].to_string()),
        }
    }

    /// Whether devices may be shared in fractions across each other (default true).
    pub fn allow_fragmentation(&self) -> bool {
        self.resource_opts
            .get("allow_fractional_resource_fragmentation")
            .and_then(serde_json::Value::as_bool)
            .unwrap_or(true)
    }
}

/// The image of a kernel (`ImageConfig`).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Full name with registry, project and tag.
    #[serde(deserialize_with = "text")]
    pub canonical: String,
    #[serde(default, deserialize_with = "optional_text")]
    pub project: Option<String>,
    #[serde(default = "native_architecture", deserialize_with = "text")]
    pub architecture: String,
    /// The image *config* digest, compared with the local image's id.
    #[serde(default, deserialize_with = "text")]
    pub digest: String,
    #[serde(default, deserialize_with = "optional_text")]
    pub repo_digest: Option<String>,
    #[serde(default, deserialize_with = "null_default")]
    pub registry: RegistryConfig,
    #[serde(default, deserialize_with = "null_default")]
    pub labels: TextMap,
    #[serde(default, deserialize_with = "truth")]
    pub is_local: bool,
    #[serde(default, deserialize_with = "null_default")]
    pub auto_pull: AutoPull,
}

fn native_architecture() -> String {
    std::env::consts::ARCH.to_owned()
}

impl ImageConfig {
    /// A label's value, or `default` when the label is absent.
    pub fn label_or<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.labels.get(name).unwrap_or(default)
    }

    /// Whether the space-separated feature list (`uid-match` when absent) names `feature`.
    pub fn has_feature(&self, feature: &str) -> bool {
        self.label_or("ai.backend.features", "uid-match")
            .split_whitespace()
            .any(|listed| listed == feature)
    }

    /// The name Docker is given: the canonical one, or `project/name:tag` for a local image.
    pub fn docker_name(&self) -> &str {
        if !self.is_local {
            return &self.canonical;
        }
        match self.canonical.strip_prefix(&self.registry.name) {
            Some(rest) if !self.registry.name.is_empty() => rest.trim_start_matches('/'),
            _ => &self.canonical,
        }
    }

    /// The last path component of the image name, without tag: the middle of the container's name.
    pub fn short_name(&self) -> &str {
        let last = self.canonical.rsplit('/').next().unwrap_or_default();
        let last = last.split('@').next().unwrap_or_default();
        last.split(':').next().unwrap_or_default()
    }
}

/// Where the image comes from, with the credentials for it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RegistryConfig {
    #[serde(default, deserialize_with = "text")]
    pub name: String,
    #[serde(default, deserialize_with = "text")]
    pub url: String,
    #[serde(default, deserialize_with = "optional_text")]
    pub username: Option<String>,
    #[serde(default, deserialize_with = "null_default")]
    pub password: Option<SecretText>,
}

/// A virtual folder to be mounted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VfolderMount {
    #[serde(default, deserialize_with = "text")]
    pub name: String,
    #[serde(default, deserialize_with = "optional_text")]
    pub vfid: Option<String>,
    #[serde(default, deserialize_with = "optional_text")]
    pub vfsubpath: Option<String>,
    #[serde(deserialize_with = "text")]
    pub host_path: String,
    #[serde(deserialize_with = "text")]
    pub kernel_path: String,
    pub mount_perm: MountPermission,
    #[serde(default, deserialize_with = "null_default")]
    pub usage_mode: VfolderUsage,
}

/// The manager's private extras (`internal_data`, a JSON column: may be null or partial).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct InternalData {
    #[serde(default, deserialize_with = "list")]
    pub dotfiles: Vec<Dotfile>,
    #[serde(default, deserialize_with = "null_default")]
    pub ssh_keypair: Option<SshKeypair>,
    /// Free JSON, written as it is to `docker-creds.json`.
    #[serde(default)]
    pub docker_credentials: Confidential,
    #[serde(default, deserialize_with = "list")]
    pub domain_socket_proxies: Vec<String>,
    #[serde(default, deserialize_with = "truth")]
    pub sudo_session_enabled: bool,
    #[serde(default, deserialize_with = "truth")]
    pub prevent_vfolder_mounts: bool,
    #[serde(default, deserialize_with = "truth")]
    pub block_service_ports: bool,
    #[serde(default, deserialize_with = "optional_text")]
    pub runtime_variant: Option<String>,
    #[serde(default, deserialize_with = "optional_text")]
    pub model_definition_path: Option<String>,
}

/// A JSON value that is never printed.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Confidential(pub serde_json::Value);

impl std::fmt::Debug for Confidential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_null() { "null" } else { "***" })
    }
}

/// A file the user wants in every container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Dotfile {
    #[serde(deserialize_with = "text")]
    pub path: String,
    #[serde(default, deserialize_with = "null_default")]
    pub data: SecretText,
    /// Octal text such as `644`.
    #[serde(default = "dotfile_mode", deserialize_with = "text")]
    pub perm: String,
}

fn dotfile_mode() -> String {
    "644".to_owned()
}

/// A key pair: public key as an OpenSSH line, private key as PEM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SshKeypair {
    #[serde(deserialize_with = "text")]
    pub public_key: String,
    pub private_key: SecretText,
}

/// The cluster a kernel belongs to (`ClusterInfo`).
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ClusterInfo {
    #[serde(default, deserialize_with = "null_default")]
    pub mode: ClusterMode,
    /// Kernels in the session.
    #[serde(default, deserialize_with = "whole::or_zero")]
    pub size: i64,
    /// Role to number of kernels.
    #[serde(default, deserialize_with = "null_default")]
    pub replicas: serde_json::Map<String, serde_json::Value>,
    /// Empty, or a map with `mode` (`bridge`, `host`, a plugin's name) and that mode's own keys.
    #[serde(default, deserialize_with = "null_default")]
    pub network_config: serde_json::Map<String, serde_json::Value>,
    #[serde(default, deserialize_with = "null_default")]
    pub ssh_keypair: Option<SshKeypair>,
    /// Host name to address and port.
    #[serde(default, deserialize_with = "null_default")]
    pub cluster_ssh_port_mapping: Option<serde_json::Map<String, serde_json::Value>>,
}

impl ClusterInfo {
    /// The network mode asked for, if the session has a network of its own.
    pub fn network_mode(&self) -> Option<&str> {
        self.network_config
            .get("mode")?
            .as_str()
            .filter(|mode| !mode.is_empty())
    }

    /// Name of the network to join.
    pub fn network_name(&self) -> Option<&str> {
        self.network_config.get("network_name")?.as_str()
    }

    /// The sshd port that others were told for a kernel: by its host name, or by its id, as newer
    /// managers do it.
    pub fn mapped_ssh_port(&self, hostname: &str, kernel: KernelId) -> Option<u16> {
        let mapping = self.cluster_ssh_port_mapping.as_ref()?;
        let entry = mapping
            .get(hostname)
            .or_else(|| mapping.get(&by_id(kernel)))?
            .as_array()?;
        u16::try_from(entry.get(1)?.as_u64()?).ok()
    }

    /// Where the sshd of each kernel is, also by the names that kernels know each other by: `hosts`,
    /// comma-separated, in the order of the kernels, which is the mapping's.
    pub fn ssh_places(
        &self,
        hosts: Option<&str>,
    ) -> Option<serde_json::Map<String, serde_json::Value>> {
        let mut places = self.cluster_ssh_port_mapping.clone()?;
        let hosts: Vec<&str> = hosts.unwrap_or_default().split(',').collect();
        let by_ids = places.keys().all(|name| {
            let id = name.strip_prefix("node-");
            id.is_some_and(|id| id.parse::<KernelId>().is_ok())
        });
        if by_ids && hosts.len() == places.len() {
            let named: Vec<_> = hosts
                .into_iter()
                .map(str::to_owned)
                .zip(places.values().cloned())
                .filter(|(name, _)| !name.is_empty())
                .collect();
            places.extend(named);
        }
        Some(places)
    }
}

/// The key of a kernel's sshd where a mapping goes by ids.
fn by_id(kernel: KernelId) -> String {
    format!("node-{kernel}")
}

tolerant::text_enum! {
    /// What the session is for.
    pub enum SessionType { #[default] Interactive = "interactive", Batch = "batch", Inference = "inference", System = "system" }
}
tolerant::text_enum! {
    /// Whether the cluster stays on one node.
    pub enum ClusterMode { #[default] SingleNode = "single-node", MultiNode = "multi-node" }
}
tolerant::text_enum! {
    /// When an image is pulled.
    pub enum AutoPull { #[default] Digest = "digest", Tag = "tag", None = "none" }
}
tolerant::text_enum! {
    /// Rights on a mounted folder; `wd` (write and delete) is mounted like `rw`.
    pub enum MountPermission { #[default] ReadOnly = "ro", ReadWrite = "rw", WriteDelete = "wd" }
}
tolerant::text_enum! {
    /// What a virtual folder holds.
    pub enum VfolderUsage { #[default] General = "general", Model = "model", Data = "data" }
}

#[cfg(test)]
mod tests;
