/* Causal attention of packed tokens over a cache in memory.
 *
 * A token names its slot and its position; which tokens come together in one call makes no difference to the bits of
 * any: each query takes its keys in the same blocks, one after another, in the order of their positions, and a token's
 * keys and values are read back from the cache by all, itself included. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* How keys and values are kept: attention_halves.c and attention_bytes.c say where each lies. */
typedef enum {
  ATTENTION_HALVES, /* float16 */
  ATTENTION_BYTES,  /* int8, with a factor in float16 for each key and each value of a head */
} attention_cells;

/* Positions whose keys lie together. */
#define ATTENTION_BLOCK 16

typedef struct {
  size_t num_heads, num_kv_heads, head_size; /* head_size: a multiple of 16, at most 256 */
  attention_cells cells;
  size_t num_slots, capacity;                /* capacity: tokens of a slot, a multiple of ATTENTION_BLOCK */
  size_t head_bytes;                         /* of a head's keys, or values, in a slot: room for `capacity` of them */
  float scale;                               /* of scores */
  size_t window;                             /* how many positions back a query sees, itself included; 0 for all */
} attention_shape;

/* One layer's cache: keys [num_slots][num_kv_heads][head_bytes], then values the same. */
typedef uint8_t *attention_cache;

/* One layer's tokens. */
typedef struct {
  const float *qkv;                 /* [num_tokens][(num_heads + 2 num_kv_heads) x head_size] */
  const int32_t *slots, *positions; /* [num_tokens]; those of a slot follow one another, positions ascending by 1 */
  size_t num_tokens;
  const float *cosines, *sines;   /* [>= positions][head_size / 2]; NULL for none */
  const float *q_norm, *k_norm;   /* [head_size], or NULL */
  float epsilon;                  /* of the norms */
} attention_tokens;

/* Turns tokens first .. last: writes their queries, scaled, to q [num_tokens][num_heads x head_size], their keys and
 * values to the cache. */
void attention_prepare(const attention_shape *shape, const attention_tokens *tokens, attention_cache cache, float *q,
                       size_t first, size_t last);

/* Neighbouring tokens of one slot, computed together. */
typedef struct {
  size_t first, count;
} attention_run;

/* How many tokens a run may have. */
size_t attention_run_length(const attention_shape *shape);

/* Attends with one run's queries of one key head; writes to out [num_tokens][num_heads x head_size]. All tokens must be
 * prepared. */
void attention_attend(const attention_shape *shape, const attention_tokens *tokens, attention_cache cache,
                      const float *q, attention_run run, size_t kv_head, float *out);
