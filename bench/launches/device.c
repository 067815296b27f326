// The stand-in's device, an H100 SXM with 80 GB, as CUDA's runtime and its driver describe it; and the rest of the
// driver, which Triton calls and PyTorch looks up by name. See runtime.c.
#include "standin.h"
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

// The runtime.

rt cudaGetDeviceCount(int *count) { *count = 1; return OK; }
rt cudaGetDevice(int *device) { *device = 0; return OK; }
rt cudaSetDevice(int device) { return OK; }
rt cudaDriverGetVersion(int *version) { *version = 13000; return OK; }
rt cudaRuntimeGetVersion(int *version) { *version = 13000; return OK; }
rt cudaGetLastError(void) { return OK; }
rt cudaPeekAtLastError(void) { return OK; }
rt cudaDeviceGetPCIBusId(char *id, int size, int device) { strncpy(id, "0000:01:00.0", size); return OK; }
rt cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return OK; }
rt cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }
rt cudaMemGetInfo(size_t *free_bytes, size_t *total) { *free_bytes = 84UL << 30; *total = 85017755648UL; return OK; }

rt cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->major = 9;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->reservedSharedMemPerBlock = 1024;
    p->totalGlobalMem = 85017755648UL;
    p->totalConstMem = 65536;
    p->l2CacheSize = 52428800;
    p->persistingL2CacheMaxSize = 32768000;
    p->memoryBusWidth = 5120;
    p->memPitch = 2147483647;
    p->textureAlignment = 512;
    p->texturePitchAlignment = 32;
    p->asyncEngineCount = 3;
    p->canMapHostMemory = p->concurrentKernels = p->ECCEnabled = p->unifiedAddressing = p->managedMemory = 1;
    p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
    p->cooperativeLaunch = p->memoryPoolsSupported = p->clusterLaunch = p->unifiedFunctionPointers = 1;
    p->pciBusID = 1;
    return OK;
}


// The runtime numbers a device's attributes as the driver does.
static int h100_attribute(int which) {
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 232448;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 65536;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 52428800;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
        default: return 1;
    }
}

rt cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = h100_attribute((int)which);
    return OK;
}

// The driver.

typedef CUresult drv;

drv cuInit(unsigned flags) { return CUDA_SUCCESS; }
drv cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
drv cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
drv cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
drv cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) { *value = h100_attribute(which); return CUDA_SUCCESS; }
drv cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)0x10; return CUDA_SUCCESS; }
drv cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
drv cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
drv cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
drv cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
drv cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    if (active) *active = 1;
    return CUDA_SUCCESS;
}
drv cuGetErrorString(CUresult error, const char **text) { *text = "an error of the stand-in"; return CUDA_SUCCESS; }
drv cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)0x20; return CUDA_SUCCESS; }
drv cuModuleLoadDataEx(CUmodule *m, const void *i, unsigned n, CUjit_option *o, void **v) { return cuModuleLoadData(m, i); }
drv cuModuleLoad(CUmodule *module, const char *path) { return cuModuleLoadData(module, path); }
drv cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
drv cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) { *f = (CUfunction)strdup(name); return CUDA_SUCCESS; }
drv cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
    *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
drv cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
drv cuFuncSetCacheConfig(CUfunction f, CUfunc_cache configuration) { return CUDA_SUCCESS; }
drv cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, CUstream stream, void **parameters, void **extra) {
    launched("triton", (const char *)f, stream);
    return CUDA_SUCCESS;
}
drv cuLaunchKernelEx(const CUlaunchConfig *configuration, CUfunction f, void **parameters, void **extra) {
    launched("triton", (const char *)f, configuration->hStream);
    return CUDA_SUCCESS;
}
drv cuOccupancyMaxActiveClusters(int *clusters, CUfunction f, const CUlaunchConfig *c) { *clusters = 1; return CUDA_SUCCESS; }
drv cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer; // CU_POINTER_ATTRIBUTE_DEVICE_POINTER, the only one asked for
    return CUDA_SUCCESS;
}
