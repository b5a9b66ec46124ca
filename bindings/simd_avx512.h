// AVX-512 (F, BW, DQ, VL): sixteen float lanes, thirty-two registers, masks for the tails. With
// VSTAR_BFLOAT16_PAIRS also AVX512_BF16's product of pairs of bfloat16.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace vstar::VSTAR_ISA {

constexpr int kLanes = 16;
constexpr int kLogitsKeys = 8;   // 8 keys x 2 vectors of queries: 16 accumulators
constexpr int kProductRows = 8;  // 8 rows x 3 vectors of head_dim: 24 accumulators
constexpr int kProductVectors = 3;

struct Vec {
  __m512 v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// Returns the larger; b where either is NaN, as the instruction does.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
// Returns x in the lanes where a == b, y in the others.
inline Vec select_equal(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v)};
}
// Returns x in the lanes where a < b, y in the others.
inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_partial(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store_partial(float* p, Vec x, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), x.v);
}

// Rows that are needed next are fetched into the first cache, or only the second: on Intel's
// processors, which these kernels without pairs are for, that makes room for more requests.
#if defined(VSTAR_BFLOAT16_PAIRS)
constexpr int kFetchLocality = 3;
#else
constexpr int kFetchLocality = 2;
#endif

// A vector is a whole line, which then is not read before it is written. It has to be aligned.
constexpr bool kStoresPastCaches = true;
inline void store_past_caches(float* p, Vec x) { _mm512_stream_ps(p, x.v); }
// Puts all stores past the caches before any later store.
inline void finish_stores() { _mm_sfence(); }

inline Vec widen(const bfloat16*, __m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Vec widen(const float16*, __m256i bits) { return {_mm512_cvtph_ps(bits)}; }

// Rounds to nearest even; a NaN stays a (quiet) NaN.
#if defined(VSTAR_BFLOAT16_PAIRS)
// The instruction makes zero of what is below 2^-126.
inline __m256i narrow(const bfloat16*, Vec x) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
}
#else
inline __m256i narrow(const bfloat16*, Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
}
#endif
inline __m256i narrow(const float16*, Vec x) {
  return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
}

template <typename T>
inline Vec load(const T* p) {
  return widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <typename T>
inline Vec load_partial(const T* p, int n) {
  return widen(p, _mm256_maskz_loadu_epi16(first_lanes(n), p));
}
template <typename T>
inline void store(T* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, x));
}
template <typename T>
inline void store_partial(T* p, Vec x, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(p, x));
}

inline Vec round(Vec x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// Returns p * 2^n for integral n in [-127, 127]; zero where x, of which it is the power, is below
// -126: it would be subnormal.
inline Vec scale_by_power(Vec p, Vec n, Vec x) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(kept, p.v, n.v)};
}

inline void transpose(Vec (&r)[kLanes]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  // b[4g + c] holds, in 128-bit part p, column 4p + c of rows 4g to 4g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 even01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    r[c].v = _mm512_shuffle_f32x4(even01, even23, 0x88);
    r[4 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    r[8 + c].v = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    r[12 + c].v = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

#if defined(VSTAR_BFLOAT16_PAIRS)
// Two neighbours of a row, in one float lane.
struct Pair {
  bfloat16 low, high;
};

inline Vec broadcast(const Pair* p) {
  float bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return broadcast(bits);
}
inline Vec load(const Pair* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load_partial(const Pair* p, int n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
// Returns c + a.low b.low + a.high b.high in each lane, summed in float32.
inline Vec dot(Vec a, Vec b, Vec c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

}  // namespace vstar::VSTAR_ISA
