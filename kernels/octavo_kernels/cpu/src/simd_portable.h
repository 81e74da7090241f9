// Sixteen-lane vectors in plain C++: correct on any processor, vectorised as far as the compiler manages.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define OCT_INLINE static inline __attribute__((always_inline))

namespace OCT_ISA {

constexpr int kMaxTile = 2;
constexpr bool kHasBf16Dot = false;

struct VF {
  float v[16];
};
struct VI {
  int32_t v[16];
};
struct VB {
  uint8_t v[64];
};

#define OCT_LANES for (int i = 0; i < 16; i++)
#define OCT_BYTES for (int i = 0; i < 64; i++)

OCT_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
OCT_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
OCT_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    float magnitude = (float)mantissa * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}
OCT_INLINE uint16_t float_to_half(float x) {
  uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) return (uint16_t)(sign | (uint32_t)lrintf(bits_to_float(magnitude) * 16777216.0f));
  uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}
OCT_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits = float_to_bits(x);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

OCT_INLINE VF f_set(float x) {
  VF r;
  OCT_LANES r.v[i] = x;
  return r;
}
OCT_INLINE VF f_zero() { return f_set(0.0f); }
OCT_INLINE VF f_load(const float* p) {
  VF r;
  memcpy(r.v, p, 64);
  return r;
}
OCT_INLINE void f_store(float* p, VF x) { memcpy(p, x.v, 64); }
#define OCT_BINARY(name, expression)  \
  OCT_INLINE VF name(VF a, VF b) {    \
    VF r;                             \
    OCT_LANES r.v[i] = (expression);  \
    return r;                         \
  }
OCT_BINARY(f_add, a.v[i] + b.v[i])
OCT_BINARY(f_sub, a.v[i] - b.v[i])
OCT_BINARY(f_mul, a.v[i] * b.v[i])
OCT_BINARY(f_div, a.v[i] / b.v[i])
OCT_BINARY(f_max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
OCT_BINARY(f_min, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
#undef OCT_BINARY
OCT_INLINE VF f_abs(VF a) {
  VF r;
  OCT_LANES r.v[i] = fabsf(a.v[i]);
  return r;
}
OCT_INLINE VF f_fma(VF a, VF b, VF c) {
  VF r;
  OCT_LANES r.v[i] = a.v[i] * b.v[i] + c.v[i];
  return r;
}
OCT_INLINE float f_sum(VF a) {
  float s = 0;
  OCT_LANES s += a.v[i];
  return s;
}
OCT_INLINE float f_largest(VF a) {
  float m = a.v[0];
  OCT_LANES m = a.v[i] > m ? a.v[i] : m;
  return m;
}
OCT_INLINE VI f_round(VF a) {
  VI r;
  OCT_LANES r.v[i] = (int32_t)rintf(a.v[i]);
  return r;
}
OCT_INLINE VF f_from(VI a) {
  VF r;
  OCT_LANES r.v[i] = (float)a.v[i];
  return r;
}
OCT_INLINE VF f_pow2(VI n) {
  VF r;
  OCT_LANES r.v[i] = bits_to_float((uint32_t)(n.v[i] + 127) << 23);
  return r;
}
OCT_INLINE VF f_load_f16(const uint16_t* p) {
  VF r;
  OCT_LANES r.v[i] = half_to_float(p[i]);
  return r;
}
OCT_INLINE VF f_load_bf16(const uint16_t* p) {
  VF r;
  OCT_LANES r.v[i] = bits_to_float((uint32_t)p[i] << 16);
  return r;
}
OCT_INLINE VF f_load_i8(const int8_t* p) {
  VF r;
  OCT_LANES r.v[i] = (float)p[i];
  return r;
}
OCT_INLINE VF f_load_u8(const uint8_t* p) {
  VF r;
  OCT_LANES r.v[i] = (float)p[i];
  return r;
}
OCT_INLINE void f_store_f16(uint16_t* p, VF x) { OCT_LANES p[i] = float_to_half(x.v[i]); }
OCT_INLINE void f_store_bf16(uint16_t* p, VF x) { OCT_LANES p[i] = float_to_bf16(x.v[i]); }
OCT_INLINE void i_store_i8(int8_t* p, VI x) {
  OCT_LANES p[i] = (int8_t)(x.v[i] > 127 ? 127 : x.v[i] < -128 ? -128 : x.v[i]);
}

OCT_INLINE VI i_zero() {
  VI r;
  OCT_LANES r.v[i] = 0;
  return r;
}
OCT_INLINE VI i_add(VI a, VI b) {
  VI r;
  OCT_LANES r.v[i] = a.v[i] + b.v[i];
  return r;
}
OCT_INLINE int i_sum(VI a) {
  int s = 0;
  OCT_LANES s += a.v[i];
  return s;
}

OCT_INLINE VB b_load(const uint8_t* p) {
  VB r;
  memcpy(r.v, p, 64);
  return r;
}
OCT_INLINE VB b_and(VB a, uint8_t mask) {
  VB r;
  OCT_BYTES r.v[i] = a.v[i] & mask;
  return r;
}
OCT_INLINE VB b_or(VB a, VB b) {
  VB r;
  OCT_BYTES r.v[i] = a.v[i] | b.v[i];
  return r;
}
template <int N>
OCT_INLINE VB b_shr(VB a) {
  VB r;
  OCT_BYTES r.v[i] = (uint8_t)(a.v[i] >> N);
  return r;
}
template <int N>
OCT_INLINE VB b_shl(VB a) {
  VB r;
  OCT_BYTES r.v[i] = (uint8_t)(a.v[i] << N);
  return r;
}
OCT_INLINE VI dot4(VI acc, VB u, const int8_t* a) {
  OCT_LANES {
    int s = 0;
    for (int j = 0; j < 4; j++) s += (int)u.v[4 * i + j] * (int)a[j];
    acc.v[i] += s;
  }
  return acc;
}
template <int J>
OCT_INLINE VF b_float(VB a) {
  VF r;
  OCT_LANES r.v[i] = (float)a.v[4 * i + J];
  return r;
}
OCT_INLINE float bf16_at(const VB& a, int byte) {
  return bits_to_float(((uint32_t)a.v[byte] << 16) | ((uint32_t)a.v[byte + 1] << 24));
}
OCT_INLINE VF bf16_low(VB a) {
  VF r;
  OCT_LANES r.v[i] = bf16_at(a, 4 * i);
  return r;
}
OCT_INLINE VF bf16_high(VB a) {
  VF r;
  OCT_LANES r.v[i] = bf16_at(a, 4 * i + 2);
  return r;
}
OCT_INLINE VF dot2_bf16(VF acc, VB w, const uint16_t* a) {
  VF low = f_set(bits_to_float((uint32_t)a[0] << 16)), high = f_set(bits_to_float((uint32_t)a[1] << 16));
  return f_fma(bf16_low(w), low, f_fma(bf16_high(w), high, acc));
}
OCT_INLINE void prefetch(const void*) {}

OCT_INLINE VF f_sum16(VF* x) {
  VF r;
  OCT_LANES r.v[i] = f_sum(x[i]);
  return r;
}
OCT_INLINE void f_transpose16(VF* x) {
  VF t[16];
  OCT_LANES t[i] = x[i];
  OCT_LANES for (int j = 0; j < 16; j++) x[i].v[j] = t[j].v[i];
}

#undef OCT_LANES
#undef OCT_BYTES

}  // namespace OCT_ISA
