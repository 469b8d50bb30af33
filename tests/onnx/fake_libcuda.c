/* What stands for NVIDIA's driver: the few functions of the CUDA Driver API that cuda_driver.py asks, with their names,
 * arguments and codes as its reference has them. What it answers is in the environment. */

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

int cuInit(unsigned int flags) {
    (void)flags;
    return number("FAKE_CUDA_INIT", 0);
}

int cuDriverGetVersion(int *version) {
    *version = number("FAKE_CUDA_VERSION", 13000);
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = number("FAKE_CUDA_DEVICES", 1);
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal < number("FAKE_CUDA_DEVICES", 1) ? 0 : 101; /* CUDA_ERROR_INVALID_DEVICE */
}

int cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, (size_t)length, "Example GPU %d", device);
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? number("FAKE_CUDA_MAJOR", 9) : 0;
    return attribute == 75 || attribute == 76 ? 0 : 1; /* CUDA_ERROR_INVALID_VALUE */
}

static int num_retained, num_pushed;

int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    *context = &num_retained;
    num_retained++;
    return number("FAKE_CUDA_CONTEXT", 0);
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    return num_retained-- > 0 ? 0 : 201; /* CUDA_ERROR_INVALID_CONTEXT */
}

int cuCtxPushCurrent_v2(void *context) {
    num_pushed++;
    return context == &num_retained ? 0 : 201;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = &num_retained;
    return num_pushed-- > 0 ? 0 : 201;
}

int fake_contexts_in_use(void) {
    return num_retained + num_pushed;
}

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    if (!num_pushed)
        return 201;
    *free = (size_t)7 << 30;
    *total = (size_t)80 << 30;
    return number("FAKE_CUDA_MEMORY", 0);
}

int cuGetErrorName(int code, const char **name) {
    static const struct { int code; const char *name; } known[] = {
        {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"},
        {999, "CUDA_ERROR_UNKNOWN"},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].code == code) {
            *name = known[i].name;
            return 0;
        }
    *name = NULL;
    return 1;
}
