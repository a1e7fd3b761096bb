// The part of CUDA that the CUDA provider of ONNX Runtime calls, for a machine without a GPU: memory is the host's, and
// kernels do nothing. cuda_dry_run.py adds the functions that only have to succeed, compiles this into a library for
// each soname, and reads from $CUDA_STUB_CALLS how often what was called.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_COUNTERS = 1 << 17, SM = CUDA_STUB_SM };

struct counter {
  const void *key;
  const char *name;
  long calls;
};

static struct counter counters[MAX_COUNTERS];
static int used;

static void write_counters(void) {
  const char *path = getenv("CUDA_STUB_CALLS");
  FILE *file = path == NULL ? NULL : fopen(path, "a");
  if (file == NULL) return;
  for (int i = 0; i < used; ++i) {
    if (counters[i].calls > 0) fprintf(file, "%ld %s\n", counters[i].calls, counters[i].name);
  }
  fclose(file);
}

static void add_counter(const void *key, const char *name) {
  if (used == MAX_COUNTERS) return;
  if (used == 0) atexit(write_counters);
  counters[used++] = (struct counter){key, name, 0};
}

static void count(const void *key, const char *name) {
  for (int i = 0; i < used; ++i) {
    if (counters[i].key != key) continue;
    ++counters[i].calls;
    return;
  }
  add_counter(key, name);
  if (used < MAX_COUNTERS) ++counters[used - 1].calls;
}

// Kernels: the provider registers their names when it is loaded, and launches them by address.

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFunction(void **handle, const void *host, char *device, const char *name) {
  add_counter(host, name);
}
int __cudaGetKernel(const void **kernel, const void *host) { return *kernel = host, 0; }
int cudaLaunchKernel(const void *kernel) { return count(kernel, "unregistered kernel"), 0; }
int __cudaLaunchKernel(const void *kernel) { return cudaLaunchKernel(kernel); }
int cudaLaunchCooperativeKernel(const void *kernel) { return cudaLaunchKernel(kernel); }
int cudaLaunchKernelExC(const void *config, const void *kernel) { return cudaLaunchKernel(kernel); }

// Memory.

int cudaMalloc(void **memory, size_t size) { return posix_memalign(memory, 256, size + 256) == 0 ? 0 : 2; }
int cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { return cudaMalloc(memory, size); }
int cudaMallocFromPoolAsync(void **memory, size_t size, void *pool, void *stream) { return cudaMalloc(memory, size); }
int cudaFree(void *memory) { return free(memory), 0; }
int cudaFreeHost(void *memory) { return free(memory), 0; }
int cudaFreeAsync(void *memory, void *stream) { return free(memory), 0; }
int cudaMemset(void *memory, int value, size_t size) { return memset(memory, value, size), 0; }
int cudaMemsetAsync(void *memory, int value, size_t size, void *stream) { return memset(memory, value, size), 0; }
int cudaMemGetInfo(size_t *available, size_t *total) { return *available = *total = (size_t)80 << 30, 0; }
int cudaMemcpy(void *target, const void *source, size_t size, int kind) {
  static const char *const names[] = {"copy in main memory", "copy to the GPU", "copy from the GPU", "copy on the GPU"};
  if (kind >= 0 && kind < 4) count(names[kind], names[kind]);
  return memcpy(target, source, size), 0;
}
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
  return cudaMemcpy(target, source, size, kind);
}
int cudaPointerGetAttributes(int *attributes, const void *memory) {
  memset(attributes, 0, 32);
  return attributes[0] = 2, 0;  // device memory
}

// The device.

int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaGetDeviceCount(int *devices) { return *devices = 1, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return *stream = &counters, 0; }
int cudaStreamCreate(void **stream) { return *stream = &counters, 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return *event = &counters, 0; }
int cudaEventCreate(void **event) { return *event = &counters, 0; }
int cudaStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cudaFuncGetAttributes(void *attributes, const void *kernel) { return memset(attributes, 0, 136), 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return *blocks = 1, 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **function) { return *function = NULL, 0; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  static const int known[][2] = {{1, 1024}, {8, 49152}, {10, 32}, {16, 132}, {39, 2048}, {97, 232448}};
  *value = attribute == 75 ? SM / 10 : attribute == 76 ? SM % 10 : 1;
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i) {
    if (known[i][0] == attribute) *value = known[i][1];
  }
  return 0;
}
int cudaGetDeviceProperties(char *properties, int device) {  // cudaDeviceProp of CUDA 13
  static const int known[][2] = {{296, 49152}, {304, 65536},   {308, 32},    {320, 1024},  {324, 1024},  {328, 1024},
                                 {332, 64},    {336, 1 << 30}, {340, 65535}, {344, 65535}, {352, 65536}, {384, 132}};
  memset(properties, 0, 512);
  strcpy(properties, "no GPU");
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i) memcpy(properties + known[i][0], &known[i][1], sizeof(int));
  const size_t memory = (size_t)80 << 30;
  const int capability[] = {SM / 10, SM % 10};
  memcpy(properties + 288, &memory, sizeof memory);
  memcpy(properties + 360, capability, sizeof capability);
  return 0;
}

// What an error would be called.

const char *cudaGetErrorName(int error) { return "an error of the stub"; }
const char *cudaGetErrorString(int error) { return "an error of the stub"; }
const char *cublasGetStatusName(int error) { return "an error of the stub"; }
const char *cublasGetStatusString(int error) { return "an error of the stub"; }
const char *cudnnGetErrorString(int error) { return "an error of the stub"; }
void cudnnGetLastErrorString(char *message, size_t size) { *message = 0; }

// Libraries on top of CUDA: handles are created, everything else only has to succeed.

size_t cudnnGetVersion(void) { return 92000; }
int cudnnGetReductionWorkspaceSize(void *a, void *b, void *c, void *d, size_t *size) { return *size = 0, 0; }
int cudnnGetReductionIndicesSize(void *a, void *b, void *c, void *d, size_t *size) { return *size = 0, 0; }
