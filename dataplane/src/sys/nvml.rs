//! The calls of NVML that its binding does not wrap: what the driver calls a MIG instance, and the
//! memory of a device as drivers before 510 tell it.
//!
//! In: the library and a device of it. Out: the ids below which the kernel driver lists the instance
//! in `/proc/driver/nvidia/capabilities`; memory. Invariant: a library without these calls tells nothing.
//!
//! Source: NVIDIA's NVML API reference, "Multi Instance GPU Management" and "Device Queries".

use std::mem::MaybeUninit;

use nvml_wrapper::error::{NvmlError, nvml_try};
use nvml_wrapper::{Device, Nvml};
use shared::observed::MigInstance;

/// Ids of an instance; `None` when it is none, or the driver does not tell.
pub fn mig_instance<'nvml>(nvml: &'nvml Nvml, device: &Device<'nvml>) -> Option<MigInstance> {
    let library = nvml.lib();
    let of_gpu = library.nvmlDeviceGetGpuInstanceId.as_ref().ok()?;
    let of_compute = library.nvmlDeviceGetComputeInstanceId.as_ref().ok()?;
    // SAFETY: the handle is the library's own and stays valid as long as `nvml` is borrowed; it is
    // passed to the same library below, and kept nowhere.
    let handle = unsafe { device.handle() };
    let (mut gpu, mut compute) = (0, 0);
    // SAFETY: a function of the library that `nvml` holds open, with a handle of that library. It
    // writes one unsigned int, into a variable of this frame that nothing else refers to, and keeps
    // no pointer.
    let gpu_told = unsafe { of_gpu(handle, &raw mut gpu) };
    // SAFETY: as above.
    let compute_told = unsafe { of_compute(handle, &raw mut compute) };
    ((gpu_told, compute_told) == (0, 0)).then_some(MigInstance { gpu, compute })
}

/// Total and free memory, bytes, by the first form of the call, which every driver knows.
///
/// # Errors
/// As the driver says; also when its library has no such call.
pub fn memory_v1<'nvml>(
    nvml: &'nvml Nvml,
    device: &Device<'nvml>,
) -> Result<(u64, u64), NvmlError> {
    let call = nvml.lib().nvmlDeviceGetMemoryInfo.as_ref();
    let call = call.map_err(|err| NvmlError::FailedToLoadSymbol(err.to_string()))?;
    let mut memory = MaybeUninit::zeroed();
    // SAFETY: the handle is the library's own and stays valid as long as `nvml` is borrowed; it is
    // passed to the same library below, and kept nowhere.
    let handle = unsafe { device.handle() };
    // SAFETY: a function of the library that `nvml` holds open, with a handle of that library. It fills
    // the structure, which has the layout of the binding's headers and is of this frame, and keeps no
    // pointer.
    nvml_try(unsafe { call(handle, memory.as_mut_ptr()) })?;
    // SAFETY: three numbers, for which all bits mean something; they were zero before the call.
    let memory = unsafe { memory.assume_init() };
    Ok((memory.total, memory.free))
}
