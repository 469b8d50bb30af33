/* Cells of int8: a token's key, or value, of a head is its cells times a factor of its own, which is a half.
 *
 * Keys and queries are rotated alike before: products of two stay what they are, but no dimension is so large any more
 * that the factor which it asks for leaves nothing of the others (QuaRot, arXiv 2404.00456).
 *
 * Products are of integers: queries and weights become 16 bits wide, so that they lose nothing beside what cells have
 * lost, and two products and a sum are one instruction. Sums of integers are exact.
 *
 * Keys lie [capacity / ATTENTION_BLOCK][head_size / 2][ATTENTION_BLOCK][2], so that two dimensions of a key are
 * neighbours; values [capacity / 2][head_size][2], so that two positions of a dimension are. Behind either lie its
 * factors, [capacity]. */
#include <math.h>

#include "attention_cells.h"

#define LARGEST_CELL 127.0f
#define LARGEST_INTEGER 32767.0f /* x LARGEST_CELL x 256 fits 32 bits */
#define SMALLEST 1e-30f          /* of what others are divided by, lest an inverse be infinite */

static half *factors_of(const void *cells, size_t head_size, size_t capacity) {
  return (half *)((uint8_t *)cells + capacity * head_size);
}

/* The largest magnitude of a vector; NaN counts as the largest. */
static float magnitude(const float *x, size_t size) {
  const __m256i no_sign = _mm256_set1_epi32(INT32_MAX);
  __m256i largest = _mm256_setzero_si256();
  for (size_t i = 0; i < size; i += 8) {
    largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + i)), no_sign));
  }
  return largest_magnitude(largest);
}

/* Eight floats as integers of at most `limit`; NaN is its negative. */
INLINE __m256i round8(__m256 x, __m256 limit) {
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(x, _mm256_sub_ps(_mm256_setzero_ps(), limit)), limit));
}

/* A vector over its factor, which is returned: finite, and rounded up, so that what is not too large for it fits. */
static half pack(const float *x, size_t size, int8_t *out) {
  const __m128 wanted = _mm_min_ss(_mm_set_ss(magnitude(x, size) / LARGEST_CELL), _mm_set_ss(65504.0f));
  const half factor = (half)_mm_extract_epi16(_mm_cvtps_ph(wanted, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC), 0);
  const __m256 inverse = _mm256_set1_ps(factor ? 1 / _cvtsh_ss(factor) : 0);
  const __m256 limit = _mm256_set1_ps(LARGEST_CELL);
  for (size_t i = 0; i < size; i += 16) {
    const __m256i low = round8(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse), limit);
    const __m256i high = round8(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inverse), limit);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)(out + i), bytes);
  }
  return factor;
}

/* Each of eight floats and its partner, `distance` away, become their sum and their difference. */
INLINE __m256 butterfly(__m256 x, __m256 partners, int distance) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bit = _mm256_set1_epi32(distance);
  const __m256i second = _mm256_cmpeq_epi32(_mm256_and_si256(lanes, bit), bit);
  const __m256 signs = _mm256_and_ps(_mm256_castsi256_ps(second), _mm256_set1_ps(-0.0f));
  return _mm256_add_ps(partners, _mm256_xor_ps(x, signs));
}

/* How many dimensions are rotated together: the largest power of two that divides a head. */
static size_t rotated_together(size_t head_size) { return head_size & -head_size; }

/* Rotates a vector by Hadamard's matrix of ones and minus ones, which makes it sqrt(rotated_together) times longer. */
static void rotate(const float *x, size_t head_size, float *out) {
  for (size_t i = 0; i < head_size; i += 8) {
    __m256 v = _mm256_loadu_ps(x + i);
    v = butterfly(v, _mm256_permute_ps(v, 0xb1), 1);
    v = butterfly(v, _mm256_permute_ps(v, 0x4e), 2);
    v = butterfly(v, _mm256_permute2f128_ps(v, v, 1), 4);
    _mm256_storeu_ps(out + i, v);
  }
  for (size_t distance = 8; distance < rotated_together(head_size); distance *= 2) {
    for (size_t start = 0; start < head_size; start += 2 * distance) {
      for (size_t i = start; i < start + distance; i += 8) {
        const __m256 a = _mm256_loadu_ps(out + i), b = _mm256_loadu_ps(out + i + distance);
        _mm256_storeu_ps(out + i, _mm256_add_ps(a, b));
        _mm256_storeu_ps(out + i + distance, _mm256_sub_ps(a, b));
      }
    }
  }
}

static void store(const attention_shape *shape, size_t position, const float *key, const float *value, void *keys,
                  void *values) {
  const size_t size = shape->head_size;
  int8_t packed[MAX_HEAD_SIZE];
  float rotated[MAX_HEAD_SIZE];
  rotate(key, size, rotated);
  factors_of(keys, size, shape->capacity)[position] = pack(rotated, size, packed);
  int8_t *to = (int8_t *)keys + position / ATTENTION_BLOCK * ATTENTION_BLOCK * size + position % ATTENTION_BLOCK * 2;
  for (size_t i = 0; i < size; i += 2) memcpy(to + i * ATTENTION_BLOCK, packed + i, 2);
  factors_of(values, size, shape->capacity)[position] = pack(value, size, packed);
  to = (int8_t *)values + position / 2 * 2 * size + position % 2;
  for (size_t i = 0; i < size; i++) to[i * 2] = packed[i];
}

/* `size` floats, times `inverse`, as integers. */
INLINE void to_integers(const float *x, size_t size, float inverse, int16_t *out) {
  const __m256 factor = _mm256_set1_ps(inverse), limit = _mm256_set1_ps(LARGEST_INTEGER);
  for (size_t i = 0; i < size; i += 16) {
    const __m256i low = round8(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor), limit);
    const __m256i high = round8(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), factor), limit);
    _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
  }
}

static void begin(attending *a) {
  for (size_t row = 0; row < a->num_rows; row++) {
    /* A NaN is the largest, and makes NaN of the scale and so of all scores. */
    float rotated[MAX_HEAD_SIZE];
    rotate(a->q[row], a->head_size, rotated);
    const float largest = magnitude(rotated, a->head_size);
    to_integers(rotated, a->head_size, LARGEST_INTEGER / fmaxf(largest, SMALLEST), a->integers[row]);
    a->q_scales[row] = largest / LARGEST_INTEGER / (float)rotated_together(a->head_size);
  }
}

/* Two neighbouring integers, eight times. */
INLINE __m256i broadcast_pair(const int16_t *pair) {
  int32_t both;
  memcpy(&both, pair, sizeof both);
  return _mm256_set1_epi32(both);
}

/* sum += a x b, in pairs. Written out because the compiler would multiply for all rows first, and the products would
 * push the sums out of registers. */
INLINE void multiply_add(__m256i *sum, __m256i a, __m256i b) {
  __m256i product;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*sum), "=&x"(product) : "x"(a), "x"(b));
}

/* Adds products of sixteen pairs of cells with a pair of each of num_rows rows, which are `stride` apart. */
INLINE void add_products(const int num_rows, const int16_t *pairs, const int stride, const int8_t *cells,
                         __m256i sums[GROUP][2]) {
  const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)cells));
  const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(cells + 16)));
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    const __m256i both = broadcast_pair(pairs + i * stride);
    multiply_add(&sums[i][0], low, both);
    multiply_add(&sums[i][1], high, both);
  }
}

INLINE void score_block(const int num_rows, attending *a, size_t row, const int8_t *keys, const half *factors,
                        size_t column) {
  __m256i sums[GROUP][2];
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
  for (size_t d = 0; d < a->head_size; d += 2) {
    add_products(num_rows, a->integers[row] + d, MAX_HEAD_SIZE, keys + d * ATTENTION_BLOCK, sums);
  }
  const __m256 low = load_halves(factors), high = load_halves(factors + 8);
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    const __m256 scale = _mm256_set1_ps(a->q_scales[row + (size_t)i]);
    float *scores = &a->weights[row + (size_t)i][column];
    _mm256_storeu_ps(scores, _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][0]), _mm256_mul_ps(low, scale)));
    _mm256_storeu_ps(scores + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][1]), _mm256_mul_ps(high, scale)));
  }
}

INLINE void score_rows(const int num_rows, attending *a, size_t row, const int8_t *keys, size_t start, size_t count) {
  const half *factors = factors_of(keys, a->head_size, a->capacity) + start;
  for (size_t column = 0; column < count; column += ATTENTION_BLOCK) {
    score_block(num_rows, a, row, keys + (start + column) * a->head_size, factors + column, column);
  }
}

/* Turns a row's weights into integers, its values' factors included; returns what they are to be multiplied by. */
static float pack_weights(float *weights, const half *factors, size_t count, int16_t *out) {
  for (size_t i = 0; i < count; i += 8) {
    _mm256_storeu_ps(weights + i, _mm256_mul_ps(_mm256_loadu_ps(weights + i), load_halves(factors + i)));
  }
  const float largest = fmaxf(magnitude(weights, count), SMALLEST);
  to_integers(weights, count, LARGEST_INTEGER / largest, out);
  return largest / LARGEST_INTEGER;
}

/* Sixteen columns. */
INLINE void add_columns(const int num_rows, attending *a, size_t row, int16_t weights[GROUP][SPAN], const float *scales,
                        const int8_t *values, size_t count, size_t column) {
  __m256i sums[GROUP][2];
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
  for (size_t key = 0; key < count; key += 2) {
    add_products(num_rows, weights[0] + key, SPAN, values + key * a->head_size + column * 2, sums);
  }
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    const __m256 scale = _mm256_set1_ps(scales[i]);
    float *totals = &a->totals[row + (size_t)i][column];
    _mm256_storeu_ps(totals, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][0]), scale, _mm256_loadu_ps(totals)));
    _mm256_storeu_ps(totals + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i][1]), scale, _mm256_loadu_ps(totals + 8)));
  }
}

INLINE void add_rows(const int num_rows, attending *a, size_t row, const int8_t *values, size_t start, size_t count) {
  const half *factors = factors_of(values, a->head_size, a->capacity) + start;
  int16_t integers[GROUP][SPAN];
  float scales[GROUP];
#pragma GCC unroll 6
  for (int i = 0; i < num_rows; i++) {
    scales[i] = pack_weights(a->weights[row + (size_t)i], factors, count, integers[i]);
  }
  for (size_t column = 0; column < a->head_size; column += 16) {
    add_columns(num_rows, a, row, integers, scales, values + start * a->head_size, count, column);
  }
}

GROUP_FUNCTION(score, keys)
GROUP_FUNCTION(add, values)

const attention_cells_functions attention_bytes = {GROUP, store, begin, score, attention_weigh, add};

SIMD_END
