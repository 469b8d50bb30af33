/* The part of ONNX Runtime's C interface that custom operators need.
 *
 * OrtApi is a table of functions that only grows: each keeps its place for good, so a program may ask any later runtime
 * for an older version of the table. Here are the places that are used, counted in the table of version 20, and nothing
 * of the official header, which is not part of ONNX Runtime's Python packages.
 *
 * Reference: https://onnxruntime.ai/docs/api/c/struct_ort_api.html and struct_ort_custom_op.html */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 20

typedef struct OrtStatus OrtStatus; /* NULL is success */
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtShape;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtCustomOp OrtCustomOp;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT32 = 6, ORT_FLOAT16 = 10 };
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };

#define SKIP(first, last) void *skipped_##first[last - first + 1]
typedef struct {
  /* 0 */ OrtStatus *(*CreateStatus)(int code, const char *message);
  SKIP(1, 25);
  /* 26 */ OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **out);
  /* 27 */ OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);
  /* 28 */ OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
  SKIP(29, 50);
  /* 51 */ OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **out);
  SKIP(52, 60);
  /* 61 */ OrtStatus *(*GetDimensionsCount)(const OrtShape *shape, size_t *out);
  /* 62 */ OrtStatus *(*GetDimensions)(const OrtShape *shape, int64_t *out, size_t length);
  SKIP(63, 64);
  /* 65 */ OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtShape **out);
  SKIP(66, 74);
  /* 75 */ OrtStatus *(*AllocatorAlloc)(OrtAllocator *allocator, size_t size, void **out);
  /* 76 */ OrtStatus *(*AllocatorFree)(OrtAllocator *allocator, void *pointer);
  SKIP(77, 84);
  /* 85 */ OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name, float *out);
  /* 86 */ OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name, int64_t *out);
  SKIP(87, 89);
  /* 90 */ OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index, const OrtValue **out);
  /* 91 */ OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *dims,
                                                 size_t num_dims, OrtValue **out);
  SKIP(92, 92);
  /* 93 */ void (*ReleaseStatus)(OrtStatus *status);
  SKIP(94, 98);
  /* 99 */ void (*ReleaseTensorTypeAndShapeInfo)(OrtShape *shape);
  SKIP(100, 100);
  /* 101 */ void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *domain);
  SKIP(102, 131);
  /* 132 */ void (*ReleaseAllocator)(OrtAllocator *allocator);
  SKIP(133, 229);
  /* 230 */ OrtStatus *(*KernelInfo_GetInputCount)(const OrtKernelInfo *info, size_t *out);
  SKIP(231, 231);
  /* 232 */ OrtStatus *(*KernelInfo_GetInputName)(const OrtKernelInfo *info, size_t index, char *out, size_t *size);
  SKIP(233, 236);
  /* 237 */ OrtStatus *(*HasSessionConfigEntry)(const OrtSessionOptions *options, const char *key, int *out);
  /* 238 */ OrtStatus *(*GetSessionConfigEntry)(const OrtSessionOptions *options, const char *key, char *out,
                                                size_t *size);
  SKIP(239, 248);
  /* 249 */ OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info, size_t index, int *is_constant,
                                                            const OrtValue **out);
  SKIP(250, 273);
  /* 274 */ OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*task)(void *, size_t),
                                                    size_t num_tasks, size_t num_batches, void *data);
  SKIP(275, 277);
  /* 278 */ OrtStatus *(*KernelInfoGetAllocator)(const OrtKernelInfo *info, int memory_type, OrtAllocator **out);
} OrtApi;
#undef SKIP

_Static_assert(offsetof(OrtApi, KernelInfoGetAllocator) == 278 * sizeof(void *), "a place is miscounted");

typedef struct {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
  uint32_t version; /* of the interface that this was written for: what came later is not looked at */
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  int (*GetInputType)(const OrtCustomOp *, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  int (*GetOutputType)(const OrtCustomOp *, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *kernel, OrtKernelContext *);
  void (*KernelDestroy)(void *kernel);
  int (*GetInputCharacteristic)(const OrtCustomOp *, size_t index);
  int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **kernel);
  OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, void *context);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
};

#define CUSTOM_OP_VERSION 17 /* the first whose OrtCustomOp ends with GetEndVersion */
