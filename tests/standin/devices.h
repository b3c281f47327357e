// The devices of a stand-in machine, out of a text file, for all that stand in for NVIDIA's driver here.
//
// NVML_STANDIN names the file; it is read at every call, so a test changes devices by replacing it.
//   driver 550.1                     version of the driver
//   init 9                           nvmlInit answers this code (9: driver not loaded)
//   uninitialized                    the library has lost its driver: it has to be initialized again
//   hang                             every call waits until the line is gone
//   hangs CALL                       the call of this name does
//   slow MS                          every call takes so long
//   fails CALL N CODE [PART]         the call answers this code for device N (-1: all of them), or for an instance of it only (-1: for itself only)
//   grows CALL N                     the list has grown whenever it is read, N times of N + 1
//   samples N                        there is room for so many samples of the performance monitoring (64)
//   device N uuid=... [name=... mem=BYTES used=BYTES reserved=BYTES util=PERCENT power=MW temp=C pci=... minor=N sms=N mig=1 lost=1 noutil=1 norows=1 enc=PERCENT dec=PERCENT nolist=1 nomem=1 gpm=1 noecc=1 drained=1 fabric=STATE fabric_status=CODE]
//                                    fabric: how far it has come in joining its NVSwitches (nvmlGpuFabricState_t; 0, none, if not said)
//   part N I uuid=... [name= mem= used= sms= slices= cslices= gi= ci= gr=PERCENT smu=PERCENT dram=PERCENT]   instance I of device N; without gi the
//                                    driver does not tell its ids; gr, smu and dram are what its GPU instance does, told where the device has gpm
//                                    nolist: instances do not tell their processes, only the whole device does
//   process N pid=P mem=BYTES [sm=PERCENT enc=PERCENT dec=PERCENT part=I draws=1|2 mps=1|2]    a process on device N; draws 1: it draws, 2: and
//                                    computes too; mps: it computes by way of the Multi-Process Service, 2: and nobody samples its load
//   xid N CODE SERIAL                a fault of device N, told once per serial number
//   ecc N SERIAL                     its memory has an error of two bits, told in the same way
//   path A B LEVEL                   what lies between two devices (nvmlGpuTopologyLevel_t; 50, the whole system, if not said)
//   link N L BUS                     NVLink L of device N leads to the device or switch BUS; "-": it is down
//
// Programs that compute (cuda.c) are lines of the same form in files of the directory NVML_STANDIN.d, counted as long as they live; what
// they use comes on top of what the file says of their device.
//   process N pid=P mem=BYTES sm=PERCENT part=I until=NS    busy until then, of the monotonic clock
#pragma once
#define _GNU_SOURCE
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15, NO_MEMORY = 20, WRONG_VERSION = 25 };
enum { MAX = 96, MAX_PARTS = 256, MAX_PROCESSES = 256 };
typedef unsigned long long u64;

struct device { int used, index, part, mig, lost, noutil, nolist, nomem, gpm, noecc, drained, fabric, fabric_status, gi, ci, enc, dec; double gr, smu, dram; char uuid[80], name[96], pci[32]; u64 mem, taken, reserved; unsigned norows, minor, util, power, temp, sms, slices, cslices; };
struct process { int device, part; unsigned pid, sm, enc, dec, draws, mps; u64 mem; };
static struct device devices[MAX], parts[MAX_PARTS];
static struct process processes[MAX_PROCESSES];
static int n_processes, initialized, init_code;
static char driver[80];
static struct { int device; u64 type, code, serial; } faults[16];
static int n_faults;
static struct { int a, b, level; } paths[MAX * MAX];
static struct { int device, link; char bus[32]; } links[MAX * 18];
static int n_paths, n_links;
static struct { char call[64]; int device, code, part; } failures[16];
static struct { char call[64]; int times, left; } growing[4];
static char hanging[64];
static int n_failures, n_growing, n_samples;
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
static double share_of(char *line, const char *key) {
  char text[32];
  return field(line, key, text, sizeof text) ? strtod(text, NULL) : -1;
}
static void describe(struct device *d, char *line, int index, int part) {
  memset(d, 0, sizeof *d);
  d->used = 1, d->index = index, d->part = part;
  field(line, "uuid", d->uuid, sizeof d->uuid);
  if (!field(line, "name", d->name, sizeof d->name)) strcpy(d->name, "Stand-in");
  for (char *c = d->name; *c; c++) if (*c == '_') *c = ' ';
  field(line, "pci", d->pci, sizeof d->pci);
  d->mem = number(line, "mem", 1ull << 30), d->taken = number(line, "used", 0), d->reserved = number(line, "reserved", 0);
  d->norows = number(line, "norows", 0), d->minor = number(line, "minor", index);
  d->util = number(line, "util", 0), d->power = number(line, "power", 50000), d->temp = number(line, "temp", 40);
  d->sms = number(line, "sms", 16), d->slices = number(line, "slices", 1);
  d->mig = number(line, "mig", 0), d->lost = number(line, "lost", 0), d->noutil = number(line, "noutil", 0);
  d->nolist = number(line, "nolist", 0), d->nomem = number(line, "nomem", 0), d->gpm = number(line, "gpm", 0);
  d->noecc = number(line, "noecc", 0), d->drained = number(line, "drained", 0);
  d->fabric = number(line, "fabric", 0), d->fabric_status = number(line, "fabric_status", 0);
  d->cslices = number(line, "cslices", d->slices);
  d->gr = share_of(line, "gr"), d->smu = share_of(line, "smu"), d->dram = share_of(line, "dram");
  d->gi = (int)number(line, "gi", -1), d->ci = (int)number(line, "ci", 0);
  d->enc = (int)number(line, "enc", -1), d->dec = (int)number(line, "dec", -1);
}

static u64 now_ns(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (u64)t.tv_sec * 1000000000 + t.tv_nsec; }

// The device that computes for a process.
static struct device *device_of(struct process *p) {
  if (p->device < 0 || p->device >= MAX || !devices[p->device].used) return NULL;
  if (p->part < 0) return &devices[p->device];
  for (int i = 0; i < MAX_PARTS; i++) if (parts[i].used && parts[i].index == p->device && parts[i].part == p->part) return &parts[i];
  return NULL;
}
static struct process *add_process(char *line, int device) {
  if (n_processes == MAX_PROCESSES) return NULL;
  struct process *p = &processes[n_processes++];
  *p = (struct process){device, (int)number(line, "part", -1), number(line, "pid", 0), number(line, "sm", 0), number(line, "enc", 0), number(line, "dec", 0), number(line, "draws", 0), number(line, "mps", 0), number(line, "mem", 0)};
  if (now_ns() > number(line, "until", ~0ull)) p->sm = 0;
  return p;
}

// Adds the programs that compute.
static void add_running(const char *path) {
  char name[4096], line[512];
  snprintf(name, sizeof name, "%s.d", path);
  DIR *all = opendir(name);
  if (!all) return;
  for (struct dirent *one; (one = readdir(all));) {
    int device;
    if (strspn(one->d_name, "0123456789") != strlen(one->d_name)) continue;
    snprintf(name, sizeof name, "%s.d/%.32s", path, one->d_name);
    FILE *file = fopen(name, "r");
    if (!file) continue;
    if (fgets(line, sizeof line, file) && sscanf(line, "process %d", &device) == 1 && !kill(atoi(one->d_name), 0)) {
      struct process *p = add_process(line, device);
      struct device *d = p ? device_of(p) : NULL;
      if (d) d->taken += p->mem, d->util = d->util + p->sm > 100 ? 100 : d->util + p->sm;
    }
    fclose(file);
  }
  closedir(all);
}

// Reads the file; waits while it says so.
static void look(void) {
  for (;;) {
    int hang = 0, np = 0, slow = 0, ng = 0;
    const char *path = getenv("NVML_STANDIN");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return;
    char line[512];
    memset(devices, 0, sizeof devices), memset(parts, 0, sizeof parts);
    n_processes = n_faults = n_paths = n_links = init_code = n_failures = 0;
    hanging[0] = 0, n_samples = 64;
    strcpy(driver, "550.54.15");
    while (fgets(line, sizeof line, file)) {
      int a = 0, b = 0, c = 0;
      char bus[32], call[64];
      u64 code, serial;
      if (sscanf(line, "hangs %63s", hanging) == 1) {}
      else if (!strncmp(line, "hang", 4)) hang = 1;
      else if (sscanf(line, "slow %d", &slow) == 1) {}
      else if (sscanf(line, "samples %d", &n_samples) == 1) {}
      else if (c = -2, sscanf(line, "fails %63s %d %d %d", call, &a, &b, &c) >= 3 && n_failures < 16)
        strcpy(failures[n_failures].call, call), failures[n_failures].device = a, failures[n_failures].code = b, failures[n_failures].part = c, n_failures++;
      else if (sscanf(line, "grows %63s %d", call, &a) == 2 && ng < 4) {
        if (ng >= n_growing || strcmp(growing[ng].call, call) || growing[ng].times != a)
          strcpy(growing[ng].call, call), growing[ng].times = growing[ng].left = a;
        ng++;
      }
      else if (!strncmp(line, "uninitialized", 13)) initialized = 0;
      else if (sscanf(line, "driver %79s", driver) == 1) {}
      else if (sscanf(line, "init %d", &init_code) == 1) {}
      else if (sscanf(line, "device %d", &a) == 1 && a >= 0 && a < MAX) describe(&devices[a], line, a, -1);
      else if (sscanf(line, "part %d %d", &a, &b) == 2 && np < MAX_PARTS) describe(&parts[np++], line, a, b);
      else if (sscanf(line, "process %d", &a) == 1) add_process(line, a);
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
    n_growing = ng;
    add_running(path);
    if (slow) usleep(1000 * slow);
    if (!hang) return;
    usleep(20000);
  }
}


// The code that a call has to fail with; waits while it hangs.
static int failing(const char *call, int device, int part) {
  while (!strcmp(hanging, call)) usleep(20000), look();
  for (int i = 0; i < n_failures; i++)
    if (!strcmp(failures[i].call, call) && (failures[i].device == -1 || failures[i].device == device) && (failures[i].part == -2 || failures[i].part == part))
      return failures[i].code;
  return OK;
}
// Whether a list that is read has grown since its length was told.
static int has_grown(const char *call) {
  for (int i = 0; i < n_growing; i++)
    if (!strcmp(growing[i].call, call)) {
      if (growing[i].left-- > 0) return 1;
      growing[i].left = growing[i].times;
    }
  return 0;
}
