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
