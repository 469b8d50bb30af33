/* Weights of 8 bits with activations of 16: exact for all that shows. */
#include "linear_tile.h"

#define MAX_ROWS 6 /* that are computed together: twelve sums, two weights, an activation and a product */

/* A group's values lie two by two, the rows beside each other. */
void quantize_words(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                    linear_rows *rows, size_t row, row_group group) {
  int16_t *values = (int16_t *)rows->values + group.first * w->inputs + (row - group.first) * 2;
  float *sums = rows->sums + row * w->num_blocks;
  const float factor = norm ? norm_factor(x, width, epsilon) : 1;
  float inverse;
  rows->scales[row] = step_of(largest_activation(x, width, norm, factor), LARGEST_WORD, &inverse);
  const __m256 inverses = _mm256_set1_ps(inverse);
  int32_t sum = 0;
  for (size_t k = 0; k < w->inputs; k += 8) {
    const __m256 v = load_activations(x, norm, factor, k, width);
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverses));
    int16_t eight[8];
    _mm_storeu_si128((__m128i *)eight,
                     _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
    for (size_t i = 0; i < 8; i += 2) memcpy(values + (k + i) * group.count, eight + i, 2 * sizeof *eight);
    if (w->has_minima) {
      for (size_t i = 0; i < 8; i++) sum += eight[i];
      if ((k + 8) % w->block_size == 0) {
        sums[k / w->block_size] = (float)sum;
        sum = 0;
      }
    }
  }
}

/* sum += a x b, in pairs. Written out because the compiler would multiply for all rows first, and the products would
 * push the sums out of registers. */
INLINE void multiply_add(__m256i *sum, __m256i a, __m256i b) {
  __m256i product;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(a), "x"(b));
}

INLINE __m256i widened(__m128i bytes, const bool minima) {
  return minima ? _mm256_cvtepu8_epi16(bytes) : _mm256_cvtepi8_epi16(bytes);
}

/* num_rows is a constant where this is inlined, as is minima. */
INLINE void multiply_rows(const int num_rows, const bool minima, const linear_weights *w, size_t tile,
                          const linear_rows *rows, size_t first_row, fetch ahead, float (*results)[TILE]) {
  const uint8_t *values = w->values + tile * TILE * w->inputs;
  uintptr_t fetched = (uintptr_t)values + ahead.distance; /* an address: it may lie beyond the weights */
  const int16_t *x = (const int16_t *)rows->values + first_row * w->inputs;
  __m256 totals[MAX_ROWS][2]; /* not `results`, which could overlap what is read here, for all the compiler knows */
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) totals[i][0] = totals[i][1] = _mm256_setzero_ps();
  for (size_t block = 0; block < w->num_blocks; block++) {
    __m256i sums[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < num_rows; i++) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
    for (size_t k = 0; k < w->block_size; k += UNROLLED) {
      _mm_prefetch((const char *)fetched, _MM_HINT_T1);
      _mm_prefetch((const char *)(fetched + ahead.step / 2), _MM_HINT_T1);
      fetched += ahead.step;
#pragma GCC unroll 4
      for (int pair = 0; pair < UNROLLED / 2; pair++) {
        const __m256i low = widened(_mm_load_si128((const __m128i *)values), minima);
        const __m256i high = widened(_mm_load_si128((const __m128i *)(values + 16)), minima);
        values += 32;
#pragma GCC unroll 6
        for (int i = 0; i < num_rows; i++) {
          int32_t two;
          memcpy(&two, x + 2 * i, sizeof two);
          const __m256i both = _mm256_set1_epi32(two);
          multiply_add(&sums[i][0], low, both);
          multiply_add(&sums[i][1], high, both);
        }
        x += 2 * num_rows;
      }
    }
    const size_t factor = (tile * w->num_blocks + block) * TILE;
    const __m256 low_scale = load_factors(w, w->scales, factor), high_scale = load_factors(w, w->scales, factor + 8);
#pragma GCC unroll 6
    for (int i = 0; i < num_rows; i++) {
      totals[i][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][0]), low_scale, totals[i][0]);
      totals[i][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][1]), high_scale, totals[i][1]);
    }
    if (minima) {
      const __m256 low = load_factors(w, w->minima, factor), high = load_factors(w, w->minima, factor + 8);
#pragma GCC unroll 6
      for (int i = 0; i < num_rows; i++) {
        const __m256 sum = _mm256_broadcast_ss(rows->sums + (first_row + (size_t)i) * w->num_blocks + block);
        totals[i][0] = _mm256_fmadd_ps(sum, low, totals[i][0]);
        totals[i][1] = _mm256_fmadd_ps(sum, high, totals[i][1]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    const __m256 scale = _mm256_broadcast_ss(rows->scales + first_row + (size_t)i);
    _mm256_storeu_ps(results[i], _mm256_mul_ps(totals[i][0], scale));
    _mm256_storeu_ps(results[i] + 8, _mm256_mul_ps(totals[i][1], scale));
  }
}

MULTIPLY_WORDS(ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6))

const linear_method LINEAR_WORDS = {
    .max_rows = MAX_ROWS, .max_tiles = 1, .neighbours = 2, .cached_bytes = 20 << 10, .quantize = quantize_words,
    .multiply = multiply};

SIMD_END
