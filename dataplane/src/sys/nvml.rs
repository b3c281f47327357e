//! The two calls of NVML that its binding does not wrap: what the driver calls a MIG instance.
//!
//! In: the library and a device of it. Out: the ids below which the kernel driver lists the instance
//! in `/proc/driver/nvidia/capabilities`. Invariant: a library without these calls tells nothing.
//!
//! Source: NVIDIA's NVML API reference, "Multi Instance GPU Management".

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
