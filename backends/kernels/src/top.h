/* The largest numbers of a row, and its normaliser. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Finds the k largest of row [size], 1 <= k <= size: values, largest first, and ids, equal values by id; and
 * log_sum_exp = log(sum(exp(row / temperature))), temperature > 0. NaN counts as the least. False if memory runs out. */
bool top_of_row(const float *row, size_t size, size_t k, float temperature, float *values, int64_t *ids,
                double *log_sum_exp);
