/* Weights of 4 bits with activations of 8, which have a scale for each block: twice as many products an instruction as
 * with 16 bits, at a loss below that of most weights' rounding. */
#include "linear_tile.h"

#define MAX_ROWS 6     /* that are computed together, as in linear_words.c */
#define LARGEST 127.0f /* a sum of 16 bits holds half of a block: 16 products with 15 at most */

/* A group's values lie four by four, the rows beside each other. */
static void quantize(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                     linear_rows *rows, size_t row, row_group group) {
  int8_t *values = (int8_t *)rows->values + group.first * w->inputs + (row - group.first) * 4;
  float *scales = rows->scales + row * w->num_blocks, *sums = rows->sums + row * w->num_blocks;
  const float factor = norm ? norm_factor(x, width, epsilon) : 1;
  for (size_t block = 0; block < w->num_blocks; block++) {
    const size_t start = block * BYTE_BLOCK, count = BYTE_BLOCK / 8;
    __m256 v[BYTE_BLOCK / 8];
    __m256i magnitudes = _mm256_setzero_si256();
    for (size_t i = 0; i < count; i++) {
      v[i] = load_activations(x, norm, factor, start + i * 8, width);
      magnitudes = larger_magnitudes(magnitudes, v[i]);
    }
    float inverse;
    scales[block] = step_of(largest_magnitude(magnitudes), LARGEST, &inverse);
    const __m256 inverses = _mm256_set1_ps(inverse);
    __m256i sum = _mm256_setzero_si256();
    for (size_t i = 0; i < count; i++) {
      const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverses));
      sum = _mm256_add_epi32(sum, rounded);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
      int32_t fours[2];
      _mm_storel_epi64((__m128i *)fours, _mm_packs_epi16(words, words));
      memcpy(values + (start + i * 8) * group.count, &fours[0], 4);
      memcpy(values + (start + i * 8 + 4) * group.count, &fours[1], 4);
    }
    sums[block] = scales[block] * sum8(_mm256_cvtepi32_ps(sum)); /* small integers: exact */
  }
}

/* sum += a x b, in pairs of bytes, those of a without sign (see multiply_add in words). */
INLINE void multiply_add(__m256i *sum, __m256i a, __m256i b) {
  __m256i product;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(a), "x"(b));
}

/* The products of four inputs, which begin the sums if they are the first. */
INLINE void add_four(const int num_rows, const bool first, __m256i (*sums)[2], __m256i low, __m256i high,
                     const int8_t *x) {
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    int32_t four;
    memcpy(&four, x + 4 * i, sizeof four);
    const __m256i all = _mm256_set1_epi32(four);
    if (first) {
      sums[i][0] = _mm256_maddubs_epi16(low, all);
      sums[i][1] = _mm256_maddubs_epi16(high, all);
    } else {
      multiply_add(&sums[i][0], low, all);
      multiply_add(&sums[i][1], high, all);
    }
  }
}

/* num_rows is a constant where this is inlined. */
INLINE void multiply_rows(const int num_rows, const linear_weights *w, size_t tile, const linear_rows *rows,
                          size_t first_row, fetch ahead, float (*results)[TILE]) {
  const uint8_t *values = w->values + tile * TILE * w->inputs / 2;
  uintptr_t fetched = (uintptr_t)values + ahead.distance;
  const int8_t *x = (const int8_t *)rows->values + first_row * w->inputs;
  const float *scales = rows->scales + first_row * w->num_blocks, *row_sums = rows->sums + first_row * w->num_blocks;
  const __m256i low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 totals[MAX_ROWS][2];
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) totals[i][0] = totals[i][1] = _mm256_setzero_ps();
  for (size_t block = 0; block < w->num_blocks; block++) {
    __m256i sums[MAX_ROWS][2]; /* of 16 bits, two for each output */
#pragma GCC unroll 4
    for (size_t k = 0; k < BYTE_BLOCK; k += UNROLLED) {
      _mm_prefetch((const char *)fetched, _MM_HINT_T1);
      fetched += ahead.step;
      const __m256i low = _mm256_load_si256((const __m256i *)values);
      const __m256i high = _mm256_load_si256((const __m256i *)(values + 32));
      values += 64;
      add_four(num_rows, !k, sums, _mm256_and_si256(low, low_bits), _mm256_and_si256(high, low_bits), x);
      x += 4 * num_rows;
      add_four(num_rows, false, sums, _mm256_and_si256(_mm256_srli_epi16(low, 4), low_bits),
               _mm256_and_si256(_mm256_srli_epi16(high, 4), low_bits), x);
      x += 4 * num_rows;
    }
    const size_t factor = (tile * w->num_blocks + block) * TILE;
    const __m256 low_scale = load_factors(w, w->scales, factor), high_scale = load_factors(w, w->scales, factor + 8);
    const __m256 low_least = load_factors(w, w->minima, factor), high_least = load_factors(w, w->minima, factor + 8);
#pragma GCC unroll 6
    for (int i = 0; i < num_rows; i++) {
      const size_t at = (size_t)i * w->num_blocks + block;
      const __m256 scale = _mm256_broadcast_ss(scales + at), sum = _mm256_broadcast_ss(row_sums + at);
      const __m256 low_sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[i][0], ones));
      const __m256 high_sum = _mm256_cvtepi32_ps(_mm256_madd_epi16(sums[i][1], ones));
      totals[i][0] = _mm256_fmadd_ps(low_sum, _mm256_mul_ps(low_scale, scale), totals[i][0]);
      totals[i][1] = _mm256_fmadd_ps(high_sum, _mm256_mul_ps(high_scale, scale), totals[i][1]);
      totals[i][0] = _mm256_fmadd_ps(sum, low_least, totals[i][0]);
      totals[i][1] = _mm256_fmadd_ps(sum, high_least, totals[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    _mm256_storeu_ps(results[i], totals[i][0]);
    _mm256_storeu_ps(results[i] + 8, totals[i][1]);
  }
}

INLINE void multiply_group(const linear_weights *w, size_t tile, const linear_rows *rows, row_group group, fetch ahead,
                           float (*results)[TILE]) {
  switch (group.count) {
    case 1: multiply_rows(1, w, tile, rows, group.first, ahead, results); break;
    case 2: multiply_rows(2, w, tile, rows, group.first, ahead, results); break;
    case 3: multiply_rows(3, w, tile, rows, group.first, ahead, results); break;
    case 4: multiply_rows(4, w, tile, rows, group.first, ahead, results); break;
    case 5: multiply_rows(5, w, tile, rows, group.first, ahead, results); break;
    default: multiply_rows(MAX_ROWS, w, tile, rows, group.first, ahead, results); break;
  }
}

static void multiply(const linear_weights *w, const size_t *tiles, size_t num_tiles, const linear_rows *rows,
                     row_group group, fetch ahead, float (*results)[MAX_GROUP][TILE]) {
  for (size_t i = 0; i < num_tiles; i++) multiply_group(w, tiles[i], rows, group, ahead, results[i]);
}

const linear_method LINEAR_BYTES = {
    .max_rows = MAX_ROWS, .max_tiles = 1, .neighbours = 4, .cached_bytes = 20 << 10, .quantize = quantize,
    .multiply = multiply};

SIMD_END
