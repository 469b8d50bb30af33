#include "attention.h"

#include <math.h>

#include "processor.h"

#include "attention_cells.h"

static const attention_cells_functions *functions_of(const attention_shape *shape) {
  if (shape->cells == ATTENTION_BYTES) return &attention_bytes;
  return processor_best() >= ISA_AVX512_VNNI ? &attention_halves_512 : &attention_halves;
}

static const float *find(const float *table, int32_t position, size_t width) {
  return table ? table + (size_t)position * width : NULL;
}

/* One head of one token: an RMS norm, then rotation of its halves, then a factor. */
static void turn(const float *x, size_t size, const float *norm, float epsilon, const float *cosines,
                 const float *sines, float factor, float *out) {
  float normed[MAX_HEAD_SIZE];
  if (norm) {
    __m256 squares = _mm256_setzero_ps();
    for (size_t i = 0; i < size; i += 8) {
      const __m256 v = _mm256_loadu_ps(x + i);
      squares = _mm256_fmadd_ps(v, v, squares);
    }
    const __m256 scale = _mm256_set1_ps(1 / sqrtf(sum8(squares) / (float)size + epsilon));
    for (size_t i = 0; i < size; i += 8) {
      const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), scale);
      _mm256_storeu_ps(normed + i, _mm256_mul_ps(v, _mm256_loadu_ps(norm + i)));
    }
    x = normed;
  }
  const __m256 factors = _mm256_set1_ps(factor);
  if (!cosines) {
    for (size_t i = 0; i < size; i += 8) _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), factors));
    return;
  }
  const size_t middle = size / 2;
  for (size_t i = 0; i < middle; i += 8) {
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + middle + i);
    const __m256 c = _mm256_loadu_ps(cosines + i), s = _mm256_loadu_ps(sines + i);
    const __m256 low = _mm256_fmsub_ps(a, c, _mm256_mul_ps(b, s)), high = _mm256_fmadd_ps(b, c, _mm256_mul_ps(a, s));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(low, factors));
    _mm256_storeu_ps(out + middle + i, _mm256_mul_ps(high, factors));
  }
}

static uint8_t *keys_of(const attention_shape *shape, attention_cache cache, size_t slot, size_t kv_head) {
  return cache + (slot * shape->num_kv_heads + kv_head) * shape->head_bytes;
}

static uint8_t *values_of(const attention_shape *shape, attention_cache cache, size_t slot, size_t kv_head) {
  return keys_of(shape, cache, shape->num_slots + slot, kv_head);
}

void attention_prepare(const attention_shape *shape, const attention_tokens *tokens, attention_cache cache, float *q,
                       size_t first, size_t last) {
  const size_t size = shape->head_size, heads = shape->num_heads, kv_heads = shape->num_kv_heads;
  for (size_t token = first; token < last; token++) {
    const float *x = tokens->qkv + token * (heads + 2 * kv_heads) * size;
    const int32_t position = tokens->positions[token];
    const size_t slot = (size_t)tokens->slots[token];
    const float *cosines = find(tokens->cosines, position, size / 2), *sines = find(tokens->sines, position, size / 2);
    for (size_t head = 0; head < heads; head++) {
      turn(x + head * size, size, tokens->q_norm, tokens->epsilon, cosines, sines, shape->scale,
           q + (token * heads + head) * size);
    }
    for (size_t head = 0; head < kv_heads; head++) {
      float key[MAX_HEAD_SIZE];
      turn(x + (heads + head) * size, size, tokens->k_norm, tokens->epsilon, cosines, sines, 1, key);
      functions_of(shape)->store(shape, (size_t)position, key, x + (heads + kv_heads + head) * size,
                                 keys_of(shape, cache, slot, head), values_of(shape, cache, slot, head));
    }
  }
}

/* --- attending ---------------------------------------------------------------------------------------------------- */

void attention_weigh(attending *a, size_t row, size_t first, size_t count) {
  const __m256 nothing = _mm256_set1_ps(-INFINITY);
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_set1_epi32((int)a->first_key[row] - 1), high = _mm256_set1_epi32((int)a->last_key[row] + 1);
  float *weights = a->weights[row];
  __m256 largest = nothing;
  for (size_t i = 0; i < count; i += 8) {
    __m256 score = _mm256_loadu_ps(weights + i);
    const __m256i key = _mm256_add_epi32(lanes, _mm256_set1_epi32((int)(first + i)));
    const __m256i seen = _mm256_and_si256(_mm256_cmpgt_epi32(key, low), _mm256_cmpgt_epi32(high, key));
    score = _mm256_blendv_ps(nothing, score, _mm256_castsi256_ps(seen));
    _mm256_storeu_ps(weights + i, score);
    largest = _mm256_max_ps(largest, score);
  }
  const float before = a->largest[row], after = fmaxf(before, max8(largest));
  if (after == -INFINITY) { /* none of these keys is seen */
    for (size_t i = 0; i < count; i += 8) _mm256_storeu_ps(weights + i, _mm256_setzero_ps());
    return;
  }
  const __m256 reference = _mm256_set1_ps(after);
  if (after > before) {
    const __m256 correction = exp8(_mm256_sub_ps(_mm256_set1_ps(before), reference));
    a->sums[row] = _mm256_mul_ps(a->sums[row], correction);
    for (size_t i = 0; i < a->head_size; i += 8) {
      _mm256_storeu_ps(a->totals[row] + i, _mm256_mul_ps(_mm256_loadu_ps(a->totals[row] + i), correction));
    }
    a->largest[row] = after;
  }
  for (size_t i = 0; i < count; i += 8) {
    const __m256 weight = exp8(_mm256_sub_ps(_mm256_loadu_ps(weights + i), reference));
    _mm256_storeu_ps(weights + i, weight);
    a->sums[row] = _mm256_add_ps(a->sums[row], weight);
  }
}

size_t attention_run_length(const attention_shape *shape) {
  const size_t length = MAX_ROWS / (shape->num_heads / shape->num_kv_heads);
  return length ? length : 1;
}

/* One part of a run's rows: at most MAX_ROWS. */
static void attend_rows(const attention_cells_functions *cells, const void *keys, const void *values, attending *a,
                        float **out) {
  const size_t size = a->head_size;
  size_t first = a->first_key[0], last = a->last_key[0];
  for (size_t row = 0; row < a->num_rows; row++) {
    if (a->first_key[row] < first) first = a->first_key[row];
    if (a->last_key[row] > last) last = a->last_key[row];
    a->largest[row] = -INFINITY;
    a->sums[row] = _mm256_setzero_ps();
    memset(a->totals[row], 0, size * sizeof(float));
  }
  cells->begin(a);
  for (size_t start = first / SPAN * SPAN; start <= last; start += SPAN) {
    size_t count = last + 1 - start;
    count = count > SPAN ? SPAN : (count + ATTENTION_BLOCK - 1) / ATTENTION_BLOCK * ATTENTION_BLOCK;
    for (size_t row = 0; row < a->num_rows; row += cells->group) {
      const size_t num_rows = a->num_rows - row < cells->group ? a->num_rows - row : cells->group;
      cells->score(a, row, num_rows, keys, start, count);
      for (size_t i = row; i < row + num_rows; i++) cells->weigh(a, i, start, count);
      cells->add(a, row, num_rows, values, start, count);
    }
  }
  for (size_t row = 0; row < a->num_rows; row++) {
    /* Adding 0 turns -0 into 0, as the unseen keys of a neighbour's block would. */
    const __m256 share = _mm256_set1_ps(1 / sum8(a->sums[row])), zero = _mm256_setzero_ps();
    for (size_t i = 0; i < size; i += 8) {
      _mm256_storeu_ps(out[row] + i, _mm256_fmadd_ps(_mm256_loadu_ps(a->totals[row] + i), share, zero));
    }
  }
}

void attention_attend(const attention_shape *shape, const attention_tokens *tokens, attention_cache cache,
                      const float *q, attention_run run, size_t kv_head, float *out) {
  const size_t size = shape->head_size, sharing = shape->num_heads / shape->num_kv_heads;
  const size_t slot = (size_t)tokens->slots[run.first];
  const attention_cells_functions *cells = functions_of(shape);
  const void *keys = keys_of(shape, cache, slot, kv_head), *values = values_of(shape, cache, slot, kv_head);
  attending a;
  a.num_rows = 0;
  a.head_size = size;
  a.capacity = shape->capacity;
  float *to[MAX_ROWS];
  for (size_t token = run.first; token < run.first + run.count; token++) {
    const size_t position = (size_t)tokens->positions[token];
    for (size_t head = 0; head < sharing; head++) {
      const size_t at = (token * shape->num_heads + kv_head * sharing + head) * size;
      a.q[a.num_rows] = q + at;
      to[a.num_rows] = out + at;
      a.last_key[a.num_rows] = position;
      a.first_key[a.num_rows] = shape->window && position + 1 > shape->window ? position + 1 - shape->window : 0;
      a.num_rows++;
      if (a.num_rows == MAX_ROWS) {
        attend_rows(cells, keys, values, &a, to);
        a.num_rows = 0;
      }
    }
  }
  if (a.num_rows) attend_rows(cells, keys, values, &a, to);
}

SIMD_END
