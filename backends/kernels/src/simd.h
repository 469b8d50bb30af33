/* Eight floats at a time, on x86-64 with AVX2, FMA and F16C.
 *
 * Nothing here depends on where in memory, or beside what, a value lies: the same operand gives the same bits. Files
 * that include this are compiled with -ffp-contract=off, so that only what is written as a fused operation is one.
 *
 * Such a file includes this last, and ends with SIMD_END: what lies between is compiled for such processors; with
 * SIMD_512 defined for those that have AVX-512 and VNNI as well, with SIMD_AMX for those that have AMX beside these. */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(SIMD_AMX)
#define SIMD_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8"
#elif defined(SIMD_512)
#define SIMD_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#else
#define SIMD_TARGET "avx2,fma,f16c"
#endif
#define SIMD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SIMD_BEGIN(features) \
  SIMD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SIMD_END _Pragma("clang attribute pop")
#else
#define SIMD_BEGIN(features) SIMD_PRAGMA(GCC target(features))
#define SIMD_END
#endif
SIMD_BEGIN(SIMD_TARGET)

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t half; /* IEEE 754 binary16 */

INLINE __m256 load_halves(const half *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }

INLINE void store_halves(half *p, __m256 x) {
  /* Beyond the largest half lies infinity, which times a weight of zero would be NaN. NaN itself becomes the largest: a
   * cell is always a number, whoever gets it next. */
  const __m256 largest = _mm256_set1_ps(65504.0f);
  x = _mm256_max_ps(_mm256_min_ps(x, largest), _mm256_sub_ps(_mm256_setzero_ps(), largest));
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

/* The sum of eight floats, in one order. */
INLINE float sum8(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

INLINE float max8(__m256 x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}

/* The largest of eight floats of no sign, given as bits: these are ordered as the floats are, NaN above all. */
INLINE float largest_magnitude(__m256i x) {
  __m128i s = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(s));
}

/* e^x for x <= 88, to about 1e-7 of it; exactly 1 at 0, exactly 0 below -87. Range reduction by Cody and Waite, then
 * the Taylor polynomial of degree 7 on [-ln 2 / 2, ln 2 / 2]. */
INLINE __m256 exp8(__m256 x) {
  const __m256 tiny = _mm256_set1_ps(-87.0f);
  const __m256 normal = _mm256_cmp_ps(x, tiny, _CMP_GE_OQ);
  x = _mm256_min_ps(_mm256_max_ps(x, tiny), _mm256_set1_ps(88.0f));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.0f / 5040);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  p = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  return _mm256_and_ps(p, normal);
}

/* 2^x for x <= 0, to about 1e-7 of it; exactly 1 at 0, exactly 0 from -127 on. A polynomial on [-1/2, 1/2], fitted for
 * the least relative error. */
INLINE __m256 power_of_two8(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-127.0f)); /* there the exponent's bits are 0 too */
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(1.5353357e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3398876e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(9.618438e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.5503324e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.24022648f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.6931472f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

/* 1 / (1 + e^-x) */
INLINE __m256 sigmoid8(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  return _mm256_div_ps(one, _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

#ifdef __AVX512F__
INLINE __m512 load_halves16(const half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* As exp8, of sixteen: the same bits. */
INLINE __m512 exp16(__m512 x) {
  const __m512 tiny = _mm512_set1_ps(-87.0f);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, tiny, _CMP_GE_OQ);
  x = _mm512_min_ps(_mm512_max_ps(x, tiny), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512i power = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
  return _mm512_maskz_mov_ps(normal, _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power)));
}
#endif
