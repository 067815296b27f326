// An H100 that launches nothing, for machines without a GPU: PyTorch and Triton find it in the place of CUDA's runtime
// (preloaded) and of its driver (as libcuda.so.1), see device.c, and everything up to the launch is real.
//
// Device memory is host memory. Every launch, copy, wait and replay is written to a record, a tab-separated line each.
// While a stream is captured, what a real one refuses is refused and recorded: allocating, waiting for the device, and
// copying to or from memory that the host may move. Kernels are named and not run, so every value is arbitrary.
// Symbols are those that PyTorch 2.11 (CUDA 13) and Triton 3.6 call.
#include "standin.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The record.

static FILE *record;
static pthread_mutex_t record_lock = PTHREAD_MUTEX_INITIALIZER;

void standin_record_to(const char *path) {
    pthread_mutex_lock(&record_lock);
    if (record) fclose(record);
    record = path && *path ? fopen(path, "w") : NULL;
    pthread_mutex_unlock(&record_lock);
}

void say(const char *format, ...) {
    pthread_mutex_lock(&record_lock);
    if (record) {
        va_list values;
        va_start(values, format);
        vfprintf(record, format, values);
        va_end(values);
        fputc('\n', record);
        fflush(record);
    }
    pthread_mutex_unlock(&record_lock);
}

void standin_note(const char *line) { say("%s", line); }

// Kernels that PyTorch was compiled with, by name.

static struct { const void *function; const char *name; } *kernels;
static size_t kernels_used, kernels_size;

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *v, char *a, const char *name, int e, size_t s, int c, int g) {}
void __cudaRegisterFunction(void **handle, const char *function, char *d, const char *name, int t, void *a, void *b,
                            void *c, void *e, int *w) {
    if (kernels_used == kernels_size) {
        kernels_size = kernels_size ? 2 * kernels_size : 65536;
        kernels = realloc(kernels, kernels_size * sizeof *kernels);
    }
    kernels[kernels_used].function = function;
    kernels[kernels_used++].name = name;
}

static const char *name_of(const void *function) {
    for (size_t i = 0; i < kernels_used; i++)
        if (kernels[i].function == function) return kernels[i].name;
    return "unknown";
}

rt cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    return OK;
}
rt cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute which, int value) { return OK; }
rt cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f, int size, size_t s, unsigned g) {
    *blocks = 2;
    return OK;
}

// Capture: one stream at a time.

static cudaStream_t captured_stream;
static int capturing;
static unsigned long long capture_number;
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

static rt refuse_while_capturing(const char *what) {
    if (!capturing) return OK;
    say("refused\t%s", what);
    return cudaErrorStreamCaptureUnsupported;
}
static rt refuse_unless_relaxed(const char *what) {
    return mode == cudaStreamCaptureModeRelaxed ? OK : refuse_while_capturing(what);
}

rt cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode asked) {
    if (!stream) return cudaErrorStreamCaptureUnsupported;
    captured_stream = stream;
    capturing = 1;
    capture_number++;
    say("begin");
    return OK;
}
rt cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    capturing = 0;
    *graph = (cudaGraph_t)0x77;
    say("end");
    return OK;
}
static enum cudaStreamCaptureStatus status_of(cudaStream_t stream) {
    return capturing && stream == captured_stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
rt cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = status_of(stream);
    return OK;
}
rt cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *number,
                            cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                            size_t *count) {
    *status = status_of(stream);
    if (number) *number = capture_number;
    if (graph) *graph = (cudaGraph_t)0x77;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return OK;
}
rt cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *other) {
    enum cudaStreamCaptureMode before = mode;
    mode = *other;
    *other = before;
    return OK;
}
rt cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)0x78;
    return OK;
}
rt cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { say("replay"); return OK; }
rt cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return OK; }
rt cudaGraphDestroy(cudaGraph_t graph) { return OK; }
rt cudaGraphExecDestroy(cudaGraphExec_t graph) { return OK; }

// Launches.

void launched(const char *by, const char *name, void *stream) {
    if (capturing && stream != captured_stream) say("refused\ta launch on another stream: %s", name);
    say("launch\t%s\t%s", by, name);
}

static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } configurations[8];
static __thread int configured;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configurations[configured].grid = grid;
    configurations[configured].block = block;
    configurations[configured].shared = shared;
    configurations[configured++].stream = stream;
    return 0;
}
rt __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    configured--;
    *grid = configurations[configured].grid;
    *block = configurations[configured].block;
    *shared = configurations[configured].shared;
    *(cudaStream_t *)stream = configurations[configured].stream;
    return OK;
}
rt __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)function; return OK; }
rt __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    launched("pytorch", name_of(kernel), stream);
    return OK;
}
rt cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    launched("pytorch", name_of(kernel), stream);
    return OK;
}
rt cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *kernel, void **arguments) {
    launched("pytorch", name_of(kernel), configuration->stream);
    return OK;
}

// Memory.

static struct { char *start; size_t size; } pinned[4096];
static int pinned_used;

static int is_pinned(const void *pointer) {
    const char *at = pointer;
    for (int i = 0; i < pinned_used; i++)
        if (at >= pinned[i].start && at < pinned[i].start + pinned[i].size) return 1;
    return 0;
}

rt cudaMalloc(void **pointer, size_t size) {
    if (refuse_unless_relaxed("cudaMalloc")) return cudaErrorStreamCaptureUnsupported;
    if (posix_memalign(pointer, 512, size ? size : 512)) return cudaErrorMemoryAllocation;
    if (size <= 4 << 20) memset(*pointer, 0, size); // small tensors are indices: 0 lies in every range
    return OK;
}
rt cudaFree(void *pointer) { refuse_unless_relaxed("cudaFree"); free(pointer); return OK; }
rt cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    refuse_unless_relaxed("cudaHostAlloc");
    if (posix_memalign(pointer, 4096, size ? size : 512)) return cudaErrorMemoryAllocation;
    if (pinned_used < 4096) {
        pinned[pinned_used].start = *pointer;
        pinned[pinned_used++].size = size;
    }
    return OK;
}
rt cudaFreeHost(void *pointer) { free(pointer); return OK; }
rt cudaHostRegister(void *pointer, size_t size, unsigned flags) { return OK; }
rt cudaHostUnregister(void *pointer) { return OK; }
rt cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    memset(found, 0, sizeof *found);
    found->type = is_pinned(pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    return OK;
}
rt cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    refuse_while_capturing("cudaMemcpy");
    say("wait\tcudaMemcpy");
    memmove(to, from, size);
    return OK;
}
rt cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (stream == captured_stream && kind == cudaMemcpyHostToDevice && !is_pinned(from))
        refuse_while_capturing("a copy from pageable host memory");
    if (stream == captured_stream && kind == cudaMemcpyDeviceToHost) refuse_while_capturing("a copy to the host");
    say("copy\t%zu", size);
    memmove(to, from, size);
    return OK;
}
rt cudaMemset(void *to, int value, size_t size) { refuse_while_capturing("cudaMemset"); memset(to, value, size); return OK; }
rt cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    say("fill\t%zu", size);
    memset(to, value, size);
    return OK;
}

// Streams and events.

static unsigned long handles = 0x1000;
#define NEW_HANDLE(type) ((type)__sync_add_and_fetch(&handles, 16))

static rt wait_for(const char *what) {
    say("wait\t%s", what);
    return refuse_while_capturing(what);
}

rt cudaStreamCreate(cudaStream_t *stream) { *stream = NEW_HANDLE(cudaStream_t); return OK; }
rt cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return cudaStreamCreate(stream); }
rt cudaStreamDestroy(cudaStream_t stream) { return OK; }
rt cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return OK; }
rt cudaStreamQuery(cudaStream_t stream) { refuse_unless_relaxed("cudaStreamQuery"); return OK; }
rt cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return OK; }
rt cudaStreamSynchronize(cudaStream_t stream) { return wait_for("cudaStreamSynchronize"); }
rt cudaDeviceSynchronize(void) { return wait_for("cudaDeviceSynchronize"); }
rt cudaEventSynchronize(cudaEvent_t event) { return wait_for("cudaEventSynchronize"); }
rt cudaEventCreate(cudaEvent_t *event) { *event = NEW_HANDLE(cudaEvent_t); return OK; }
rt cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
rt cudaEventDestroy(cudaEvent_t event) { return OK; }
rt cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return OK; }
rt cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return OK; }
rt cudaEventQuery(cudaEvent_t event) { refuse_unless_relaxed("cudaEventQuery"); return OK; }
rt cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) { *milliseconds = 1; return OK; }
