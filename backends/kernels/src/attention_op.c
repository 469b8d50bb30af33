/* The operator headrace.Attention: writes a layer's new keys and values to the cache, and attends.
 *
 *     0 qkv        float [T, (num_heads + 2 kv_heads) x head_size]
 *     1 cache      float16 [layers, 2, slots, kv_heads, capacity, head_size]: keys (0) and values (1), written in place.
 *                  attention_halves.c says how they lie
 *     2 slots      int32 [T]
 *     3 positions  int32 [T]; tokens of a slot follow one another, positions ascending by 1
 *     4 cosines    float [>= positions, head_size / 2], optional: without, positions are not encoded
 *     5 sines      the same
 *     6 q_norm     float [head_size], optional: of an RMS norm over each head's queries
 *     7 k_norm     the same, of keys
 *
 * Output: float [T, num_heads x head_size]. Attributes: layer, num_heads, scale, window (0: none),
 * epsilon (of the norms).
 *
 * There are two of it, of which a session has one (kernel.c): the other keeps int8. Its cache is declared as above, so
 * that one graph serves both, but holds less in the same place of a head, [n, head_size] halves: a capacity of
 * 2 n head_size / (head_size + 2), down to a multiple of 16, as attention_bytes.c says. */
#include <stdlib.h>

#include "attention.h"
#include "kernel.h"

enum { QKV, CACHE, SLOTS, POSITIONS, COSINES, SINES, Q_NORM, K_NORM };
static const input_spec INPUTS[] = {
    [QKV] = {ORT_FLOAT, false},         [CACHE] = {ORT_FLOAT16, false},
    [SLOTS] = {ORT_INT32, false},     [POSITIONS] = {ORT_INT32, false},
    [COSINES] = {ORT_FLOAT, true},  [SINES] = {ORT_FLOAT, true},
    [Q_NORM] = {ORT_FLOAT, true},    [K_NORM] = {ORT_FLOAT, true},
};
COMMON_CALLBACKS("Attention", INPUTS, 1)

#define TOKENS_A_TASK 2

typedef struct {
  const OrtApi *ort;
  OrtAllocator *allocator;
  attention_cells cells;
  int64_t layer, num_heads, window;
  float scale, epsilon;
} attention_kernel;

typedef struct {
  attention_shape shape;
  attention_tokens tokens;
  attention_cache cache;
  float *q, *out;
  attention_run *runs;
  size_t num_runs;
} attention_job;

static void prepare_task(void *data, size_t task) {
  attention_job *job = data;
  const size_t first = task * TOKENS_A_TASK, last = first + TOKENS_A_TASK;
  attention_prepare(&job->shape, &job->tokens, job->cache, job->q, first,
                    last < job->tokens.num_tokens ? last : job->tokens.num_tokens);
}

static void attend_task(void *data, size_t task) {
  attention_job *job = data;
  /* The last tokens of a prompt see most: they come first, so that no thread starts on them when others are done. */
  const attention_run run = job->runs[job->num_runs - 1 - task / job->shape.num_kv_heads];
  attention_attend(&job->shape, &job->tokens, job->cache, job->q, run, task % job->shape.num_kv_heads, job->out);
}

static void find_runs(attention_job *job) {
  const size_t longest = attention_run_length(&job->shape);
  job->num_runs = 0;
  for (size_t token = 0; token < job->tokens.num_tokens; token++) {
    attention_run *last = job->num_runs ? &job->runs[job->num_runs - 1] : NULL;
    if (last && job->tokens.slots[token] == job->tokens.slots[last->first] && last->count < longest) {
      last->count++;
    } else {
      job->runs[job->num_runs++] = (attention_run){token, 1};
    }
  }
}

static int64_t capacity_of(const attention_kernel *kernel, const tensor *cache) {
  if (kernel->cells == ATTENTION_HALVES) return cache->dims[4];
  const int64_t head_size = cache->dims[5], head_bytes = cache->dims[4] * head_size * (int64_t)sizeof(uint16_t);
  return head_bytes / (head_size + (int64_t)sizeof(uint16_t)) / ATTENTION_BLOCK * ATTENTION_BLOCK;
}

static OrtStatus *check(const attention_kernel *kernel, const tensor *qkv, const tensor *cache, const tensor *slots,
                        const tensor *positions) {
  const OrtApi *ort = kernel->ort;
  /* A cache that has cells lies in memory: products of its sizes overflow nothing. */
  if (cache->num_dims != 6 || cache->dims[1] != 2 || cache->dims[2] < 1 || cache->dims[3] < 1 || cache->dims[4] < 1 ||
      cache->dims[4] > INT32_MAX || cache->dims[0] <= kernel->layer) {
    return invalid(ort, "headrace.Attention: cache must be [layers, 2, slots, kv_heads, capacity, head_size]");
  }
  const int64_t kv_heads = cache->dims[3], head_size = cache->dims[5];
  if (head_size < 16 || head_size % 16 || head_size > 256) {
    return invalid(ort, "headrace.Attention: head_size must be a multiple of 16, at most 256");
  }
  const int64_t capacity = capacity_of(kernel, cache);
  if (capacity < 1 || capacity % ATTENTION_BLOCK || capacity > INT32_MAX) {
    return invalid(ort, "headrace.Attention: cache must have a capacity that is a multiple of 16");
  }
  if (kernel->num_heads % kv_heads) {
    return invalid(ort, "headrace.Attention: num_heads must be a multiple of kv_heads");
  }
  if (qkv->num_dims != 2 || qkv->dims[1] != (kernel->num_heads + 2 * kv_heads) * head_size) {
    return invalid(ort, "headrace.Attention: qkv must be [T, (num_heads + 2 kv_heads) x head_size]");
  }
  if (slots->num_dims != 1 || positions->num_dims != 1 || slots->dims[0] != qkv->dims[0] ||
      positions->dims[0] != qkv->dims[0]) {
    return invalid(ort, "headrace.Attention: slots and positions must be [T]");
  }
  const int32_t *slot = slots->data, *position = positions->data;
  for (int64_t i = 0; i < qkv->dims[0]; i++) {
    if (slot[i] < 0 || slot[i] >= cache->dims[2] || position[i] < 0 || position[i] >= capacity) {
      return invalid(ort, "headrace.Attention: a slot or position is out of the cache");
    }
    if (i && slot[i] == slot[i - 1] && position[i] != position[i - 1] + 1) {
      return invalid(ort, "headrace.Attention: positions of a slot must ascend by 1");
    }
  }
  return NULL;
}

/* Checks the optional inputs, the others being right. */
static OrtStatus *check_tables(const OrtApi *ort, const tensor *positions, int64_t head_size, const tensor *cosines,
                               const tensor *sines, const tensor *q_norm, const tensor *k_norm) {
  const tensor *norms[] = {q_norm, k_norm};
  for (size_t i = 0; i < 2; i++) {
    if (!is_absent(norms[i]) && (norms[i]->num_dims != 1 || norms[i]->dims[0] != head_size)) {
      return invalid(ort, "headrace.Attention: q_norm and k_norm must be [head_size]");
    }
  }
  if (is_absent(cosines) && is_absent(sines)) return NULL;
  if (cosines->num_dims != 2 || sines->num_dims != 2 || cosines->dims[0] != sines->dims[0] ||
      cosines->dims[1] != head_size / 2 || sines->dims[1] != head_size / 2) {
    return invalid(ort, "headrace.Attention: cosines and sines must be [positions, head_size / 2]");
  }
  const int32_t *position = positions->data;
  for (int64_t i = 0; i < positions->dims[0]; i++) {
    if (position[i] >= cosines->dims[0]) return invalid(ort, "headrace.Attention: a position is out of the cosines");
  }
  return NULL;
}

static OrtStatus *attend(const OrtApi *ort, OrtKernelContext *context, attention_job *job) {
  const size_t num_tokens = job->tokens.num_tokens;
  CHECK(run_tasks(ort, context, prepare_task, (num_tokens + TOKENS_A_TASK - 1) / TOKENS_A_TASK, job));
  find_runs(job);
  return run_tasks(ort, context, attend_task, job->num_runs * job->shape.num_kv_heads, job);
}

static OrtStatus *compute(void *data, OrtKernelContext *context) {
  attention_kernel *kernel = data;
  const OrtApi *ort = kernel->ort;
  tensor qkv, cache, slots, positions, cosines, sines, q_norm, k_norm;
  CHECK(read_input(ort, context, QKV, &qkv));
  CHECK(read_input(ort, context, CACHE, &cache));
  CHECK(read_input(ort, context, SLOTS, &slots));
  CHECK(read_input(ort, context, POSITIONS, &positions));
  CHECK(read_input(ort, context, COSINES, &cosines));
  CHECK(read_input(ort, context, SINES, &sines));
  CHECK(read_input(ort, context, Q_NORM, &q_norm));
  CHECK(read_input(ort, context, K_NORM, &k_norm));
  CHECK(check(kernel, &qkv, &cache, &slots, &positions));
  CHECK(check_tables(ort, &positions, cache.dims[5], &cosines, &sines, &q_norm, &k_norm));
  const size_t num_tokens = (size_t)qkv.dims[0], head_size = (size_t)cache.dims[5];
  attention_job job = {
      .shape = {.num_heads = (size_t)kernel->num_heads,
                .num_kv_heads = (size_t)cache.dims[3],
                .head_size = head_size,
                .cells = kernel->cells,
                .num_slots = (size_t)cache.dims[2],
                .capacity = (size_t)capacity_of(kernel, &cache),
                .head_bytes = (size_t)cache.dims[4] * head_size * sizeof(uint16_t),
                .scale = kernel->scale,
                .window = (size_t)kernel->window},
      .tokens = {.qkv = qkv.data,
                 .slots = slots.data,
                 .positions = positions.data,
                 .num_tokens = num_tokens,
                 .cosines = cosines.data,
                 .sines = sines.data,
                 .q_norm = q_norm.data,
                 .k_norm = k_norm.data,
                 .epsilon = kernel->epsilon},
  };
  const size_t layer_bytes = 2 * job.shape.num_slots * job.shape.num_kv_heads * job.shape.head_bytes;
  job.cache = (attention_cache)cache.data + (size_t)kernel->layer * layer_bytes;
  const size_t width = job.shape.num_heads * head_size;
  CHECK(make_output(ort, context, 0, qkv.dims[0], (int64_t)width, &job.out));
  if (!num_tokens) return NULL;
  const size_t q_size = num_tokens * width * sizeof(float);
  char *memory;
  CHECK(ort->AllocatorAlloc(kernel->allocator, q_size + num_tokens * sizeof(attention_run), (void **)&memory));
  job.q = (float *)memory;
  job.runs = (attention_run *)(memory + q_size);
  OrtStatus *status = attend(ort, context, &job);
  OrtStatus *freed = ort->AllocatorFree(kernel->allocator, memory);
  if (!status) return freed;
  if (freed) ort->ReleaseStatus(freed);
  return status;
}

static void destroy(void *data) {
  attention_kernel *kernel = data;
  if (kernel->allocator) kernel->ort->ReleaseAllocator(kernel->allocator);
  free(kernel);
}

static OrtStatus *read_kernel(attention_kernel *kernel, const OrtKernelInfo *info) {
  const OrtApi *ort = kernel->ort;
  CHECK(ort->KernelInfoGetAttribute_int64(info, "layer", &kernel->layer));
  CHECK(ort->KernelInfoGetAttribute_int64(info, "num_heads", &kernel->num_heads));
  CHECK(ort->KernelInfoGetAttribute_int64(info, "window", &kernel->window));
  CHECK(ort->KernelInfoGetAttribute_float(info, "scale", &kernel->scale));
  CHECK(ort->KernelInfoGetAttribute_float(info, "epsilon", &kernel->epsilon));
  if (kernel->layer < 0 || kernel->window < 0) {
    return invalid(ort, "headrace.Attention: layer and window must be 0 or more");
  }
  if (kernel->num_heads < 1 || kernel->num_heads > INT32_MAX) {
    return invalid(ort, "headrace.Attention: num_heads must be 1 or more");
  }
  return ort->KernelInfoGetAllocator(info, 0, &kernel->allocator);
}

static OrtStatus *create(const OrtCustomOp *op, const OrtApi *ort, const OrtKernelInfo *info, void **out) {
  attention_kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel) return ort->CreateStatus(ORT_FAIL, "headrace.Attention: out of memory");
  kernel->ort = ort;
  kernel->cells = op == &attention_bytes_op ? ATTENTION_BYTES : ATTENTION_HALVES;
  OrtStatus *status = read_kernel(kernel, info);
  if (status) {
    destroy(kernel);
    return status;
  }
  *out = kernel;
  return NULL;
}

const OrtCustomOp attention_op = CUSTOM_OP, attention_bytes_op = CUSTOM_OP;
