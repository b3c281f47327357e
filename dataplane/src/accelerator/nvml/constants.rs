//! What stays as it is as long as a device has its id: its model, where it is, and its units.
//!
//! In: the device, and what it told before. Out: the same again where this answer has failed. Invariant:
//! an answer that fails changes nothing.

use std::path::Path;

use nvml_wrapper::Device;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::PciInfo;
use shared::observed::AcceleratorRow;

use super::super::files;
use super::{has_lost_its_driver, is_not_offered};

/// Of one device.
pub(super) struct Constants {
    /// Its name; empty when it is not known.
    pub model: String,
    /// Its address, as sysfs writes it; empty when it is not known.
    pub pci: String,
    /// Minor number of its device file.
    pub minor: Option<u32>,
    /// Multiprocessors.
    pub units: Option<u32>,
}

impl Constants {
    /// Asks a device that has told `place`. `known` is what it told before.
    ///
    /// # Errors
    /// The library has lost its driver.
    pub(super) fn read(
        device: &Device<'_>,
        place: Result<PciInfo, NvmlError>,
        known: Option<&AcceleratorRow>,
    ) -> Result<Self, NvmlError> {
        let pci = place.map(|place| bus_address(&place.bus_id));
        let pci = constant(pci, known.map(|row| row.pci.clone()))?;
        let model = constant(device.name(), known.map(|row| row.model.clone()))?;
        let minor = constant(device.minor_number(), known.and_then(|row| row.minor))?;
        let units = constant(multiprocessors(device), known.map(|row| row.units))?;
        Ok(Self {
            model: model.unwrap_or_default(),
            pci: pci.unwrap_or_default(),
            minor,
            units: units.flatten(),
        })
    }
}

/// What a device has told now, or told before where this answer has failed. None where there is no such thing, or it has not been told yet.
///
/// # Errors
/// The library has lost its driver.
fn constant<T>(answer: Result<T, NvmlError>, known: Option<T>) -> Result<Option<T>, NvmlError> {
    match answer {
        Ok(told) => Ok(Some(told)),
        Err(err) if is_not_offered(&err) => Ok(None),
        Err(err) if has_lost_its_driver(&err) => Err(err),
        Err(_) => Ok(known),
    }
}

/// `00000000:3B:00.0` as sysfs writes it, `0000:3b:00.0`.
pub(super) fn bus_address(bus_id: &str) -> String {
    let lower = bus_id.to_ascii_lowercase();
    match lower.split_once(':') {
        Some((domain, rest)) if domain.len() > 4 && domain.is_ascii() => {
            format!("{}:{rest}", &domain[domain.len() - 4..])
        }
        _ => lower,
    }
}

pub(super) fn numa_node(root: &Path, pci: &str) -> Option<u16> {
    if pci.is_empty() || pci.contains('/') {
        return None;
    }
    files::numa_node(&root.join("sys/bus/pci/devices").join(pci))
}

/// Multiprocessors of a whole device: the driver tells cores, and how many of them make one is known
/// by the generation (CUDA's programming guide, "Compute Capabilities").
fn multiprocessors(device: &Device<'_>) -> Result<Option<u32>, NvmlError> {
    let of_generation = device.cuda_compute_capability()?;
    let cores = match (of_generation.major, of_generation.minor) {
        (6, 0) | (7, _) | (8, 0) => 64,
        (5 | 6 | 8.., _) => 128,
        _ => return Ok(None),
    };
    Ok(Some(device.num_cores()? / cores))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_sysfs() {
        assert_eq!(bus_address("00000000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(bus_address("0000:AF:00.0"), "0000:af:00.0");
        assert_eq!(numa_node(Path::new("/"), "../../etc"), None);
    }
}
