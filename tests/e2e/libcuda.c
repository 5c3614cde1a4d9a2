// An NVIDIA driver for tests on machines without one. Environment variables say how it behaves: DRIVER_VERSION is the
// version that cuDriverGetVersion returns, such as 12040; DRIVER_INIT is the return code of cuInit and DRIVER_LOAD that
// of loading a kernel, each 0 by default. There are DRIVER_DEVICES GPUs, 1 by default; CUDA_VISIBLE_DEVICES, numbers with
// commas between them, shows some of them in its order. They are Hopper GPUs, except number DRIVER_OTHER, which is of
// generation DRIVER_GENERATION (8 by default). Their memory is the host's. Number DRIVER_FULL has little free memory.
//
// The driver reads a kernel's parameters out of its machine code, and refuses a launch that passes fewer or more. If an
// image is no machine code, it accepts any. Kernels do nothing, except the one that draws tokens: it draws 1, 2, 3 … for
// a step. Compiled with -DBEFORE_12_4 the driver cannot be asked for parameters, like drivers of that age.
#include <stdint.h>
#include <stdio.h>
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

// The number of the GPU that the process sees as `ordinal`; -1 if there is none.
static int seen_as(int ordinal) {
    int devices = number("DRIVER_DEVICES", 1);
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    if (!visible) return ordinal < devices ? ordinal : -1;
    for (; *visible && ordinal > 0; --ordinal) visible += strcspn(visible, ",") + (strchr(visible, ',') != NULL);
    return *visible && atoi(visible) < devices ? atoi(visible) : -1;
}

int cuDeviceGetCount(int* count) {
    for (*count = 0; seen_as(*count) >= 0; ++*count);
    return 0;
}

// A handle is the GPU's number.
int cuDeviceGet(int* device, int ordinal) {
    *device = seen_as(ordinal);
    return *device < 0 ? 101 : 0;
}

static int is_other(int device) { return device == number("DRIVER_OTHER", -1); }

int cuDeviceGetName(char* name, int size, int device) {
    strncpy(name, is_other(device) ? "Another GPU of the tests" : "A Hopper GPU of the tests", (size_t)size);
    return 0;
}

int cuDeviceGetUuid_v2(uint8_t* uuid, int device) {
    memset(uuid, 0, 16);
    uuid[0] = (uint8_t)device;
    return 0;
}

int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    (void)device;
    *bytes = 80000000000;
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    switch (attribute) {
        case 16: *value = 132; break;        // multiprocessors
        case 38: *value = 50 << 20; break;   // bytes of the L2
        case 75: *value = is_other(device) ? number("DRIVER_GENERATION", 8) : 9; break;  // compute capability, major
        case 76: *value = 0; break;          // and minor
        case 97: *value = 232448; break;     // shared memory of a CTA
        default: *value = 0;
    }
    return 0;
}

// A kernel, which is also the module that holds it: an image of an engine has one kernel.
typedef struct {
    char name[256];
    int num_params;  // -1: not known
    size_t sizes[64], offsets[64];
} Kernel;

// Reads the parameters out of a cubin, which is an ELF file. Its section `.nv.info.NAME` has an attribute for each
// parameter: a format (4: bytes follow), the kind (0x17) and the number of bytes; then 4 bytes, the parameter's number
// and offset, and its size above bit 18.
static void read_parameters(Kernel* kernel, const uint8_t* image) {
    kernel->num_params = -1;
    if (memcmp(image, "\177ELF", 4) != 0) return;
    uint64_t sections;
    uint16_t size, count, names;
    memcpy(&sections, image + 40, 8);
    memcpy(&size, image + 58, 2);
    memcpy(&count, image + 60, 2);
    memcpy(&names, image + 62, 2);
    uint64_t texts;
    memcpy(&texts, image + sections + names * size + 24, 8);
    for (int i = 0; i < count; ++i) {
        const uint8_t* section = image + sections + i * size;
        uint32_t name;
        uint64_t start, bytes;
        memcpy(&name, section, 4);
        memcpy(&start, section + 24, 8);
        memcpy(&bytes, section + 32, 8);
        const char* text = (const char*)image + texts + name;
        if (strncmp(text, ".nv.info.", 9) != 0) continue;
        snprintf(kernel->name, sizeof kernel->name, "%s", text + 9);
        kernel->num_params = 0;
        for (uint64_t at = 0; at + 4 <= bytes;) {
            const uint8_t* attribute = image + start + at;
            uint16_t length = 0;
            if (attribute[0] == 4) memcpy(&length, attribute + 2, 2);
            if (attribute[0] == 4 && attribute[1] == 0x17) {
                uint16_t number, offset;
                uint32_t word;
                memcpy(&number, attribute + 8, 2);
                memcpy(&offset, attribute + 10, 2);
                memcpy(&word, attribute + 12, 4);
                kernel->sizes[number] = word >> 18;
                kernel->offsets[number] = offset;
                if (number >= kernel->num_params) kernel->num_params = number + 1;
            }
            at += 4 + length;
        }
        return;
    }
}

int cuModuleLoadDataEx(void** module, const void* image, unsigned options, int* names, void** values) {
    (void)options, (void)names, (void)values;
    Kernel* kernel = calloc(1, sizeof *kernel);
    read_parameters(kernel, image);
    *module = kernel;
    return number("DRIVER_LOAD", 0);
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    Kernel* kernel = module;
    if (kernel->num_params >= 0 && strcmp(kernel->name, name) != 0) return 500;
    *function = kernel;
    return 0;
}

#ifndef BEFORE_12_4
int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
    const Kernel* kernel = function;
    if (kernel->num_params < 0) return 801;
    if (index >= (size_t)kernel->num_params) return 1;
    *offset = kernel->offsets[index];
    *size = kernel->sizes[index];
    return 0;
}
#endif

// The step's counts and what it drew, where the last launch of the drawing kernel left them for the graph: a thread is
// a rank.
static _Thread_local const int32_t* header;
static _Thread_local int32_t* drawn;

static void draw(void) {
    for (int i = 0; header && i < header[4]; ++i) {
        drawn[4 * i] = i + 1;
        drawn[4 * i + 1] = -1;
    }
}

int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) {
    (void)config, (void)extra;
    const Kernel* kernel = function;
    int passed = 0;
    while (passed < 32 && params[passed]) ++passed;
    if (kernel->num_params >= 0 && passed != kernel->num_params) {
        fprintf(stderr, "driver: %d parameters for %s, which takes %d\n", passed, kernel->name, kernel->num_params);
        return 1;
    }
    if (strstr(kernel->name, "sample4draw")) {
        memcpy(&header, params[0], sizeof header);
        memcpy(&drawn, params[passed - 1], sizeof drawn);
        draw();
    }
    return 0;
}

int cuGraphLaunch(void* graph, void* stream) {
    (void)graph, (void)stream;
    draw();
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
    free(module);
    return 0;
}

// A context is the GPU's number and one, so that it is no null pointer.
static _Thread_local size_t current;

int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = (void*)((size_t)device + 1);
    return 0;
}

int cuCtxSetCurrent(void* context) {
    current = (size_t)context;
    return 0;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    *total = 80000000000;
    *free = current == (size_t)number("DRIVER_FULL", -1) + 1 ? 100000000 : *total;
    return 0;
}

int cuMemAlloc_v2(void** memory, size_t bytes) {
    *memory = calloc(1, bytes ? bytes : 1);
    return *memory ? 0 : 2;
}

int cuMemFree_v2(void* memory) {
    free(memory);
    return 0;
}

int cuMemHostAlloc(void** memory, size_t bytes, unsigned flags) {
    (void)flags;
    return cuMemAlloc_v2(memory, bytes);
}

int cuMemFreeHost(void* memory) { return cuMemFree_v2(memory); }

int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    (void)stream;
    memcpy(to, from, bytes);
    return 0;
}

int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    return cuMemcpyHtoDAsync_v2(to, from, bytes, stream);
}

int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, void* stream) {
    return cuMemcpyHtoDAsync_v2(to, from, bytes, stream);
}

int cuMemsetD8Async(void* memory, unsigned char byte, size_t bytes, void* stream) {
    (void)stream;
    memset(memory, byte, bytes);
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

int cuEventElapsedTime(float* ms, void* from, void* to) {
    (void)from, (void)to;
    *ms = 1;
    return 0;
}

// All other functions succeed and do nothing. Handles are never read.
#define DONE(name) \
    int name(void) { return 0; }
DONE(cuStreamSynchronize)
DONE(cuStreamWaitEvent)
DONE(cuCtxEnablePeerAccess)
DONE(cuIpcGetMemHandle)
DONE(cuIpcOpenMemHandle_v2)
DONE(cuIpcCloseMemHandle)
DONE(cuStreamBeginCapture_v2)
DONE(cuStreamEndCapture)
DONE(cuEventCreate)
DONE(cuEventDestroy_v2)
DONE(cuEventRecord)
DONE(cuEventQuery)
DONE(cuEventSynchronize)
DONE(cuGraphInstantiateWithFlags)
DONE(cuGraphExecDestroy)
DONE(cuGraphDestroy)
DONE(cuTensorMapEncodeTiled)
