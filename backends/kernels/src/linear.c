#include <stdlib.h>

#include "processor.h"

#include "linear_tile.h"

#define FETCHED_BYTES (20 << 10) /* of weights, ahead */

static const linear_method *method_of(int bits, size_t block_size) {
  if (bits == 4) return &LINEAR_BYTES;
  const processor_isa isa = processor_best();
  if (isa >= ISA_AMX_INT8 && (block_size == 32 || block_size == 64)) return &LINEAR_AMX;
  return isa >= ISA_AVX512_VNNI ? &LINEAR_WORDS_512 : &LINEAR_WORDS;
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

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
    const size_t n = w->method->neighbours;
    uint8_t *tile = packed + output / TILE * tile_bytes + output % TILE * n;
    const uint8_t *row = values + output * row_bytes;
    if (w->bits == 8) {
      const uint8_t zero = w->has_minima ? 0 : 128;
      for (size_t k = 0; k < w->inputs; k++) tile[k / n * TILE * n + k % n] = (uint8_t)(row[k] - zero);
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
  w->method = method_of(bits, block_size);
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

static size_t count_groups(const linear_weights *w, const linear_rows *rows) {
  return (rows->count + w->method->max_rows - 1) / w->method->max_rows;
}

static row_group group_of(const linear_rows *rows, size_t group, size_t num_groups) {
  const size_t first = rows->count * group / num_groups;
  return (row_group){first, rows->count * (group + 1) / num_groups - first};
}

void linear_quantize(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                     linear_rows *rows, size_t first, size_t last) {
  const size_t num_groups = count_groups(w, rows);
  for (size_t number = 0; number < num_groups; number++) {
    const row_group group = group_of(rows, number, num_groups);
    const size_t end = group.first + group.count;
    for (size_t i = group.first < first ? first : group.first; i < (end < last ? end : last); i++) {
      w->method->quantize(w, x + i * width, width, norm, epsilon, rows, i, group);
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

/* What a piece of work adds to, and where it goes. */
typedef struct {
  linear_gate gate;
  const float *bias, *residual;
  float *out;
} linear_output;

/* Some neighbouring tiles, or pairs of them, of a group of rows. */
static void multiply_pieces(const linear_weights *w, const linear_rows *rows, const linear_output *to, size_t first,
                            size_t last, row_group group, fetch ahead) {
  const size_t a_piece = to->gate ? 2 : 1, width = w->outputs / a_piece;
  size_t tiles[MAX_TILES] = {0}, num_tiles = 0;
  _Alignas(64) float results[MAX_TILES][MAX_GROUP][TILE];
  for (size_t piece = first; piece < last; piece++) {
    tiles[num_tiles++] = piece;
    if (to->gate) tiles[num_tiles++] = piece + w->num_tiles / 2;
  }
  w->method->multiply(w, tiles, num_tiles, rows, group, ahead, results);
  for (size_t piece = first; piece < last; piece++) {
    const float(*const values)[TILE] = results[(piece - first) * a_piece];
    const size_t column = piece * TILE, count = width - column < TILE ? width - column : TILE;
    for (size_t i = 0; i < group.count; i++) {
      __m256 result[2] = {_mm256_load_ps(values[i]), _mm256_load_ps(values[i] + 8)};
      if (to->gate) { /* what is gated lies in the next tile */
        result[0] = _mm256_mul_ps(gated(to->gate, result[0]), _mm256_load_ps(values[MAX_GROUP + i]));
        result[1] = _mm256_mul_ps(gated(to->gate, result[1]), _mm256_load_ps(values[MAX_GROUP + i] + 8));
      }
      const size_t at = (group.first + i) * width + column;
      finish(result, count, to->bias ? to->bias + column : NULL, to->residual ? to->residual + at : NULL, to->out + at);
    }
  }
}

void linear_multiply(const linear_weights *w, const linear_rows *rows, linear_gate gate, const float *bias,
                     const float *residual, float *out, size_t first, size_t last) {
  const linear_output to = {gate, bias, residual, out};
  const size_t num_groups = count_groups(w, rows), tile_bytes = value_bytes(w, w->inputs), a_piece = gate ? 2 : 1;
  const size_t together = w->method->max_tiles > a_piece ? w->method->max_tiles / a_piece : 1;
  /* A single group needs its weights once: what it fetches need not come long before. */
  const size_t cached = (num_groups == 1 ? FETCHED_BYTES : w->method->cached_bytes) / (tile_bytes * a_piece);
  const size_t step = cached > together ? cached : together;
  for (; first < last; first += step) {
    const size_t end = smaller(last, first + step);
    for (size_t number = 0; number < num_groups; number++) {
      const row_group group = group_of(rows, number, num_groups);
      /* Each group fetches its share of the tile that is `step` further: so memory is busy all the time, not only while
       * the first group passes. */
      const fetch ahead = {step * tile_bytes + tile_bytes / num_groups * number, value_bytes(w, UNROLLED) / num_groups};
      if (w->method->enter) w->method->enter(w, group.count);
      for (size_t piece = first; piece < end; piece += together) {
        multiply_pieces(w, rows, &to, piece, smaller(end, piece + together), group, ahead);
      }
      if (w->method->leave) w->method->leave(group.count);
    }
  }
}

SIMD_END
