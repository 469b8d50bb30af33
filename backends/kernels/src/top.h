/* The largest numbers of rows, and their normalisers. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Finds the k largest of each row of rows [num_rows][size], 1 <= k <= size: values and ids [num_rows][k], largest first,
 * equal values by id; and log_sum_exps [num_rows] = log(sum(exp(row / temperature))), temperatures > 0. NaN counts as
 * the least. False if memory runs out. */
bool top_of_rows(const float *rows, size_t num_rows, size_t size, size_t k, const float *temperatures, float *values,
                 int64_t *ids, double *log_sum_exps);

/* --- the largest of all ------------------------------------------------------------------------------------------- */

#define MAXIMUM_SPAN 128 /* neighbouring numbers of a row, the last ones perhaps fewer, that have a maximum together */

static inline size_t count_maxima(size_t size) { return (size + MAXIMUM_SPAN - 1) / MAXIMUM_SPAN; }

/* The largest of x [count], count from 1, or NaN where there is one. */
float largest_or_nan(const float *x, size_t count);

/* The places of the largest logits of some rows: ids [num_rows], of equal ones the first; of the first NaN where there is
 * one. logits [.][size], and maxima [.][count_maxima(size)] by largest_or_nan. */
void greedy_of_rows(const float *logits, const float *maxima, size_t size, const int64_t *rows, size_t num_rows,
                    int64_t *ids);

/* --- what drawing needs of it ------------------------------------------------------------------------------------- */

typedef struct {
  uint32_t key; /* ascends as values descend */
  int32_t id;
} candidate;

/* The bits of a float, as a number that descends as the float ascends. */
uint32_t descending(float x);

/* Sorts by key, keeping the order of equal ones; spare has room for as many. */
void sort_candidates(candidate *x, candidate *spare, size_t count);

/* A number that at least k of the row are not below, and few more; parts_for(k) <= size, and maxima has room for as many. */
float threshold(const float *row, size_t size, size_t k, float *maxima, size_t num_parts);
size_t parts_for(size_t k);
