//! Accelerators as slots: what the drivers told, what is given out of it, and what containers get.
//!
//! In: the dataplane's rows, the settings of file and etcd, a file of made-up devices. Out: a
//! [`DevicePlugin`] per kind in the ledger, kept up to date.
//! Invariants: absent is not zero, so before the first scan the node goes by what it knew in an
//! earlier life; a device that a kernel holds is known as long as the kernel lives; a device that
//! does not work is not given out and not announced, and is both again when it works again.

pub mod device;
mod device_nodes;
pub mod engine;
pub mod host;
pub mod inject;
pub mod mock;
pub mod plugin;
mod plugin_devices;
pub mod settings;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use config::Config;
use shared::observed::AcceleratorKind;
use tokio::sync::watch;

use crate::blocking::blocking;
use crate::files::{plain_name, replace_file};
use crate::kernel::node::Node;
use crate::link::Observed;
use crate::resource::{DevicePlugin, InventoryError, Ledger};
use device::{AcceleratorDevice, of_rows};
use engine::EngineFacts;
use plugin::AcceleratorPlugin;
use plugin_devices::PluginDevices;
use settings::{Options, Settings};

/// How long the first heartbeat waits for the first scan of a node that had accelerators, or whose
/// dataplane runs: drivers take seconds to start.
const FIRST_SCAN: Duration = Duration::from_secs(10);
/// And of any other node, whose dataplane may be on its way.
const FIRST_LOOK: Duration = Duration::from_secs(1);

/// Before the next try to keep the list of devices, where nothing else happens.
const SAVE_AGAIN: Duration = Duration::from_secs(5);

/// What the node knows of its accelerators.
#[derive(Debug)]
pub struct Accelerators {
    settings: Settings,
    /// Where the last scan is kept.
    file: PathBuf,
    /// One writes at a time, so that the last to write knows most.
    writing: Mutex<()>,
    devices: Mutex<Vec<AcceleratorDevice>>,
    /// Those of device plugins.
    listed: PluginDevices,
    /// Number of scans that told something new; none before the first scan.
    scans: watch::Sender<Option<u64>>,
}

impl Accelerators {
    /// Goes by what an earlier life knew. Blocking.
    pub fn open(config: &Config, options: &Options, engine: EngineFacts) -> Self {
        let name = format!("accelerators.{}.json", plain_name(&config.agent.id));
        let file = config.agent.var_base_path.join(name);
        let kept: Vec<AcceleratorDevice> = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|err| {
                tracing::warn!(%err, path = %file.display(),
                    "the list of accelerators of an earlier life makes no sense; waiting for the drivers");
                Vec::new()
            }),
            Err(_) => Vec::new(),
        };
        let settings = Settings::of(config, options, engine);
        let (listed, devices) = kept.into_iter().partition(|device| device.slot.is_some());
        Self {
            file,
            writing: Mutex::default(),
            devices: Mutex::new(devices),
            listed: PluginDevices::new(&settings.plugin_slots, listed),
            settings,
            scans: watch::Sender::default(),
        }
    }

    /// The plugins to begin with: made-up devices, and those of an earlier life. Blocking.
    ///
    /// # Errors
    /// The file of made-up devices cannot be used.
    pub fn plugins(&self) -> Result<Vec<Box<dyn DevicePlugin>>, mock::MockError> {
        let mut all: Vec<Box<dyn DevicePlugin>> = Vec::new();
        if let Some(path) = &self.settings.mock {
            let mock = mock::read(path, &self.settings)?;
            tracing::warn!(device = mock.key(), path = %path.display(),
                "devices of this name are made up, as node.accelerators.mock says");
            all.push(Box::new(mock));
        }
        let devices = self.known();
        for kind in kinds(&devices) {
            if !self.settings.is_taken(&kind) {
                all.push(Box::new(AcceleratorPlugin::of_kind(
                    &kind,
                    &devices,
                    &self.settings,
                )));
            }
        }
        for plugin in self.listed.plugins() {
            all.push(Box::new(plugin));
        }
        Ok(all)
    }

    fn known(&self) -> Vec<AcceleratorDevice> {
        let devices = self.devices.lock();
        devices.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes of what is given out; `None` before the first scan.
    pub fn subscribe(&self) -> watch::Receiver<Option<u64>> {
        self.scans.subscribe()
    }

    /// Waits for the first scan, not for ever.
    pub async fn first_scan(&self, dataplane_runs: bool) {
        let limit = if dataplane_runs || !self.known().is_empty() {
            FIRST_SCAN
        } else {
            FIRST_LOOK
        };
        let mut scans = self.scans.subscribe();
        if tokio::time::timeout(limit, scans.wait_for(Option::is_some))
            .await
            .is_err()
            && limit == FIRST_SCAN
        {
            tracing::warn!(
                waited_s = limit.as_secs(),
                "the drivers of accelerators have not answered; going by what was known before"
            );
        }
    }

    /// Takes in what a device plugin lists of its slot, as long as `counts`.
    ///
    /// # Errors
    /// The devices cannot be given out; nothing is changed then.
    pub(crate) fn list(
        &self,
        ledger: &Ledger,
        slot: &str,
        mut devices: Vec<AcceleratorDevice>,
        counts: impl FnOnce() -> bool,
    ) -> Result<(), InventoryError> {
        // By the plugin's own ids too; it gives no numbers.
        devices.retain(|device| {
            self.settings
                .gives_listed(slot, &[&device.id, &host::own_id(&device.id)])
        });
        let changed = self.listed.put(ledger, slot, devices, counts)?;
        self.touch(changed);
        Ok(())
    }

    /// A device plugin is gone, and its devices work for nobody, as long as `counts`; whether that
    /// is new.
    ///
    /// # Errors
    /// Never in practice: the devices were given out before.
    pub(crate) fn lose(
        &self,
        ledger: &Ledger,
        slot: &str,
        counts: impl FnOnce() -> bool,
    ) -> Result<bool, InventoryError> {
        let changed = self.listed.lose(ledger, slot, counts)?;
        self.touch(changed);
        Ok(changed)
    }

    /// Tells whoever follows that a device plugin has changed what is given out.
    fn touch(&self, changed: bool) {
        if changed {
            self.scans
                .send_modify(|scans| *scans = scans.map(|number| number + 1));
        }
    }

    /// On a node without accelerators no pass costs anything.
    fn has_nothing_to_do(&self, observed: &Observed) -> bool {
        let rows = observed.snapshot.as_ref();
        rows.is_none_or(|snapshot| snapshot.accelerators.is_empty())
            && self.scans.borrow().is_some()
            && self.known().is_empty()
    }

    /// Takes in what the dataplane says; whether the devices have changed.
    fn take_in(&self, ledger: &Ledger, observed: &Observed) -> Result<bool, InventoryError> {
        let Some(snapshot) = observed.snapshot.as_deref().filter(|_| observed.is_alive()) else {
            return Ok(false);
        };
        let silent = silent(observed);
        let counters = snapshot.node.as_ref().map(|node| &node.counters);
        let waits = counters.is_none_or(|counters| counters.accelerators_found.is_none());
        if waits && silent.is_empty() {
            return Ok(false);
        }
        let before = self.known();
        let mut fresh = of_rows(&snapshot.accelerators, &self.settings);
        // Of drivers that have told nothing: they are there, and so are the devices that were.
        let unheard = before.iter().filter(|old| silent.contains(&old.kind));
        let unheard = unheard.map(|old| if waits { old.clone() } else { old.as_lost() });
        fresh.extend(unheard);
        let held = ledger.accelerators_held();
        let lost = before.iter().filter(|old| {
            held.keys().any(|id| old.is_called(id))
                && fresh.iter().all(|device| device.id != old.id)
        });
        let lost: Vec<AcceleratorDevice> = lost.map(AcceleratorDevice::as_lost).collect();
        fresh.extend(lost);
        if fresh != before {
            let kinds: BTreeSet<String> = kinds(&before).union(&kinds(&fresh)).cloned().collect();
            for kind in kinds {
                if self.settings.is_taken(&kind) {
                    continue;
                }
                let plugin = AcceleratorPlugin::of_kind(&kind, &fresh, &self.settings);
                ledger.install(Arc::new(plugin))?;
            }
            *self.devices.lock().unwrap_or_else(PoisonError::into_inner) = fresh.clone();
            tracing::info!(
                devices = fresh.len(),
                working = fresh.iter().filter(|device| device.healthy).count(),
                "accelerators have changed"
            );
        }
        let first = self.scans.borrow().is_none();
        if !waits && (first || fresh != before) {
            self.scans
                .send_modify(|scans| *scans = Some(scans.unwrap_or(0) + 1));
        } else {
            self.touch(fresh != before);
        }
        Ok(fresh != before)
    }

    /// Devices that do not work and that the dataplane has no row of, because their driver has told it
    /// nothing.
    pub(crate) fn unheard(&self, observed: &Observed) -> Vec<AcceleratorDevice> {
        let silent = silent(observed);
        if silent.is_empty() {
            return Vec::new();
        }
        let mut known = self.known();
        known.retain(|device| !device.healthy && silent.contains(&device.kind));
        known
    }

    fn keep(&self) -> std::io::Result<()> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = self.known();
        all.extend(self.listed.known());
        let bytes = serde_json::to_vec_pretty(&all).map_err(std::io::Error::other)?;
        replace_file(&self.file, &bytes)
    }
}

/// Kinds whose driver is there and has told a dataplane that runs nothing since it started.
fn silent(observed: &Observed) -> Vec<String> {
    let node = observed
        .snapshot
        .as_deref()
        .and_then(|all| all.node.as_ref());
    let bits = node.and_then(|node| node.counters.accelerators_silent);
    let bits = bits.filter(|_| observed.is_alive()).unwrap_or(0);
    let drivers = [
        AcceleratorKind::Cuda,
        AcceleratorKind::Rocm,
        AcceleratorKind::Tpu,
    ];
    let silent = drivers.into_iter().filter(|kind| bits & kind.bit() != 0);
    silent.map(|kind| kind.to_string()).collect()
}

fn kinds(devices: &[AcceleratorDevice]) -> BTreeSet<String> {
    devices.iter().map(|device| device.kind.clone()).collect()
}

/// How the list of devices is kept on disk: again as long as that fails.
#[derive(Debug, Default)]
struct Persistence {
    /// Something has changed that is not on disk yet.
    unsaved: bool,
    /// The log says that it cannot be written.
    failing: bool,
}

impl Persistence {
    /// Writes what is not on disk yet. Blocking.
    fn go_on(&mut self, accelerators: &Accelerators) {
        if !self.unsaved {
            return;
        }
        match accelerators.keep() {
            Ok(()) => {
                self.unsaved = false;
                if std::mem::take(&mut self.failing) {
                    tracing::info!("the list of accelerators is kept again");
                }
            }
            Err(err) if !std::mem::replace(&mut self.failing, true) => {
                tracing::warn!(%err, path = %accelerators.file.display(),
                    "the list of accelerators cannot be kept, and this is tried again");
            }
            Err(_) => {}
        }
    }
}

/// Keeps the ledger's accelerators up to date until the agent stops.
pub async fn follow(node: Arc<Node>) {
    let accelerators = &node.accelerators;
    let mut observed = node.link.subscribe();
    let mut trouble = false;
    let mut keeping = Persistence::default();
    loop {
        let now = observed.borrow_and_update().clone();
        if keeping.unsaved || !accelerators.has_nothing_to_do(&now) {
            let of_node = node.clone();
            // Settings may look into sysfs and the inventory is kept on disk.
            let done = blocking(move || {
                let accelerators = &of_node.accelerators;
                let changed = accelerators.take_in(&of_node.ledger, &now);
                keeping.unsaved |= matches!(changed, Ok(true));
                keeping.go_on(accelerators);
                (changed, keeping)
            });
            let taken;
            (taken, keeping) = done.await;
            match taken {
                Ok(_) => trouble = false,
                Err(err) if !std::mem::replace(&mut trouble, true) => tracing::error!(
                    err = crate::causes::chain(&err),
                    "the accelerators of this node cannot be given out"
                ),
                Err(_) => {}
            }
        }
        tokio::select! {
            changed = observed.changed() => if changed.is_err() {
                return;
            },
            () = accelerators.listed.unsaved.notified() => keeping.unsaved = true,
            () = tokio::time::sleep(SAVE_AGAIN), if keeping.unsaved => {}
            () = node.stopping.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use shared::observed::{
        AcceleratorCounters, AcceleratorRow, NodeCounters, NodeSample, ObservedSnapshot,
    };

    use super::*;
    use crate::stats::fixture::card;

    /// The configuration of a node that keeps its state there.
    fn node_below(place: &Path) -> Config {
        let mut options = config::LoadOptions::of_this_process(None, true);
        options.environment = Box::new(|_| None);
        let mut config = Config::clone(&config::load(&options).unwrap().config);
        config.agent.var_base_path = place.to_owned();
        config
    }

    fn open(config: &Config) -> Accelerators {
        Accelerators::open(config, &Options::default(), EngineFacts::default())
    }

    /// A dataplane that runs, whose drivers have found so many devices, or not looked yet.
    fn observed(found: Option<u32>) -> Observed {
        let cards = 0..found.unwrap_or(0);
        let snapshot = ObservedSnapshot {
            node: Some(NodeSample {
                counters: NodeCounters {
                    accelerators_found: found.map(u64::from),
                    ..NodeCounters::default()
                },
                ..NodeSample::default()
            }),
            accelerators: cards
                .map(|index| card(index, AcceleratorCounters::default()))
                .collect(),
            ..ObservedSnapshot::default()
        };
        Observed {
            snapshot: Some(Arc::new(snapshot)),
            heartbeat_age: Some(Duration::ZERO),
            epoch: 1,
        }
    }

    fn announced(ledger: &Ledger) -> Option<String> {
        let all = ledger.available();
        let slot = all.iter().find(|slot| slot.name == "cuda.device")?;
        Some(slot.amount.to_string())
    }

    #[tokio::test]
    async fn the_first_heartbeat_waits_for_the_first_scan_and_the_next_life_goes_by_the_last() {
        let place = tempfile::tempdir().unwrap();
        let config = node_below(place.path());
        let open = || open(&config);

        let accelerators = open();
        let ledger = Ledger::discover(&config, Vec::new()).unwrap();
        let mut waits = std::pin::pin!(accelerators.first_scan(true));
        // The drivers look for their devices; that is not "no devices".
        assert!(!accelerators.take_in(&ledger, &observed(None)).unwrap());
        let soon = tokio::time::timeout(Duration::from_millis(50), &mut waits);
        assert!(soon.await.is_err(), "the heartbeat has not waited");
        assert_eq!(announced(&ledger), None);
        assert!(accelerators.take_in(&ledger, &observed(Some(2))).unwrap());
        let done = tokio::time::timeout(Duration::from_secs(5), waits);
        done.await.expect("the scan ends the wait");
        assert_eq!(announced(&ledger).as_deref(), Some("2"));

        accelerators.keep().unwrap();
        let next = open();
        let ledger = Ledger::discover(&config, next.plugins().unwrap()).unwrap();
        assert_eq!(announced(&ledger).as_deref(), Some("2"));
        assert!(next.subscribe().borrow().is_none(), "not scanned yet");
        assert!(!next.take_in(&ledger, &observed(None)).unwrap());
        assert_eq!(announced(&ledger).as_deref(), Some("2"));
        // Both are gone, and nobody holds them.
        assert!(next.take_in(&ledger, &observed(Some(0))).unwrap());
        assert_eq!(announced(&ledger).as_deref(), Some("0"));
    }

    /// A dataplane whose drivers of these kinds have told nothing, and may still do so.
    fn silent_observed(silent: u64, waits: bool, rows: Vec<AcceleratorRow>) -> Observed {
        let mut observed = observed(Some(0));
        let mut snapshot = ObservedSnapshot::clone(observed.snapshot.as_ref().unwrap());
        let node = snapshot.node.as_mut().unwrap();
        node.counters.accelerators_silent = Some(silent);
        node.counters.accelerators_found = (!waits).then_some(rows.len() as u64);
        snapshot.accelerators = rows;
        observed.snapshot = Some(Arc::new(snapshot));
        observed
    }

    #[test]
    fn devices_of_a_driver_that_tells_nothing_are_known_and_not_given_out() {
        let place = tempfile::tempdir().unwrap();
        let config = node_below(place.path());
        let open = || open(&config);
        let accelerators = open();
        let ledger = Ledger::discover(&config, Vec::new()).unwrap();
        accelerators.take_in(&ledger, &observed(Some(2))).unwrap();
        accelerators.keep().unwrap();

        let next = open();
        let ledger = Ledger::discover(&config, next.plugins().unwrap()).unwrap();
        let told = |kind: &str| {
            let all = ledger.available();
            let found = all.iter().find(|slot| slot.name == kind);
            found.map(|slot| slot.amount.to_string())
        };
        let cuda = AcceleratorKind::Cuda.bit();
        let amd = || vec![AcceleratorRow::new(AcceleratorKind::Rocm, 0, "amd-0")];
        // While the driver may answer, the node goes by what it knew, and by what others tell.
        let waits = silent_observed(cuda, true, amd());
        assert!(next.take_in(&ledger, &waits).unwrap());
        assert_eq!(told("cuda.device").as_deref(), Some("2"));
        assert_eq!(told("rocm.device").as_deref(), Some("1"));
        assert!(next.subscribe().borrow().is_none(), "not all have answered");
        assert!(next.unheard(&waits).is_empty());
        // It hangs, or does not start.
        let late = silent_observed(cuda, false, amd());
        assert!(next.take_in(&ledger, &late).unwrap());
        assert_eq!(told("cuda.device").as_deref(), Some("0"));
        assert_eq!(told("rocm.device").as_deref(), Some("1"));
        assert!(next.subscribe().borrow().is_some());
        let unheard = next.unheard(&late).into_iter();
        let unheard: Vec<(String, Option<u32>)> = unheard.map(|it| (it.id, it.number)).collect();
        assert_eq!(
            unheard,
            [("GPU-0".to_owned(), Some(0)), ("GPU-1".to_owned(), Some(1))]
        );
        let hardware = AcceleratorPlugin::of_kind("cuda", &next.known(), &next.settings);
        let hardware = crate::resource::DevicePlugin::hardware(&hardware).unwrap();
        assert_eq!(hardware.status, crate::resource::HardwareStatus::Offline);
        assert!(!next.take_in(&ledger, &late).unwrap(), "nothing new");
        // The next life knows them too, also where they could not be kept for a while.
        let file = next.file.clone();
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir_all(file.join("in the way")).unwrap();
        let mut keeping = Persistence {
            unsaved: true,
            ..Persistence::default()
        };
        for _ in 0..2 {
            keeping.go_on(&next);
            assert!(keeping.unsaved && keeping.failing);
        }
        std::fs::remove_dir_all(&file).unwrap();
        keeping.go_on(&next);
        assert!(!keeping.unsaved && !keeping.failing);
        assert_eq!(open().known().len(), 3);
        // It answers after all.
        assert!(next.take_in(&ledger, &observed(Some(2))).unwrap());
        assert_eq!(told("cuda.device").as_deref(), Some("2"));
    }

    #[test]
    fn a_pass_on_a_node_without_accelerators_does_nothing() {
        let place = tempfile::tempdir().unwrap();
        let config = node_below(place.path());
        let accelerators = open(&config);
        let ledger = Ledger::discover(&config, accelerators.plugins().unwrap()).unwrap();
        // The first answer is news, whatever it is.
        assert!(!accelerators.has_nothing_to_do(&observed(Some(0))));
        assert!(!accelerators.take_in(&ledger, &observed(Some(0))).unwrap());
        assert!(accelerators.has_nothing_to_do(&observed(Some(0))));
        let files = std::fs::read_dir(place.path()).unwrap();
        assert_eq!(files.count(), 0, "nothing is kept of nothing");
        let slots = ledger.available();
        let slots: Vec<&str> = slots.iter().map(|slot| slot.name.as_str()).collect();
        assert_eq!(slots, ["cpu", "mem"]);
        // One that is plugged in is seen.
        assert!(!accelerators.has_nothing_to_do(&observed(Some(1))));
        assert!(accelerators.take_in(&ledger, &observed(Some(1))).unwrap());
        assert!(!accelerators.has_nothing_to_do(&observed(Some(0))));
    }
}
