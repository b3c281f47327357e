// A stand-in for NVIDIA's management library: the real C ABI, devices out of a text file (devices.h says how). That it is the real one is
// what accelerator_nvml_binding finds: NVIDIA's own binding for Python reads everything here. BEFORE_510 leaves out what older drivers lack,
// BEFORE_520 the performance monitoring alone.
#include "devices.h"

#define BEGIN look(); if (!initialized) return UNINITIALIZED;
#define FAIL(device, part) { int bad = failing(__func__, device, part); if (bad) return bad; }
#define DEVICE BEGIN if (!d || !d->used) return INVALID; if (d->lost) return LOST; FAIL(d->index, d->part)
#define WHOLE DEVICE if (d->part >= 0) return NOT_SUPPORTED;
#define API __attribute__((visibility("default")))

API int nvmlInit_v2(void) { look(); if (init_code) return init_code; initialized = 1; return OK; }
API int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
API int nvmlShutdown(void) { initialized = 0; return OK; }
API const char *nvmlErrorString(int code) { (void)code; return "stand-in"; }
API int nvmlSystemGetDriverVersion(char *text, unsigned length) { BEGIN snprintf(text, length, "%s", driver); return OK; }
API int nvmlSystemGetNVMLVersion(char *text, unsigned length) { BEGIN snprintf(text, length, "12.%s", driver); return OK; }
API int nvmlSystemGetCudaDriverVersion_v2(int *version) { BEGIN *version = 12040; return OK; }
API int nvmlDeviceGetCount_v2(unsigned *count) { BEGIN FAIL(-1, -1) *count = 0; for (int i = 0; i < MAX; i++) if (devices[i].used) *count = i + 1; return OK; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **d) {
  BEGIN
  if (index >= MAX || !devices[index].used) return INVALID;
  if (devices[index].lost) return LOST;
  FAIL((int)index, -1)
  *d = &devices[index];
  return OK;
}
API int nvmlDeviceGetUUID(struct device *d, char *text, unsigned length) { DEVICE snprintf(text, length, "%s", d->uuid); return OK; }
API int nvmlDeviceGetName(struct device *d, char *text, unsigned length) { DEVICE snprintf(text, length, "%s", d->name); return OK; }
API int nvmlDeviceGetMinorNumber(struct device *d, unsigned *minor) { WHOLE *minor = d->minor; return OK; }
// The older structure has no field for what the driver keeps for itself: it is used there.
struct memory_v1 { u64 total, free, used; };
API int nvmlDeviceGetMemoryInfo(struct device *d, struct memory_v1 *m) { DEVICE if (d->nomem) return NOT_SUPPORTED; m->total = d->mem; m->free = d->mem - d->taken - d->reserved; m->used = d->taken + d->reserved; return OK; }
#ifndef BEFORE_510
struct memory { unsigned version; u64 total, reserved, free, used; };
API int nvmlDeviceGetMemoryInfo_v2(struct device *d, struct memory *m) {
  DEVICE
  if (d->nomem) return NOT_SUPPORTED;
  if (m->version != (sizeof *m | 2 << 24)) return WRONG_VERSION;
  m->total = d->mem; m->reserved = d->reserved; m->used = d->taken; m->free = d->mem - d->taken - d->reserved;
  return OK;
}
#endif
struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
static void fill(struct pci *p, const char *bus_id) {
  memset(p, 0, sizeof *p);
  sscanf(bus_id, "%x:%x:%x", &p->domain, &p->bus, &p->device);
  snprintf(p->bus_id, sizeof p->bus_id, "%s", bus_id);
  // With four digits of the domain, as it was before they were eight.
  snprintf(p->legacy, sizeof p->legacy, "%.12s", strlen(bus_id) > 12 ? bus_id + strlen(bus_id) - 12 : bus_id);
  p->id = 0x233010de, p->subsystem = 0x16c110de;
}
API int nvmlDeviceGetPciInfo_v3(struct device *d, struct pci *p) { WHOLE fill(p, d->pci); return OK; }
API int nvmlDeviceQueryDrainState(struct pci *p, unsigned *state) {
  BEGIN
  for (int i = 0; i < MAX; i++) {
    struct pci own;
    if (!devices[i].used || (fill(&own, devices[i].pci), own.domain != p->domain || own.bus != p->bus || own.device != p->device)) continue;
    FAIL(i, -1)
    *state = devices[i].drained;
    return OK;
  }
  return INVALID;
}
API int nvmlDeviceGetMigMode(struct device *d, unsigned *current, unsigned *pending) { WHOLE *current = *pending = d->mig; return OK; }
API int nvmlDeviceGetMaxMigDeviceCount(struct device *d, unsigned *count) { WHOLE *count = d->mig ? 7 : 0; return OK; }
API int nvmlDeviceGetMigDeviceHandleByIndex(struct device *d, unsigned index, struct device **part) {
  WHOLE
  for (int i = 0; i < MAX_PARTS; i++)
    if (parts[i].used && parts[i].index == d->index && parts[i].part == (int)index) { *part = &parts[i]; return OK; }
  return NOT_FOUND;
}
static int id_of(struct device *d, int id, unsigned *out) { if (d->part < 0 || d->gi < 0) return NOT_SUPPORTED; *out = id; return OK; }
API int nvmlDeviceGetGpuInstanceId(struct device *d, unsigned *id) { DEVICE return id_of(d, d->gi, id); }
API int nvmlDeviceGetComputeInstanceId(struct device *d, unsigned *id) { DEVICE return id_of(d, d->ci, id); }
struct attributes { unsigned sms, ce, dec, enc, jpeg, ofa, slices, ci_slices; u64 mb; };
API int nvmlDeviceGetAttributes_v2(struct device *d, struct attributes *a) {
  DEVICE
  if (d->part < 0) return NOT_SUPPORTED;
  memset(a, 0, sizeof *a);
  a->sms = d->sms, a->slices = d->slices, a->ci_slices = d->cslices, a->mb = d->mem >> 20;
  return OK;
}
API int nvmlDeviceGetNumGpuCores(struct device *d, unsigned *n) { WHOLE *n = d->sms * 128; return OK; }
API int nvmlDeviceGetCudaComputeCapability(struct device *d, int *major, int *minor) { WHOLE *major = 9; *minor = 0; return OK; }
struct utilization { unsigned gpu, memory; };
API int nvmlDeviceGetUtilizationRates(struct device *d, struct utilization *u) { WHOLE if (d->mig) return NOT_SUPPORTED; u->gpu = d->util; u->memory = d->util / 2; return OK; }
static int coder(int percent, unsigned *load, unsigned *us) { if (percent < 0) return NOT_SUPPORTED; *load = percent, *us = 167000; return OK; }
API int nvmlDeviceGetEncoderUtilization(struct device *d, unsigned *load, unsigned *us) { WHOLE return coder(d->enc, load, us); }
API int nvmlDeviceGetDecoderUtilization(struct device *d, unsigned *load, unsigned *us) { WHOLE return coder(d->dec, load, us); }
API int nvmlDeviceGetPowerUsage(struct device *d, unsigned *mw) { WHOLE *mw = d->power; return OK; }
API int nvmlDeviceGetEnforcedPowerLimit(struct device *d, unsigned *mw) { WHOLE *mw = 400000; return OK; }
API int nvmlDeviceGetTemperature(struct device *d, int sensor, unsigned *c) { WHOLE if (sensor) return INVALID; *c = d->temp; return OK; }
API int nvmlDeviceGetTotalEnergyConsumption(struct device *d, u64 *mj) { WHOLE *mj = 123456789; return OK; }
API int nvmlDeviceGetClockInfo(struct device *d, int clock, unsigned *mhz) { WHOLE *mhz = clock == 2 ? 2619 : 1980; return OK; }
API int nvmlDeviceGetPcieThroughput(struct device *d, int counter, unsigned *kb) { WHOLE *kb = counter ? 200 : 100; return OK; }
API int nvmlDeviceGetTotalEccErrors(struct device *d, int kind, int counter, u64 *n) { WHOLE *n = counter ? 9 : kind ? 1 : 2; return OK; }
struct process_info { unsigned pid; u64 mem; unsigned gi, ci; };
static int on(struct process *p, struct device *d) { return p->device == d->index && p->part == d->part; }
// Processes of a device that compute (0), draw (1) or compute by way of the Multi-Process Service (2); a divided device lists those of its parts, with the ids of these.
static int processes_of(const char *call, struct device *d, unsigned kind, unsigned *count, struct process_info *out) {
  unsigned room = *count, n = 0;
  if (d->part >= 0 && devices[d->index].nolist) return NOT_SUPPORTED;
  for (int i = 0; i < n_processes; i++) {
    struct process *p = &processes[i];
    if (p->mps ? kind != 2 : kind == 2 || (p->draws != 2 && p->draws != kind)) continue;
    struct device *of = device_of(p);
    if (!of || !(on(p, d) || (d->part < 0 && d->mig && p->device == d->index))) continue;
    int part = of->part >= 0 && of->gi >= 0;
    if (out && n < room) out[n] = (struct process_info){p->pid, p->mem, part ? (unsigned)of->gi : ~0u, part ? (unsigned)of->ci : ~0u};
    n++;
  }
  *count = n;
  return n > room || (out && has_grown(call)) ? TOO_SMALL : OK;
}
API int nvmlDeviceGetComputeRunningProcesses_v2(struct device *d, unsigned *count, struct process_info *out) { DEVICE return processes_of(__func__, d, 0, count, out); }
API int nvmlDeviceGetGraphicsRunningProcesses_v2(struct device *d, unsigned *count, struct process_info *out) { DEVICE return processes_of(__func__, d, 1, count, out); }
#ifndef BEFORE_510
API int nvmlDeviceGetComputeRunningProcesses_v3(struct device *d, unsigned *count, struct process_info *out) { DEVICE return processes_of(__func__, d, 0, count, out); }
API int nvmlDeviceGetGraphicsRunningProcesses_v3(struct device *d, unsigned *count, struct process_info *out) { DEVICE return processes_of(__func__, d, 1, count, out); }
API int nvmlDeviceGetMPSComputeRunningProcesses_v3(struct device *d, unsigned *count, struct process_info *out) { DEVICE return processes_of(__func__, d, 2, count, out); }
#endif
API int nvmlDeviceGetMPSComputeRunningProcesses_v2(struct device *d, unsigned *count, struct process_info *out) { DEVICE return processes_of(__func__, d, 2, count, out); }
struct sample { unsigned pid; u64 at; unsigned sm, mem, enc, dec; };
API int nvmlDeviceGetProcessUtilization(struct device *d, struct sample *out, unsigned *count, u64 since) {
  WHOLE
  if (d->noutil || d->mig) return NOT_SUPPORTED;
  unsigned room = *count, n = 0;
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  u64 now = (u64)t.tv_sec * 1000000 + t.tv_nsec / 1000;
  for (int i = 0; i < n_processes; i++) {
    struct process *p = &processes[i];
    if (!on(p, d) || now <= since || p->mps == 2) continue;
    // A sample per process and moment; its memory is the share of time in which memory was read or written.
    if (out && n < room) out[n] = (struct sample){p->pid, now, p->sm, p->sm / 4, p->enc, p->dec};
    n++;
  }
  *count = n;
  if (!n) return NOT_FOUND;
  return !out || n > room || has_grown(__func__) ? TOO_SMALL : OK;
}
// BEFORE_510 stands for drivers that do not know of fabrics either.
#ifndef BEFORE_510
struct fabric { unsigned char cluster[16]; unsigned status, clique; unsigned char state; };
API int nvmlDeviceGetGpuFabricInfo(struct device *d, struct fabric *f) {
  WHOLE
  memset(f, 0, sizeof *f);
  f->state = d->fabric, f->status = d->fabric_status;
  return OK;
}
struct fabric_v { unsigned version; struct { unsigned char cluster[16]; unsigned status, clique; unsigned char state; } of; unsigned health; };
API int nvmlDeviceGetGpuFabricInfoV(struct device *d, struct fabric_v *f) {
  WHOLE
  if (f->version != (sizeof *f | 2 << 24)) return WRONG_VERSION;
  memset(&f->of, 0, sizeof f->of);
  f->of.state = d->fabric, f->of.status = d->fabric_status, f->health = 0;
  return OK;
}
#endif
API int nvmlEventSetCreate(void **set) { BEGIN *set = &told; return OK; }
API int nvmlEventSetFree(void *set) { (void)set; return OK; }
// Faults, and errors of two bits where there is such memory; asked for more, a device refuses.
static u64 kinds_of(struct device *d) { return d->noecc ? 8 : 8 | 2; }
static u64 registered[MAX];
API int nvmlDeviceGetSupportedEventTypes(struct device *d, u64 *kinds) { WHOLE *kinds = kinds_of(d); return OK; }
API int nvmlDeviceRegisterEvents(struct device *d, u64 kinds, void *set) { (void)set; WHOLE if (kinds & ~kinds_of(d)) return NOT_SUPPORTED; registered[d->index] |= kinds; return OK; }
struct event { struct device *device; u64 type, data; unsigned gi, ci; };
API int nvmlEventSetWait_v2(void *set, struct event *e, unsigned ms) {
  (void)set; (void)ms;
  BEGIN
  for (int i = 0; i < n_faults; i++)
    if (faults[i].serial > told && (registered[faults[i].device] & faults[i].type)) {
      told = faults[i].serial;
      memset(e, 0, sizeof *e);
      e->device = &devices[faults[i].device], e->type = faults[i].type, e->data = faults[i].code;
      e->gi = e->ci = ~0u;
      return OK;
    }
  return TIMEOUT;
}
API int nvmlDeviceGetTopologyCommonAncestor(struct device *d, struct device *other, int *level) {
  WHOLE
  if (!other || !other->used || other == d) return INVALID;
  *level = 50;
  for (int i = 0; i < n_paths; i++)
    if ((paths[i].a == d->index && paths[i].b == other->index) || (paths[i].b == d->index && paths[i].a == other->index)) *level = paths[i].level;
  return OK;
}
static const char *link_of(struct device *d, unsigned link, int *any) {
  const char *bus = NULL;
  *any = 0;
  for (int i = 0; i < n_links; i++)
    if (links[i].device == d->index) { *any = 1; if (links[i].link == (int)link) bus = links[i].bus; }
  return bus;
}
API int nvmlDeviceGetNvLinkState(struct device *d, unsigned link, unsigned *active) {
  int any;
  WHOLE
  if (link >= 18) return INVALID;
  const char *bus = link_of(d, link, &any);
  if (!any) return NOT_SUPPORTED;
  *active = bus && strcmp(bus, "-");
  return OK;
}
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(struct device *d, unsigned link, struct pci *p) {
  int any;
  WHOLE
  const char *bus = link >= 18 ? NULL : link_of(d, link, &any);
  if (!bus) return INVALID;
  fill(p, bus);
  return OK;
}
API int nvmlDeviceGetRemappedRows(struct device *d, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
  WHOLE
  *corrected = *uncorrected = *pending = 0, *failed = d->norows;
  return OK;
}
struct field { unsigned id, scope; long long at, latency; int type, code; union { double d; unsigned u; u64 big; } value; };
API int nvmlDeviceGetFieldValues(struct device *d, int count, struct field *fields) {
  WHOLE
  for (int i = 0; i < count; i++) {
    fields[i].code = fields[i].id == 145 ? OK : NOT_SUPPORTED; // NVML_FI_DEV_REMAPPED_FAILURE
    fields[i].type = 1;
    fields[i].value.u = d->norows;
  }
  return OK;
}

#if !defined BEFORE_510 && !defined BEFORE_520
// Performance monitoring: shares between two samples, here those of the later one.
struct sample_of { struct device *device; int gi; u64 at; double gr, smu, dram; };
static int samples_taken;
struct gpm_support { unsigned version, supported; };
API int nvmlGpmQueryDeviceSupport(struct device *d, struct gpm_support *s) {
  WHOLE
  if (s->version != 1) return WRONG_VERSION;
  s->supported = d->gpm;
  return OK;
}
API int nvmlGpmSampleAlloc(struct sample_of **sample) {
  BEGIN
  FAIL(-1, -1)
  if (samples_taken >= n_samples) return NO_MEMORY;
  samples_taken++;
  *sample = calloc(1, sizeof **sample);
  return OK;
}
API int nvmlGpmSampleFree(struct sample_of *sample) {
  if (!sample) return INVALID;
  samples_taken--;
  free(sample);
  return OK;
}
API int nvmlGpmMigSampleGet(struct device *d, unsigned gi, struct sample_of *sample) {
  WHOLE
  if (!d->gpm || !d->mig) return NOT_SUPPORTED;
  for (int i = 0; i < MAX_PARTS; i++)
    if (parts[i].used && parts[i].index == d->index && parts[i].gi == (int)gi) {
      *sample = (struct sample_of){d, (int)gi, now_ns(), parts[i].gr, parts[i].smu, parts[i].dram};
      return OK;
    }
  return INVALID;
}
struct metric { unsigned id; int code; double value; struct { const char *name, *long_name, *unit; } about; };
struct metrics { unsigned version, count; struct sample_of *before, *now; struct metric all[210]; };
API int nvmlGpmMetricsGet(struct metrics *m) {
  BEGIN
  if (m->version != 1) return WRONG_VERSION;
  if (!m->before || !m->now || !m->before->at || m->count > 210) return INVALID;
  if (m->before->device != m->now->device || m->before->gi != m->now->gi || m->before->at >= m->now->at) return INVALID;
  FAIL(m->now->device->index, -1)
  for (unsigned i = 0; i < m->count; i++) {
    struct metric *one = &m->all[i];
    one->value = one->id == 1 ? m->now->gr : one->id == 2 ? m->now->smu : one->id == 10 ? m->now->dram : -1;
    one->code = one->value < 0 ? NOT_SUPPORTED : OK;
    one->about.name = one->about.long_name = "share", one->about.unit = "%";
  }
  return OK;
}
#endif
