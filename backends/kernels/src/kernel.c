#include "kernel.h"

#include <pthread.h>
#include <string.h>

#include "processor.h"
#include "top.h"

OrtStatus *invalid(const OrtApi *ort, const char *message) { return ort->CreateStatus(ORT_INVALID_ARGUMENT, message); }

static OrtStatus *describe(const OrtApi *ort, const OrtValue *value, tensor *out) {
  OrtShape *shape;
  CHECK(ort->GetTensorTypeAndShape(value, &shape));
  OrtStatus *status = ort->GetDimensionsCount(shape, &out->num_dims);
  if (!status && out->num_dims > MAX_DIMENSIONS) status = invalid(ort, "headrace: a tensor has more than 6 dimensions");
  if (!status) status = ort->GetDimensions(shape, out->dims, out->num_dims);
  ort->ReleaseTensorTypeAndShapeInfo(shape);
  if (status) return status;
  return ort->GetTensorMutableData((OrtValue *)value, &out->data);
}

OrtStatus *read_input(const OrtApi *ort, const OrtKernelContext *context, size_t index, tensor *out) {
  const OrtValue *value = NULL;
  *out = (tensor){0};
  CHECK(ort->KernelContext_GetInput(context, index, &value));
  return value ? describe(ort, value, out) : NULL;
}

OrtStatus *read_constant(const OrtApi *ort, const OrtKernelInfo *info, size_t index, tensor *out) {
  const OrtValue *value = NULL;
  int is_constant = 0;
  size_t num_inputs, name_size = 1; /* with the zero at its end: an absent input has no other name */
  *out = (tensor){0};
  CHECK(ort->KernelInfo_GetInputCount(info, &num_inputs));
  if (index < num_inputs) CHECK(ort->KernelInfo_GetInputName(info, index, NULL, &name_size));
  if (name_size == 1) return NULL;
  CHECK(ort->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (!is_constant || !value) return invalid(ort, "headrace: every weight must be an initializer");
  CHECK(describe(ort, value, out));
  for (size_t i = 0; i < out->num_dims; i++) {
    if (!out->dims[i]) return invalid(ort, "headrace: a weight has no elements");
  }
  return NULL;
}

OrtStatus *make_output(const OrtApi *ort, OrtKernelContext *context, size_t index, int64_t rows, int64_t columns,
                       float **out) {
  const int64_t dims[2] = {rows, columns};
  OrtValue *value = NULL;
  *out = NULL;
  CHECK(ort->KernelContext_GetOutput(context, index, dims, 2, &value));
  if (value) return ort->GetTensorMutableData(value, (void **)out);
  return index ? NULL : invalid(ort, "headrace: the output has no name");
}

OrtStatus *run_tasks(const OrtApi *ort, const OrtKernelContext *context, void (*task)(void *, size_t), size_t num_tasks,
                     void *data) {
  if (num_tasks > 1) return ort->KernelContext_ParallelFor(context, task, num_tasks, num_tasks, data);
  task(data, 0);
  return NULL;
}

/* --- registration ------------------------------------------------------------------------------------------------- */

/* One for each attention. They live as long as the process: sessions keep pointing to them. */
static OrtCustomOpDomain *domains[2];
static pthread_mutex_t domains_lock = PTHREAD_MUTEX_INITIALIZER;

static OrtStatus *make_domain(const OrtApi *ort, const OrtCustomOp *attention, OrtCustomOpDomain **domain) {
  if (*domain) return NULL;
  OrtCustomOpDomain *made;
  CHECK(ort->CreateCustomOpDomain("headrace", &made));
  OrtStatus *status = ort->CustomOpDomain_Add(made, &linear_op);
  if (!status) status = ort->CustomOpDomain_Add(made, attention);
  if (status) {
    ort->ReleaseCustomOpDomain(made);
  } else {
    *domain = made;
  }
  return status;
}

/* A session that shall keep int8 in its cache says so by the entry "headrace.kv_cache_dtype". */
static OrtStatus *read_cache_type(const OrtApi *ort, const OrtSessionOptions *options, bool *is_int8) {
  static const char *const KEY = "headrace.kv_cache_dtype";
  int has_entry = 0;
  *is_int8 = false;
  CHECK(ort->HasSessionConfigEntry(options, KEY, &has_entry));
  if (!has_entry) return NULL;
  char value[8] = "";
  size_t size = sizeof value;
  OrtStatus *status = ort->GetSessionConfigEntry(options, KEY, value, &size);
  if (status) ort->ReleaseStatus(status); /* too long, for one */
  *is_int8 = !strcmp(value, "int8");
  return *is_int8 || !strcmp(value, "float16") ? NULL : invalid(ort, "headrace.kv_cache_dtype must be float16 or int8");
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                     const OrtApiBase *base) {
  const OrtApi *ort = base->GetApi(ORT_API_VERSION);
  /* Every runtime has the first version, and CreateStatus in it. */
  if (!ort) return base->GetApi(1)->CreateStatus(ORT_FAIL, "headrace: ONNX Runtime must be 1.20 or later");
  bool is_int8;
  CHECK(read_cache_type(ort, options, &is_int8));
  pthread_mutex_lock(&domains_lock);
  OrtCustomOpDomain **domain = &domains[is_int8];
  OrtStatus *status = make_domain(ort, is_int8 ? &attention_bytes_op : &attention_op, domain);
  if (!status) status = ort->AddCustomOpDomain(options, *domain);
  pthread_mutex_unlock(&domains_lock);
  return status;
}

/* The instructions that the operators are computed with here; NULL if this processor has not what they need. */
__attribute__((visibility("default"))) const char *headrace_kernels_isa(void) { return processor_name(processor_best()); }

/* What top.h has, for callers that load the library by name. */

__attribute__((visibility("default"))) void headrace_greedy(const known_rows *rows, int64_t *ids) {
  greedy_of_rows(rows, ids);
}

__attribute__((visibility("default"))) bool headrace_top(const known_rows *rows, size_t k, const float *temperatures,
                                                          float *values, int64_t *ids, double *log_sum_exps) {
  return top_of_rows(rows, k, temperatures, values, ids, log_sum_exps);
}
