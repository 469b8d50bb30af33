/* As attention_halves.c, on processors with AVX-512: sixteen keys, or columns, are one register. Each lane adds what it
 * adds there, in the same order, so the bits are the same. */
#define SIMD_512
#include <math.h>

#include "attention_cells.h"

/* num_rows is a constant where this is inlined, as below. */
INLINE void score_rows(const int num_rows, attending *a, size_t row, const half *keys, size_t start, size_t count) {
  for (size_t column = 0; column < count; column += ATTENTION_BLOCK) {
    const half *const block = keys + (start + column) * a->head_size;
    __m512 sums[MAX_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < num_rows; i++) sums[i] = _mm512_setzero_ps();
    for (size_t d = 0; d < a->head_size; d++) {
      const __m512 key = load_halves16(block + d * ATTENTION_BLOCK);
#pragma GCC unroll 12
      for (int i = 0; i < num_rows; i++) {
        sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(a->q[row + (size_t)i][d]), key, sums[i]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < num_rows; i++) _mm512_storeu_ps(&a->weights[row + (size_t)i][column], sums[i]);
  }
}

static void weigh(attending *a, size_t row, size_t first, size_t count) {
  const __m512 nothing = _mm512_set1_ps(-INFINITY);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i low = _mm512_set1_epi32((int)a->first_key[row]), high = _mm512_set1_epi32((int)a->last_key[row]);
  float *weights = a->weights[row];
  __m512 largest = nothing;
  for (size_t i = 0; i < count; i += 16) {
    const __m512i key = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)(first + i)));
    const __mmask16 seen = _mm512_cmpge_epi32_mask(key, low) & _mm512_cmple_epi32_mask(key, high);
    const __m512 score = _mm512_mask_mov_ps(nothing, seen, _mm512_loadu_ps(weights + i));
    _mm512_storeu_ps(weights + i, score);
    largest = _mm512_max_ps(largest, score);
  }
  const float of_these = max8(_mm256_max_ps(_mm512_castps512_ps256(largest), _mm512_extractf32x8_ps(largest, 1)));
  const float before = a->largest[row], after = fmaxf(before, of_these);
  if (after == -INFINITY) { /* none of these keys is seen */
    for (size_t i = 0; i < count; i += 16) _mm512_storeu_ps(weights + i, _mm512_setzero_ps());
    return;
  }
  if (after > before) {
    const __m256 correction = exp8(_mm256_sub_ps(_mm256_set1_ps(before), _mm256_set1_ps(after)));
    a->sums[row] = _mm256_mul_ps(a->sums[row], correction);
    const __m512 corrections = _mm512_set1_ps(_mm256_cvtss_f32(correction));
    for (size_t i = 0; i < a->head_size; i += 16) {
      _mm512_storeu_ps(a->totals[row] + i, _mm512_mul_ps(_mm512_loadu_ps(a->totals[row] + i), corrections));
    }
    a->largest[row] = after;
  }
  const __m512 reference = _mm512_set1_ps(after);
  for (size_t i = 0; i < count; i += 16) {
    const __m512 weight = exp16(_mm512_sub_ps(_mm512_loadu_ps(weights + i), reference));
    _mm512_storeu_ps(weights + i, weight);
    a->sums[row] = _mm256_add_ps(a->sums[row], _mm512_castps512_ps256(weight));
    a->sums[row] = _mm256_add_ps(a->sums[row], _mm512_extractf32x8_ps(weight, 1));
  }
}

INLINE void add_rows(const int num_rows, attending *a, size_t row, const half *values, size_t start, size_t count) {
  for (size_t column = 0; column < a->head_size; column += 16) {
    __m512 sums[MAX_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < num_rows; i++) sums[i] = _mm512_loadu_ps(&a->totals[row + (size_t)i][column]);
    for (size_t key = 0; key < count; key++) {
      const __m512 value = load_halves16(values + (start + key) * a->head_size + column);
#pragma GCC unroll 12
      for (int i = 0; i < num_rows; i++) {
        sums[i] = _mm512_fmadd_ps(_mm512_set1_ps(a->weights[row + (size_t)i][key]), value, sums[i]);
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < num_rows; i++) _mm512_storeu_ps(&a->totals[row + (size_t)i][column], sums[i]);
  }
}

#define CASE(name, num_rows) \
  case num_rows: name##_rows(num_rows, a, row, operand, start, count); break
#define CASES(name)                                                                                              \
  static void name(attending *a, size_t row, size_t num_rows, const void *operand, size_t start, size_t count) { \
    switch (num_rows) {                                                                                          \
      CASE(name, 1);                                                                                             \
      CASE(name, 2);                                                                                             \
      CASE(name, 3);                                                                                             \
      CASE(name, 4);                                                                                             \
      CASE(name, 5);                                                                                             \
      CASE(name, 6);                                                                                             \
      CASE(name, 7);                                                                                             \
      CASE(name, 8);                                                                                             \
      CASE(name, 9);                                                                                             \
      CASE(name, 10);                                                                                            \
      CASE(name, 11);                                                                                            \
      CASE(name, 12);                                                                                            \
    }                                                                                                            \
  }
CASES(score)
CASES(add)

const attention_cells_functions attention_halves_512 = {
    MAX_ROWS, attention_store_halves, attention_begin_halves, score, weigh, add};

SIMD_END
