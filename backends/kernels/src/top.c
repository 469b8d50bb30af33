#include "top.h"

#include <math.h>
#include <stdlib.h>

#include "simd.h"

uint32_t descending(float x) {
  uint32_t bits;
  if (x == 0) x = 0; /* -0 is no less than 0 */
  memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

/* A radix sort, a byte at a time. */
void sort_candidates(candidate *x, candidate *spare, size_t count) {
  for (int shift = 0; shift < 32; shift += 8) {
    size_t starts[257] = {0};
    for (size_t i = 0; i < count; i++) starts[(x[i].key >> shift & 255) + 1]++;
    for (size_t i = 0; i < 256; i++) starts[i + 1] += starts[i];
    for (size_t i = 0; i < count; i++) spare[starts[x[i].key >> shift & 255]++] = x[i];
    candidate *swapped = x;
    x = spare;
    spare = swapped;
  }
}

/* The k-th largest of x [count], k from 1; reorders x. Quickselect (Hoare, CACM 4:7). */
static float kth_largest(float *x, size_t count, size_t k) {
  size_t low = 0, high = count - 1;
  while (low < high) {
    const float pivot = x[low + (high - low) / 2];
    size_t i = low, j = high;
    for (;; i++, j--) {
      while (x[i] > pivot) i++;
      while (x[j] < pivot) j--;
      if (i >= j) break;
      const float swapped = x[i];
      x[i] = x[j];
      x[j] = swapped;
    }
    if (k - 1 <= j) {
      high = j;
    } else {
      low = j + 1;
    }
  }
  return x[low];
}

/* NaN would be neither above nor below anything. */
INLINE __m256 load_ordered(const float *p) {
  const __m256 x = _mm256_loadu_ps(p);
  return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
}

static float ordered(float x) { return isnan(x) ? -INFINITY : x; }

/* Parts of a row whose maxima tell its k-th largest well enough. */
static size_t parts_for(size_t k) {
  size_t num_parts = 512;
  while (num_parts < 4 * k) num_parts *= 2;
  return num_parts;
}

static bool spans_do(size_t size, size_t k) { return 2 * k <= count_maxima(size); }

size_t threshold_room(size_t size, size_t k) { return spans_do(size, k) ? count_maxima(size) : parts_for(k); }

/* The k-th largest of the maxima, of spans if there are enough. Or else of parts: i is every element whose place, modulo
 * their number, is i. */
float threshold(const float *row, const float *maxima, size_t size, size_t k, float *spare) {
  const size_t room = threshold_room(size, k);
  if (spans_do(size, k)) {
    memcpy(spare, maxima, room * sizeof *spare);
    return kth_largest(spare, room, k);
  }
  for (size_t i = 0; i < room; i++) spare[i] = -INFINITY;
  size_t start = 0;
  for (; start + room <= size; start += room) {
    for (size_t i = 0; i < room; i += 8) {
      _mm256_storeu_ps(spare + i, _mm256_max_ps(_mm256_loadu_ps(spare + i), _mm256_loadu_ps(row + start + i)));
    }
  }
  for (size_t i = 0; start + i < size; i++) spare[i] = fmaxf(spare[i], row[start + i]);
  return kth_largest(spare, room, k);
}

typedef struct {
  candidate *found; /* room for the whole row */
  size_t count;
  double sum;
} second_pass;

/* Collects what is at least `least`, and sums exp((x - largest) / temperature) over everything. The row at `next` is
 * fetched meanwhile. */
static void collect_and_sum(const float *row, size_t size, float least, float largest, float temperature,
                            const float *next, second_pass *out) {
  const __m256 limit = _mm256_set1_ps(least);
  const __m256 reference = _mm256_set1_ps(largest), factor = _mm256_set1_ps((float)M_LOG2E / temperature);
  size_t count = 0, i = 0;
  double total = 0;
  while (i + 8 <= size) {
    __m256 sum = _mm256_setzero_ps(); /* of 128 a lane: what they round off is below 1e-5 of it */
    for (size_t end = i + 1024; i + 8 <= size && i < end; i += 8) {
      if (next) _mm_prefetch((const char *)(next + i), _MM_HINT_T1);
      const __m256 x = load_ordered(row + i);
      for (int hits = _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ)); hits; hits &= hits - 1) {
        const size_t at = i + (size_t)__builtin_ctz((unsigned)hits);
        out->found[count++] = (candidate){descending(ordered(row[at])), (int32_t)at};
      }
      sum = _mm256_add_ps(sum, power_of_two8(_mm256_mul_ps(_mm256_sub_ps(x, reference), factor)));
    }
    total += (double)sum8(sum);
  }
  for (; i < size; i++) {
    const float x = ordered(row[i]);
    if (x >= least) out->found[count++] = (candidate){descending(x), (int32_t)i};
    total += exp((double)((x - largest) / temperature));
  }
  out->count = count;
  out->sum = total;
}

static float largest_of(const float *x, size_t count) {
  float largest = -INFINITY;
  for (size_t i = 0; i < count; i++) largest = fmaxf(largest, ordered(x[i]));
  return largest;
}

/* `next` is a row that comes next, if there is one; `spare` and `found` are what threshold and sorting need. */
static void top_of_row(const float *row, const float *maxima, size_t size, size_t k, float temperature,
                       const float *next, float *spare, candidate *found, float *values, int64_t *ids,
                       double *log_sum_exp) {
  float largest = largest_or_nan(maxima, count_maxima(size)), least = -INFINITY;
  if (isnan(largest)) {
    largest = largest_of(row, size); /* and all are candidates */
  } else if (threshold_room(size, k) < size) {
    least = threshold(row, maxima, size, k, spare);
  }
  second_pass pass = {.found = found};
  collect_and_sum(row, size, least, largest, temperature, next, &pass);
  sort_candidates(found, found + pass.count, pass.count);
  for (size_t i = 0; i < k; i++) {
    ids[i] = found[i].id;
    values[i] = ordered(row[ids[i]]);
  }
  *log_sum_exp = (double)largest / (double)temperature + log(pass.sum);
}

bool top_of_rows(const known_rows *rows, size_t k, const float *temperatures, float *values, int64_t *ids,
                 double *log_sum_exps) {
  float *spare = malloc(threshold_room(rows->size, k) * sizeof *spare);
  candidate *found = malloc(2 * rows->size * sizeof *found);
  const bool enough = spare && found;
  for (size_t i = 0; enough && i < rows->count; i++) {
    const float *next = i + 1 < rows->count ? logits_of(rows, i + 1) : NULL;
    top_of_row(logits_of(rows, i), maxima_of(rows, i), rows->size, k, temperatures[i], next, spare, found,
               values + i * k, ids + i * k, log_sum_exps + i);
  }
  free(spare);
  free(found);
  return enough;
}

float largest_or_nan(const float *x, size_t count) {
  __m256 largest[4], nans = _mm256_setzero_ps();
  for (size_t j = 0; j < 4; j++) largest[j] = _mm256_set1_ps(-INFINITY);
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __m256 values[4];
    for (size_t j = 0; j < 4; j++) {
      values[j] = _mm256_loadu_ps(x + i + 8 * j);
      largest[j] = _mm256_max_ps(values[j], largest[j]);
    }
    nans = _mm256_or_ps(nans, _mm256_cmp_ps(values[0], values[1], _CMP_UNORD_Q));
    nans = _mm256_or_ps(nans, _mm256_cmp_ps(values[2], values[3], _CMP_UNORD_Q));
  }
  bool has_nan = _mm256_movemask_ps(nans);
  float result = max8(_mm256_max_ps(_mm256_max_ps(largest[0], largest[1]), _mm256_max_ps(largest[2], largest[3])));
  for (; i < count; i++) {
    has_nan |= isnan(x[i]);
    result = x[i] > result ? x[i] : result;
  }
  return has_nan ? NAN : result;
}

const float *logits_of(const known_rows *rows, size_t i) { return rows->logits + (size_t)rows->places[i] * rows->size; }

const float *maxima_of(const known_rows *rows, size_t i) {
  float *maxima = rows->maxima + (size_t)rows->places[i] * count_maxima(rows->size);
  if (rows->is_stale[rows->places[i]]) {
    const float *row = logits_of(rows, i);
    for (size_t start = 0; start < rows->size; start += MAXIMUM_SPAN) {
      const size_t left = rows->size - start;
      maxima[start / MAXIMUM_SPAN] = largest_or_nan(row + start, left < MAXIMUM_SPAN ? left : MAXIMUM_SPAN);
    }
  }
  return maxima;
}

size_t place_of(const float *x, size_t count, float value) {
  size_t i = 0;
  while (i + 1 < count && !(isnan(value) ? isnan(x[i]) : x[i] == value)) i++;
  return i;
}

void greedy_of_rows(const known_rows *rows, int64_t *ids) {
  for (size_t i = 0; i < rows->count; i++) {
    const float *maxima = maxima_of(rows, i);
    const size_t num_maxima = count_maxima(rows->size);
    const float largest = largest_or_nan(maxima, num_maxima);
    const size_t first = place_of(maxima, num_maxima, largest) * MAXIMUM_SPAN;
    ids[i] = (int64_t)(first + place_of(logits_of(rows, i) + first, rows->size - first, largest));
  }
}

SIMD_END
