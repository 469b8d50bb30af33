/* What the two ways to multiply share: words.c, activations of 16 bits with weights of 8; bytes.c, of 8 bits with
 * weights of 4. */
#pragma once

#include "linear.h"

#include <math.h>

#include "simd.h"

#define MAX_ROWS 6 /* rows that are computed together: twelve sums, two weights, an activation and a product */
#define SMALLEST 1e-30f /* of the largest activation, lest its inverse be infinite; what is below counts as zeros */
#define UNROLLED 8      /* inputs at once; every block has a multiple of as many */

/* What to fetch from memory meanwhile: `step` bytes with every UNROLLED inputs. An address and no pointer, since it may
 * lie beyond the weights: what is not there is not fetched, and that is all. */
typedef struct {
  uintptr_t from;
  size_t step;
} fetch;

/* Multiplies one tile with a group of rows, whose number is the function's own. */
typedef void tile_function(const linear_weights *w, size_t tile, const linear_rows *rows, size_t first_row, fetch ahead,
                           __m256 (*results)[2]);
extern tile_function *const WORD_TILES[2][MAX_ROWS]; /* without and with minima; then by the number of rows, from 1 */
extern tile_function *const BYTE_TILES[MAX_ROWS];

/* Quantises row `row` of `rows`, one of a group of `group_rows` that begins with `group_start`. */
typedef void quantize_function(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                               linear_rows *rows, size_t row, size_t group_start, size_t group_rows);
quantize_function quantize_words, quantize_bytes;

INLINE __m256 load_factors(const linear_weights *w, const void *factors, size_t index) {
  return w->half_scales ? load_halves((const half *)factors + index) : _mm256_loadu_ps((const float *)factors + index);
}

/* What an RMS norm multiplies a row with, before its own factors. */
INLINE float norm_factor(const float *x, size_t width, float epsilon) {
  __m256 squares = _mm256_setzero_ps();
  size_t k = 0;
  for (; k + 8 <= width; k += 8) {
    const __m256 v = _mm256_loadu_ps(x + k);
    squares = _mm256_fmadd_ps(v, v, squares);
  }
  float total = sum8(squares);
  for (; k < width; k++) total += x[k] * x[k];
  return 1 / sqrtf(total / (float)width + epsilon);
}

INLINE __m256 normed8(const float *x, const float *norm, float factor) {
  const __m256 v = _mm256_loadu_ps(x);
  return norm ? _mm256_mul_ps(_mm256_mul_ps(v, _mm256_set1_ps(factor)), _mm256_loadu_ps(norm)) : v;
}

/* Eight activations of a row from k on; zeros make up for what is missing. */
INLINE __m256 load_activations(const float *x, const float *norm, float factor, size_t k, size_t width) {
  if (k + 8 <= width) return normed8(x + k, norm ? norm + k : NULL, factor);
  float some[8] = {0}, some_norm[8] = {0};
  if (k < width) memcpy(some, x + k, (width - k) * sizeof *x);
  if (k < width && norm) memcpy(some_norm, norm + k, (width - k) * sizeof *norm);
  return normed8(some, norm ? some_norm : NULL, factor);
}

/* The larger magnitudes of both, as integers, which are ordered as floats without signs are. */
INLINE __m256i larger_magnitudes(__m256i magnitudes, __m256 x) {
  return _mm256_max_epi32(magnitudes, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(INT32_MAX)));
}
