/* Products of rows of floats with a quantised matrix.
 *
 * Weights are integers of 8 or 4 bits in blocks along the inputs, each block with a scale and, perhaps, a minimum:
 * weight = scale x integer + minimum. Activations become integers too. A product of integers is exact, so a row's result
 * has the same bits whatever rows are computed beside it, and however work is divided.
 *
 * Beside weights of 8 bits, activations have 16, with one scale for a row, which loses nothing that shows. It costs
 * little: without VNNI, multiplying bytes takes two multiplications (one in pairs, one that widens the sums),
 * multiplying 16-bit integers one for half as many; AMX takes their two bytes one after the other. Beside weights of 4
 * bits they have 8, with a scale for each block: then sums of pairs still fit 16 bits, and one multiplication does twice
 * as many.
 *
 * How it is computed is the processor's affair (linear_method); all of them add the same floats in the same order, and
 * so give the same bits. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TILE 16       /* outputs that are computed together */
#define BYTE_BLOCK 32 /* weights of 4 bits in a block */

typedef struct {
  size_t outputs, inputs; /* inputs: padded to whole blocks */
  size_t block_size;      /* inputs; a multiple of 8, at most 256; with 4 bits BYTE_BLOCK */
  size_t num_blocks;
  size_t num_tiles;
  int bits; /* 8 or 4 */
  bool has_minima;
  bool half_scales;
  const struct linear_method *method;
  /* For each tile, some neighbouring inputs after others, each with its 16 outputs: int8 [inputs / n][TILE][n], n being
   * the method's. With 4 bits unsigned and eight inputs in four bytes, the first four in the lower halves:
   * [inputs / 8][TILE][4]. */
  uint8_t *values;
  /* [num_tiles][num_blocks][TILE], of float, or of halves where they hold every one exactly. */
  void *scales, *minima;
} linear_weights;

typedef enum { GATE_NONE, GATE_SILU, GATE_GELU_TANH } linear_gate;

/* Rows of activations, quantised. They are computed in groups of nearly equal size; within a group lie some neighbouring
 * inputs of each row, then the next ones, and so on. */
typedef struct {
  size_t count;
  void *values;  /* count x inputs, of 16 bits, or 8 with weights of 4 bits; begins at a multiple of 64 */
  float *scales; /* [count], or [count][num_blocks] with weights of 4 bits */
  float *sums;   /* [count][num_blocks]: of each block's values; times their scales, with weights of 4 bits */
} linear_rows;

/* Packs a matrix [outputs, width] whose integers lie as com.microsoft.MatMulNBits has them: values
 * [outputs, num_blocks, block_size x bits / 8], the zero being 2^(bits - 1); scales and, if not NULL, minima
 * [outputs, num_blocks]. With minima the integers count from 0. Returns false if memory runs out. */
bool linear_pack(linear_weights *weights, const uint8_t *values, const float *scales, const float *minima, size_t outputs,
                 size_t num_blocks, size_t block_size, int bits);
void linear_release(linear_weights *weights);

/* Quantises rows first .. last of x [count, width], after an RMS norm if `norm` [width] is not NULL. */
void linear_quantize(const linear_weights *weights, const float *x, size_t width, const float *norm, float epsilon,
                     linear_rows *rows, size_t first, size_t last);

/* How many pieces the outputs divide into: tiles, or pairs of them. With a gate the first half of the outputs are
 * gates, the second what they gate. */
size_t linear_num_pieces(const linear_weights *weights, linear_gate gate);

/* Computes pieces first .. last of out [count, outputs], or [count, outputs / 2] with a gate, adding residual (shaped as
 * out) and, without a gate, bias [outputs] where not NULL. */
void linear_multiply(const linear_weights *weights, const linear_rows *rows, linear_gate gate, const float *bias,
                     const float *residual, float *out, size_t first, size_t last);
