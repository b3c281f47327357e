// A stand-in for CUDA's driver library: as much of the real C ABI as tests/python/cuda_load.py calls, on the devices that devices.h
// describes. CUDA_VISIBLE_DEVICES chooses one by its UUID. It can't run any kernel but "spin", whose results it knows, at a round per
// nanosecond, one launch after the other; what it uses is written where the stand-ins for NVML and nvidia-smi find it.
#include "devices.h"
#include <sys/stat.h>

enum { INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NO_SUCH_NAME = 500, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3 };
enum { MAX_BLOCKS = 64 };
typedef unsigned u32;
#define API __attribute__((visibility("default")))

static struct device *mine;
static int number_of_mine = -1, part_of_mine = -1, retained, current, loaded;
static struct { char *at; u64 size; } blocks[MAX_BLOCKS];
static u64 allocated, busy_until, window_from, window_busy;
static u32 percent;

static void tell(void) {
  char directory[4096], fresh[4200], place[4200];
  const char *state = getenv("NVML_STANDIN");
  if (!state || !mine) return;
  snprintf(directory, sizeof directory, "%s.d", state);
  mkdir(directory, 0755);
  snprintf(fresh, sizeof fresh, "%s/.%d", directory, getpid());
  snprintf(place, sizeof place, "%s/%d", directory, getpid());
  FILE *file = fopen(fresh, "w");
  if (!file) return;
  fprintf(file, "process %d pid=%d mem=%llu sm=%u until=%llu", number_of_mine, getpid(), allocated, percent, now_ns() + 3000000000ull);
  if (part_of_mine >= 0) fprintf(file, " part=%d", part_of_mine);
  fprintf(file, "\n");
  fclose(file);
  rename(fresh, place);
}

API int cuInit(u32 flags) {
  if (flags) return INVALID_VALUE;
  look();
  const char *wanted = getenv("CUDA_VISIBLE_DEVICES");
  mine = NULL;
  for (int i = 0; i < MAX && !mine; i++)
    if (devices[i].used && !devices[i].mig && !devices[i].lost && (!wanted || !strcmp(devices[i].uuid, wanted))) mine = &devices[i], number_of_mine = i;
  for (int i = 0; i < MAX_PARTS && !mine; i++)
    if (parts[i].used && wanted && !strcmp(parts[i].uuid, wanted)) mine = &parts[i], number_of_mine = parts[i].index, part_of_mine = parts[i].part;
  return mine ? OK : NO_DEVICE;
}
API int cuDeviceGetCount(int *count) { if (!mine) return NOT_INITIALIZED; *count = 1; return OK; }
API int cuDeviceGet(int *device, int ordinal) { if (!mine) return NOT_INITIALIZED; if (ordinal) return INVALID_DEVICE; *device = 0; return OK; }
API int cuDeviceGetPCIBusId(char *text, int length, int device) {
  if (!mine || device) return INVALID_DEVICE;
  // The domain has four digits here, eight in NVML.
  const char *bus = devices[number_of_mine].pci;
  snprintf(text, length, "%s", strlen(bus) > 12 ? bus + strlen(bus) - 12 : bus);
  return OK;
}
API int cuDevicePrimaryCtxRetain(void **context, int device) { if (!mine || device) return INVALID_DEVICE; retained = 1, *context = &retained; return OK; }
API int cuCtxSetCurrent(void *context) { if (!retained || context != &retained) return INVALID_CONTEXT; current = 1; tell(); return OK; }
API int cuMemAlloc_v2(u64 *at, size_t size) {
  if (!current) return INVALID_CONTEXT;
  if (!size) return INVALID_VALUE;
  look();
  if (allocated + size > mine->mem - mine->reserved) return OUT_OF_MEMORY;
  for (int i = 0; i < MAX_BLOCKS; i++)
    if (!blocks[i].at) {
      // Never touched, so it costs this machine nothing.
      if (!(blocks[i].at = calloc(1, size))) return OUT_OF_MEMORY;
      blocks[i].size = size, allocated += size, *at = (u64)(size_t)blocks[i].at;
      tell();
      return OK;
    }
  return OUT_OF_MEMORY;
}
static char *within(u64 at, u64 size) {
  for (int i = 0; i < MAX_BLOCKS; i++) {
    u64 from = (u64)(size_t)blocks[i].at;
    if (from && at >= from && at + size <= from + blocks[i].size) return (char *)(size_t)at;
  }
  return NULL;
}
API int cuMemcpyDtoH_v2(void *to, u64 from, size_t size) {
  char *block = within(from, size);
  if (!current || !block) return INVALID_VALUE;
  memcpy(to, block, size);
  return OK;
}
API int cuModuleLoadData(void **module, const char *image) {
  if (!current) return INVALID_CONTEXT;
  if (!strstr(image, ".version") || !strstr(image, ".target") || !strstr(image, ".entry spin(")) return INVALID_IMAGE;
  loaded = 1, *module = &loaded;
  return OK;
}
API int cuModuleGetFunction(void **function, void *module, const char *name) {
  if (module != &loaded || !loaded) return INVALID_HANDLE;
  if (strcmp(name, "spin")) return NO_SUCH_NAME;
  *function = &loaded;
  return OK;
}
API int cuLaunchKernel(void *function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared, void *stream, void **arguments, void **extra) {
  if (function != &loaded || !loaded) return INVALID_HANDLE;
  if (gy != 1 || gz != 1 || by != 1 || bz != 1 || shared || stream || extra || !gx || !bx || bx > 1024) return INVALID_VALUE;
  u64 to = *(u64 *)arguments[0], now = now_ns();
  u32 rounds = *(u32 *)arguments[1];
  u32 *out = (u32 *)within(to, (u64)gx * bx * 4);
  if (!out || !rounds) return INVALID_VALUE;
  // x * 1664525 + 1013904223, so many times.
  u32 a = 1664525, c = 1013904223, times = 1, plus = 0;
  for (u32 left = rounds; left; left >>= 1, c = a * c + c, a *= a)
    if (left & 1) times *= a, plus = a * plus + c;
  // The same again leaves what is there.
  static u32 *last_out, last_rounds, last_threads;
  if (out != last_out || rounds != last_rounds || gx * bx != last_threads)
    for (u32 i = 0; i < gx * bx; i++) out[i] = times * i + plus;
  last_out = out, last_rounds = rounds, last_threads = gx * bx;
  if (!window_from) window_from = now;
  busy_until = (busy_until > now ? busy_until : now) + rounds;
  window_busy += rounds;
  return OK;
}
API int cuCtxSynchronize(void) {
  if (!current) return INVALID_CONTEXT;
  for (u64 now; (now = now_ns()) < busy_until;) usleep((busy_until - now) / 1000 + 1);
  u64 now = now_ns(), window = now - window_from;
  if (window > 500000000ull) {
    percent = window_busy >= window ? 100 : window_busy * 100 / window;
    window_from = now, window_busy = 0;
    tell();
  }
  return OK;
}
API int cuGetErrorName(int code, const char **name) {
  static const struct { int code; const char *name; } names[] = {
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"}, {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"}, {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"}, {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"}, {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"}, {NO_SUCH_NAME, "CUDA_ERROR_NOT_FOUND"},
  };
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].code == code) { *name = names[i].name; return OK; }
  return INVALID_VALUE;
}
