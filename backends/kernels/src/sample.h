/* Draws tokens from rows of logits. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "top.h"

/* What one draw is told; api.DrawOptions says what each means. 1e-9 <= temperature, 1 <= top_k. */
typedef struct {
  double temperature, top_p, min_p, number;
  int64_t top_k;
} draw_options;

/* Draws from each of the rows; ids [count] gets the drawn. Where a row has a NaN, its place; where its largest number is
 * infinite, the place of that. False if memory runs out. */
__attribute__((visibility("default"))) bool headrace_draw(const known_rows *rows, const draw_options *options,
                                                          int64_t *ids);
