#include "sample.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "simd.h"

#define BLOCK 512        /* weights that are summed before any is looked at */
#define PADDING 16       /* behind every array here: eight numbers are computed at a time, or sixteen */
#define FAR 88.03        /* over 127 ln 2: what is so many temperatures below the largest weighs nothing */
#define FEW 256          /* values that are sorted */
#define MOST_HALVINGS 24 /* before they are sorted, however many they are: equal ones stay together */
#define MOST_PARTS 4096  /* of which a k-th largest is looked for; for more, halving is quicker */

/* Numbers of a row in the order of their places, and the weight of each: exp((value - largest) / temperature). */
typedef struct {
  size_t count;
  float *values, *weights;
  double *sums; /* of blocks */
  int32_t *places;
  candidate *few;            /* room for twice as many as the row has */
  uint64_t packings[1 << 8]; /* for any choice of eight numbers, a byte for each: the places of the chosen */
} pool;

/* Eight numbers, of which there may be fewer. */
INLINE __m256 load_part(const float *p, size_t left) {
  if (left >= 8) return _mm256_loadu_ps(p);
  float part[8] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY};
  memcpy(part, p, left * sizeof *p);
  return _mm256_loadu_ps(part);
}

static size_t block_size(size_t start, size_t count) { return count - start < BLOCK ? count - start : BLOCK; }

INLINE double sum4(__m256d x) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

/* The sum of weights, in doubles. Behind them are zeros. */
static double sum(const float *weights, size_t count) {
  __m256d sums[4];
  for (size_t j = 0; j < 4; j++) sums[j] = _mm256_setzero_pd();
  for (size_t i = 0; i < count; i += 16) {
    for (size_t j = 0; j < 4; j++) {
      sums[j] = _mm256_add_pd(sums[j], _mm256_cvtps_pd(_mm_loadu_ps(weights + i + 4 * j)));
    }
  }
  return sum4(_mm256_add_pd(_mm256_add_pd(sums[0], sums[1]), _mm256_add_pd(sums[2], sums[3])));
}

/* How numbers of a row become weights. */
typedef struct {
  float largest; /* of the row */
  double temperature, min_weight; /* what weighs less gets 0 */
} scale;

/* Weighs values; behind them come zeros. */
static void weigh(const float *values, size_t count, const scale *s, float *weights) {
  const __m256 largest = _mm256_set1_ps(s->largest), factor = _mm256_set1_ps((float)(M_LOG2E / s->temperature));
  const __m256 least = _mm256_set1_ps((float)s->min_weight);
  for (size_t i = 0; i < count; i += 8) {
    const __m256 x = _mm256_sub_ps(load_part(values + i, count - i), largest);
    const __m256 weight = power_of_two8(_mm256_mul_ps(x, factor));
    _mm256_storeu_ps(weights + i, _mm256_and_ps(weight, _mm256_cmp_ps(weight, least, _CMP_GE_OQ)));
  }
  memset(weights + count, 0, PADDING * sizeof *weights);
}

/* The sums of the weights of each block of values; gives the sum of these. What is at `next` is fetched meanwhile. */
static double sum_blocks(const float *values, size_t count, const scale *s, const float *next, double *sums) {
  float weights[BLOCK + PADDING];
  double total = 0;
  for (size_t start = 0; start < count; start += BLOCK) {
    const size_t size = block_size(start, count);
    for (size_t i = 0; next && i < size; i += 16) _mm_prefetch((const char *)(next + start + i), _MM_HINT_T1);
    weigh(values + start, size, s, weights);
    total += sums[start / BLOCK] = sum(weights, size);
  }
  return total;
}

/* Where the running sum of the weights of values first exceeds `target`, which is less than the sum of `sums`. */
static size_t pick(const float *values, size_t count, const scale *s, const double *sums, double target) {
  double before = 0;
  size_t start = 0;
  for (; start + BLOCK < count && before + sums[start / BLOCK] <= target; start += BLOCK) before += sums[start / BLOCK];
  float weights[BLOCK + PADDING];
  const size_t size = block_size(start, count);
  weigh(values + start, size, s, weights);
  size_t picked = 0; /* the last one with a weight, where rounding keeps the sum from exceeding the target */
  for (size_t i = 0; i < size && before <= target; i++) {
    if (weights[i] > 0) picked = i;
    before += (double)weights[i];
  }
  return start + picked;
}

/* Takes what is not below `least` into the pool. A span whose maximum is need not be looked at. */
static void collect(const float *row, const float *maxima, size_t size, float least, pool *p) {
  const __m256 limit = _mm256_set1_ps(least);
  size_t count = 0;
  for (size_t i = 0; i < size; i += 8) {
    if (i % MAXIMUM_SPAN == 0 && maxima[i / MAXIMUM_SPAN] < least) {
      i += MAXIMUM_SPAN - 8;
      continue;
    }
    const __m256 x = load_part(row + i, size - i);
    const unsigned hits = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ));
    const __m256i packing = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)p->packings[hits]));
    _mm256_storeu_ps(p->values + count, _mm256_permutevar8x32_ps(x, packing));
    _mm256_storeu_si256((__m256i *)(p->places + count), _mm256_add_epi32(packing, _mm256_set1_epi32((int)i)));
    count += (size_t)__builtin_popcount(hits);
  }
  p->count = count;
}

/* The sum of the weights of the values that are not below `least`, and their count. */
static double sum_from(const pool *p, float least, size_t *count) {
  const __m256 limit = _mm256_set1_ps(least);
  __m256d low = _mm256_setzero_pd(), high = low;
  size_t found = 0;
  for (size_t i = 0; i < p->count; i += 8) {
    const __m256 hits = _mm256_cmp_ps(load_part(p->values + i, p->count - i), limit, _CMP_GE_OQ);
    const __m256 weights = _mm256_and_ps(_mm256_loadu_ps(p->weights + i), hits);
    low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(weights)));
    high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(weights, 1)));
    found += (size_t)__builtin_popcount((unsigned)_mm256_movemask_ps(hits));
  }
  *count = found;
  return sum4(_mm256_add_pd(low, high));
}

/* What is kept, of the order largest first and equal ones by place: what is above `value`; and of what equals it,
 * what has an index below `index`. */
typedef struct {
  float value;
  int32_t index;
} cut;

/* Cuts after `most` candidates, or after those whose weights reach `mass`, but never before the first. Gives the sum
 * of the weights before the cut. The values are from `least` to `largest`. */
static double find_cut(pool *p, size_t most, double mass, float least, float largest, cut *out) {
  /* The cut is among the values from `low` to below `high`, or right below them. */
  float low = -INFINITY, high = INFINITY;
  size_t count = 0, count_from_low = p->count;
  double sum_of_kept = 0;
  for (int halvings = 0; count_from_low - count > FEW && halvings < MOST_HALVINGS; halvings++) {
    const float middle = 0.5f * fmaxf(low, least) + 0.5f * fminf(high, largest);
    if (middle <= low || middle >= high) break;
    size_t count_from_middle;
    const double sum_from_middle = sum_from(p, middle, &count_from_middle);
    if (count_from_middle > most || sum_from_middle >= mass) {
      low = middle;
      count_from_low = count_from_middle;
    } else {
      high = middle;
      count = count_from_middle;
      sum_of_kept = sum_from_middle;
    }
  }
  size_t num_few = 0;
  for (size_t i = 0; i < p->count; i += 8) {
    const __m256 x = load_part(p->values + i, p->count - i);
    const __m256 above_low = _mm256_cmp_ps(x, _mm256_set1_ps(low), _CMP_GE_OQ);
    const __m256 below_high = _mm256_cmp_ps(x, _mm256_set1_ps(high), _CMP_LT_OQ);
    unsigned hits = (unsigned)_mm256_movemask_ps(_mm256_and_ps(above_low, below_high));
    for (; hits; hits &= hits - 1) {
      const size_t at = i + (size_t)__builtin_ctz(hits);
      if (at < p->count) p->few[num_few++] = (candidate){descending(p->values[at]), (int32_t)at};
    }
  }
  sort_candidates(p->few, p->few + num_few, num_few);
  for (size_t i = 0; i < num_few; i++) {
    const int32_t index = p->few[i].id;
    if (count && (count >= most || sum_of_kept >= mass)) {
      *out = (cut){p->values[index], index};
      return sum_of_kept;
    }
    count++;
    sum_of_kept += (double)p->weights[index];
  }
  *out = (cut){low, INT32_MAX};
  return sum_of_kept;
}

/* Leaves the values before the cut; the others become -infinity. */
static void drop(pool *p, cut end) {
  const __m256 value = _mm256_set1_ps(end.value), nothing = _mm256_set1_ps(-INFINITY);
  const __m256i index = _mm256_set1_epi32(end.index), steps = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (size_t i = 0; i < p->count; i += 8) {
    const __m256 x = _mm256_loadu_ps(p->values + i);
    const __m256i before = _mm256_cmpgt_epi32(index, _mm256_add_epi32(steps, _mm256_set1_epi32((int)i)));
    const __m256 equal = _mm256_and_ps(_mm256_cmp_ps(x, value, _CMP_EQ_OQ), _mm256_castsi256_ps(before));
    const __m256 kept = _mm256_or_ps(_mm256_cmp_ps(x, value, _CMP_GT_OQ), equal);
    _mm256_storeu_ps(p->values + i, _mm256_blendv_ps(nothing, x, kept));
  }
}

/* A number that nothing which top_p keeps is below: all that is below has less than 1 - top_p of `total`. */
static double least_of_top_p(const draw_options *o, size_t size, float largest, double total) {
  const double distance = -log((1 - o->top_p) * total / (double)size);
  return (double)largest - o->temperature * (distance + 1e-3 * (1 + distance)); /* weights are rounded */
}

static int64_t draw_from_row(const float *row, const float *maxima, size_t size, const draw_options *o,
                             const float *next, pool *p) {
  scale s = {.largest = largest_or_nan(maxima, count_maxima(size)), .temperature = o->temperature};
  if (!isfinite(s.largest)) return (int64_t)place_of(row, size, s.largest);
  const size_t top_k = (uint64_t)o->top_k < size ? (size_t)o->top_k : size;
  double bound = (double)s.largest - FAR * o->temperature, mass = INFINITY;
  if (top_k == size) {
    if (o->top_p >= 1) s.min_weight = o->min_p;
    mass = sum_blocks(row, size, &s, next, p->sums);
    if (o->top_p >= 1) return (int64_t)pick(row, size, &s, p->sums, o->number * mass);
    bound = fmax(bound, least_of_top_p(o, size, s.largest, mass));
  } else if (threshold_room(size, top_k) <= MOST_PARTS && threshold_room(size, top_k) < size) {
    bound = fmax(bound, (double)threshold(row, maxima, size, top_k, p->weights));
  }
  const float least = (float)fmax(bound, -FLT_MAX);
  collect(row, maxima, size, least, p);
  weigh(p->values, p->count, &s, p->weights);
  cut end = {-INFINITY, INT32_MAX};
  if (top_k < size) mass = find_cut(p, top_k, INFINITY, least, s.largest, &end);
  if (o->top_p < 1) find_cut(p, top_k, o->top_p * mass, least, s.largest, &end);
  drop(p, end);
  s.min_weight = o->min_p;
  const double total = sum_blocks(p->values, p->count, &s, NULL, p->sums);
  return p->places[pick(p->values, p->count, &s, p->sums, o->number * total)];
}

static void fill_packings(uint64_t *packings) {
  for (unsigned hits = 0; hits < 1 << 8; hits++) {
    uint64_t packing = 0;
    int count = 0;
    for (uint64_t i = 0; i < 8; i++) {
      if (hits >> i & 1) packing |= i << 8 * count++;
    }
    packings[hits] = packing;
  }
}

bool headrace_draw(const known_rows *rows, const draw_options *options, int64_t *ids) {
  const size_t size = rows->size;
  pool p;
  p.values = malloc((size + PADDING) * sizeof *p.values);
  p.weights = malloc((size + PADDING) * sizeof *p.weights);
  p.places = malloc((size + PADDING) * sizeof *p.places);
  p.few = malloc(2 * size * sizeof *p.few);
  p.sums = malloc((size / BLOCK + 1) * sizeof *p.sums);
  const bool enough = p.values && p.weights && p.places && p.few && p.sums;
  fill_packings(p.packings);
  for (size_t i = 0; enough && i < rows->count; i++) {
    const float *next = i + 1 < rows->count ? logits_of(rows, i + 1) : NULL;
    ids[i] = draw_from_row(logits_of(rows, i), maxima_of(rows, i), size, options + i, next, &p);
  }
  free(p.values);
  free(p.weights);
  free(p.places);
  free(p.few);
  free(p.sums);
  return enough;
}

SIMD_END
