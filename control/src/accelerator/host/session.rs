//! One registered plugin: its devices as long as it lists them, and the calls a container needs.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::GrantError;
use super::answer::Granted;
use super::wire::{
    ContainerPreferredAllocationRequest, Device, DeviceIds, DevicePluginOptions, PerContainer,
    Plugin, PreferredAllocationRequest,
};
use crate::accelerator::inject::Injection;
use crate::accelerator::known::Known;
use crate::accelerator::plugin::AcceleratorPlugin;
use crate::kernel::node::Node;
use crate::resource::{PluginFacts, SlotDeclaration, SlotType, device_of};

/// Devices of a plugin beyond this many are left out.
const MOST: usize = 4096;

/// A registered plugin.
#[derive(Debug, Clone)]
pub struct Session(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    resource: String,
    slot: String,
    socket: PathBuf,
    options: Mutex<DevicePluginOptions>,
    /// While it lists its devices.
    connection: watch::Sender<Option<Plugin>>,
    ended: CancellationToken,
}

impl Session {
    pub(super) fn new(
        resource: String,
        slot: String,
        socket: PathBuf,
        options: DevicePluginOptions,
        ended: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            resource,
            slot,
            socket,
            options: Mutex::new(options),
            connection: watch::Sender::default(),
            ended,
        }))
    }

    /// The slot its devices are given out as.
    pub(super) fn slot(&self) -> &str {
        &self.0.slot
    }

    /// Another one has registered in its place.
    pub(super) fn end(&self) {
        self.0.ended.cancel();
    }

    fn options(&self) -> DevicePluginOptions {
        let options = self.0.options.lock();
        *options.unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(&self) -> Option<Plugin> {
        self.0.connection.borrow().clone()
    }

    /// Follows its devices until it ends, by itself or because another one took its place.
    pub(super) async fn follow(self, node: Arc<Node>) {
        let mut devices = Vec::new();
        let ended = tokio::select! {
            ended = self.watch(&node, &mut devices) => ended,
            () = self.0.ended.cancelled() => return,
            () = node.stopping.cancelled() => return,
        };
        self.0.connection.send_replace(None);
        let why = ended.err().map_or_else(
            || "it has closed the list of its devices".to_owned(),
            |status| status.message().to_owned(),
        );
        tracing::warn!(
            resource = self.0.resource,
            why,
            "a device plugin is gone; its devices are not given out until it registers again"
        );
        for device in &mut devices {
            device.healthy = false;
        }
        self.install(&node, &devices);
    }

    async fn watch(&self, node: &Arc<Node>, devices: &mut Vec<Known>) -> Result<(), Status> {
        let plugin = Plugin::connect(&self.0.socket).await?;
        // Plugins that do not send their options with the registration tell them when asked; old
        // ones know no such call.
        if let Ok(options) = plugin.options().await {
            *self
                .0
                .options
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = options;
        }
        let mut listed = plugin.watch().await?;
        self.0.connection.send_replace(Some(plugin));
        while let Some(message) = listed.message().await? {
            *devices = self.known(message.devices);
            self.install(node, devices);
        }
        Ok(())
    }

    /// The devices as far as they make sense.
    fn known(&self, listed: Vec<Device>) -> Vec<Known> {
        let mut seen = BTreeSet::new();
        let mut nonsense = 0_usize;
        let mut known = Vec::new();
        for device in listed {
            let id = device.id;
            // Ids are put into files with lists of `id:amount`.
            let plain = !id.is_empty()
                && id.len() <= 253
                && !id.chars().any(|c| c.is_control() || ",:=".contains(c));
            if !plain || known.len() >= MOST || !seen.insert(id.clone()) {
                nonsense += 1;
                continue;
            }
            let numa_node = device.topology.and_then(|topology| {
                let first = topology.nodes.first()?.id;
                i32::try_from(first).ok()
            });
            known.push(Known {
                kind: device_of(&self.0.slot).to_owned(),
                id,
                model: self.0.resource.clone(),
                pci: String::new(),
                numa_node,
                healthy: device.health == "Healthy",
                fault: None,
                profile: None,
                memory: 0,
                units: 0,
                nodes: Vec::new(),
            });
        }
        if nonsense > 0 {
            tracing::warn!(
                resource = self.0.resource,
                nonsense,
                "a device plugin lists devices that cannot be: without an id, twice, or too many"
            );
        }
        known
    }

    fn install(&self, node: &Node, devices: &[Known]) {
        let plugin = AcceleratorPlugin {
            key: device_of(&self.0.slot).to_owned(),
            devices: devices.to_vec(),
            declared: vec![SlotDeclaration {
                name: self.0.slot.clone(),
                kind: SlotType::Count,
            }],
            shown: Vec::new(),
            shares: None,
            injection: Injection::Answered,
            facts: PluginFacts::default(),
        };
        match node.ledger.install(Arc::new(plugin)) {
            Ok(()) => node.accelerators.touch(),
            Err(err) => tracing::error!(
                resource = self.0.resource,
                err = crate::kernel::destroy::chain(&err),
                "the devices of a plugin cannot be given out"
            ),
        }
    }

    /// Which devices the plugin would rather give, if it has an opinion.
    pub(super) async fn prefer(
        &self,
        available: Vec<String>,
        given: &[String],
    ) -> Option<Vec<String>> {
        if !self.options().get_preferred_allocation_available || given.is_empty() {
            return None;
        }
        let plugin = self.connection()?;
        let request = PreferredAllocationRequest {
            container_requests: vec![ContainerPreferredAllocationRequest {
                available_ids: available,
                must_include_ids: Vec::new(),
                allocation_size: i32::try_from(given.len()).ok()?,
            }],
        };
        match plugin.prefer(request).await {
            Ok(answer) => {
                let ids = answer.containers.into_iter().next()?.ids;
                (ids.len() == given.len()).then_some(ids)
            }
            Err(status) => {
                tracing::debug!(
                    resource = self.0.resource,
                    why = status.message(),
                    "a device plugin prefers nothing"
                );
                None
            }
        }
    }

    /// What a container with these devices gets.
    pub(super) async fn grant(&self, ids: Vec<String>) -> Result<Granted, GrantError> {
        let resource = || self.0.resource.clone();
        let plugin = self.connection().ok_or_else(|| GrantError::Gone {
            resource: resource(),
        })?;
        let failed = |step| {
            move |status| GrantError::Call {
                resource: self.0.resource.clone(),
                step,
                status: Box::new(status),
            }
        };
        let request = PerContainer {
            containers: vec![DeviceIds { ids: ids.clone() }],
        };
        let answer = plugin
            .allocate(request)
            .await
            .map_err(failed("allocate devices"))?;
        let [answer] =
            <[_; 1]>::try_from(answer.containers).map_err(|all: Vec<_>| GrantError::Answer {
                resource: resource(),
                why: format!("{} answers for one container", all.len()),
            })?;
        let granted = Granted::of(answer).map_err(|why| GrantError::Answer {
            resource: resource(),
            why,
        })?;
        if self.options().pre_start_required {
            plugin
                .pre_start(DeviceIds { ids })
                .await
                .map_err(failed("prepare the start of a container"))?;
        }
        Ok(granted)
    }
}
