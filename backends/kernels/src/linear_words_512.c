/* As linear_words.c, on processors with AVX-512 and VNNI: a tile's sums are one register, and an instruction multiplies
 * and adds. */
#define SIMD_512
#include "linear_tile.h"

#define MAX_ROWS 12 /* that are computed together: as many sums, as many totals, a weight */

/* num_rows is a constant where this is inlined, as is minima. */
INLINE void multiply_rows(const int num_rows, const bool minima, const linear_weights *w, size_t tile,
                          const linear_rows *rows, size_t first_row, fetch ahead, float (*results)[TILE]) {
  const uint8_t *values = w->values + tile * TILE * w->inputs;
  uintptr_t fetched = (uintptr_t)values + ahead.distance; /* an address: it may lie beyond the weights */
  const int16_t *x = (const int16_t *)rows->values + first_row * w->inputs;
  __m512 totals[MAX_ROWS];
#pragma GCC unroll 12
  for (int i = 0; i < num_rows; i++) totals[i] = _mm512_setzero_ps();
  for (size_t block = 0; block < w->num_blocks; block++) {
    __m512i sums[MAX_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < num_rows; i++) sums[i] = _mm512_setzero_si512();
    for (size_t k = 0; k < w->block_size; k += UNROLLED) {
      _mm_prefetch((const char *)fetched, _MM_HINT_T1);
      _mm_prefetch((const char *)(fetched + ahead.step / 2), _MM_HINT_T1);
      fetched += ahead.step;
#pragma GCC unroll 4
      for (int pair = 0; pair < UNROLLED / 2; pair++) {
        const __m256i bytes = _mm256_load_si256((const __m256i *)values);
        const __m512i words = minima ? _mm512_cvtepu8_epi16(bytes) : _mm512_cvtepi8_epi16(bytes);
        values += 2 * TILE;
#pragma GCC unroll 12
        for (int i = 0; i < num_rows; i++) {
          int32_t two;
          memcpy(&two, x + 2 * i, sizeof two);
          sums[i] = _mm512_dpwssd_epi32(sums[i], words, _mm512_set1_epi32(two));
        }
        x += 2 * num_rows;
      }
    }
    const size_t factor = (tile * w->num_blocks + block) * TILE;
    const __m512 scale = load_factors16(w, w->scales, factor);
#pragma GCC unroll 12
    for (int i = 0; i < num_rows; i++) totals[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i]), scale, totals[i]);
    if (minima) {
      const __m512 least = load_factors16(w, w->minima, factor);
#pragma GCC unroll 12
      for (int i = 0; i < num_rows; i++) {
        const __m512 sum = _mm512_set1_ps(rows->sums[(first_row + (size_t)i) * w->num_blocks + block]);
        totals[i] = _mm512_fmadd_ps(sum, least, totals[i]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < num_rows; i++) {
    _mm512_storeu_ps(results[i], _mm512_mul_ps(totals[i], _mm512_set1_ps(rows->scales[first_row + (size_t)i])));
  }
}

MULTIPLY_WORDS(ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12))

const linear_method LINEAR_WORDS_512 = {
    .max_rows = MAX_ROWS, .max_tiles = 1, .neighbours = 2, .cached_bytes = 20 << 10, .quantize = quantize_words,
    .multiply = multiply};

SIMD_END
