/* The functions of libcuda.so.1 and libcudart.so.13 that TVM's CUDA runtime calls, over memory of the host. A module is
 * a shared library that emulator.py compiled from the kernels. Types and numbers are those of CUDA's headers.
 * Fresh memory holds NaN. EMULATED_REVERSE runs lanes and warps in the other order.
 * While a stream is captured, launches are recorded instead of made, and what a capture forbids fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, NOT_FOUND = 500, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_WRONG = 901 };

typedef struct { unsigned grid[3], block[3], shared_bytes; void *stream, *attributes; unsigned attribute_count; } LaunchConfig;
typedef const char *Launch(void (*)(void **), void **, const unsigned *, const unsigned *, size_t, int);
typedef struct { void (*kernel)(void **); Launch *launch; int arguments; char name[200]; } Function;
typedef struct { int attribute, value; } Attribute;

typedef struct Recorded { Function *function; LaunchConfig config; unsigned char (*values)[8]; struct Recorded *next; } Recorded;
typedef struct { Recorded *first, **end; void *stream; } Graph;

/* What the two libraries made of this file share: that of the first one loaded. */
typedef struct {
  Graph *capture;
  unsigned long long launches, replays; /* launches made one by one, replays of graphs */
  void *stream;                         /* of the last of either */
} Shared;
Shared *cudaEmulatedShared(void) {
  static Shared own;
  return &own;
}
static Shared *shared(void) {
  static Shared *first;
  if (!first) first = ((Shared *(*)(void))dlsym(RTLD_DEFAULT, "cudaEmulatedShared"))();
  return first;
}
static int capturing(void) { return shared()->capture != NULL; }

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
  char symbol[4096]; /* names of joined operators are long */
  snprintf(symbol, sizeof symbol, "emulated_%s", name);
  void *kernel = dlsym(module, symbol), *launch = dlsym(module, "emulated_launch");
  if (!kernel || !launch) return NOT_FOUND;
  Function *found = calloc(1, sizeof *found);
  memcpy(&found->kernel, &kernel, sizeof kernel);
  memcpy(&found->launch, &launch, sizeof launch);
  snprintf(symbol, sizeof symbol, "emulated_arguments_%s", name);
  found->arguments = *(const int *)dlsym(module, symbol);
  snprintf(found->name, sizeof found->name, "%s", name);
  *function = found;
  return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
static int make_launch(const LaunchConfig *config, Function *function, void **arguments) {
  int reversed = getenv("EMULATED_REVERSE") != NULL;
  const char *error = function->launch(function->kernel, arguments, config->grid, config->block, config->shared_bytes, reversed);
  if (error) fprintf(stderr, "emulated CUDA: %s: %s\n", function->name, error);
  return error ? LAUNCH_FAILED : SUCCESS;
}
int cuLaunchKernelEx(const LaunchConfig *config, Function *function, void **arguments, void **extra) {
  const unsigned *block = config->block;
  if (block[0] * block[1] * block[2] > 1024 || config->shared_bytes > 49152) return INVALID_VALUE;
  Graph *capture = shared()->capture;
  if (!capture) return shared()->launches++, shared()->stream = config->stream, make_launch(config, function, arguments);
  if (config->stream != capture->stream) return CAPTURE_UNSUPPORTED;
  Recorded *row = calloc(1, sizeof *row);
  *row = (Recorded){.function = function, .config = *config, .values = calloc((size_t)function->arguments + 1, 8)};
  for (int i = 0; i < function->arguments; i++) memcpy(row->values[i], arguments[i], 8); /* as they are now */
  *capture->end = row;
  capture->end = &row->next;
  return SUCCESS;
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
enum { PAGE = 4096 };
/* Pages of its own, the first one for their size: who uses memory that was freed is stopped, as on a GPU. */
int cudaMalloc(void **memory, size_t size) {
  if (capturing()) return CAPTURE_UNSUPPORTED;
  size_t whole = (size / PAGE + 2) * PAGE;
  char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return OUT_OF_MEMORY;
  memcpy(start, &whole, sizeof whole);
  return *memory = memset(start + PAGE, 0xff, size), SUCCESS;
}
int cudaFree(void *memory) {
  if (capturing()) return CAPTURE_UNSUPPORTED;
  if (!memory) return SUCCESS;
  char *start = (char *)memory - PAGE;
  size_t whole;
  memcpy(&whole, start, sizeof whole);
  return munmap(start, whole) ? INVALID_VALUE : SUCCESS;
}
int cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
int cudaFreeHost(void *memory) { return cudaFree(memory); }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { return capturing() ? CAPTURE_UNSUPPORTED : (memmove(to, from, size), SUCCESS); }
int cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, void *stream) { return memmove(to, from, size), SUCCESS; }
int cudaMemGetInfo(size_t *unused, size_t *total) { return *unused = *total = (size_t)8 << 30, SUCCESS; }
int cudaStreamCreate(void **stream) { return *stream = (void *)1, SUCCESS; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void *stream) { return SUCCESS; }
int cudaStreamSynchronize(void *stream) { return capturing() ? CAPTURE_UNSUPPORTED : SUCCESS; }
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

/* CUDA graphs: a list of launches with the arguments they had */

int cudaStreamBeginCapture(void *stream, int mode) {
  if (capturing()) return CAPTURE_WRONG;
  Graph *graph = calloc(1, sizeof *graph);
  *graph = (Graph){.end = &graph->first, .stream = stream};
  return shared()->capture = graph, SUCCESS;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  if (!capturing() || stream != shared()->capture->stream) return CAPTURE_WRONG;
  return *graph = shared()->capture, shared()->capture = NULL, SUCCESS;
}
int cudaGraphInstantiate(void **ready, void *graph, unsigned long long flags) { return *ready = graph, SUCCESS; }
int cudaGraphLaunch(Graph *ready, void *stream) {
  if (capturing()) return CAPTURE_UNSUPPORTED;
  shared()->replays++, shared()->stream = stream;
  for (Recorded *row = ready->first; row; row = row->next) {
    void *arguments[row->function->arguments + 1];
    for (int i = 0; i < row->function->arguments; i++) arguments[i] = row->values[i];
    int status = make_launch(&row->config, row->function, arguments);
    if (status) return status;
  }
  return SUCCESS;
}
int cudaGraphDestroy(void *graph) { return SUCCESS; } /* the instance is the same list; both live on */
int cudaGraphExecDestroy(void *ready) { return SUCCESS; }
