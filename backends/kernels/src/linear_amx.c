/* Weights of 8 bits with activations of 16, on processors with AMX: matrices of bytes are multiplied, so an activation is
 * its upper byte, with the sign, times 256, and its lower one, without. Sums of integers are exact, in whatever parts. */
#define SIMD_AMX
#include "linear_tile.h"

#define HALF 16             /* rows of a matrix register, which has 64 bytes in each */
#define MAX_ROWS (2 * HALF) /* that are computed together */
#define FEW_ROWS 3          /* for which VNNI is faster */

/* Matrix registers: activations of a group's first rows, upper and lower bytes, and of its second ones, either; weights;
 * sums of all these. Constants of the instructions. */
#define FIRST_UPPER 0
#define FIRST_LOWER 1
#define SECOND 2
#define WEIGHTS 3
#define FIRST_UPPER_SUMS 4
#define FIRST_LOWER_SUMS 5
#define SECOND_UPPER_SUMS 6
#define SECOND_LOWER_SUMS 7

/* Rows of a register: a group of more than HALF is two halves, which share a row if it is odd. */
static size_t half_of(size_t num_rows) { return num_rows <= HALF ? num_rows : (num_rows + 1) / 2; }

static void enter(const linear_weights *w, size_t num_rows) {
  if (num_rows <= FEW_ROWS) return;
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16]; /* of a row */
    uint8_t rows[16];
  } shape = {.palette = 1};
  for (int i = FIRST_UPPER; i <= SECOND_LOWER_SUMS; i++) {
    shape.bytes[i] = (uint16_t)(i < WEIGHTS ? w->block_size : 64);
    shape.rows[i] = (uint8_t)(i == WEIGHTS ? w->block_size / 4 : half_of(num_rows));
  }
  /* By hand: GCC 12's function says that it reads the first eight bytes. */
  __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}

static void leave(size_t num_rows) {
  if (num_rows > FEW_ROWS) _tile_release();
}

/* A group's values lie block by block: the upper bytes of all rows, then the lower ones. */
static void quantize(const linear_weights *w, const float *x, size_t width, const float *norm, float epsilon,
                     linear_rows *rows, size_t row, row_group group) {
  const size_t size = w->block_size;
  uint8_t *values = (uint8_t *)rows->values + 2 * group.first * w->inputs + (row - group.first) * size;
  float *sums = rows->sums + row * w->num_blocks;
  const float factor = norm ? norm_factor(x, width, epsilon) : 1;
  float inverse;
  rows->scales[row] = step_of(largest_activation(x, width, norm, factor), LARGEST_WORD, &inverse);
  const __m256 inverses = _mm256_set1_ps(inverse);
  __m256i sum = _mm256_setzero_si256();
  for (size_t k = 0; k < w->inputs; k += 8) {
    const __m256 v = load_activations(x, norm, factor, k, width);
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverses));
    /* Out of 16 bits is only what is no number, in a row that is none. */
    const __m256i words = _mm256_max_epi32(rounded, _mm256_set1_epi32(INT16_MIN));
    uint8_t *to = values + k / size * 2 * size * group.count + k % size;
    _mm_storel_epi64((__m128i *)to, _mm256_cvtepi32_epi8(_mm256_srai_epi32(words, 8)));
    _mm_storel_epi64((__m128i *)(to + size * group.count), _mm256_cvtepi32_epi8(words));
    if (w->has_minima) {
      sum = _mm256_add_epi32(sum, words);
      if ((k + 8) % size == 0) {
        const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        sums[k / size] = (float)_mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
        sum = _mm256_setzero_si256();
      }
    }
  }
}

/* The sums of a block's products, of one tile. */
typedef struct {
  int32_t upper[MAX_ROWS][TILE], lower[MAX_ROWS][TILE];
} block_sums;

#define MULTIPLY_UPPER(sums, x)     \
  _tile_zero(sums);                 \
  if (minima)                       \
    _tile_dpbsud(sums, x, WEIGHTS); \
  else                              \
    _tile_dpbssd(sums, x, WEIGHTS)
#define MULTIPLY_LOWER(sums, x)     \
  _tile_zero(sums);                 \
  if (minima)                       \
    _tile_dpbuud(sums, x, WEIGHTS); \
  else                              \
    _tile_dpbusd(sums, x, WEIGHTS)

/* Multiplies the activations of a block, the first of which are loaded, with a tile's weights. minima and halves are
 * constants where this is inlined. */
INLINE void multiply_block(const uint8_t *values, const uint8_t *x, size_t block_size, size_t num_rows,
                           const bool minima, const bool halves) {
  _tile_loadd(WEIGHTS, values, 64);
  MULTIPLY_UPPER(FIRST_UPPER_SUMS, FIRST_UPPER);
  MULTIPLY_LOWER(FIRST_LOWER_SUMS, FIRST_LOWER);
  if (halves) {
    const uint8_t *const second = x + (num_rows - half_of(num_rows)) * block_size;
    _tile_loadd(SECOND, second, block_size);
    MULTIPLY_UPPER(SECOND_UPPER_SUMS, SECOND);
    _tile_loadd(SECOND, second + num_rows * block_size, block_size);
    MULTIPLY_LOWER(SECOND_LOWER_SUMS, SECOND);
  }
}

INLINE void store_sums(block_sums *sums, size_t num_rows, const bool halves) {
  const size_t second = num_rows - half_of(num_rows);
  _tile_stored(FIRST_UPPER_SUMS, sums->upper, 64);
  _tile_stored(FIRST_LOWER_SUMS, sums->lower, 64);
  if (halves) _tile_stored(SECOND_UPPER_SUMS, sums->upper + second, 64);
  if (halves) _tile_stored(SECOND_LOWER_SUMS, sums->lower + second, 64);
}

/* results += sums x scale, as floats. */
INLINE void scale_block(const linear_weights *w, size_t tile, size_t block, const linear_rows *rows, row_group group,
                        const block_sums *sums, float (*results)[TILE], const bool minima) {
  const size_t factor = (tile * w->num_blocks + block) * TILE;
  const __m512 scale = load_factors16(w, w->scales, factor);
  const __m512 least = minima ? load_factors16(w, w->minima, factor) : _mm512_setzero_ps();
  for (size_t i = 0; i < group.count; i++) {
    const __m512i upper = _mm512_slli_epi32(_mm512_load_si512(sums->upper[i]), 8);
    const __m512i sum = _mm512_add_epi32(upper, _mm512_load_si512(sums->lower[i]));
    __m512 total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_load_ps(results[i]));
    if (minima) {
      const __m512 of_row = _mm512_set1_ps(rows->sums[(group.first + i) * w->num_blocks + block]);
      total = _mm512_fmadd_ps(of_row, least, total);
    }
    _mm512_store_ps(results[i], total);
  }
}

INLINE void multiply_group(const linear_weights *w, const size_t *tiles, size_t num_tiles, const linear_rows *rows,
                           row_group group, fetch ahead, float (*results)[MAX_GROUP][TILE], const bool minima,
                           const bool halves) {
  const size_t tile_bytes = TILE * w->inputs, block_bytes = TILE * w->block_size;
  const size_t fetch_bytes = ahead.step * w->block_size / UNROLLED;
  const uint8_t *x = (const uint8_t *)rows->values + 2 * group.first * w->inputs;
  for (size_t t = 0; t < num_tiles; t++) {
    for (size_t i = 0; i < group.count; i++) _mm512_store_ps(results[t][i], _mm512_setzero_ps());
  }
  _Alignas(64) block_sums sums;
  for (size_t block = 0; block < w->num_blocks; block++, x += 2 * group.count * w->block_size) {
    _tile_loadd(FIRST_UPPER, x, w->block_size);
    _tile_loadd(FIRST_LOWER, x + group.count * w->block_size, w->block_size);
    for (size_t t = 0; t < num_tiles; t++) {
      const uint8_t *values = w->values + tiles[t] * tile_bytes + block * block_bytes;
      const uintptr_t fetched = (uintptr_t)w->values + tiles[t] * tile_bytes + ahead.distance + block * fetch_bytes;
      for (size_t line = 0; line < fetch_bytes; line += 64) _mm_prefetch((const char *)(fetched + line), _MM_HINT_T1);
      multiply_block(values, x, w->block_size, group.count, minima, halves);
      /* While that goes on, what was multiplied before is scaled. */
      if (t) {
        scale_block(w, tiles[t - 1], block, rows, group, &sums, results[t - 1], minima);
      } else if (block) {
        scale_block(w, tiles[num_tiles - 1], block - 1, rows, group, &sums, results[num_tiles - 1], minima);
      }
      store_sums(&sums, group.count, halves);
    }
  }
  scale_block(w, tiles[num_tiles - 1], w->num_blocks - 1, rows, group, &sums, results[num_tiles - 1], minima);
  for (size_t i = 0; i < group.count; i++) {
    const __m512 scale = _mm512_set1_ps(rows->scales[group.first + i]);
    for (size_t t = 0; t < num_tiles; t++) {
      _mm512_store_ps(results[t][i], _mm512_mul_ps(_mm512_load_ps(results[t][i]), scale));
    }
  }
}

/* The same of a few rows, by VNNI, which multiplies bytes without sign with such that have one. So either the upper bytes
 * or, beside weights without sign, the lower ones are moved by 128, and 128 x the sum of the weights makes up for it.
 * num_rows and minima are constants where this is inlined. */
INLINE void multiply_few(const int num_rows, const bool minima, const linear_weights *w, size_t tile,
                         const linear_rows *rows, size_t first_row, fetch ahead, float (*results)[TILE]) {
  const uint8_t *values = w->values + tile * TILE * w->inputs;
  const uint8_t *x = (const uint8_t *)rows->values + 2 * first_row * w->inputs;
  uintptr_t fetched = (uintptr_t)values + ahead.distance;
  const __m512i ones = _mm512_set1_epi8(1), sign = _mm512_set1_epi8(-128);
  __m512 totals[FEW_ROWS];
#pragma GCC unroll 3
  for (int i = 0; i < num_rows; i++) totals[i] = _mm512_setzero_ps();
  for (size_t block = 0; block < w->num_blocks; block++) {
    const uint8_t *const lower = x + (size_t)num_rows * w->block_size;
    __m512i of_weights = _mm512_setzero_si512(), uppers[FEW_ROWS], lowers[FEW_ROWS];
#pragma GCC unroll 3
    for (int i = 0; i < num_rows; i++) uppers[i] = lowers[i] = _mm512_setzero_si512();
    for (size_t k = 0; k < w->block_size; k += UNROLLED) {
      _mm_prefetch((const char *)fetched, _MM_HINT_T1);
      _mm_prefetch((const char *)(fetched + ahead.step / 2), _MM_HINT_T1);
      fetched += ahead.step;
#pragma GCC unroll 2
      for (size_t four = k; four < k + UNROLLED; four += 4) {
        const __m512i weights = _mm512_load_si512(values);
        values += 4 * TILE;
        of_weights = minima ? _mm512_dpbusd_epi32(of_weights, weights, ones) : _mm512_dpbusd_epi32(of_weights, ones, weights);
#pragma GCC unroll 3
        for (int i = 0; i < num_rows; i++) {
          int32_t upper, low;
          memcpy(&upper, x + (size_t)i * w->block_size + four, sizeof upper);
          memcpy(&low, lower + (size_t)i * w->block_size + four, sizeof low);
          const __m512i u = _mm512_set1_epi32(upper), l = _mm512_set1_epi32(low);
          if (minima) {
            uppers[i] = _mm512_dpbusd_epi32(uppers[i], weights, u);
            lowers[i] = _mm512_dpbusd_epi32(lowers[i], weights, _mm512_xor_si512(l, sign));
          } else {
            uppers[i] = _mm512_dpbusd_epi32(uppers[i], _mm512_xor_si512(u, sign), weights);
            lowers[i] = _mm512_dpbusd_epi32(lowers[i], l, weights);
          }
        }
      }
    }
    x += 2 * (size_t)num_rows * w->block_size;
    const size_t factor = (tile * w->num_blocks + block) * TILE;
    const __m512 scale = load_factors16(w, w->scales, factor);
    const __m512 least = minima ? load_factors16(w, w->minima, factor) : _mm512_setzero_ps();
#pragma GCC unroll 3
    for (int i = 0; i < num_rows; i++) {
      const __m512i moved = _mm512_slli_epi32(of_weights, 7);
      if (minima) {
        lowers[i] = _mm512_add_epi32(lowers[i], moved);
      } else {
        uppers[i] = _mm512_sub_epi32(uppers[i], moved);
      }
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(uppers[i], 8), lowers[i]);
      totals[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[i]);
      if (minima) {
        const __m512 of_row = _mm512_set1_ps(rows->sums[(first_row + (size_t)i) * w->num_blocks + block]);
        totals[i] = _mm512_fmadd_ps(of_row, least, totals[i]);
      }
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < num_rows; i++) {
    _mm512_store_ps(results[i], _mm512_mul_ps(totals[i], _mm512_set1_ps(rows->scales[first_row + (size_t)i])));
  }
}

INLINE void multiply_few_of(const bool minima, const linear_weights *w, const size_t *tiles, size_t num_tiles,
                            const linear_rows *rows, row_group group, fetch ahead, float (*results)[MAX_GROUP][TILE]) {
  for (size_t t = 0; t < num_tiles; t++) {
    switch (group.count) {
      case 1: multiply_few(1, minima, w, tiles[t], rows, group.first, ahead, results[t]); break;
      case 2: multiply_few(2, minima, w, tiles[t], rows, group.first, ahead, results[t]); break;
      default: multiply_few(FEW_ROWS, minima, w, tiles[t], rows, group.first, ahead, results[t]); break;
    }
  }
}

static void multiply(const linear_weights *w, const size_t *tiles, size_t num_tiles, const linear_rows *rows,
                     row_group group, fetch ahead, float (*results)[MAX_GROUP][TILE]) {
  if (w->has_minima && group.count <= FEW_ROWS) {
    multiply_few_of(true, w, tiles, num_tiles, rows, group, ahead, results);
  } else if (group.count <= FEW_ROWS) {
    multiply_few_of(false, w, tiles, num_tiles, rows, group, ahead, results);
  } else if (w->has_minima && group.count > HALF) {
    multiply_group(w, tiles, num_tiles, rows, group, ahead, results, true, true);
  } else if (w->has_minima) {
    multiply_group(w, tiles, num_tiles, rows, group, ahead, results, true, false);
  } else if (group.count > HALF) {
    multiply_group(w, tiles, num_tiles, rows, group, ahead, results, false, true);
  } else {
    multiply_group(w, tiles, num_tiles, rows, group, ahead, results, false, false);
  }
}

const linear_method LINEAR_AMX = {.max_rows = MAX_ROWS,
                                  .max_tiles = MAX_TILES,
                                  .neighbours = 4,
                                  .cached_bytes = 64 << 10,
                                  .quantize = quantize,
                                  .multiply = multiply,
                                  .enter = enter,
                                  .leave = leave};

SIMD_END
