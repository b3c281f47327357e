"""What NVIDIA's own Python binding reads of NVML, as JSON: structures, names and constants are the binding's.

Usage: nvml_binding.py   (with the interpreter of tests/scripts/nvml-binding; the loader finds libnvidia-ml.so.1)

What the library does not support, or its binding can't find in it, is null.
"""

import ctypes
import json
import sys
import time

import pynvml as nvml

ABSENT = (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound)


def text(value):
    return value.decode() if isinstance(value, bytes) else value


def told(function, *arguments):
    try:
        return text(function(*arguments))
    except ABSENT:
        return None


def fields(structure, *names):
    return structure and {name: text(getattr(structure, name)) for name in names}


def pci(structure):
    return fields(structure, "busIdLegacy", "domain", "bus", "device", "pciDeviceId", "pciSubSystemId", "busId")


def memory(device):
    first, second = told(nvml.nvmlDeviceGetMemoryInfo, device), told(nvml.nvmlDeviceGetMemoryInfo, device, nvml.nvmlMemory_v2)
    return {"v1": fields(first, "total", "free", "used"), "v2": fields(second, "total", "reserved", "free", "used")}


def processes(device):
    forms = {
        "compute_v2": nvml.nvmlDeviceGetComputeRunningProcesses_v2,
        "compute_v3": nvml.nvmlDeviceGetComputeRunningProcesses_v3,
        "graphics_v2": nvml.nvmlDeviceGetGraphicsRunningProcesses_v2,
        "graphics_v3": nvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        "mps_v2": nvml.nvmlDeviceGetMPSComputeRunningProcesses_v2,
        "mps_v3": nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3,
    }
    all = {}
    for name, form in forms.items():
        listed = told(form, device)
        all[name] = listed and [fields(one, "pid", "usedGpuMemory", "gpuInstanceId", "computeInstanceId") for one in listed]
    return all


def fabric(device):
    """How far a device has come in joining its NVSwitches, by two forms of the call."""
    forms = {
        "v1": (nvml.nvmlDeviceGetGpuFabricInfo, nvml.c_nvmlGpuFabricInfo_t()),
        "v2": (nvml.nvmlDeviceGetGpuFabricInfoV, nvml.c_nvmlGpuFabricInfo_v2_t()),
    }
    all = {}
    for name, (form, into) in forms.items():
        answered = told(form, device, ctypes.byref(into)) is not None
        all[name] = fields(into, "state", "status") if answered else None
    return all


def samples(device, since=0):
    try:
        all = told(nvml.nvmlDeviceGetProcessUtilization, device, since)
    except nvml.NVMLError_NotFound:
        return []
    return all and [fields(one, "pid", "timeStamp", "smUtil", "memUtil", "encUtil", "decUtil") for one in all]


def field(device, number):
    [value] = told(nvml.nvmlDeviceGetFieldValues, device, [number]) or [None]
    if value is None or value.nvmlReturn:
        return None
    assert value.valueType == nvml.NVML_VALUE_TYPE_UNSIGNED_INT, value.valueType
    return value.value.uiVal


def links(device):
    all = []
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active = told(nvml.nvmlDeviceGetNvLinkState, device, link)
        except nvml.NVMLError_InvalidArgument:
            # It has no more.
            return all
        all.append(active and pci(nvml.nvmlDeviceGetNvLinkRemotePciInfo(device, link)))
    return all


def load(device, instance):
    """Shares of a GPU instance between two samples, by metric; null where the device tells none."""
    support = told(nvml.nvmlGpmQueryDeviceSupport, device)
    if not support or not support.isSupportedDevice:
        return None
    taken = [nvml.nvmlGpmSampleAlloc() for _ in range(2)]
    for sample in taken:
        nvml.nvmlGpmMigSampleGet(device, instance, sample)
        time.sleep(0.001)
    wanted = {
        "graphics": nvml.NVML_GPM_METRIC_GRAPHICS_UTIL,
        "processors": nvml.NVML_GPM_METRIC_SM_UTIL,
        "memory": nvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
        "fp64": nvml.NVML_GPM_METRIC_FP64_UTIL,
    }
    question = nvml.c_nvmlGpmMetricsGet_t(version=nvml.NVML_GPM_METRICS_GET_VERSION, numMetrics=len(wanted))
    question.sample1, question.sample2 = taken
    for place, metric in enumerate(wanted.values()):
        question.metrics[place].metricId = metric
    answers = nvml.nvmlGpmMetricsGet(question).metrics
    assert ctypes.sizeof(answers[0]) == 40, "an unsigned, a code, a double and three texts"
    found = {name: None if answers[place].nvmlReturn else answers[place].value for place, name in enumerate(wanted)}
    for sample in taken:
        nvml.nvmlGpmSampleFree(sample)
    return found


def part(device, number):
    try:
        instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(device, number)
    except nvml.NVMLError_NotFound:
        return None
    attributes = told(nvml.nvmlDeviceGetAttributes, instance)
    return {
        "uuid": text(nvml.nvmlDeviceGetUUID(instance)),
        "memory": memory(instance),
        "ids": [told(nvml.nvmlDeviceGetGpuInstanceId, instance), told(nvml.nvmlDeviceGetComputeInstanceId, instance)],
        "attributes": fields(attributes, "multiprocessorCount", "gpuInstanceSliceCount", "computeInstanceSliceCount", "memorySizeMB"),
        "processes": processes(instance),
        "load": load(device, nvml.nvmlDeviceGetGpuInstanceId(instance)),
    }


def whole(device, others):
    utilization = told(nvml.nvmlDeviceGetUtilizationRates, device)
    remapped = told(nvml.nvmlDeviceGetRemappedRows, device)
    parts = (part(device, number) for number in range(told(nvml.nvmlDeviceGetMaxMigDeviceCount, device) or 0))
    return {
        "uuid": text(nvml.nvmlDeviceGetUUID(device)),
        "name": text(nvml.nvmlDeviceGetName(device)),
        "minor": nvml.nvmlDeviceGetMinorNumber(device),
        "pci": pci(nvml.nvmlDeviceGetPciInfo(device)),
        "mig": nvml.nvmlDeviceGetMigMode(device),
        "drained": nvml.nvmlDeviceQueryDrainState(nvml.nvmlDeviceGetPciInfo(device)),
        "fabric": fabric(device),
        "parts": [found for found in parts if found],
        "cores": nvml.nvmlDeviceGetNumGpuCores(device),
        "capability": nvml.nvmlDeviceGetCudaComputeCapability(device),
        "memory": memory(device),
        "utilization": fields(utilization, "gpu", "memory"),
        "encoder": told(nvml.nvmlDeviceGetEncoderUtilization, device),
        "decoder": told(nvml.nvmlDeviceGetDecoderUtilization, device),
        "power_mw": nvml.nvmlDeviceGetPowerUsage(device),
        "power_limit_mw": nvml.nvmlDeviceGetEnforcedPowerLimit(device),
        "energy_mj": nvml.nvmlDeviceGetTotalEnergyConsumption(device),
        "temperature_c": nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
        "clock_mhz": nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM),
        "pcie_rx_kb_per_s": nvml.nvmlDeviceGetPcieThroughput(device, nvml.NVML_PCIE_UTIL_RX_BYTES),
        "pcie_tx_kb_per_s": nvml.nvmlDeviceGetPcieThroughput(device, nvml.NVML_PCIE_UTIL_TX_BYTES),
        "ecc_corrected": nvml.nvmlDeviceGetTotalEccErrors(device, nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_VOLATILE_ECC),
        "ecc_uncorrected": nvml.nvmlDeviceGetTotalEccErrors(device, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        "remapped_rows": remapped,
        "remapped_failure": field(device, nvml.NVML_FI_DEV_REMAPPED_FAILURE),
        "ways": [None if other == device else nvml.nvmlDeviceGetTopologyCommonAncestor(device, other) for other in others],
        "links": links(device),
        "processes": processes(device),
        "samples": samples(device),
        "samples_of_the_future": samples(device, 1 << 62),
    }


def events(devices):
    kinds = nvml.nvmlEventTypeXidCriticalError | nvml.nvmlEventTypeDoubleBitEccError
    chosen = nvml.nvmlEventSetCreate()
    for device in devices:
        nvml.nvmlDeviceRegisterEvents(device, kinds & nvml.nvmlDeviceGetSupportedEventTypes(device), chosen)
    names = {nvml.nvmlEventTypeXidCriticalError: "xid", nvml.nvmlEventTypeDoubleBitEccError: "ecc"}
    all = []
    while True:
        try:
            event = nvml.nvmlEventSetWait(chosen, 0)
        except nvml.NVMLError_Timeout:
            nvml.nvmlEventSetFree(chosen)
            return all
        uuid = text(nvml.nvmlDeviceGetUUID(event.device))
        all.append([uuid, names[event.eventType], event.eventData, event.gpuInstanceId, event.computeInstanceId])


def main():
    nvml.nvmlInit()
    devices = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    answer = {
        "driver": text(nvml.nvmlSystemGetDriverVersion()),
        "cuda": nvml.nvmlSystemGetCudaDriverVersion_v2(),
        "devices": [whole(device, devices) for device in devices],
        "events": events(devices),
        "error": str(nvml.NVMLError(nvml.NVML_ERROR_GPU_IS_LOST)),
    }
    nvml.nvmlShutdown()
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
