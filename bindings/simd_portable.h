// Any processor: four float lanes by the vector extension that GCC and Clang share, which they map
// to SSE2, NEON or whatever the target's baseline has.
#pragma once

#include "partial_lines.h"
#include "types.h"

namespace vstar::VSTAR_ISA {

constexpr int kLanes = 4;
constexpr int kLogitsKeys = 4;
constexpr int kProductRows = 4;
constexpr int kProductVectors = 2;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  Float4 v;
};

inline Vec zero() { return {Float4{}}; }
inline Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
inline Vec broadcast(const float* p) { return broadcast(*p); }
inline Vec add(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec div(Vec a, Vec b) { return {a.v / b.v}; }
// Fused only where the target has it: the file is compiled with -ffp-contract=fast.
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
// Returns the larger; b where either is NaN, as the x86 instruction does.
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
// Returns x in the lanes where a == b, y in the others.
inline Vec select_equal(Vec a, Vec b, Vec x, Vec y) {
  return {a.v == b.v ? x.v : y.v};
}
// Returns x in the lanes where a < b, y in the others.
inline Vec select_less(Vec a, Vec b, Vec x, Vec y) {
  return {a.v < b.v ? x.v : y.v};
}

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}
inline float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  float result;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    const uint32_t bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    __builtin_memcpy(&result, &bits, 4);
    return result;
  }
  if (magnitude < 0x0400u) {  // zero or subnormal: magnitude * 2^-24, exact
    result = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign ? -result : result;
  }
  const uint32_t bits = sign | ((magnitude << 13) + 0x38000000u);
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline void from_float(float* p, float x) { *p = x; }
// Both round to nearest even and keep a NaN a (quiet) NaN.
inline void from_float(bfloat16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  p->bits = static_cast<uint16_t>(rounded >> 16);
}
inline void from_float(float16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u | ((bits >> 13) & 0x3ffu);
  } else if (bits >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: the sum's last bits are the subnormal
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    __builtin_memcpy(&half, &magnitude, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

template <typename T>
inline Vec load_partial(const T* p, int n) {
  Vec x = zero();
  for (int i = 0; i < n; ++i) x.v[i] = to_float(p[i]);
  return x;
}
template <typename T>
inline void store_partial(T* p, Vec x, int n) {
  for (int i = 0; i < n; ++i) from_float(p + i, x.v[i]);
}
template <typename T>
inline Vec load(const T* p) {
  return load_partial(p, kLanes);
}
template <typename T>
inline void store(T* p, Vec x) {
  store_partial(p, x, kLanes);
}
inline Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x.v, p, sizeof x.v);
  return x;
}
inline void store(float* p, Vec x) { __builtin_memcpy(p, &x.v, sizeof x.v); }

// Rounds to the nearest integer, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for the fraction.
inline Vec round(Vec x) {
  const Float4 magic = broadcast(12582912.0f).v;
  return {(x.v + magic) - magic};
}
// Returns p * 2^n for integral n in [-127, 127]; zero where x, of which it is the power, is below
// -126: it would be subnormal.
inline Vec scale_by_power(Vec p, Vec n, Vec x) {
  // A NaN in n is in p too; it must not reach the integer conversion.
  const Float4 finite = n.v == n.v ? n.v : zero().v;
  const Int4 exponent = __builtin_convertvector(finite, Int4) << 23;
  const Int4 kept = ~(x.v < broadcast(-126.0f).v);
  return {(Float4)(((Int4)p.v + exponent) & kept)};
}

inline void transpose(Vec (&r)[kLanes]) {
  const Float4 a = r[0].v, b = r[1].v, c = r[2].v, d = r[3].v;
  r[0].v = Float4{a[0], b[0], c[0], d[0]};
  r[1].v = Float4{a[1], b[1], c[1], d[1]};
  r[2].v = Float4{a[2], b[2], c[2], d[2]};
  r[3].v = Float4{a[3], b[3], c[3], d[3]};
}

}  // namespace vstar::VSTAR_ISA
