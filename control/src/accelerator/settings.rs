//! Settings of accelerators: the file's `[node.accelerators]` with what etcd says over it, as in the
//! original below `config/plugins/accelerator/<name>`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use config::{AllocationMode, Config, CudaInjection, means_plugin};
use rust_decimal::Decimal;

use super::engine::EngineFacts;
use crate::kernel::resource_text::parse_binary_size;
use crate::resource::device_of;

/// What a cluster sets for accelerator plugins: plugin, key, value.
pub type Options = BTreeMap<String, BTreeMap<String, String>>;

/// `config/plugins/accelerator` of etcd.
pub fn of_tree(tree: &crate::etcd::Tree) -> Options {
    let plugins = tree.members.iter();
    plugins
        .map(|(plugin, keys)| {
            let texts = keys.members.iter();
            let texts = texts.filter_map(|(key, member)| Some((key, member.value.as_ref()?)));
            let texts = texts.map(|(key, text)| (key.clone(), text.clone()));
            (plugin.clone(), texts.collect())
        })
        .collect()
}

/// [`ShareUnits::reserved`] unless a cluster says otherwise, as in the original.
const RESERVED: u64 = 64 << 20;

/// How devices are divided into shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareUnits {
    /// Memory of a share of 1, bytes.
    pub memory: u64,
    /// Multiprocessors of a share of 1.
    pub processors: u32,
    /// The least share, and the step of shares.
    pub quantum: Decimal,
    /// Memory of a device that its limits leave to the driver, bytes.
    pub reserved: u64,
}

/// How the devices of a plugin are given out.
#[derive(Debug, Clone, Copy)]
struct Sharing {
    fractional: bool,
    units: ShareUnits,
}

/// The settings in effect.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    mask: Vec<String>,
    switches: Switches,
    /// How containers get CUDA devices, if the configuration says so.
    pub injection: CudaInjection,
    /// What the engine can do.
    pub engine: EngineFacts,
    /// None gives CUDA devices out as a whole.
    pub shares: Option<ShareUnits>,
    /// The same of made-up devices.
    pub mock_shares: Option<ShareUnits>,
    /// The unit of shares also where CUDA devices are given out as a whole.
    pub units: ShareUnits,
    /// The file of made-up devices.
    pub mock: Option<PathBuf>,
    /// Their device name.
    pub mock_key: Option<String>,
    /// Slots that device plugins serve.
    pub plugin_slots: Vec<String>,
    /// Where `sys`, `proc` and `dev` are.
    pub root: PathBuf,
}

impl Settings {
    /// Of the file, with the cluster's over it; what of those makes no sense is told and left out.
    pub fn of(config: &Config, options: &Options, engine: EngineFacts) -> Self {
        let file = &config.node.accelerators;
        let switches = Switches::of(config);
        let mock_file = file.mock.clone().filter(|path| {
            let on = switches.allow("mock");
            if !on {
                tracing::warn!(path = %path.display(),
                    "made-up devices are switched off by agent.allow-compute-plugins or agent.block-compute-plugins");
            }
            on
        });
        for slot in file.device_plugins.values() {
            if !switches.allow(device_of(slot)) {
                tracing::warn!(
                    slot,
                    "devices of a device plugin are switched off by agent.allow-compute-plugins or agent.block-compute-plugins"
                );
            }
        }
        let mut cuda = Sharing {
            fractional: file.allocation_mode == AllocationMode::Fractional,
            units: ShareUnits {
                memory: file.unit_mem.0,
                processors: file.unit_proc,
                quantum: Decimal::new(file.quantum_percent.into(), 2),
                reserved: RESERVED,
            },
        };
        cuda.take_all("cuda", options);
        let mock_key = mock_file.as_deref().and_then(super::mock::key_of);
        // Made-up devices have a plugin of their own; those of CUDA follow what is said of real ones.
        let mut mock = Sharing {
            fractional: cuda.fractional && mock_key.as_deref() == Some("cuda"),
            ..cuda
        };
        mock.take_all("mock", options);
        let masks = options.iter().filter_map(|(plugin, keys)| {
            let of_mock = mock_key.as_deref().filter(|_| plugin == "mock");
            Some((of_mock.unwrap_or(plugin), keys.get("device_mask")?))
        });
        let masks = masks.flat_map(|(kind, text)| masked(kind, text));
        Self {
            mask: file.device_mask.iter().cloned().chain(masks).collect(),
            switches,
            injection: file.cuda_injection,
            engine,
            shares: cuda.fractional.then_some(cuda.units),
            mock_shares: mock.fractional.then_some(mock.units),
            units: cuda.units,
            mock: mock_file,
            plugin_slots: file.device_plugins.values().cloned().collect(),
            root: file.device_root.clone(),
            mock_key,
        }
    }

    /// Whether a device is given out.
    pub fn gives_out(&self, kind: &str, id: &str, index: u32) -> bool {
        self.allows(kind) && !self.masks(kind, id, index)
    }

    /// Whether a device that a device plugin lists is given out, by any of its ids.
    pub fn gives_listed(&self, slot: &str, ids: &[&str]) -> bool {
        let masked = |mask: &String| ids.iter().any(|id| mask.eq_ignore_ascii_case(id));
        self.allows(device_of(slot)) && !self.mask.iter().any(masked)
    }

    /// Whether made-up devices or a device plugin have the name of a kind of the drivers.
    pub fn is_taken(&self, kind: &str) -> bool {
        self.mock_key.as_deref() == Some(kind)
            || self.plugin_slots.iter().any(|slot| device_of(slot) == kind)
    }

    /// Whether a device is left out by its id or number.
    pub fn masks(&self, kind: &str, id: &str, index: u32) -> bool {
        let named = |mask: &String| {
            mask.eq_ignore_ascii_case(id)
                || mask
                    .split_once(':')
                    .is_some_and(|(of, number)| of == kind && number.trim().parse() == Ok(index))
        };
        self.mask.iter().any(named)
    }

    /// Whether a kind of device is switched on.
    pub fn allows(&self, kind: &str) -> bool {
        self.switches.allow(kind)
    }
}

/// Which plugins are switched on ([`means_plugin`]).
#[derive(Debug, Clone, PartialEq)]
struct Switches {
    allowed: Option<Vec<String>>,
    blocked: Vec<String>,
}

impl Switches {
    fn of(config: &Config) -> Self {
        let agent = &config.agent;
        let allowed = agent.allow_compute_plugins.as_ref();
        let blocked = agent.block_compute_plugins.iter().flatten();
        Self {
            allowed: allowed.map(|all| all.iter().cloned().collect()),
            blocked: blocked.cloned().collect(),
        }
    }

    fn allow(&self, plugin: &str) -> bool {
        let named = |list: &[String]| list.iter().any(|entry| means_plugin(entry, plugin));
        self.allowed.as_deref().is_none_or(named) && !named(&self.blocked)
    }
}

impl Sharing {
    /// Takes in what a cluster says of a plugin; what makes no sense is told and left out.
    fn take_all(&mut self, plugin: &str, options: &Options) {
        for (key, text) in options.get(plugin).into_iter().flatten() {
            if key != "device_mask" && self.take(key, text).is_none() {
                let key = format!("config/plugins/accelerator/{plugin}/{key}");
                tracing::warn!(key, value = text, "a setting of etcd is not used");
            }
        }
    }

    fn take(&mut self, key: &str, text: &str) -> Option<()> {
        let memory = || parse_binary_size(text.trim());
        match (key, text) {
            ("allocation_mode", "discrete") => self.fractional = false,
            ("allocation_mode", "fractional") => self.fractional = true,
            ("unit_mem", _) => {
                let size = memory().filter(|size| (512 << 20..=1 << 40).contains(size));
                self.units.memory = size?;
            }
            ("reserved_memory", _) => {
                self.units.reserved = memory().filter(|size| *size <= 1 << 40)?;
            }
            ("unit_proc", text) => {
                let units = text.trim().parse().ok();
                self.units.processors = units.filter(|units| (2..=1024).contains(units))?;
            }
            ("quantum_size", text) => {
                let quantum = text.trim().parse::<Decimal>().ok();
                // Amounts have two decimals.
                let fits = |size: &Decimal| {
                    *size > Decimal::ZERO && *size <= Decimal::ONE && size.normalize().scale() <= 2
                };
                self.units.quantum = quantum.filter(fits)?;
            }
            _ => return None,
        }
        Some(())
    }
}

/// The original masks by number or, in newer releases, by UUID.
fn masked<'t>(plugin: &'t str, text: &'t str) -> impl Iterator<Item = String> + 't {
    let entries = text.split(',').map(str::trim);
    entries
        .filter(|entry| !entry.is_empty())
        .map(move |entry| match entry.parse::<u32>() {
            Ok(index) => format!("{plugin}:{index}"),
            Err(_) => entry.to_owned(),
        })
}

/// The group that owns a device node, below the settings' root.
pub(super) fn group_of(root: &Path, node: &str) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    let node = root.join(node.trim_start_matches('/'));
    std::fs::metadata(node).ok().map(|found| found.gid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_switch_all_plugins_and_modules_their_own() {
        let of = |allowed: Option<&[&str]>, blocked: &[&str]| {
            let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            let switches = Switches {
                allowed: allowed.map(list),
                blocked: list(blocked),
            };
            let all = ["cuda", "rocm", "gaudi"].into_iter();
            all.filter(|name| switches.allow(name))
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(of(None, &[]), "cuda rocm gaudi");
        assert_eq!(of(Some(&[]), &[]), "");
        assert_eq!(
            of(
                Some(&["ai.backend.accelerator"]),
                &["ai.backend.accelerator.rocm"]
            ),
            "cuda gaudi"
        );
        assert_eq!(of(Some(&["cuda_open"]), &[]), "cuda");
        assert_eq!(of(None, &["ai.backend"]), "");
    }

    #[test]
    fn masks_of_the_original_are_numbers_or_ids() {
        let all: Vec<String> = masked("cuda", "0, GPU-5 ,,2").collect();
        assert_eq!(all, ["cuda:0", "GPU-5", "cuda:2"]);
    }
}
