// A driver that is as the tests say, for machines without one. DRIVER_VERSION is what cuDriverGetVersion says, as 12040;
// DRIVER_INIT the return code of cuInit, DRIVER_LOAD that of loading a kernel, each 0 by default. It has one Hopper GPU, which
// loads kernels and has no memory.
#include <stdlib.h>
#include <string.h>

static int number(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuDriverGetVersion(int* version) {
    *version = number("DRIVER_VERSION", 13000);
    return 0;
}

int cuInit(unsigned flags) {
    (void)flags;
    return number("DRIVER_INIT", 0);
}

static const struct {
    unsigned code;
    const char *name, *text;
} CODES[] = {
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static int describe(unsigned code, const char** text, int by_name) {
    *text = NULL;
    for (unsigned i = 0; i < sizeof CODES / sizeof *CODES; ++i)
        if (CODES[i].code == code) *text = by_name ? CODES[i].name : CODES[i].text;
    return *text ? 0 : 1;
}
int cuGetErrorName(unsigned code, const char** text) { return describe(code, text, 1); }
int cuGetErrorString(unsigned code, const char** text) { return describe(code, text, 0); }

int cuDeviceGetCount(int* count) {
    *count = number("DRIVER_DEVICES", 1);
    return 0;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDeviceGetName(char* name, int size, int device) {
    (void)device;
    strncpy(name, "A Hopper GPU of the tests", (size_t)size);
    return 0;
}

int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    (void)device;
    *bytes = 80000000000;
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    (void)device;
    switch (attribute) {
        case 16: *value = 132; break;        // multiprocessors
        case 38: *value = 50 << 20; break;   // bytes of the L2
        case 75: *value = 9; break;          // compute capability, major
        case 76: *value = 0; break;          // and minor
        case 97: *value = 232448; break;     // shared memory of a CTA
        default: *value = 0;
    }
    return 0;
}

int cuModuleLoadDataEx(void** module, const void* image, unsigned options, int* names, void** values) {
    (void)image, (void)options, (void)names, (void)values;
    *module = NULL;
    return number("DRIVER_LOAD", 0);
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    (void)module, (void)name;
    *function = function;
    return 0;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
    (void)function;
    *value = attribute == 0 ? 1024 : 0;  // threads of a CTA
    return 0;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    (void)function, (void)attribute, (void)value;
    return 0;
}

int cuModuleUnload(void* module) {
    (void)module;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    (void)device;
    *context = context;
    return 0;
}

int cuCtxSetCurrent(void* context) {
    (void)context;
    return 0;
}

int cuStreamCreate(void** stream, unsigned flags) {
    (void)flags;
    *stream = stream;
    return 0;
}

int cuStreamDestroy_v2(void* stream) {
    (void)stream;
    return 0;
}

// What a test reaches fails with `unknown error`, if it is not above.
#define NOTHING(name) \
    int name(void) { return 999; }
NOTHING(cuMemGetInfo_v2)
NOTHING(cuMemAlloc_v2)
NOTHING(cuMemFree_v2)
NOTHING(cuMemHostAlloc)
NOTHING(cuMemFreeHost)
NOTHING(cuMemcpyHtoDAsync_v2)
NOTHING(cuMemcpyDtoHAsync_v2)
NOTHING(cuMemsetD8Async)
NOTHING(cuStreamSynchronize)
NOTHING(cuStreamBeginCapture_v2)
NOTHING(cuStreamEndCapture)
NOTHING(cuEventCreate)
NOTHING(cuEventDestroy_v2)
NOTHING(cuEventRecord)
NOTHING(cuEventSynchronize)
NOTHING(cuEventElapsedTime)
NOTHING(cuLaunchKernelEx)
NOTHING(cuGraphInstantiateWithFlags)
NOTHING(cuGraphLaunch)
NOTHING(cuGraphExecDestroy)
NOTHING(cuGraphDestroy)
NOTHING(cuTensorMapEncodeTiled)
