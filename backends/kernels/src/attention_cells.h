/* What attention.c and the types of cells share: the state of a run, and what each type does with it. */
#pragma once

#include "attention.h"
#include "simd.h"

#define MAX_ROWS 12 /* queries of a run: tokens x the heads that share a key head; a multiple of GROUP and of 4 */
#define GROUP 6     /* rows computed together, with AVX2: twelve sums, two cells and an operand are 15 registers */
#define SPAN 64     /* keys between two corrections of the sums: four blocks */
#define MAX_HEAD_SIZE 256

/* The queries of a run, and what has been summed up for each. */
typedef struct {
  size_t num_rows, head_size, capacity;
  const float *q[MAX_ROWS];
  size_t first_key[MAX_ROWS], last_key[MAX_ROWS]; /* that it sees, both included */
  float largest[MAX_ROWS];                        /* score so far */
  float weights[MAX_ROWS][SPAN];                  /* scores, then their exponentials */
  __m256 sums[MAX_ROWS];                          /* of exponentials, in eight parts */
  float totals[MAX_ROWS][MAX_HEAD_SIZE];          /* of values, weighted */
  int16_t integers[MAX_ROWS][MAX_HEAD_SIZE];      /* queries, of bytes alone: … */
  float q_scales[MAX_ROWS];                       /* … over these */
} attending;

/* A group is rows row .. row + num_rows, at most `group`; keys and values are those of a head in a slot, from position 0
 * on. */
typedef struct {
  size_t group;
  /* Writes a token's key and value [head_size], as finite numbers whatever they are. */
  void (*store)(const attention_shape *shape, size_t position, const float *key, const float *value, void *keys,
                void *values);
  /* Before the first span: looks at all queries. */
  void (*begin)(attending *a);
  /* Writes the scores of a group with keys start .. start + count to its weights; count is a multiple of
   * ATTENTION_BLOCK. */
  void (*score)(attending *a, size_t row, size_t num_rows, const void *keys, size_t start, size_t count);
  /* Turns a row's scores of these keys into exponentials, against the largest score so far. */
  void (*weigh)(attending *a, size_t row, size_t start, size_t count);
  /* Adds the values of these keys to a group's totals, by its weights, which are lost. A weight of zero adds exactly
   * nothing. */
  void (*add)(attending *a, size_t row, size_t num_rows, const void *values, size_t start, size_t count);
} attention_cells_functions;

extern const attention_cells_functions attention_halves, attention_halves_512, attention_bytes;

/* What they have in common. */
void attention_weigh(attending *a, size_t row, size_t start, size_t count);
void attention_store_halves(const attention_shape *shape, size_t position, const float *key, const float *value,
                            void *keys, void *values);
void attention_begin_halves(attending *a);

/* Makes a function of a group, `name`, of the inlined name_rows, whose number of rows must be a constant. */
#define GROUP_FUNCTION(name, operand)                                                                                \
  static void name(attending *a, size_t row, size_t num_rows, const void *operand, size_t start, size_t count) {    \
    switch (num_rows) {                                                                                              \
      case 1: name##_rows(1, a, row, operand, start, count); break;                                                  \
      case 2: name##_rows(2, a, row, operand, start, count); break;                                                  \
      case 3: name##_rows(3, a, row, operand, start, count); break;                                                  \
      case 4: name##_rows(4, a, row, operand, start, count); break;                                                  \
      case 5: name##_rows(5, a, row, operand, start, count); break;                                                  \
      default: name##_rows(GROUP, a, row, operand, start, count); break;                                             \
    }                                                                                                                \
  }
