// A stand-in for nvidia-smi: tells the devices that devices.h describes, in the words of the real program. What of it the suites use:
//   --query-gpu=FIELD,...  or  --query-compute-apps=FIELD,...   each with --format=csv,noheader,nounits
//   pmon -c 1 -s um
#include "devices.h"

static const char *rest(const char *word, const char *prefix) {
  size_t n = strlen(prefix);
  return strncmp(word, prefix, n) ? NULL : word + n;
}

// One field of a device; 0 when there is no such field.
static int of_device(struct device *d, const char *name) {
  u64 used = d->taken;
#define IS(NAME) !strcmp(name, NAME)
  if (IS("uuid")) printf("%s", d->uuid);
  else if (IS("index")) printf("%d", d->index);
  else if (IS("name")) printf("%s", d->name);
  else if (IS("driver_version")) printf("%s", driver);
  else if (IS("pci.bus_id")) printf("%s", d->pci);
  else if (IS("mig.mode.current")) printf("%s", d->mig ? "Enabled" : "Disabled");
  else if (IS("memory.total")) printf("%llu", d->mem >> 20);
  else if (IS("memory.used")) printf("%llu", used >> 20);
  else if (IS("memory.free")) printf("%llu", (d->mem - used - d->reserved) >> 20);
  else if (IS("utilization.gpu") || IS("utilization.memory")) d->mig ? printf("[N/A]") : printf("%u", IS("utilization.gpu") ? d->util : d->util / 2);
  else if (IS("utilization.encoder") || IS("utilization.decoder")) {
    int coder = IS("utilization.encoder") ? d->enc : d->dec;
    coder < 0 ? printf("[N/A]") : printf("%d", coder);
  }
  else if (IS("power.draw")) printf("%u.%02u", d->power / 1000, d->power % 1000 / 10);
  else if (IS("enforced.power.limit")) printf("400.00");
  else if (IS("temperature.gpu")) printf("%u", d->temp);
  else if (IS("clocks.sm")) printf("1980");
  else if (IS("clocks.mem")) printf("2619");
  else if (IS("ecc.errors.corrected.volatile.total")) printf("2");
  else if (IS("ecc.errors.uncorrected.volatile.total")) printf("1");
  else return 0;
  return 1;
}

static int of_process(struct process *p, const char *name) {
  if (IS("pid")) printf("%u", p->pid);
  else if (IS("gpu_uuid")) printf("%s", device_of(p)->uuid);
  else if (IS("used_memory")) printf("%llu", p->mem >> 20);
  else return 0;
  return 1;
}

static int unknown(const char *name) {
  printf("Field \"%s\" is not a valid field to query.\n", name);
  return 2;
}

static int query(const char *fields, struct device *d, struct process *p) {
  char all[1024];
  snprintf(all, sizeof all, "%s", fields);
  char *at = NULL;
  for (char *name = strtok_r(all, ",", &at); name; name = strtok_r(NULL, ",", &at)) {
    if (name != all) printf(", ");
    if (!(p ? of_process(p, name) : of_device(d, name))) return unknown(name);
  }
  printf("\n");
  return 0;
}

static int monitor(void) {
  printf("# gpu         pid   type     sm    mem    enc    dec    jpg    ofa     fb   ccpm    command \n");
  printf("# Idx           #    C/G      %%      %%      %%      %%      %%      %%     MB     MB    name \n");
  for (int i = 0; i < MAX; i++) {
    int any = 0;
    for (int n = 0; n < n_processes; n++) {
      struct process *p = &processes[n];
      if (!devices[i].used || p->device != i || p->part >= 0) continue;
      any = 1;
      printf("%5d %11u     C ", i, p->pid);
      p->sm && !devices[i].noutil ? printf("%6u", p->sm) : printf("     -");
      printf("      -      -      -      -      - %6llu      0    stand-in\n", p->mem >> 20);
    }
    if (devices[i].used && !any) printf("%5d           -     -      -      -      -      -      -      -      -      -    -\n", i);
  }
  return 0;
}

int main(int argc, char **argv) {
  const char *fields;
  look();
  if (init_code) {
    printf("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n");
    return 9;
  }
  if (argc > 1 && !strcmp(argv[1], "pmon")) return monitor();
  if (argc != 3 || strcmp(argv[2], "--format=csv,noheader,nounits")) return unknown("anything else");
  int code = 0;
  if ((fields = rest(argv[1], "--query-gpu=")))
    for (int i = 0; i < MAX && !code; i++) code = devices[i].used ? query(fields, &devices[i], NULL) : 0;
  else if ((fields = rest(argv[1], "--query-compute-apps=")))
    for (int n = 0; n < n_processes && !code; n++) code = device_of(&processes[n]) ? query(fields, NULL, &processes[n]) : 0;
  else
    code = unknown(argv[1]);
  return code;
}
