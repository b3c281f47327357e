//! The MIG instances of a divided device.
//!
//! In: the device. Out: its instances, each a row by itself. Invariant: one that does not answer now, and did at the
//! last look, is still there.

use nvml_wrapper::Device;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::DeviceAttributes;
use shared::observed::{AcceleratorCounters, AcceleratorRow, MigInstance};

use super::super::{Reading, clip};
use super::counters::Memory;
use super::processes::{Listed, listed};
use super::{Session, has_lost_its_driver, is_not_offered, is_passing, key, profile};
use crate::sys::nvml::mig_instance;

/// Parts of device N are numbered from `(N + 1) * PARTS`.
pub(super) const PARTS: u32 = 1000;

/// An instance of a divided device.
pub(super) enum Instance<'nvml> {
    There {
        number: u32,
        instance: Device<'nvml>,
        ids: Option<MigInstance>,
    },
    Failed {
        number: u32,
        err: NvmlError,
    },
}

impl Instance<'_> {
    pub(super) fn number(&self) -> u32 {
        match self {
            Self::There { number, .. } | Self::Failed { number, .. } => *number,
        }
    }
}

/// The device that a number is, or is a part of.
pub(super) fn whole_of(number: u32) -> u32 {
    match number / PARTS {
        0 => number,
        beyond => beyond - 1,
    }
}

/// `MIG-GPU-<UUID>/<GPU instance>/<compute instance>`, as drivers before 470 name instances.
fn instance_of_name(id: &str) -> Option<MigInstance> {
    let mut fields = id.strip_prefix("MIG-GPU-")?.split('/').skip(1);
    let mut next = || fields.next()?.parse().ok();
    let (gpu, compute) = (next()?, next()?);
    next().is_none().then_some(MigInstance { gpu, compute })
}

impl<'nvml> Session<'nvml> {
    /// The instances of a divided device, those too that do not answer now and did at the last look.
    pub(super) fn parts(
        &self,
        index: u32,
        device: &Device<'nvml>,
    ) -> Result<Vec<Instance<'nvml>>, NvmlError> {
        let mut parts = Vec::new();
        for place in 0..device.mig_device_count()?.min(PARTS - 1) {
            let number = (index + 1) * PARTS + place;
            match device.mig_device_by_index(place) {
                Ok(instance) => parts.push(Instance::There {
                    number,
                    ids: mig_instance(self.nvml, &instance),
                    instance,
                }),
                Err(err) if has_lost_its_driver(&err) => return Err(err),
                Err(err) if is_passing(&err) && self.history.known.contains_key(&number) => {
                    parts.push(Instance::Failed { number, err });
                }
                // Numbers without an instance are gaps.
                Err(_) => {}
            }
        }
        Ok(parts)
    }

    pub(super) fn read_part(
        &mut self,
        whole: &AcceleratorRow,
        (device, of_whole): (&Device<'nvml>, Option<Memory>),
        part: Instance<'nvml>,
        reading: &mut Reading,
    ) -> Result<AcceleratorRow, NvmlError> {
        let (number, instance, ids) = match part {
            Instance::There {
                number,
                instance,
                ids,
            } => (number, instance, ids),
            Instance::Failed { err, .. } => return Err(err),
        };
        let memory = Memory::of(self.nvml, &instance)?;
        let attributes = match instance.attributes() {
            Ok(attributes) => Some(attributes),
            Err(err) if is_passing(&err) => return Err(err),
            Err(_) => None,
        };
        let id = instance.uuid()?;
        let total = memory.map(|memory| memory.total);
        let known = self.history.known.get(&number).map(|(_, row)| row);
        let known = known.filter(|row| row.id == id);
        let profile = match instance.name() {
            Ok(name) => profile::of_name(&name),
            Err(err) if is_not_offered(&err) => None,
            Err(err) if has_lost_its_driver(&err) => return Err(err),
            // Its sizes do not tell all that its name does.
            Err(_) => known.map(|row| row.profile.clone()),
        };
        let known_ids = known.and_then(|row| row.instance);
        let profile = profile.or_else(|| {
            let of_whole = of_whole.map(|memory| memory.total);
            Some(profile::of_sizes(attributes.as_ref()?, total?, of_whole?))
        });
        // Its processors are told of the whole GPU instance, of which others may have a part.
        let has_all = |found: &DeviceAttributes| {
            found.compute_instance_slice_count == found.gpu_instance_slice_count
        };
        let alone = ids.filter(|_| attributes.as_ref().is_some_and(has_all));
        let load = alone.map(|ids| self.loads.read((device, &whole.id), (ids.gpu, &id)));
        let load = load.unwrap_or_default();
        let mut row = AcceleratorRow {
            key: key(number),
            instance: ids.or_else(|| instance_of_name(&id)).or(known_ids),
            id,
            part_of: Some(whole.key.index),
            divided: false,
            profile: profile.unwrap_or_default(),
            units: attributes.map(|found| found.multiprocessor_count),
            counters: AcceleratorCounters {
                memory_total_bytes: total,
                memory_used_bytes: memory.map(Memory::used),
                utilisation_permille: load.busy,
                memory_utilisation_permille: load.memory,
                ..AcceleratorCounters::default()
            },
            ..whole.clone()
        };
        let own = match (listed(&instance), row.instance) {
            // Then the whole device may list those of all instances, with the ids of these.
            (Listed::NotOffered | Listed::Failed(_), Some(ids)) => match listed(device) {
                Listed::These(mut list) => {
                    list.all.retain(|process| {
                        let of = (process.gpu_instance_id, process.compute_instance_id);
                        of == (Some(ids.gpu), Some(ids.compute))
                    });
                    Listed::These(list)
                }
                other => other,
            },
            (own, _) => own,
        };
        (row.users, row.users_unknown) = self.users(number, &instance, own, reading);
        clip(&mut row);
        Ok(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_tell_the_device_that_they_are_a_part_of() {
        assert_eq!([0, 999, 1000, 1999, 8004].map(whole_of), [0, 999, 0, 0, 7]);
    }

    #[test]
    fn old_names_of_instances_tell_their_ids() {
        let of = |id: &str| instance_of_name(id).map(|ids| (ids.gpu, ids.compute));
        assert_eq!(of("MIG-GPU-8f0f9c8e-0000-4000/7/0"), Some((7, 0)));
        for other in [
            "MIG-8f0f9c8e",
            "MIG-GPU-8f0f",
            "MIG-GPU-8f0f/7",
            "MIG-GPU-8f0f/7/x",
            "MIG-GPU-8f0f/7/0/1",
            "GPU-8f0f/7/0",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
