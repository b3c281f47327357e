//! What a device or an instance of one measures. Invariant: what the driver does not tell is absent.

use nvml_wrapper::enum_wrappers::device::{
    Clock, EccCounter, MemoryError, PcieUtilCounter, TemperatureSensor,
};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::NVML_FI_DEV_REMAPPED_FAILURE;
use nvml_wrapper::{Device, Nvml};
use shared::observed::AcceleratorCounters;

use super::is_not_offered;
use crate::sys::nvml::memory_v1;

/// Memory of a device or an instance, bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    pub(super) total: u64,
    pub(super) free: u64,
}

impl Memory {
    /// `None` where it is a part of the host's.
    pub(super) fn of<'nvml>(
        nvml: &'nvml Nvml,
        device: &Device<'nvml>,
    ) -> Result<Option<Self>, NvmlError> {
        let told = match device.memory_info() {
            Ok(found) => Ok((found.total, found.free)),
            Err(NvmlError::FailedToLoadSymbol(_)) => memory_v1(nvml, device),
            Err(err) => Err(err),
        };
        match told {
            Ok((total, free)) => Ok(Some(Self { total, free })),
            Err(err) if is_not_offered(&err) => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// What is not free, as the original tells it: what the driver keeps for itself is used too.
    pub(super) fn used(self) -> u64 {
        self.total.saturating_sub(self.free)
    }
}

/// Whether the driver has failed to replace a defective row of its memory.
pub(super) fn cannot_replace_rows(device: &Device<'_>) -> bool {
    let told = device.field_values_for(&[FieldId(NVML_FI_DEV_REMAPPED_FAILURE)]);
    let told = told.ok().and_then(|values| values.into_iter().next()?.ok());
    match told.and_then(|sample| sample.value.ok()) {
        Some(SampleValue::U32(failed)) => failed != 0,
        Some(SampleValue::U64(failed)) => failed != 0,
        _ => false,
    }
}

pub(super) fn counters(device: &Device<'_>, memory: Option<Memory>) -> AcceleratorCounters {
    let permille = |percent: u32| u64::from(percent.min(100)) * 10;
    let load = device.utilization_rates().ok();
    // Thousands of bytes per second, measured over 20 ms.
    let pcie = |counter| {
        let kilobytes = device.pcie_throughput(counter).ok()?;
        Some(u64::from(kilobytes) * 1000)
    };
    let errors = |kind| device.total_ecc_errors(kind, EccCounter::Volatile).ok();
    AcceleratorCounters {
        memory_total_bytes: memory.map(|memory| memory.total),
        memory_used_bytes: memory.map(Memory::used),
        utilisation_permille: load.as_ref().map(|load| permille(load.gpu)),
        memory_utilisation_permille: load.as_ref().map(|load| permille(load.memory)),
        power_mw: device.power_usage().ok().map(u64::from),
        power_limit_mw: device.enforced_power_limit().ok().map(u64::from),
        temperature_mc: device
            .temperature(TemperatureSensor::Gpu)
            .ok()
            .map(|degrees| u64::from(degrees) * 1000),
        energy_mj: device.total_energy_consumption().ok(),
        clock_mhz: device.clock_info(Clock::SM).ok().map(u64::from),
        memory_clock_mhz: device.clock_info(Clock::Memory).ok().map(u64::from),
        pcie_rx_bytes_per_s: pcie(PcieUtilCounter::Receive),
        pcie_tx_bytes_per_s: pcie(PcieUtilCounter::Send),
        encoder_permille: device
            .encoder_utilization()
            .ok()
            .map(|found| permille(found.utilization)),
        decoder_permille: device
            .decoder_utilization()
            .ok()
            .map(|found| permille(found.utilization)),
        ecc_corrected: errors(MemoryError::Corrected),
        ecc_uncorrected: errors(MemoryError::Uncorrected),
    }
}
