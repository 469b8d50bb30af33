#include "top.h"

#include <math.h>
#include <stdlib.h>

#include "simd.h"

typedef struct {
  uint32_t key; /* ascends as values descend */
  int32_t id;
} candidate;

/* The bits of a float, as a number that descends as the float ascends. */
static uint32_t descending(float x) {
  uint32_t bits;
  if (x == 0) x = 0; /* -0 is no less than 0 */
  memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

/* Sorts by key, keeping the order of equal ones; spare has room for as many. A radix sort, a byte at a time. */
static void sort(candidate *x, candidate *spare, size_t count) {
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

/* A number that at least k of the row are not below, and few more: the k-th largest of the maxima of at least k parts.
 * Part i is every element whose place, modulo num_parts, is i. */
static float threshold(const float *row, size_t size, size_t k, float *maxima, size_t num_parts) {
  for (size_t i = 0; i < num_parts; i++) maxima[i] = -INFINITY;
  size_t start = 0;
  for (; start + num_parts <= size; start += num_parts) {
    for (size_t i = 0; i < num_parts; i += 8) {
      _mm256_storeu_ps(maxima + i, _mm256_max_ps(_mm256_loadu_ps(maxima + i), load_ordered(row + start + i)));
    }
  }
  for (size_t i = 0; start + i < size; i++) maxima[i] = fmaxf(maxima[i], ordered(row[start + i]));
  return kth_largest(maxima, num_parts, k);
}

static size_t collect(const float *row, size_t size, float least, candidate *found) {
  const __m256 limit = _mm256_set1_ps(least);
  size_t count = 0, i = 0;
  for (; i + 8 <= size; i += 8) {
    const __m256 x = load_ordered(row + i);
    for (int hits = _mm256_movemask_ps(_mm256_cmp_ps(x, limit, _CMP_GE_OQ)); hits; hits &= hits - 1) {
      const size_t at = i + (size_t)__builtin_ctz((unsigned)hits);
      found[count++] = (candidate){descending(ordered(row[at])), (int32_t)at};
    }
  }
  for (; i < size; i++) {
    if (ordered(row[i]) >= least) found[count++] = (candidate){descending(ordered(row[i])), (int32_t)i};
  }
  return count;
}

static double sum_of_exponentials(const float *row, size_t size, float largest, float temperature) {
  const __m256 reference = _mm256_set1_ps(largest), factor = _mm256_set1_ps(1 / temperature);
  double total = 0;
  size_t i = 0;
  while (i + 8 <= size) {
    __m256 sum = _mm256_setzero_ps(); /* of few enough that float32 holds it well */
    for (size_t end = i + 1024; i + 8 <= size && i < end; i += 8) {
      sum = _mm256_add_ps(sum, exp8(_mm256_mul_ps(_mm256_sub_ps(load_ordered(row + i), reference), factor)));
    }
    total += (double)sum8(sum);
  }
  for (; i < size; i++) total += exp((double)((ordered(row[i]) - largest) / temperature));
  return total;
}

bool top_of_row(const float *row, size_t size, size_t k, float temperature, float *values, int64_t *ids,
                double *log_sum_exp) {
  size_t num_parts = 512;
  while (num_parts < 4 * k) num_parts *= 2;
  float *maxima = malloc(num_parts * sizeof *maxima);
  candidate *found = malloc(2 * size * sizeof *found);
  if (maxima && found) {
    const float least = num_parts < size ? threshold(row, size, k, maxima, num_parts) : -INFINITY;
    const size_t count = collect(row, size, least, found);
    sort(found, found + count, count);
    for (size_t i = 0; i < k; i++) {
      ids[i] = found[i].id;
      values[i] = ordered(row[ids[i]]);
    }
    const double sum = sum_of_exponentials(row, size, values[0], temperature);
    *log_sum_exp = (double)values[0] / (double)temperature + log(sum);
  }
  const bool done = maxima && found;
  free(maxima);
  free(found);
  return done;
}
