/* The largest numbers of rows, and their normalisers. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAXIMUM_SPAN 128 /* neighbouring numbers of a row, the last ones perhaps fewer, that have a maximum together */

static inline size_t count_maxima(size_t size) { return (size + MAXIMUM_SPAN - 1) / MAXIMUM_SPAN; }

/* The largest of x [count], count from 1, or NaN where there is one. */
float largest_or_nan(const float *x, size_t count);

/* The place of the first of x [count] that is `value`, or NaN as it is; the last place if none is. */
size_t place_of(const float *x, size_t count, float value);

/* Rows of numbers, and what is known of them. */
typedef struct {
  const float *logits; /* [][size] */
  float *maxima;       /* [][count_maxima(size)]: of each span of a row, by largest_or_nan */
  const bool *is_stale; /* []: whether a row's maxima are still to be found; they are, each time they are asked for */
  size_t size;
  const int64_t *places; /* [count]: the rows that are meant */
  size_t count;
} known_rows;

/* Those of the i-th of the rows that are meant. */
const float *logits_of(const known_rows *rows, size_t i);
const float *maxima_of(const known_rows *rows, size_t i);

/* Finds the k largest of each row, 1 <= k <= size: values and ids [count][k], largest first, equal values by id; and
 * log_sum_exps [count] = log(sum(exp(row / temperature))), temperatures [count] > 0. NaN counts as the least. False if
 * memory runs out. */
bool top_of_rows(const known_rows *rows, size_t k, const float *temperatures, float *values, int64_t *ids,
                 double *log_sum_exps);

/* The places of the largest numbers: ids [count], of equal ones the first; of the first NaN where there is one. */
void greedy_of_rows(const known_rows *rows, int64_t *ids);

/* --- what drawing needs of it ------------------------------------------------------------------------------------- */

typedef struct {
  uint32_t key; /* ascends as values descend */
  int32_t id;
} candidate;

/* The bits of a float, as a number that descends as the float ascends. */
uint32_t descending(float x);

/* Sorts by key, keeping the order of equal ones; spare has room for as many. */
void sort_candidates(candidate *x, candidate *spare, size_t count);

/* A number that at least k of the row are not below, and few more. No maximum is NaN; spare has room for
 * threshold_room(size, k) numbers. */
float threshold(const float *row, const float *maxima, size_t size, size_t k, float *spare);
size_t threshold_room(size_t size, size_t k);
