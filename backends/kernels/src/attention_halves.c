/* Cells of float16. Keys lie [capacity / ATTENTION_BLOCK][head_size][ATTENTION_BLOCK], values [capacity][head_size]. */
#include "attention_cells.h"

void attention_store_halves(const attention_shape *shape, size_t position, const float *key, const float *value,
                            void *keys, void *values) {
  const size_t size = shape->head_size;
  half packed[MAX_HEAD_SIZE];
  for (size_t i = 0; i < size; i += 8) store_halves(packed + i, _mm256_loadu_ps(key + i));
  half *to = (half *)keys + position / ATTENTION_BLOCK * ATTENTION_BLOCK * size + position % ATTENTION_BLOCK;
  for (size_t i = 0; i < size; i++) to[i * ATTENTION_BLOCK] = packed[i];
  to = (half *)values + position * size;
  for (size_t i = 0; i < size; i += 8) store_halves(to + i, _mm256_loadu_ps(value + i));
}

void attention_begin_halves(attending *a) { (void)a; }

INLINE void score_block(const int num_rows, attending *a, size_t row, const half *keys, size_t column) {
  __m256 sums[GROUP][2];
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) sums[i][0] = sums[i][1] = _mm256_setzero_ps();
  for (size_t d = 0; d < a->head_size; d++) {
    const __m256 low = load_halves(keys + d * ATTENTION_BLOCK), high = load_halves(keys + d * ATTENTION_BLOCK + 8);
#pragma GCC unroll 6
    for (int i = 0; i < num_rows; i++) {
      const __m256 q = _mm256_broadcast_ss(a->q[row + (size_t)i] + d);
      sums[i][0] = _mm256_fmadd_ps(q, low, sums[i][0]);
      sums[i][1] = _mm256_fmadd_ps(q, high, sums[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    _mm256_storeu_ps(&a->weights[row + (size_t)i][column], sums[i][0]);
    _mm256_storeu_ps(&a->weights[row + (size_t)i][column + 8], sums[i][1]);
  }
}

INLINE void score_rows(const int num_rows, attending *a, size_t row, const half *keys, size_t start, size_t count) {
  for (size_t column = 0; column < count; column += ATTENTION_BLOCK) {
    score_block(num_rows, a, row, keys + (start + column) * a->head_size, column);
  }
}

/* Sixteen columns. */
INLINE void add_columns(const int num_rows, attending *a, size_t row, const half *values, size_t count, size_t column) {
  __m256 sums[GROUP][2];
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    sums[i][0] = _mm256_loadu_ps(&a->totals[row + (size_t)i][column]);
    sums[i][1] = _mm256_loadu_ps(&a->totals[row + (size_t)i][column + 8]);
  }
  for (size_t key = 0; key < count; key++) {
    const half *value = values + key * a->head_size + column;
    const __m256 low = load_halves(value), high = load_halves(value + 8);
#pragma GCC unroll 6
    for (int i = 0; i < num_rows; i++) {
      const __m256 weight = _mm256_broadcast_ss(&a->weights[row + (size_t)i][key]);
      sums[i][0] = _mm256_fmadd_ps(weight, low, sums[i][0]);
      sums[i][1] = _mm256_fmadd_ps(weight, high, sums[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    _mm256_storeu_ps(&a->totals[row + (size_t)i][column], sums[i][0]);
    _mm256_storeu_ps(&a->totals[row + (size_t)i][column + 8], sums[i][1]);
  }
}

INLINE void add_rows(const int num_rows, attending *a, size_t row, const half *values, size_t start, size_t count) {
  for (size_t column = 0; column < a->head_size; column += 16) {
    add_columns(num_rows, a, row, values + start * a->head_size, count, column);
  }
}

GROUP_FUNCTION(score, keys)
GROUP_FUNCTION(add, values)

const attention_cells_functions attention_halves = {GROUP, attention_store_halves, attention_begin_halves, score, attention_weigh, add};

SIMD_END
