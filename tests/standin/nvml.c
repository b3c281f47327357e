// A stand-in for NVIDIA's management library: the real C ABI, devices out of a text file.
//
// NVML_STANDIN names the file; it is read at every call, so a test changes devices by replacing it.
//   driver 550.1                     version of the driver
//   init 9                           nvmlInit answers this code (9: driver not loaded)
//   uninitialized                    the library has lost its driver: it has to be initialized again
//   hang                             every call waits until the line is gone
//   device N uuid=... [name=... mem=BYTES used=BYTES reserved=BYTES util=PERCENT power=MW temp=C pci=... sms=N mig=1 lost=1 noutil=1 norows=1 enc=PERCENT dec=PERCENT]
//   part N I uuid=... [mem= used= sms= slices= gi= ci=]   instance I of device N; without gi the driver does not tell its ids
//   process N pid=P mem=BYTES [sm=PERCENT part=I]    a process on device N
//   xid N CODE SERIAL                a fault of device N, told once per serial number
//   ecc N SERIAL                     its memory has an error of two bits, told in the same way
//   path A B LEVEL                   what lies between two devices (nvmlGpuTopologyLevel_t; 50, the whole system, if not said)
//   link N L BUS                     NVLink L of device N leads to the device or switch BUS; "-": it is down
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15 };
enum { MAX = 64, MAX_PARTS = 256 };
typedef unsigned long long u64;

struct device { int used, index, part, mig, lost, noutil, gi, ci, enc, dec; char uuid[80], name[96], pci[32]; u64 mem, taken, reserved; unsigned norows, util, power, temp, sms, slices; };
struct process { int device, part; unsigned pid, sm; u64 mem; };
static struct device devices[MAX], parts[MAX_PARTS];
static struct process processes[256];
static int n_processes, initialized, init_code;
static char driver[80];
static struct { int device; u64 type, code, serial; } faults[16];
static int n_faults;
static struct { int a, b, level; } paths[MAX * MAX];
static struct { int device, link; char bus[32]; } links[MAX * 18];
static int n_paths, n_links;
static u64 told;

static char *field(char *line, const char *key, char *out, size_t size) {
  char pattern[32];
  snprintf(pattern, sizeof pattern, " %s=", key);
  char *at = strstr(line, pattern);
  if (!at) return NULL;
  at += strlen(pattern);
  size_t n = strcspn(at, " \n");
  if (n >= size) n = size - 1;
  memcpy(out, at, n);
  out[n] = 0;
  return out;
}
static u64 number(char *line, const char *key, u64 otherwise) {
  char text[32];
  return field(line, key, text, sizeof text) ? strtoull(text, NULL, 10) : otherwise;
}
static void describe(struct device *d, char *line, int index, int part) {
  memset(d, 0, sizeof *d);
  d->used = 1, d->index = index, d->part = part;
  field(line, "uuid", d->uuid, sizeof d->uuid);
  if (!field(line, "name", d->name, sizeof d->name)) strcpy(d->name, "Stand-in");
  for (char *c = d->name; *c; c++) if (*c == '_') *c = ' ';
  field(line, "pci", d->pci, sizeof d->pci);
  d->mem = number(line, "mem", 1ull << 30), d->taken = number(line, "used", 0), d->reserved = number(line, "reserved", 0);
  d->norows = number(line, "norows", 0);
  d->util = number(line, "util", 0), d->power = number(line, "power", 50000), d->temp = number(line, "temp", 40);
  d->sms = number(line, "sms", 16), d->slices = number(line, "slices", 1);
  d->mig = number(line, "mig", 0), d->lost = number(line, "lost", 0), d->noutil = number(line, "noutil", 0);
  d->gi = (int)number(line, "gi", -1), d->ci = (int)number(line, "ci", 0);
  d->enc = (int)number(line, "enc", -1), d->dec = (int)number(line, "dec", -1);
}

// Reads the file; waits while it says so.
static void look(void) {
  for (;;) {
    int hang = 0, np = 0;
    const char *path = getenv("NVML_STANDIN");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return;
    char line[512];
    memset(devices, 0, sizeof devices), memset(parts, 0, sizeof parts);
    n_processes = n_faults = n_paths = n_links = init_code = 0;
    strcpy(driver, "550.54.15");
    while (fgets(line, sizeof line, file)) {
      int a = 0, b = 0, c = 0;
      char bus[32];
      u64 code, serial;
      if (!strncmp(line, "hang", 4)) hang = 1;
      else if (!strncmp(line, "uninitialized", 13)) initialized = 0;
      else if (sscanf(line, "driver %79s", driver) == 1) {}
      else if (sscanf(line, "init %d", &init_code) == 1) {}
      else if (sscanf(line, "device %d", &a) == 1 && a >= 0 && a < MAX) describe(&devices[a], line, a, -1);
      else if (sscanf(line, "part %d %d", &a, &b) == 2 && np < MAX_PARTS) describe(&parts[np++], line, a, b);
      else if (sscanf(line, "process %d", &a) == 1 && n_processes < 256)
        processes[n_processes++] = (struct process){a, (int)number(line, "part", -1), number(line, "pid", 0), number(line, "sm", 0), number(line, "mem", 0)};
      else if (sscanf(line, "xid %d %llu %llu", &a, &code, &serial) == 3 && n_faults < 16)
        faults[n_faults].device = a, faults[n_faults].type = 8, faults[n_faults].code = code, faults[n_faults].serial = serial, n_faults++;
      else if (sscanf(line, "ecc %d %llu", &a, &serial) == 2 && n_faults < 16)
        faults[n_faults].device = a, faults[n_faults].type = 2, faults[n_faults].code = 0, faults[n_faults].serial = serial, n_faults++;
      else if (sscanf(line, "path %d %d %d", &a, &b, &c) == 3 && n_paths < MAX * MAX)
        paths[n_paths].a = a, paths[n_paths].b = b, paths[n_paths].level = c, n_paths++;
      else if (sscanf(line, "link %d %d %31s", &a, &b, bus) == 3 && n_links < MAX * 18)
        links[n_links].device = a, links[n_links].link = b, strcpy(links[n_links].bus, bus), n_links++;
    }
    fclose(file);
    if (!hang) return;
    usleep(20000);
  }
}

#define BEGIN look(); if (!initialized) return UNINITIALIZED;
#define DEVICE BEGIN if (!d || !d->used) return INVALID; if (d->lost) return LOST;
#define WHOLE DEVICE if (d->part >= 0) return NOT_SUPPORTED;
#define API __attribute__((visibility("default")))

API int nvmlInit_v2(void) { look(); if (init_code) return init_code; initialized = 1; return OK; }
API int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
API int nvmlShutdown(void) { initialized = 0; return OK; }
API const char *nvmlErrorString(int code) { (void)code; return "stand-in"; }
API int nvmlSystemGetDriverVersion(char *text, unsigned length) { BEGIN snprintf(text, length, "%s", driver); return OK; }
API int nvmlSystemGetNVMLVersion(char *text, unsigned length) { BEGIN snprintf(text, length, "12.%s", driver); return OK; }
API int nvmlSystemGetCudaDriverVersion_v2(int *version) { BEGIN *version = 12040; return OK; }
API int nvmlDeviceGetCount_v2(unsigned *count) { BEGIN *count = 0; for (int i = 0; i < MAX; i++) if (devices[i].used) *count = i + 1; return OK; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **d) {
  BEGIN
  if (index >= MAX || !devices[index].used) return INVALID;
  if (devices[index].lost) return LOST;
  *d = &devices[index];
  return OK;
}
API int nvmlDeviceGetUUID(struct device *d, char *text, unsigned length) { DEVICE snprintf(text, length, "%s", d->uuid); return OK; }
API int nvmlDeviceGetName(struct device *d, char *text, unsigned length) { DEVICE snprintf(text, length, "%s", d->name); return OK; }
API int nvmlDeviceGetMinorNumber(struct device *d, unsigned *minor) { WHOLE *minor = d->index; return OK; }
struct memory { unsigned version; u64 total, reserved, free, used; };
API int nvmlDeviceGetMemoryInfo_v2(struct device *d, struct memory *m) { DEVICE m->total = d->mem; m->reserved = d->reserved; m->used = d->taken; m->free = d->mem - d->taken - d->reserved; return OK; }
struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
API int nvmlDeviceGetPciInfo_v3(struct device *d, struct pci *p) { WHOLE memset(p, 0, sizeof *p); snprintf(p->bus_id, sizeof p->bus_id, "%s", d->pci); return OK; }
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
  a->sms = d->sms, a->slices = a->ci_slices = d->slices, a->mb = d->mem >> 20;
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
API int nvmlDeviceGetComputeRunningProcesses_v3(struct device *d, unsigned *count, struct process_info *out) {
  DEVICE
  unsigned room = *count, n = 0;
  for (int i = 0; i < n_processes; i++)
    if (on(&processes[i], d)) {
      if (out && n < room) out[n] = (struct process_info){processes[i].pid, processes[i].mem, 0, 0};
      n++;
    }
  *count = n;
  return n > room ? TOO_SMALL : OK;
}
API int nvmlDeviceGetGraphicsRunningProcesses_v3(struct device *d, unsigned *count, struct process_info *out) { (void)out; DEVICE *count = 0; return OK; }
struct sample { unsigned pid; u64 at; unsigned sm, mem, enc, dec; };
API int nvmlDeviceGetProcessUtilization(struct device *d, struct sample *out, unsigned *count, u64 since) {
  static u64 now = 1000;
  WHOLE
  if (d->noutil || d->mig) return NOT_SUPPORTED;
  unsigned room = *count, n = 0;
  (void)since;
  for (int i = 0; i < n_processes; i++)
    if (on(&processes[i], d)) {
      if (out && n < room) out[n] = (struct sample){processes[i].pid, ++now, processes[i].sm, 0, 0, 0};
      n++;
    }
  *count = n;
  if (!n) return NOT_FOUND;
  return !out || n > room ? TOO_SMALL : OK;
}
API int nvmlEventSetCreate(void **set) { BEGIN *set = &told; return OK; }
API int nvmlEventSetFree(void *set) { (void)set; return OK; }
API int nvmlDeviceRegisterEvents(struct device *d, u64 kinds, void *set) { (void)kinds; (void)set; WHOLE return OK; }
struct event { struct device *device; u64 type, data; unsigned gi, ci; };
API int nvmlEventSetWait_v2(void *set, struct event *e, unsigned ms) {
  (void)set; (void)ms;
  BEGIN
  for (int i = 0; i < n_faults; i++)
    if (faults[i].serial > told) {
      told = faults[i].serial;
      memset(e, 0, sizeof *e);
      e->device = &devices[faults[i].device], e->type = faults[i].type, e->data = faults[i].code;
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
  memset(p, 0, sizeof *p);
  snprintf(p->bus_id, sizeof p->bus_id, "%s", bus);
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
