/* The functions of libcuda.so.1 and libcudart.so.13 that TVM's CUDA runtime calls, over memory of the host. A module is
 * a shared library that emulator.py compiled from the kernels. Types and numbers are those of CUDA's headers.
 * Fresh memory holds NaN. EMULATED_REVERSE runs lanes and warps in the other order. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, NOT_FOUND = 500, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801 };

typedef struct { unsigned grid[3], block[3], shared_bytes; void *stream, *attributes; unsigned attribute_count; } LaunchConfig;
typedef const char *Launch(void (*)(void **), void **, const unsigned *, const unsigned *, size_t, int);
typedef struct { void (*kernel)(void **); Launch *launch; char name[200]; } Function;
typedef struct { int attribute, value; } Attribute;

/* libcuda: modules and launches */

int cuModuleLoadData(void **module, const void *image) {
  const unsigned char *header = image;
  size_t size;
  if (memcmp(header, "EMULATED", 8)) return INVALID_IMAGE;
  memcpy(&size, header + 8, sizeof size);
  int file = memfd_create("kernels", 0);
  for (size_t done = 0; done < size;) {
    ssize_t count = write(file, header + 16 + done, size - done);
    if (count <= 0) return INVALID_IMAGE;
    done += (size_t)count;
  }
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!*module) fprintf(stderr, "emulated CUDA: %s\n", dlerror());
  /* The file stays open: a second library under a path the loader knows would be the first one again. */
  return *module ? SUCCESS : INVALID_IMAGE;
}
int cuModuleUnload(void *module) { return SUCCESS; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  char symbol[256];
  snprintf(symbol, sizeof symbol, "emulated_%s", name);
  void *kernel = dlsym(module, symbol), *launch = dlsym(module, "emulated_launch");
  if (!kernel || !launch) return NOT_FOUND;
  Function *found = calloc(1, sizeof *found);
  memcpy(&found->kernel, &kernel, sizeof kernel);
  memcpy(&found->launch, &launch, sizeof launch);
  snprintf(found->name, sizeof found->name, "%s", name);
  *function = found;
  return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
int cuLaunchKernelEx(const LaunchConfig *config, Function *function, void **arguments, void **extra) {
  const unsigned *block = config->block;
  if (block[0] * block[1] * block[2] > 1024 || config->shared_bytes > 49152) return INVALID_VALUE;
  int reversed = getenv("EMULATED_REVERSE") != NULL;
  const char *error = function->launch(function->kernel, arguments, config->grid, block, config->shared_bytes, reversed);
  if (error) fprintf(stderr, "emulated CUDA: %s: %s\n", function->name, error);
  return error ? LAUNCH_FAILED : SUCCESS;
}
int cuGetErrorName(int code, const char **text) { return *text = "error of the emulated driver", SUCCESS; }
int cuGetErrorString(int code, const char **text) { return cuGetErrorName(code, text); }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, (size_t)size, "emulated"), SUCCESS; }
int cuTensorMapEncodeTiled(void *map) { return NOT_SUPPORTED; }

/* libcudart: one device of compute capability 8.0, streams that are never behind */

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  static const Attribute known[] = {{1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {8, 49152}, {10, 32}, {12, 65536}, {13, 1410000}, {16, 108}, {38, 40 << 20}, {75, 8}, {76, 0}, {97, 166912}};
  *value = 0;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i].attribute == attribute) *value = known[i].value;
  return SUCCESS;
}
int cudaGetDeviceProperties(char *properties, int device) { return strcpy(properties, "emulated"), SUCCESS; }
int cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
int cudaGetDevice(int *device) { return *device = 0, SUCCESS; }
int cudaSetDevice(int device) { return device ? INVALID_VALUE : SUCCESS; }
int cudaMalloc(void **memory, size_t size) {
  *memory = aligned_alloc(256, (size / 256 + 1) * 256);
  return *memory ? (memset(*memory, 0xff, size), SUCCESS) : OUT_OF_MEMORY;
}
int cudaFree(void *memory) { return free(memory), SUCCESS; }
int cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFreeHost(void *memory) { return cudaFree(memory); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { return memmove(to, from, size), SUCCESS; }
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, void *stream) { return memmove(to, from, size), SUCCESS; }
int cudaMemGetInfo(size_t *unused, size_t *total) { return *unused = *total = (size_t)8 << 30, SUCCESS; }
int cudaStreamCreate(void **stream) { return *stream = (void *)1, SUCCESS; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void *stream) { return SUCCESS; }
int cudaStreamSynchronize(void *stream) { return SUCCESS; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return SUCCESS; }
int cudaEventCreate(void **event) { return *event = (void *)1, SUCCESS; }
int cudaEventDestroy(void *event) { return SUCCESS; }
int cudaEventRecord(void *event, void *stream) { return SUCCESS; }
int cudaEventSynchronize(void *event) { return SUCCESS; }
int cudaEventElapsedTime(float *milliseconds, void *from, void *to) { return NOT_SUPPORTED; }
const char *cudaGetErrorName(int code) { return "error of the emulated runtime"; }
const char *cudaGetErrorString(int code) { return cudaGetErrorName(code); }
int cudaGetLastError(void) { return SUCCESS; }
int cudaPeekAtLastError(void) { return SUCCESS; }
int cudaStreamBeginCapture(void *stream, int mode) { return NOT_SUPPORTED; }
int cudaStreamEndCapture(void *stream, void **graph) { return NOT_SUPPORTED; }
int cudaGraphInstantiate(void **ready, void *graph, unsigned long long flags) { return NOT_SUPPORTED; }
int cudaGraphLaunch(void *ready, void *stream) { return NOT_SUPPORTED; }
int cudaGraphDestroy(void *graph) { return SUCCESS; }
int cudaGraphExecDestroy(void *ready) { return SUCCESS; }
