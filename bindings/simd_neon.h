// Arm's Advanced SIMD (64-bit): four float lanes, thirty-two registers.
#pragma once

#include <arm_neon.h>

#include "partial_lines.h"
#include "types.h"

namespace vstar::VSTAR_ISA {

constexpr int kLanes = 4;
constexpr int kLogitsKeys = 8;   // 8 keys x 2 vectors of queries: 16 accumulators
constexpr int kProductRows = 8;  // 8 rows x 3 vectors of head_dim: 24 accumulators
constexpr int kProductVectors = 3;

struct Vec {
  float32x4_t v;
};

inline Vec zero() { return {vdupq_n_f32(0.0f)}; }
inline Vec broadcast(float x) { return {vdupq_n_f32(x)}; }
inline Vec broadcast(const float* p) { return {vld1q_dup_f32(p)}; }
inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// Returns the larger; NaN where either is, unlike x86. The kernels are content with both.
inline Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
// Returns x in the lanes where a == b, y in the others.
inline Vec select_equal(Vec a, Vec b, Vec x, Vec y) {
  return {vbslq_f32(vceqq_f32(a.v, b.v), x.v, y.v)};
}
// Returns x in the lanes where a < b, y in the others.
inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)};
}

inline Vec load(const float* p) { return {vld1q_f32(p)}; }
inline void store(float* p, Vec x) { vst1q_f32(p, x.v); }
inline Vec load_partial(const float* p, int n) {
  float buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
inline void store_partial(float* p, Vec x, int n) {
  float buffer[kLanes];
  store(buffer, x);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

inline Vec widen(const bfloat16*, uint16x4_t bits) {
  return {vreinterpretq_f32_u32(vshll_n_u16(bits, 16))};
}
inline Vec widen(const float16*, uint16x4_t bits) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(bits))};
}

// Rounds to nearest even; a NaN stays a (quiet) NaN.
inline uint16x4_t narrow(const bfloat16*, Vec x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x.v, x.v), rounded, quiet), 16);
}
inline uint16x4_t narrow(const float16*, Vec x) {
  return vreinterpret_u16_f16(vcvt_f16_f32(x.v));
}

template <typename T>
inline Vec load(const T* p) {
  return widen(p, vld1_u16(&p->bits));
}
template <typename T>
inline Vec load_partial(const T* p, int n) {
  uint16_t buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i].bits;
  return widen(p, vld1_u16(buffer));
}
template <typename T>
inline void store(T* p, Vec x) {
  vst1_u16(&p->bits, narrow(p, x));
}
template <typename T>
inline void store_partial(T* p, Vec x, int n) {
  uint16_t buffer[kLanes];
  vst1_u16(buffer, narrow(p, x));
  for (int i = 0; i < n; ++i) p[i].bits = buffer[i];
}

inline Vec round(Vec x) { return {vrndnq_f32(x.v)}; }
// Returns p * 2^n for integral n in [-127, 127]; zero where x, of which it is the power, is below
// -126: it would be subnormal.
inline Vec scale_by_power(Vec p, Vec n, Vec x) {
  const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n.v), 23);
  const int32x4_t scaled = vaddq_s32(vreinterpretq_s32_f32(p.v), exponent);
  const uint32x4_t underflow = vcltq_f32(x.v, vdupq_n_f32(-126.0f));
  return {vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(scaled), underflow))};
}

inline void transpose(Vec (&r)[kLanes]) {
  const float32x4x2_t ab = vtrnq_f32(r[0].v, r[1].v), cd = vtrnq_f32(r[2].v, r[3].v);
  r[0].v = vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0]));
  r[1].v = vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1]));
  r[2].v = vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0]));
  r[3].v = vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1]));
}

}  // namespace vstar::VSTAR_ISA
