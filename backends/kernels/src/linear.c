#include <stdlib.h>

#include "linear_tile.h"

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
    uint8_t *tile = packed + output / TILE * tile_bytes + output % TILE * (w->bits == 8 ? 2 : 4);
    const uint8_t *row = values + output * row_bytes;
    if (w->bits == 8) {
      const uint8_t zero = w->has_minima ? 0 : 128;
      for (size_t k = 0; k < w->inputs; k++) tile[k / 2 * TILE * 2 + k % 2] = (uint8_t)(row[k] - zero);
    } else {
      for (size_t k = 0; k < w->inputs; k++) {
        const int integer = k % 2 ? row[k / 2] >> 4 : row[k / 2] & 15;
        tile[k / 8 * TILE * 4 + k % 4] |= (uint8_t)(k % 8 < 4 ? integer : integer << 4);
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

void linear_quantize(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                     linear_rows *rows, size_t first, size_t last) {
  quantize_function *const quantize = w->bits == 8 ? quantize_words : quantize_bytes;
  const size_t num_groups = count_groups(rows);
  for (size_t group = 0; group < num_groups; group++) {
    const size_t start = group_start(rows, group, num_groups), end = group_start(rows, group + 1, num_groups);
    for (size_t i = start < first ? first : start; i < (end < last ? end : last); i++) {
      quantize(w, x + i * width, width, norm, epsilon, rows, i, start, end - start);
    }
  }
}

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
  tile_function *const multiply = (w->bits == 8 ? WORD_TILES[w->has_minima] : BYTE_TILES)[end - start - 1];
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
