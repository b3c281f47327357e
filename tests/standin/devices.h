// The devices of a stand-in machine, out of a text file, for all that stand in for NVIDIA's driver here.
//
// NVML_STANDIN names the file; it is read at every call, so a test changes devices by replacing it.
//   driver 550.1                     version of the driver
//   init 9                           nvmlInit answers this code (9: driver not loaded)
//   uninitialized                    the library has lost its driver: it has to be initialized again
//   hang                             every call waits until the line is gone
//   device N uuid=... [name=... mem=BYTES used=BYTES reserved=BYTES util=PERCENT power=MW temp=C pci=... sms=N mig=1 lost=1 noutil=1 norows=1 enc=PERCENT dec=PERCENT nolist=1]
//   part N I uuid=... [mem= used= sms= slices= gi= ci=]   instance I of device N; without gi the driver does not tell its ids
//                                    nolist: instances do not tell their processes, only the whole device does
//   process N pid=P mem=BYTES [sm=PERCENT enc=PERCENT dec=PERCENT part=I draws=1|2]    a process on device N; 1: it draws, 2: and computes too
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

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, TIMEOUT = 10, LOST = 15, WRONG_VERSION = 25 };
enum { MAX = 64, MAX_PARTS = 256, MAX_PROCESSES = 256 };
typedef unsigned long long u64;

struct device { int used, index, part, mig, lost, noutil, nolist, gi, ci, enc, dec; char uuid[80], name[96], pci[32]; u64 mem, taken, reserved; unsigned norows, util, power, temp, sms, slices; };
struct process { int device, part; unsigned pid, sm, enc, dec, draws; u64 mem; };
static struct device devices[MAX], parts[MAX_PARTS];
static struct process processes[MAX_PROCESSES];
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
  d->nolist = number(line, "nolist", 0);
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
  *p = (struct process){device, (int)number(line, "part", -1), number(line, "pid", 0), number(line, "sm", 0), number(line, "enc", 0), number(line, "dec", 0), number(line, "draws", 0), number(line, "mem", 0)};
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
    add_running(path);
    if (!hang) return;
    usleep(20000);
  }
}

