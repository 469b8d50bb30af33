#include "linear.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "simd.h"

#define MAX_ROWS 6 /* rows that are computed together: twelve sums, two weights and an activation are 15 registers */
#define LARGEST 32767.0f
#define SMALLEST 1e-30f /* of a row's largest activation, lest its inverse be infinite; rows below count as zeros */
#define UNROLLED 8    /* inputs at once; every block has a multiple of as many */
#define CACHED_BYTES (20 << 10) /* of weights that stay in the first cache while all rows pass */

static size_t value_bytes(const linear_weights *w, size_t inputs) { return TILE * inputs * w->bits / 8; }

static bool are_halves(const float *x, size_t count) {
  for (size_t i = 0; i < count; i++) {
    if (_cvtsh_ss(_cvtss_sh(x[i], _MM_FROUND_TO_NEAREST_INT)) != x[i]) return false;
  }
  return true;
}

static void *pack_factors(const linear_weights *w, const float *factors) {
  const size_t size = w->half_scales ? sizeof(half) : sizeof(float);
  char *packed = aligned_alloc(64, (w->num_tiles * w->num_blocks * TILE * size + 63) / 64 * 64);
  if (!packed) return NULL;
  for (size_t tile = 0; tile < w->num_tiles; tile++) {
    for (size_t block = 0; block < w->num_blocks; block++) {
      for (size_t i = 0; i < TILE; i++) {
        const size_t output = tile * TILE + i, to = (tile * w->num_blocks + block) * TILE + i;
        const float factor = output < w->outputs ? factors[output * w->num_blocks + block] : 0;
        if (w->half_scales) {
          ((half *)packed)[to] = _cvtss_sh(factor, _MM_FROUND_TO_NEAREST_INT);
        } else {
          ((float *)packed)[to] = factor;
        }
      }
    }
  }
  return packed;
}

static uint8_t *pack_values(const linear_weights *w, const uint8_t *values) {
  const size_t tile_bytes = value_bytes(w, w->inputs), row_bytes = w->inputs * w->bits / 8;
  uint8_t *packed = aligned_alloc(64, (w->num_tiles * tile_bytes + 63) / 64 * 64);
  if (!packed) return NULL;
  memset(packed, 0, w->num_tiles * tile_bytes);
  for (size_t output = 0; output < w->outputs; output++) {
    uint8_t *tile = packed + output / TILE * tile_bytes + output % TILE * 2;
    const uint8_t *row = values + output * row_bytes;
    if (w->bits == 8) {
      const uint8_t zero = w->has_minima ? 0 : 128;
      for (size_t k = 0; k < w->inputs; k++) tile[k / 2 * TILE * 2 + k % 2] = (uint8_t)(row[k] - zero);
    } else {
      for (size_t k = 0; k < w->inputs; k += 4) {
        uint8_t *to = tile + k / 4 * TILE * 2;
        to[0] = (uint8_t)((row[k / 2] & 15) | (row[k / 2 + 1] & 15) << 4);
        to[1] = (uint8_t)(row[k / 2] >> 4 | (row[k / 2 + 1] & 0xf0));
      }
    }
  }
  return packed;
}

bool linear_pack(linear_weights *w, const uint8_t *values, const float *scales, const float *minima, size_t outputs,
                 size_t num_blocks, size_t block_size, int bits) {
  const size_t num_factors = outputs * num_blocks;
  float *zero_minima = NULL;
  if (bits == 4 && !minima) {
    /* Packed integers of 4 bits count from 0. */
    zero_minima = malloc(num_factors * sizeof(float));
    if (!zero_minima) return false;
    for (size_t i = 0; i < num_factors; i++) zero_minima[i] = -8 * scales[i];
    minima = zero_minima;
  }
  *w = (linear_weights){
      .outputs = outputs,
      .inputs = num_blocks * block_size,
      .block_size = block_size,
      .num_blocks = num_blocks,
      .num_tiles = (outputs + TILE - 1) / TILE,
      .bits = bits,
      .has_minima = minima != NULL,
      .half_scales = are_halves(scales, num_factors) && (!minima || are_halves(minima, num_factors)),
  };
  w->values = pack_values(w, values);
  w->scales = pack_factors(w, scales);
  w->minima = minima ? pack_factors(w, minima) : NULL;
  free(zero_minima);
  if (w->values && w->scales && (w->minima || !minima)) return true;
  linear_release(w);
  return false;
}

void linear_release(linear_weights *w) {
  free(w->values);
  free(w->scales);
  free(w->minima);
  *w = (linear_weights){0};
}

/* Where a group of rows begins. */
static size_t group_start(const linear_rows *rows, size_t group, size_t num_groups) {
  return rows->count * group / num_groups;
}

static size_t count_groups(const linear_rows *rows) { return (rows->count + MAX_ROWS - 1) / MAX_ROWS; }

/* --- activations ------------------------------------------------------------------------------------------------ */

INLINE __m256 normed8(const float *x, const float *norm, float factor) {
  const __m256 v = _mm256_loadu_ps(x);
  return norm ? _mm256_mul_ps(_mm256_mul_ps(v, _mm256_set1_ps(factor)), _mm256_loadu_ps(norm)) : v;
}

/* The next eight activations of a row, of which `count` are left; zeros make up for what is missing. */
INLINE __m256 load_activations(const float *x, const float *norm, float factor, size_t count) {
  if (count >= 8) return normed8(x, norm, factor);
  float some[8] = {0}, some_norm[8] = {0};
  memcpy(some, x, count * sizeof *x);
  if (norm) memcpy(some_norm, norm, count * sizeof *norm);
  return normed8(some, norm ? some_norm : NULL, factor);
}

/* Writes a row's values two by two, `stride` values apart. */
static void quantize_row(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                         int16_t *values, size_t stride, float *scale, float *sums) {
  float factor = 1;
  if (norm) {
    __m256 squares = _mm256_setzero_ps();
    size_t k = 0;
    for (; k + 8 <= width; k += 8) {
      const __m256 v = _mm256_loadu_ps(x + k);
      squares = _mm256_fmadd_ps(v, v, squares);
    }
    float total = sum8(squares);
    for (; k < width; k++) total += x[k] * x[k];
    factor = 1 / sqrtf(total / (float)width + epsilon);
  }
  const __m256i no_sign = _mm256_set1_epi32(INT32_MAX);
  __m256i magnitudes = _mm256_setzero_si256();
  for (size_t k = 0; k < width; k += 8) {
    const __m256 v = load_activations(x + k, norm ? norm + k : NULL, factor, width - k);
    magnitudes = _mm256_max_epi32(magnitudes, _mm256_and_si256(_mm256_castps_si256(v), no_sign));
  }
  const float largest = largest_magnitude(magnitudes);
  *scale = largest / LARGEST; /* not a number if one of the row is not: nor are its products, then */
  const __m256 inverses = _mm256_set1_ps(largest > SMALLEST ? LARGEST / largest : 0);
  int32_t sum = 0;
  for (size_t k = 0; k < w->inputs; k += 8) {
    const size_t at = k < width ? k : width;
    const __m256 v = load_activations(x + at, norm ? norm + at : NULL, factor, width - at);
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverses));
    int16_t eight[8];
    _mm_storeu_si128((__m128i *)eight,
                     _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
    for (size_t i = 0; i < 8; i += 2) memcpy(values + (k + i) / 2 * stride, eight + i, 2 * sizeof *eight);
    if (w->has_minima) {
      for (size_t i = 0; i < 8; i++) sum += eight[i];
      if ((k + 8) % w->block_size == 0) {
        sums[k / w->block_size] = (float)sum;
        sum = 0;
      }
    }
  }
}

void linear_quantize(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                     linear_rows *rows, size_t first, size_t last) {
  const size_t num_groups = count_groups(rows);
  for (size_t group = 0; group < num_groups; group++) {
    const size_t start = group_start(rows, group, num_groups), end = group_start(rows, group + 1, num_groups);
    for (size_t i = start < first ? first : start; i < (end < last ? end : last); i++) {
      quantize_row(w, x + i * width, width, norm, epsilon, rows->values + start * w->inputs + (i - start) * 2,
                   (end - start) * 2, rows->scales + i, rows->sums + i * w->num_blocks);
    }
  }
}

/* --- products --------------------------------------------------------------------------------------------------- */

/* sum += a x b, in pairs. Written out because the compiler would multiply for all rows first, and the products would
 * push the sums out of registers. */
INLINE void multiply_add(__m256i *sum, __m256i a, __m256i b) {
  __m256i product;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(a), "x"(b));
}

INLINE void add_pair(const int num_rows, __m256i (*sums)[2], __m256i low, __m256i high, const int16_t *x) {
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    int32_t pair;
    memcpy(&pair, x + 2 * i, sizeof pair);
    const __m256i both = _mm256_set1_epi32(pair);
    multiply_add(&sums[i][0], low, both);
    multiply_add(&sums[i][1], high, both);
  }
}

INLINE __m256 load_factors(const linear_weights *w, const void *factors, size_t index) {
  return w->half_scales ? load_halves((const half *)factors + index) : _mm256_loadu_ps((const float *)factors + index);
}

/* What to fetch from memory meanwhile: `step` bytes with every UNROLLED inputs. An address and no pointer, since it may
 * lie beyond the weights: what is not there is not fetched, and that is all. */
typedef struct {
  uintptr_t from;
  size_t step;
} fetch;

/* One tile for num_rows rows, which is a constant where this is inlined, as are bits and minima. */
INLINE void multiply_tile(const int num_rows, const int bits, const bool minima, const linear_weights *w, size_t tile,
                          const linear_rows *rows, size_t first_row, fetch ahead, __m256 (*results)[2]) {
  const uint8_t *values = w->values + tile * value_bytes(w, w->inputs);
  const int16_t *x = rows->values + first_row * w->inputs;
  const __m128i low_bits = _mm_set1_epi8(15);
  __m256 totals[MAX_ROWS][2]; /* not `results`, which could overlap what is read here, for all the compiler knows */
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) totals[i][0] = totals[i][1] = _mm256_setzero_ps();
  for (size_t block = 0; block < w->num_blocks; block++) {
    __m256i sums[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < num_rows; i++) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
    for (size_t i = 0; i < w->block_size; i += UNROLLED) {
      _mm_prefetch((const char *)ahead.from, _MM_HINT_T1);
      if (bits == 8) _mm_prefetch((const char *)(ahead.from + ahead.step / 2), _MM_HINT_T1);
      ahead.from += ahead.step;
#pragma GCC unroll 4
      for (int pair = 0; pair < UNROLLED / 2; pair += bits == 8 ? 1 : 2) {
        const __m128i first = _mm_load_si128((const __m128i *)values);
        const __m128i second = _mm_load_si128((const __m128i *)(values + 16));
        values += 32;
        if (bits == 4) {
          add_pair(num_rows, sums, _mm256_cvtepu8_epi16(_mm_and_si128(first, low_bits)),
                   _mm256_cvtepu8_epi16(_mm_and_si128(second, low_bits)), x);
          x += 2 * num_rows;
          add_pair(num_rows, sums, _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(first, 4), low_bits)),
                   _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(second, 4), low_bits)), x);
        } else if (minima) {
          add_pair(num_rows, sums, _mm256_cvtepu8_epi16(first), _mm256_cvtepu8_epi16(second), x);
        } else {
          add_pair(num_rows, sums, _mm256_cvtepi8_epi16(first), _mm256_cvtepi8_epi16(second), x);
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
    results[i][0] = _mm256_mul_ps(totals[i][0], scale);
    results[i][1] = _mm256_mul_ps(totals[i][1], scale);
  }
}

typedef void tile_function(const linear_weights *, size_t tile, const linear_rows *, size_t first_row, fetch ahead,
                           __m256 (*)[2]);

#define TILE_FUNCTION(num_rows, bits, minima)                                                                        \
  static void tile_##num_rows##_##bits##_##minima(const linear_weights *w, size_t tile, const linear_rows *rows,     \
                                                  size_t first_row, fetch ahead, __m256(*results)[2]) {              \
    multiply_tile(num_rows, bits, minima, w, tile, rows, first_row, ahead, results);                                 \
  }
#define TILE_FUNCTIONS(num_rows) TILE_FUNCTION(num_rows, 8, 0) TILE_FUNCTION(num_rows, 8, 1) TILE_FUNCTION(num_rows, 4, 1)
TILE_FUNCTIONS(1)
TILE_FUNCTIONS(2)
TILE_FUNCTIONS(3)
TILE_FUNCTIONS(4)
TILE_FUNCTIONS(5)
TILE_FUNCTIONS(6)

#define FUNCTIONS_OF(bits, minima)                                                                                   \
  {tile_1_##bits##_##minima, tile_2_##bits##_##minima, tile_3_##bits##_##minima,                                     \
   tile_4_##bits##_##minima, tile_5_##bits##_##minima, tile_6_##bits##_##minima}
static tile_function *const FUNCTIONS[3][MAX_ROWS] = {FUNCTIONS_OF(8, 0), FUNCTIONS_OF(8, 1), FUNCTIONS_OF(4, 1)};

/* gelu by its tanh approximation, which is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3). */
INLINE __m256 gelu8(__m256 x) {
  const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(x, x), _mm256_set1_ps(0.044715f), _mm256_set1_ps(1.0f));
  const __m256 u = _mm256_mul_ps(_mm256_mul_ps(x, cubic), _mm256_set1_ps(1.5957691216f));
  return _mm256_mul_ps(x, sigmoid8(u));
}

INLINE __m256 gated(linear_gate gate, __m256 x) {
  return gate == GATE_SILU ? _mm256_mul_ps(x, sigmoid8(x)) : gelu8(x);
}

INLINE void add(__m256 *results, const float *x) {
  results[0] = _mm256_add_ps(results[0], _mm256_loadu_ps(x));
  results[1] = _mm256_add_ps(results[1], _mm256_loadu_ps(x + 8));
}

/* Writes a row's tile; the last tile of a matrix may be cut short. */
INLINE void finish(__m256 *results, size_t count, const float *bias, const float *residual, float *out) {
  if (count == TILE) {
    if (bias) add(results, bias);
    if (residual) add(results, residual);
    _mm256_storeu_ps(out, results[0]);
    _mm256_storeu_ps(out + 8, results[1]);
    return;
  }
  float values[TILE];
  _mm256_storeu_ps(values, results[0]);
  _mm256_storeu_ps(values + 8, results[1]);
  for (size_t i = 0; i < count; i++) {
    float value = values[i];
    if (bias) value += bias[i];
    if (residual) value += residual[i];
    out[i] = value;
  }
}

size_t linear_num_pieces(const linear_weights *w, linear_gate gate) { return gate ? w->num_tiles / 2 : w->num_tiles; }

/* One tile, or pair of them, of one of num_groups groups of rows. Each group fetches its share of the tile that is
 * `step` further: so memory is busy all the time, not only while the first group passes. */
static void multiply_piece(const linear_weights *w, const linear_rows *rows, linear_gate gate, const float *bias,
                           const float *residual, float *out, size_t tile, size_t group, size_t num_groups,
                           size_t step) {
  const size_t start = group_start(rows, group, num_groups), end = group_start(rows, group + 1, num_groups);
  tile_function *const multiply = FUNCTIONS[w->bits == 4 ? 2 : w->has_minima ? 1 : 0][end - start - 1];
  const size_t width = gate ? w->outputs / 2 : w->outputs, tile_bytes = value_bytes(w, w->inputs);
  const size_t column = tile * TILE, count = width - column < TILE ? width - column : TILE;
  const size_t share = tile_bytes / num_groups * group;
  const fetch ahead = {(uintptr_t)w->values + (tile + step) * tile_bytes + share,
                       UNROLLED * TILE * (size_t)w->bits / 8 / num_groups};
  __m256 results[MAX_ROWS][2], values[MAX_ROWS][2];
  multiply(w, tile, rows, start, ahead, results);
  if (gate) {
    const size_t other = w->num_tiles / 2;
    multiply(w, tile + other, rows, start, (fetch){ahead.from + other * tile_bytes, ahead.step}, values);
  }
  for (size_t row = start; row < end; row++) {
    __m256 *result = results[row - start];
    if (gate) {
      result[0] = _mm256_mul_ps(gated(gate, result[0]), values[row - start][0]);
      result[1] = _mm256_mul_ps(gated(gate, result[1]), values[row - start][1]);
    }
    finish(result, count, bias ? bias + column : NULL, residual ? residual + row * width + column : NULL,
           out + row * width + column);
  }
}

void linear_multiply(const linear_weights *w, const linear_rows *rows, linear_gate gate, const float *bias,
                     const float *residual, float *out, size_t first, size_t last) {
  const size_t num_groups = count_groups(rows);
  const size_t piece_bytes = value_bytes(w, w->inputs) * (gate ? 2 : 1);
  const size_t step = piece_bytes < CACHED_BYTES ? CACHED_BYTES / piece_bytes : 1;
  for (; first < last; first += step) {
    const size_t end = last - first < step ? last : first + step;
    for (size_t group = 0; group < num_groups; group++) {
      for (size_t tile = first; tile < end; tile++) {
        multiply_piece(w, rows, gate, bias, residual, out, tile, group, num_groups, step);
      }
    }
  }
}

SIMD_END
