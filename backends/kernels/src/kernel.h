/* What both operators need of ONNX Runtime. */
#pragma once

#include <stdbool.h>

#include "ort_abi.h"

/* Returns from the calling function what is not success. */
#define CHECK(call)                            \
  do {                                         \
    OrtStatus *status_ = (call);               \
    if (status_) return status_;               \
  } while (0)

#define MAX_DIMENSIONS 6

typedef struct {
  void *data;
  size_t num_dims;
  int64_t dims[MAX_DIMENSIONS];
} tensor;

/* An absent input; one without elements may have no data either. */
static inline bool is_absent(const tensor *t) { return !t->data && !t->num_dims; }

OrtStatus *invalid(const OrtApi *ort, const char *message);

/* An input of a run, which may be absent. */
OrtStatus *read_input(const OrtApi *ort, const OrtKernelContext *context, size_t index, tensor *out);

/* An input that must be an initializer, and have elements, where it is present. */
OrtStatus *read_constant(const OrtApi *ort, const OrtKernelInfo *info, size_t index, tensor *out);

/* An output [rows, columns]; *out is NULL where the graph does not name it, as it may all but the first. */
OrtStatus *make_output(const OrtApi *ort, OrtKernelContext *context, size_t index, int64_t rows, int64_t columns,
                       float **out);

/* Runs tasks 0 .. num_tasks - 1, at least one, on the session's threads; a single one on the calling thread. */
OrtStatus *run_tasks(const OrtApi *ort, const OrtKernelContext *context, void (*task)(void *, size_t), size_t num_tasks,
                     void *data);

typedef struct {
  int type;
  bool optional;
} input_spec;

extern const OrtCustomOp linear_op, attention_op, attention_bytes_op;

/* What every operator here answers alike: outputs of floats, the first of which it must have, on the CPU. */
#define COMMON_CALLBACKS(op_name, inputs, num_outputs)                                                             \
  static const char *get_name(const OrtCustomOp *op) {                                                             \
    (void)op;                                                                                                      \
    return op_name;                                                                                                \
  }                                                                                                                \
  static const char *get_provider(const OrtCustomOp *op) {                                                         \
    (void)op;                                                                                                      \
    return "CPUExecutionProvider";                                                                                 \
  }                                                                                                                \
  static size_t count_inputs(const OrtCustomOp *op) {                                                              \
    (void)op;                                                                                                      \
    return sizeof(inputs) / sizeof(inputs[0]);                                                                     \
  }                                                                                                                \
  static int input_type(const OrtCustomOp *op, size_t index) {                                                     \
    (void)op;                                                                                                      \
    return inputs[index].type;                                                                                     \
  }                                                                                                                \
  static int input_characteristic(const OrtCustomOp *op, size_t index) {                                           \
    (void)op;                                                                                                      \
    return inputs[index].optional ? ORT_OPTIONAL : ORT_REQUIRED;                                                   \
  }                                                                                                                \
  static size_t count_outputs(const OrtCustomOp *op) {                                                             \
    (void)op;                                                                                                      \
    return num_outputs;                                                                                            \
  }                                                                                                                \
  static int output_type(const OrtCustomOp *op, size_t index) {                                                    \
    (void)op, (void)index;                                                                                         \
    return ORT_FLOAT;                                                                                              \
  }                                                                                                                \
  static int output_characteristic(const OrtCustomOp *op, size_t index) {                                          \
    (void)op;                                                                                                      \
    return index ? ORT_OPTIONAL : ORT_REQUIRED;                                                                    \
  }                                                                                                                \
  static int memory_type(const OrtCustomOp *op, size_t index) {                                                    \
    (void)op, (void)index;                                                                                         \
    return 0;                                                                                                      \
  }                                                                                                                \
  static int first_version(const OrtCustomOp *op) {                                                                \
    (void)op;                                                                                                      \
    return 1;                                                                                                      \
  }

#define CUSTOM_OP                                                                                                  \
  {                                                                                                                \
    .version = CUSTOM_OP_VERSION, .GetName = get_name, .GetExecutionProviderType = get_provider,                   \
    .GetInputType = input_type, .GetInputTypeCount = count_inputs, .GetOutputType = output_type,                   \
    .GetOutputTypeCount = count_outputs, .KernelDestroy = destroy, .GetInputCharacteristic = input_characteristic, \
    .GetOutputCharacteristic = output_characteristic, .GetInputMemoryType = memory_type,                           \
    .CreateKernelV2 = create, .KernelComputeV2 = compute, .GetStartVersion = first_version,                        \
    .GetEndVersion = first_version,                                                                                \
  }
