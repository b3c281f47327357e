//! The calls of NVML that its binding does not wrap: what the driver calls a MIG instance, the memory
//! of a device as drivers before 510 tell it, and whether it has joined its fabric of NVSwitches.
//!
//! In: the library and a device of it. Out: the ids below which the kernel driver lists the instance
//! in `/proc/driver/nvidia/capabilities`; memory; how far it has come in joining. Invariant: a library
//! without these calls tells nothing.
//!
//! Source: NVIDIA's NVML API reference, "Multi Instance GPU Management" and "Device Queries".

use std::mem::MaybeUninit;

use nvml_wrapper::error::{NvmlError, nvml_try};
use nvml_wrapper::{Device, Nvml};
use shared::observed::MigInstance;

/// nvml.h, `nvmlGpuFabricState_t`.
const FABRIC_NOT_STARTED: u8 = 1;
const FABRIC_IN_PROGRESS: u8 = 2;
const FABRIC_COMPLETED: u8 = 3;
/// nvml.h, `nvmlGpuFabricInfo_v2`: a structure's size and version.
const FABRIC_INFO_2: u32 = 36 | 2 << 24;
/// nvml.h, `NVML_ERROR_ARGUMENT_VERSION_MISMATCH`.
const VERSION_MISMATCH: u32 = 25;

/// Ids of an instance; `None` when it is none, or the driver does not tell.
pub fn mig_instance<'nvml>(nvml: &'nvml Nvml, device: &Device<'nvml>) -> Option<MigInstance> {
    let library = nvml.lib();
    let of_gpu = library.nvmlDeviceGetGpuInstanceId.as_ref().ok()?;
    let of_compute = library.nvmlDeviceGetComputeInstanceId.as_ref().ok()?;
    // SAFETY: the handle is the library's own and stays valid as long as `nvml` is borrowed; it is
    // passed to the same library below, and kept nowhere.
    let handle = unsafe { device.handle() };
    // SAFETY: a function of the library that `nvml` holds open, with a handle of that library. It
    // writes one unsigned int, and keeps no pointer.
    let (gpu_told, gpu) = unsafe { ask(*of_gpu, handle, |_| ()) };
    // SAFETY: as above.
    let (compute_told, compute) = unsafe { ask(*of_compute, handle, |_| ()) };
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
    // SAFETY: the handle is the library's own and stays valid as long as `nvml` is borrowed; it is
    // passed to the same library below, and kept nowhere.
    let handle = unsafe { device.handle() };
    // SAFETY: a function of the library that `nvml` holds open, with a handle of that library. It fills
    // three numbers, in the layout of the binding's headers, and keeps no pointer.
    let (code, memory) = unsafe { ask(*call, handle, |_| ()) };
    nvml_try(code)?;
    Ok((memory.total, memory.free))
}

/// What a device says of the fabric of NVSwitches it is wired to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fabric {
    /// There is none, or the driver does not tell.
    None,
    /// It has not been registered there (yet).
    NotJoined,
    /// It is registered there.
    Joined,
    /// Its registration has failed, with this code of NVML.
    Failed(u32),
}

impl Fabric {
    fn told(code: u32, state: u8, status: u32) -> Result<Self, NvmlError> {
        match nvml_try(code) {
            Ok(()) => {}
            Err(NvmlError::NotSupported | NvmlError::FunctionNotFound) => return Ok(Self::None),
            Err(err) => return Err(err),
        }
        Ok(match (state, status) {
            (FABRIC_NOT_STARTED | FABRIC_IN_PROGRESS, _) => Self::NotJoined,
            // Only then the status is one.
            (FABRIC_COMPLETED, 0) => Self::Joined,
            (FABRIC_COMPLETED, status) => Self::Failed(status),
            // Not supported, or what only a later driver knows: that is no fault.
            _ => Self::None,
        })
    }
}

/// Whether a device is registered with its fabric.
///
/// # Errors
/// As the driver says. A library or device without the call is of no fabric.
pub fn fabric<'nvml>(nvml: &'nvml Nvml, device: &Device<'nvml>) -> Result<Fabric, NvmlError> {
    // SAFETY: the handle is the library's own and stays valid as long as `nvml` is borrowed; it is
    // passed to the same library below, and kept nowhere.
    let handle = unsafe { device.handle() };
    let library = nvml.lib();
    if let Ok(call) = library.nvmlDeviceGetGpuFabricInfoV.as_ref() {
        // SAFETY: a function of the library that `nvml` holds open, with a handle of that library. Its
        // structure is of bytes and numbers; it fills the version that is named, which has the layout of
        // the binding's headers up to a field that the next one adds, for which there is room.
        let (code, told) = unsafe { ask(*call, handle, |told| told.version = FABRIC_INFO_2) };
        if code != VERSION_MISMATCH {
            return Fabric::told(code, told.state, told.status);
        }
    }
    // Drivers before 535; later ones will not have it.
    let Ok(call) = library.nvmlDeviceGetGpuFabricInfo.as_ref() else {
        return Ok(Fabric::None);
    };
    // SAFETY: as above, with a structure that has one version only.
    let (code, told) = unsafe { ask(*call, handle, |_| ()) };
    Fabric::told(code, told.state, told.status)
}

/// What a call fills, and its code. `begin` says in the structure what the call wants to know.
///
/// # Safety
/// `call` takes this handle, fills no more than a `T`, of which all bits mean something, and keeps no
/// pointer.
unsafe fn ask<H, T>(
    call: unsafe extern "C" fn(H, *mut T) -> u32,
    handle: H,
    begin: impl FnOnce(&mut T),
) -> (u32, T) {
    // SAFETY: by the contract all bits mean something, zeros too.
    let mut told = unsafe { MaybeUninit::<T>::zeroed().assume_init() };
    begin(&mut told);
    // SAFETY: by the contract; the structure is of this frame, and nothing else refers to it.
    let code = unsafe { call(handle, &raw mut told) };
    (code, told)
}
