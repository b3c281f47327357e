//! One registered plugin: its devices as long as it lists them, and the calls a container needs.

use std::collections::BTreeSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::GrantError;
use super::answer::Granted;
use super::wire::{
    CALL, ContainerPreferredAllocationRequest, Device, DeviceIds, DevicePluginOptions,
    ListAndWatchResponse, PerContainer, Plugin, PreferredAllocationRequest,
};
use crate::accelerator::device::AcceleratorDevice;
use crate::accelerator::plugin::profile_of;
use crate::kernel::node::Node;
use crate::resource::{InventoryError, device_of};

/// Devices of a plugin beyond this many are left out.
const MOST: usize = 4096;
/// Nor is one with a longer id used, bytes.
const LONGEST_ID: usize = 253;
/// What divides lists of `id:amount`, and what is written for it.
const DIVIDERS: &str = "%,:= ";
/// A list without changes is silent, so whether its plugin lives is asked this often.
const PROBE: Duration = Duration::from_secs(10);
/// Lists take effect no more often than this; of those that come meanwhile, the last one does.
const PACE: Duration = Duration::from_secs(1);
/// Lists within a [`PACE`] beyond this many are no plugin's work: one per device is.
const MOST_LISTS: u32 = 200;
/// Pauses before a plugin that was lost is tried again: the first, doubled up to the last.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

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
    /// A call was not answered.
    silent: Notify,
    ended: CancellationToken,
}

impl Session {
    pub(super) fn new(
        resource: String,
        slot: String,
        socket: PathBuf,
        options: DevicePluginOptions,
    ) -> Self {
        Self(Arc::new(Inner {
            resource,
            slot,
            socket,
            options: Mutex::new(options),
            connection: watch::Sender::default(),
            silent: Notify::new(),
            ended: CancellationToken::new(),
        }))
    }

    /// Has the word no more: another session has its place.
    pub(super) fn end(&self) {
        self.0.ended.cancel();
    }

    fn counts(&self) -> bool {
        !self.0.ended.is_cancelled()
    }

    fn options(&self) -> DevicePluginOptions {
        let options = self.0.options.lock();
        *options.unwrap_or_else(PoisonError::into_inner)
    }

    fn connection(&self) -> Option<Plugin> {
        self.0.connection.borrow().clone()
    }

    /// Follows its devices until another one takes its place, or its socket is gone: whoever makes a
    /// new one registers again. Some register first and open it then; a kubelet dials that long.
    pub(super) async fn follow(self, node: Arc<Node>) {
        tokio::select! {
            () = self.keep(&node) => {}
            () = self.0.ended.cancelled() => {}
            () = node.stopping.cancelled() => {}
        }
    }

    async fn keep(&self, node: &Node) {
        let registered = Instant::now();
        let mut socket = self.socket().await;
        let mut pause = PAUSES.0;
        let mut has_listed = false;
        loop {
            let begun = Instant::now();
            let ended = self.watch(node, &mut has_listed).await;
            self.0.connection.send_replace(None);
            let why = ended.err().map_or_else(
                || "it has closed the list of its devices".to_owned(),
                |status| status.message().to_owned(),
            );
            if self.lose(node) {
                tracing::warn!(
                    resource = self.0.resource,
                    why,
                    "a device plugin is gone; its devices are not given out until it lists them again"
                );
            } else {
                tracing::debug!(
                    resource = self.0.resource,
                    why,
                    "a device plugin stays away"
                );
            }
            if begun.elapsed() > PAUSES.1 {
                pause = PAUSES.0;
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
            let now = self.socket().await;
            if !has_listed && registered.elapsed() < CALL {
                socket = now;
            } else if socket.is_none() || now != socket {
                return;
            }
        }
    }

    /// Device, inode and time of its socket. A link could lead anywhere, and another file of its
    /// name may be another plugin's.
    async fn socket(&self) -> Option<(u64, u64, i64, i64)> {
        let found = tokio::fs::symlink_metadata(&self.0.socket).await.ok()?;
        let is_socket = found.file_type().is_socket();
        is_socket.then(|| (found.dev(), found.ino(), found.mtime(), found.mtime_nsec()))
    }

    /// Its devices do not work; whether that is new.
    fn lose(&self, node: &Node) -> bool {
        let slot = &self.0.slot;
        let lost = node.accelerators.lose(&node.ledger, slot, || self.counts());
        lost.unwrap_or_else(|err| {
            self.refused(&err);
            false
        })
    }

    fn refused(&self, err: &InventoryError) {
        tracing::error!(
            resource = self.0.resource,
            err = crate::causes::chain(err),
            "the devices of a plugin cannot be given out"
        );
    }

    async fn watch(&self, node: &Node, has_listed: &mut bool) -> Result<(), Status> {
        if self.socket().await.is_none() {
            return Err(Status::unavailable("its endpoint is no socket"));
        }
        let plugin = Plugin::connect(&self.0.socket).await?;
        // Plugins that do not send their options with the registration tell them when asked.
        if let Some(options) = probe(&plugin).await? {
            *self
                .0
                .options
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = options;
        }
        let mut lists = plugin.watch().await?;
        let first = timeout(CALL, lists.message()).await;
        let Some(first) = first.map_err(|_| late("the devices are not listed"))?? else {
            return Ok(());
        };
        *has_listed = true;
        self.take(node, first);
        self.0.connection.send_replace(Some(plugin.clone()));
        tokio::select! {
            ended = self.read(node, &mut lists) => ended,
            silent = self.silence(&plugin) => Err(silent),
        }
    }

    /// Takes in lists until there are no more.
    async fn read(
        &self,
        node: &Node,
        lists: &mut Streaming<ListAndWatchResponse>,
    ) -> Result<(), Status> {
        let mut quiet = Instant::now() + PACE;
        while let Some(mut last) = lists.message().await? {
            let mut more = 0;
            loop {
                tokio::select! {
                    biased;
                    () = sleep_until(quiet) => break,
                    next = lists.message() => match next? {
                        Some(next) => last = next,
                        None => return Ok(()),
                    },
                }
                more += 1;
                if more > MOST_LISTS {
                    return Err(Status::resource_exhausted(
                        "it lists its devices without end",
                    ));
                }
            }
            self.take(node, last);
            quiet = Instant::now() + PACE;
        }
        Ok(())
    }

    /// Ends when the plugin does not answer.
    async fn silence(&self, plugin: &Plugin) -> Status {
        let mut probes = interval_at(Instant::now() + PROBE, PROBE);
        probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = probes.tick() => if let Err(status) = probe(plugin).await {
                    return status;
                },
                () = self.0.silent.notified() => return late("it has not answered a call"),
            }
        }
    }

    fn take(&self, node: &Node, list: ListAndWatchResponse) {
        let devices = self.known(list.devices);
        let slot = &self.0.slot;
        let taken = node
            .accelerators
            .list(&node.ledger, slot, devices, || self.counts());
        if let Err(err) = taken {
            self.refused(&err);
        }
    }

    /// What a failed call says of the plugin itself: one that is late or cut off is not trusted with
    /// the next container before it has listed its devices anew.
    fn judge(&self, status: &Status) {
        if matches!(status.code(), Code::DeadlineExceeded | Code::Unavailable) {
            self.0.silent.notify_one();
        }
    }

    /// The devices as far as they make sense.
    fn known(&self, listed: Vec<Device>) -> Vec<AcceleratorDevice> {
        let mut seen = BTreeSet::new();
        let mut nonsense = 0_usize;
        let mut known = Vec::new();
        for device in listed {
            let plain = !device.id.is_empty()
                && device.id.len() <= LONGEST_ID
                && !device.id.chars().any(char::is_control);
            let id = kept_id(&device.id);
            if !plain || known.len() >= MOST || !seen.insert(id.clone()) {
                nonsense += 1;
                continue;
            }
            // One that is unknown to sysfs comes as -1.
            let numa_node = device.topology.and_then(|topology| {
                let first = topology.nodes.first()?.id;
                i32::try_from(first).ok().filter(|node| *node >= 0)
            });
            known.push(AcceleratorDevice {
                kind: device_of(&self.0.slot).to_owned(),
                id,
                model: self.0.resource.clone(),
                pci: String::new(),
                numa_node,
                healthy: device.health == "Healthy",
                fault: None,
                instance: None,
                profile: profile_of(&self.0.slot).map(str::to_owned),
                memory: 0,
                units: 0,
                nodes: Vec::new(),
                slot: Some(self.0.slot.clone()),
                versions: Default::default(),
                near: Vec::new(),
                number: None,
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

    /// Which devices the plugin would rather give, if it has an opinion; as a kubelet does, those of
    /// its choice that may be chosen, and of the others the ones given where these are too few.
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
                available_ids: available.iter().map(|id| own_id(id)).collect(),
                must_include_ids: Vec::new(),
                allocation_size: i32::try_from(given.len()).ok()?,
            }],
        };
        match plugin.prefer(request).await {
            Ok(answer) => {
                let preferred = answer.containers.into_iter().next()?.ids;
                chosen(&preferred, &available, given)
            }
            Err(status) => {
                self.judge(&status);
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
            move |status| {
                self.judge(&status);
                GrantError::Call {
                    resource: self.0.resource.clone(),
                    step,
                    status: Box::new(status),
                }
            }
        };
        let ids: Vec<String> = ids.iter().map(|id| own_id(id)).collect();
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

/// Its options, which every plugin tells; old ones know no such call, which is an answer too.
async fn probe(plugin: &Plugin) -> Result<Option<DevicePluginOptions>, Status> {
    match plugin.options().await {
        Ok(options) => Ok(Some(options)),
        Err(status) if status.code() == Code::Unimplemented => Ok(None),
        Err(status) => Err(status),
    }
}

fn late(why: &str) -> Status {
    Status::deadline_exceeded(why)
}

/// The id of a device as it is kept. Ids are put into lists of `id:amount`, and published plugins have
/// PCI addresses for ids (`0000:c1:00.0`) or numbered replicas (`GPU-...::1`), so what divides such
/// lists is written as in a URI.
fn kept_id(own: &str) -> String {
    let mut kept = String::with_capacity(own.len());
    for c in own.chars() {
        if DIVIDERS.contains(c) {
            // All of them are ASCII.
            kept.push_str(&format!("%{:02X}", u32::from(c)));
        } else {
            kept.push(c);
        }
    }
    kept
}

/// The id as the plugin knows it.
pub(in crate::accelerator) fn own_id(kept: &str) -> String {
    DIVIDERS.chars().rev().fold(kept.to_owned(), |id, c| {
        id.replace(
            &format!("%{:02X}", u32::from(c)),
            c.encode_utf8(&mut [0; 4]),
        )
    })
}

/// As many ids as were given: what is preferred of those available, then what was given.
fn chosen(preferred: &[String], available: &[String], given: &[String]) -> Option<Vec<String>> {
    let mut ids: Vec<String> = Vec::new();
    let preferred = preferred.iter().map(|id| kept_id(id));
    let preferred = preferred.filter(|id| available.contains(id));
    for id in preferred.chain(given.iter().cloned()) {
        if ids.len() < given.len() && !ids.contains(&id) {
            ids.push(id);
        }
    }
    (ids != given).then_some(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_published_plugins_are_kept_and_given_back() {
        for (own, kept) in [
            ("d0", "d0"),
            ("0000:c1:00.0", "0000%3Ac1%3A00.0"),
            ("GPU-1::0", "GPU-1%3A%3A0"),
            ("a,b=c d", "a%2Cb%3Dc%20d"),
            ("100%3A", "100%253A"),
        ] {
            assert_eq!(kept_id(own), kept);
            assert_eq!(own_id(kept), own);
        }
    }

    #[test]
    fn a_preference_may_be_short_or_ask_for_too_much() {
        let ids = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
        let all = ids("a b c%3A1 d");
        let of = |preferred: &str| chosen(&ids(preferred), &all, &ids("a b"));
        assert_eq!(of("d c:1"), Some(ids("d c%3A1")));
        assert_eq!(of("d"), Some(ids("d a")));
        assert_eq!(of("d d"), Some(ids("d a")));
        assert_eq!(of("b d a"), Some(ids("b d")));
        // What is not available, and what it has already.
        assert_eq!(of("x"), None);
        assert_eq!(of("a b"), None);
    }
}
