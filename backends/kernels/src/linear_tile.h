/* What the ways to multiply share. Weights of 8 bits, with activations of 16: linear_words.c on any processor,
 * linear_words_512.c with VNNI, linear_amx.c. Weights of 4, with activations of 8: linear_bytes.c. */
#pragma once

#include "linear.h"

#include <math.h>

#include "simd.h"

#define MAX_GROUP 32    /* rows that are computed together, by any method */
#define MAX_TILES 4     /* the same of tiles */
#define SMALLEST 1e-30f /* of the largest activation, lest its inverse be infinite; what is below counts as zeros */
#define UNROLLED 8      /* inputs at once; every block has a multiple of as many */

/* What to fetch from memory meanwhile: what lies `distance` bytes behind the tile, `step` bytes with every UNROLLED
 * inputs. What is not there is not fetched, and that is all. */
typedef struct {
  size_t distance, step;
} fetch;

/* Neighbouring rows that are computed together, and whose values lie together. */
typedef struct {
  size_t first, count;
} row_group;

typedef struct linear_method {
  size_t max_rows;     /* of a group */
  size_t max_tiles;    /* that are worth computing together, even */
  size_t neighbours;   /* inputs that lie together, in weights of 8 bits */
  size_t cached_bytes; /* of weights that stay cached while all rows pass */
  /* Quantises a row of a group. */
  void (*quantize)(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                   linear_rows *rows, size_t row, row_group group);
  /* Multiplies some tiles with a group of rows. */
  void (*multiply)(const linear_weights *w, const size_t *tiles, size_t num_tiles, const linear_rows *rows,
                   row_group group, fetch ahead, float (*results)[MAX_GROUP][TILE]);
  /* Before tiles are multiplied with a group of so many rows, and after the last; or NULL. */
  void (*enter)(const linear_weights *w, size_t num_rows);
  void (*leave)(size_t num_rows);
} linear_method;

void quantize_words(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                    linear_rows *rows, size_t row, row_group group);
extern const linear_method LINEAR_WORDS, LINEAR_WORDS_512, LINEAR_AMX, LINEAR_BYTES;

INLINE __m256 load_factors(const linear_weights *w, const void *factors, size_t index) {
  return w->half_scales ? load_halves((const half *)factors + index) : _mm256_loadu_ps((const float *)factors + index);
}

#ifdef __AVX512F__
INLINE __m512 load_factors16(const linear_weights *w, const void *factors, size_t index) {
  if (!w->half_scales) return _mm512_loadu_ps((const float *)factors + index);
  return load_halves16((const half *)factors + index);
}
#endif

/* The integers' step of a row whose largest magnitude becomes `limit`; and its inverse. It is not a number if one of the
 * row is not: nor are its products, then. */
INLINE float step_of(float largest, float limit, float *inverse) {
  *inverse = largest > SMALLEST ? limit / largest : 0;
  return largest / limit;
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

#define LARGEST_WORD 32767.0f /* an activation of 16 bits */

/* The largest magnitude of a row. */
INLINE float largest_activation(const float *x, size_t width, const float *norm, float factor) {
  __m256i magnitudes = _mm256_setzero_si256();
  for (size_t k = 0; k < width; k += 8) {
    magnitudes = larger_magnitudes(magnitudes, load_activations(x, norm, factor, k, width));
  }
  return largest_magnitude(magnitudes);
}

/* --- methods of words --------------------------------------------------------------------------------------------- */

#define ROWS(num_rows) \
  case num_rows: multiply_rows(num_rows, minima, w, tile, rows, group.first, ahead, results); break;

/* Makes `multiply` of the inlined multiply_rows, whose number of rows and minima must be constants. `cases`: ROWS of 1 to
 * MAX_ROWS. */
#define MULTIPLY_WORDS(cases)                                                                                      \
  INLINE void multiply_group(const bool minima, const linear_weights *w, size_t tile, const linear_rows *rows,     \
                             row_group group, fetch ahead, float (*results)[TILE]) {                               \
    switch (group.count) { cases }                                                                                 \
  }                                                                                                                \
  static void multiply(const linear_weights *w, const size_t *tiles, size_t num_tiles, const linear_rows *rows,    \
                       row_group group, fetch ahead, float (*results)[MAX_GROUP][TILE]) {                          \
    for (size_t i = 0; i < num_tiles; i++) {                                                                       \
      if (w->has_minima) {                                                                                         \
        multiply_group(true, w, tiles[i], rows, group, ahead, results[i]);                                         \
      } else {                                                                                                     \
        multiply_group(false, w, tiles[i], rows, group, ahead, results[i]);                                        \
      }                                                                                                            \
    }                                                                                                              \
  }
