/* A CUDA runtime whose functions Python implements.
 *
 * Each function that NVIDIA's libcuda_dialect_runtime_static.a imports is here: a jump through a pointer that
 * gpushim/driver.py fills, or, if it has no pointer, an error that names the function.  Linked with that archive, which
 * stays as it is, this replaces libcute_dsl_runtime.so for the objects that CuTe DSL compiles. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int (*hook_missing)(const char *);
static int missing(const char *name) { return hook_missing ? hook_missing(name) : 801; /* cudaErrorNotSupported */ }

#define HOOK(name, parameters, arguments)                                                                              \
  int(*hook_##name) parameters;                                                                                        \
  int name parameters { return hook_##name ? hook_##name arguments : missing(#name); }

HOOK(cudaLaunchKernelExC, (const void *config, const void *kernel, void **args), (config, kernel, args))
HOOK(cudaLibraryLoadData,
     (void **library, const void *code, void *jo, void *jv, unsigned nj, void *lo, void *lv, unsigned nl),
     (library, code, jo, jv, nj, lo, lv, nl))
HOOK(cudaLibraryGetKernel, (void **kernel, void *library, const char *name), (kernel, library, name))
HOOK(cudaKernelSetAttributeForDevice, (void *kernel, int attribute, int value, int device),
     (kernel, attribute, value, device))
HOOK(cudaFuncSetAttribute, (void *kernel, int attribute, int value), (kernel, attribute, value))
HOOK(cudaGetDevice, (int *device), (device))
HOOK(cudaSetDevice, (int device), (device))
HOOK(cudaGetDeviceCount, (int *count), (count))
HOOK(cudaDeviceGetAttribute, (int *value, int attribute, int device), (value, attribute, device))
HOOK(cuKernelGetAttribute, (int *value, int attribute, void *kernel, int device), (value, attribute, kernel, device))
HOOK(cuDeviceGet, (int *device, int ordinal), (device, ordinal))

/* Destructors of loaded objects call this at exit, when there may be no Python any more. */
int cudaLibraryUnload(void *library) { return (void)library, 0; }
int cudaGetLastError(void) { return 0; }

int cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                     int *status) {
  *found = !strcmp(name, "cuKernelGetAttribute") ? (void *)cuKernelGetAttribute
           : !strcmp(name, "cuDeviceGet")        ? (void *)cuDeviceGet
                                                 : 0;
  if (status) *status = *found ? 0 : 1;
  return (void)version, (void)flags, *found ? 0 : missing(name);
}

const char *(*hook_cudaGetErrorName)(int);
const char *cudaGetErrorName(int code) { return hook_cudaGetErrorName ? hook_cudaGetErrorName(code) : "cudaError"; }
const char *cudaGetErrorString(int code) { return cudaGetErrorName(code); }

#define MISSING(name)                                                                                                  \
  int name(void) { return missing(#name); }
MISSING(cudaDeviceSynchronize) MISSING(cudaDriverGetVersion) MISSING(cudaEventCreate) MISSING(cudaEventCreateWithFlags)
MISSING(cudaEventDestroy) MISSING(cudaEventElapsedTime) MISSING(cudaEventQuery) MISSING(cudaEventRecord)
MISSING(cudaEventRecordWithFlags) MISSING(cudaEventSynchronize) MISSING(cudaFree) MISSING(cudaFreeAsync)
MISSING(cudaFreeHost) MISSING(cudaGetDeviceProperties) MISSING(cudaGraphAddKernelNode) MISSING(cudaGraphCreate)
MISSING(cudaGraphDestroy) MISSING(cudaGraphExecDestroy) MISSING(cudaGraphInstantiate)
MISSING(cudaGraphKernelNodeGetAttribute) MISSING(cudaGraphKernelNodeSetAttribute) MISSING(cudaGraphLaunch)
MISSING(cudaLibraryGetGlobal) MISSING(cudaLibraryGetKernelCount) MISSING(cudaLibraryGetManaged)
MISSING(cudaLibraryGetUnifiedFunction) MISSING(cudaLibraryLoadFromFile) MISSING(cudaMalloc) MISSING(cudaMallocAsync)
MISSING(cudaMallocHost) MISSING(cudaMallocManaged) MISSING(cudaMemcpy) MISSING(cudaMemcpy3D) MISSING(cudaMemcpy3DAsync)
MISSING(cudaMemcpyAsync) MISSING(cudaMemset) MISSING(cudaMemsetAsync)
MISSING(cudaOccupancyMaxActiveBlocksPerMultiprocessor) MISSING(cudaProfilerStart) MISSING(cudaProfilerStop)
MISSING(cudaStreamAddCallback) MISSING(cudaStreamBeginCapture) MISSING(cudaStreamCreate) MISSING(cudaStreamDestroy)
MISSING(cudaStreamEndCapture) MISSING(cudaStreamSynchronize) MISSING(cudaStreamWaitEvent)

/* Tensors that PyTorch has freed, by number.  It may free one while a Python exception is under way, when no Python code
 * may run: the numbers wait here for the next look at them. */
struct managed {
  char tensor[48]; /* DLTensor */
  uint64_t number; /* in the place of DLManagedTensor's context */
};
static uint64_t *freed;
static size_t freed_count, freed_room;
static char freed_lock;

void gpushim_free(struct managed *tensor) {
  while (__atomic_test_and_set(&freed_lock, __ATOMIC_ACQUIRE)) {
  }
  if (freed_count == freed_room) {
    freed_room = freed_room ? 2 * freed_room : 1024;
    freed = realloc(freed, freed_room * sizeof *freed);
    if (!freed) abort();
  }
  freed[freed_count++] = tensor->number;
  __atomic_clear(&freed_lock, __ATOMIC_RELEASE);
}

/* Move at most `room` of the numbers; return how many. */
size_t gpushim_freed(uint64_t *out, size_t room) {
  while (__atomic_test_and_set(&freed_lock, __ATOMIC_ACQUIRE)) {
  }
  size_t n = freed_count < room ? freed_count : room;
  freed_count -= n;
  if (n) memcpy(out, freed + freed_count, n * sizeof *out);
  __atomic_clear(&freed_lock, __ATOMIC_RELEASE);
  return n;
}
