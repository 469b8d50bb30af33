/* The operator headrace.Linear: out = [norm](x) W^T + bias + residual, or with a gate act(g) * u, where g and u are the
 * products with two matrices.
 *
 *     0 x         float [T, width]
 *     1 values    uint8 [outputs, blocks, block_size x bits / 8], as com.microsoft.MatMulNBits
 *     2 scales    float [outputs, blocks]
 *     3 minima    float [outputs, blocks], optional: integers then count from 0
 *     4 norm      float [width], optional: of an RMS norm over x
 *     5 bias      float [outputs], optional
 *     6 residual  float, shaped as the output, optional
 *     7 gated_values, 8 gated_scales, 9 gated_minima: with a gate, the second matrix; shaped as the first
 *
 * Outputs: 0 out, float [T, outputs]; 1 maxima, float [T, outputs / MAXIMUM_SPAN, rounded up], optional and without a
 * gate: the largest of each span of a row of out (top.h).
 *
 * All but 0 and 6 must be initializers. Attributes: bits (8 or 4), gate (a linear_gate), epsilon (of the norm). */
#include <stdlib.h>
#include <string.h>

#include "kernel.h"
#include "linear.h"
#include "top.h"

enum { X, VALUES, SCALES, MINIMA, NORM, BIAS, RESIDUAL, GATED_VALUES, GATED_SCALES, GATED_MINIMA };
static const input_spec INPUTS[] = {
    [X] = {ORT_FLOAT, false},          [VALUES] = {ORT_UINT8, false},
    [SCALES] = {ORT_FLOAT, false}, [MINIMA] = {ORT_FLOAT, true},
    [NORM] = {ORT_FLOAT, true},      [BIAS] = {ORT_FLOAT, true},
    [RESIDUAL] = {ORT_FLOAT, true},
    [GATED_VALUES] = {ORT_UINT8, true},
    [GATED_SCALES] = {ORT_FLOAT, true},
    [GATED_MINIMA] = {ORT_FLOAT, true},
};
COMMON_CALLBACKS("Linear", INPUTS, 2)

#define ROWS_A_TASK 8
#define TASK_BYTES (128 << 10) /* of weights: they stay in the second cache while all rows pass */
#define MIN_TASKS 16           /* so that a thread that is held up is helped out */
#define SMALL (1 << 16)        /* multiplications that are not worth waking another thread */

typedef struct {
  const OrtApi *ort;
  OrtAllocator *allocator;
  linear_weights weights;
  linear_gate gate;
  const float *norm, *bias;
  int64_t norm_width;
  float epsilon;
} linear_kernel;

typedef struct {
  const linear_kernel *kernel;
  linear_rows rows;
  size_t width, num_tasks;
  size_t together; /* pieces that no task divides: those of a maximum */
  const float *x, *residual;
  float *out, *maxima;
} linear_run;

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static void quantize_task(void *data, size_t task) {
  linear_run *run = data;
  const linear_kernel *kernel = run->kernel;
  const size_t first = task * ROWS_A_TASK;
  linear_quantize(&kernel->weights, run->x, run->width, kernel->norm, kernel->epsilon, &run->rows, first,
                  smaller(first + ROWS_A_TASK, run->rows.count));
}

/* Of what has just been computed, and still is in the cache. */
static void note_maxima(const linear_run *run, size_t first, size_t last) {
  const size_t outputs = run->kernel->weights.outputs, num_maxima = count_maxima(outputs);
  for (size_t row = 0; row < run->rows.count; row++) {
    for (size_t i = first; i < last; i++) {
      const size_t column = i * MAXIMUM_SPAN;
      run->maxima[row * num_maxima + i] =
          largest_or_nan(run->out + row * outputs + column, smaller(MAXIMUM_SPAN, outputs - column));
    }
  }
}

static void multiply_task(void *data, size_t task) {
  linear_run *run = data;
  const linear_kernel *kernel = run->kernel;
  const size_t num_pieces = linear_num_pieces(&kernel->weights, kernel->gate);
  const size_t num_parts = (num_pieces + run->together - 1) / run->together;
  const size_t first = num_parts * task / run->num_tasks, last = num_parts * (task + 1) / run->num_tasks;
  linear_multiply(&kernel->weights, &run->rows, kernel->gate, kernel->bias, run->residual, run->out,
                  first * run->together, smaller(last * run->together, num_pieces));
  if (run->maxima) note_maxima(run, first, last);
}

static OrtStatus *compute_rows(linear_run *run, OrtKernelContext *context) {
  const linear_kernel *kernel = run->kernel;
  const linear_weights *w = &kernel->weights;
  const size_t num_rows = run->rows.count;
  CHECK(run_tasks(kernel->ort, context, quantize_task, (num_rows + ROWS_A_TASK - 1) / ROWS_A_TASK, run));
  const size_t num_pieces = linear_num_pieces(w, kernel->gate), bytes = w->outputs * w->inputs * w->bits / 8;
  run->num_tasks = num_rows * w->outputs * w->inputs <= SMALL ? 1 : bytes / TASK_BYTES;
  if (num_rows * w->outputs * w->inputs > SMALL && run->num_tasks < MIN_TASKS) run->num_tasks = MIN_TASKS;
  run->together = run->maxima ? MAXIMUM_SPAN / TILE : 1;
  run->num_tasks = smaller(run->num_tasks, (num_pieces + run->together - 1) / run->together);
  return run_tasks(kernel->ort, context, multiply_task, run->num_tasks, run);
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  linear_kernel *kernel = data;
  const OrtApi *ort = kernel->ort;
  const linear_weights *w = &kernel->weights;
  tensor x, residual;
  CHECK(read_input(ort, context, X, &x));
  CHECK(read_input(ort, context, RESIDUAL, &residual));
  const size_t outputs = kernel->gate ? w->outputs / 2 : w->outputs;
  if (x.num_dims != 2 || (size_t)x.dims[1] > w->inputs || (size_t)x.dims[1] + w->block_size <= w->inputs) {
    return invalid(ort, "headrace.Linear: x must be [T, width], and width what the blocks of values hold");
  }
  if (kernel->norm && kernel->norm_width != x.dims[1]) return invalid(ort, "headrace.Linear: norm must be [width]");
  if (!is_absent(&residual) &&
      (residual.num_dims != 2 || residual.dims[0] != x.dims[0] || (size_t)residual.dims[1] != outputs)) {
    return invalid(ort, "headrace.Linear: residual must be shaped as the output");
  }
  linear_run run = {
      .kernel = kernel, .rows = {.count = (size_t)x.dims[0]}, .width = (size_t)x.dims[1], .x = x.data,
      .residual = residual.data};
  CHECK(make_output(ort, context, 0, x.dims[0], (int64_t)outputs, &run.out));
  CHECK(make_output(ort, context, 1, x.dims[0], (int64_t)count_maxima(outputs), &run.maxima));
  if (run.maxima && kernel->gate) return invalid(ort, "headrace.Linear: with a gate there are no maxima");
  const size_t count = run.rows.count;
  if (!count) return NULL;
  /* One piece of memory: values, then sums, then scales, which are no more than sums. */
  const size_t values_size = (count * w->inputs * sizeof(int16_t) + 63) / 64 * 64;
  char *memory;
  CHECK(ort->AllocatorAlloc(kernel->allocator, values_size + 2 * count * w->num_blocks * sizeof(float),
                            (void **)&memory));
  run.rows.values = memory;
  run.rows.sums = (float *)(memory + values_size);
  run.rows.scales = run.rows.sums + count * w->num_blocks;
  OrtStatus *status = compute_rows(&run, context);
  OrtStatus *freed = ort->AllocatorFree(kernel->allocator, memory);
  if (!status) return freed;
  if (freed) ort->ReleaseStatus(freed);
  return status;
}

static void destroy(void *data) {
  linear_kernel *kernel = data;
  linear_release(&kernel->weights);
  if (kernel->allocator) kernel->ort->ReleaseAllocator(kernel->allocator);
  free(kernel);
}

typedef struct {
  tensor values, scales, minima;
} matrix;

static OrtStatus *read_matrix(const OrtApi *ort, const OrtKernelInfo *info, size_t values, size_t scales, size_t minima,
                              matrix *out) {
  CHECK(read_constant(ort, info, values, &out->values));
  CHECK(read_constant(ort, info, scales, &out->scales));
  CHECK(read_constant(ort, info, minima, &out->minima));
  if (!out->values.data || !out->scales.data) {
    return invalid(ort, "headrace.Linear: values and scales must be initializers");
  }
  const tensor *v = &out->values, *s = &out->scales, *m = &out->minima;
  if (v->num_dims != 3 || s->num_dims != 2 || s->dims[0] != v->dims[0] || s->dims[1] != v->dims[1]) {
    return invalid(ort, "headrace.Linear: values must be [outputs, blocks, bytes], scales [outputs, blocks]");
  }
  if (m->data && (m->num_dims != 2 || m->dims[0] != v->dims[0] || m->dims[1] != v->dims[1])) {
    return invalid(ort, "headrace.Linear: minima must be shaped as scales");
  }
  return NULL;
}

/* One array behind another, in memory of its own; NULL if there is none. */
static void *joined(const tensor *first, const tensor *second, size_t size) {
  char *both = malloc(2 * size);
  if (!both) return NULL;
  memcpy(both, first->data, size);
  memcpy(both + size, second->data, size);
  return both;
}

static bool pack(linear_kernel *kernel, const matrix *first, const matrix *second, int bits) {
  const size_t outputs = (size_t)first->values.dims[0], num_blocks = (size_t)first->values.dims[1];
  const size_t bytes = (size_t)first->values.dims[2], block_size = bytes * 8 / (size_t)bits;
  if (!kernel->gate) {
    return linear_pack(&kernel->weights, first->values.data, first->scales.data, first->minima.data, outputs,
                       num_blocks, block_size, bits);
  }
  const size_t num_factors = outputs * num_blocks;
  uint8_t *values = joined(&first->values, &second->values, num_factors * bytes);
  float *scales = joined(&first->scales, &second->scales, num_factors * sizeof(float)), *minima = NULL;
  const bool has_minima = first->minima.data != NULL;
  if (has_minima) minima = joined(&first->minima, &second->minima, num_factors * sizeof(float));
  const bool packed = values && scales && (minima || !has_minima) &&
                      linear_pack(&kernel->weights, values, scales, minima, 2 * outputs, num_blocks, block_size, bits);
  free(values);
  free(scales);
  free(minima);
  return packed;
}

static OrtStatus *read_kernel(linear_kernel *kernel, const OrtKernelInfo *info) {
  const OrtApi *ort = kernel->ort;
  int64_t bits, gate;
  CHECK(ort->KernelInfoGetAttribute_int64(info, "bits", &bits));
  CHECK(ort->KernelInfoGetAttribute_int64(info, "gate", &gate));
  CHECK(ort->KernelInfoGetAttribute_float(info, "epsilon", &kernel->epsilon));
  CHECK(ort->KernelInfoGetAllocator(info, 0, &kernel->allocator));
  if (bits != 8 && bits != 4) return invalid(ort, "headrace.Linear: bits must be 8 or 4");
  if (gate < GATE_NONE || gate > GATE_GELU_TANH) return invalid(ort, "headrace.Linear: gate must be 0, 1 or 2");
  kernel->gate = (linear_gate)gate;
  matrix first, second;
  tensor norm, bias;
  CHECK(read_matrix(ort, info, VALUES, SCALES, MINIMA, &first));
  const int64_t outputs = first.values.dims[0], num_blocks = first.values.dims[1];
  const int64_t block_size = first.values.dims[2] * 8 / bits;
  if (bits == 8 ? block_size % 8 || block_size > 256 : block_size != BYTE_BLOCK) {
    return invalid(ort, "headrace.Linear: a block must have a multiple of 8 weights, at most 256; with 4 bits 32");
  }
  if (gate) {
    CHECK(read_matrix(ort, info, GATED_VALUES, GATED_SCALES, GATED_MINIMA, &second));
    if (outputs % TILE) return invalid(ort, "headrace.Linear: gated outputs must be a multiple of 16");
    if (memcmp(first.values.dims, second.values.dims, 3 * sizeof(int64_t)) ||
        !first.minima.data != !second.minima.data) {
      return invalid(ort, "headrace.Linear: both matrices must be of one shape and kind");
    }
  }
  CHECK(read_constant(ort, info, NORM, &norm));
  CHECK(read_constant(ort, info, BIAS, &bias));
  if (bias.data && (bias.num_dims != 1 || bias.dims[0] != outputs || gate)) {
    return invalid(ort, "headrace.Linear: bias must be [outputs], and without a gate");
  }
  if (norm.data && (norm.num_dims != 1 || norm.dims[0] > num_blocks * block_size)) {
    return invalid(ort, "headrace.Linear: norm must be [width]");
  }
  kernel->norm = norm.data;
  kernel->norm_width = norm.data ? norm.dims[0] : 0;
  kernel->bias = bias.data;
  return pack(kernel, &first, &second, (int)bits) ? NULL : ort->CreateStatus(ORT_FAIL, "headrace.Linear: out of memory");
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *ort, const OrtKernelInfo *info, void **out) {
  (void)op;
  linear_kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return ort->CreateStatus(ORT_FAIL, "headrace.Linear: out of memory");
  kernel->ort = ort;
  OrtStatus *status = read_kernel(kernel, info);
  if (status) {
    destroy(kernel);
    return status;
  }
  *out = kernel;
  return NULL;
}

const OrtCustomOp linear_op = CUSTOM_OP;
