// Sixteen-lane vectors in the compiler's own vector types: correct on any processor.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define OCT_INLINE static inline __attribute__((always_inline))

namespace OCT_ISA {

constexpr int kMaxTile = 2;
constexpr bool kHasBf16Dot = false;

typedef float VF __attribute__((vector_size(64)));
typedef int32_t VI __attribute__((vector_size(64)));
typedef uint32_t VU __attribute__((vector_size(64)));
typedef uint8_t VB __attribute__((vector_size(64)));

#define OCT_LANES for (int i = 0; i < 16; i++)

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
static inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    float magnitude = (float)mantissa * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (mantissa << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}
static inline uint16_t float_to_half(float x) {
  uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) return (uint16_t)(sign | (uint32_t)lrintf(bits_to_float(magnitude) * 16777216.0f));
  uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000) >> 13));
}
static inline uint16_t float_to_bf16(float x) {
  uint32_t bits = float_to_bits(x);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class V, class T>
OCT_INLINE V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

OCT_INLINE VF f_zero() { return VF{}; }
OCT_INLINE VF f_set(float x) { return VF{} + x; }
OCT_INLINE VF f_load(const float* p) { return load_as<VF>(p); }
OCT_INLINE void f_store(float* p, VF x) { memcpy(p, &x, 64); }
OCT_INLINE VF f_add(VF a, VF b) { return a + b; }
OCT_INLINE VF f_sub(VF a, VF b) { return a - b; }
OCT_INLINE VF f_mul(VF a, VF b) { return a * b; }
OCT_INLINE VF f_div(VF a, VF b) { return a / b; }
OCT_INLINE VF f_max(VF a, VF b) { return a > b ? a : b; }
OCT_INLINE VF f_min(VF a, VF b) { return a < b ? a : b; }
OCT_INLINE VF f_abs(VF a) { return (VF)((VU)a & 0x7fffffffu); }
OCT_INLINE VF f_fma(VF a, VF b, VF c) { return a * b + c; }
OCT_INLINE float f_sum(VF a) {
  float s = 0;
  OCT_LANES s += a[i];
  return s;
}
OCT_INLINE float f_largest(VF a) {
  float m = a[0];
  OCT_LANES m = a[i] > m ? a[i] : m;
  return m;
}
OCT_INLINE VI f_round(VF a) {  // to nearest even: adding 1.5 * 2^23 leaves no bits behind the point
  VF magic = f_set(12582912.0f);
  return __builtin_convertvector((a + magic) - magic, VI);
}
OCT_INLINE VF f_from(VI a) { return __builtin_convertvector(a, VF); }
// x * 2^n for whole n from -126 to 127.
OCT_INLINE VF f_scale2(VF x, VF n) { return x * (VF)((__builtin_convertvector(n, VI) + 127) << 23); }
OCT_INLINE VF f_whole(VF a) { return f_from(f_round(a)); }
constexpr float kLeastExponent = -87.0f;  // exp of it is the least that f_scale2 can make
OCT_INLINE VF f_load_f16(const uint16_t* p) {
  VF r;
  OCT_LANES r[i] = half_to_float(p[i]);
  return r;
}
OCT_INLINE VF f_load_bf16(const uint16_t* p) {
  VU r;
  OCT_LANES r[i] = p[i];
  return (VF)(r << 16);
}
OCT_INLINE VF f_load_i8(const int8_t* p) {
  VI r;
  OCT_LANES r[i] = p[i];
  return f_from(r);
}
OCT_INLINE VF f_load_u8(const uint8_t* p) {
  VI r;
  OCT_LANES r[i] = p[i];
  return f_from(r);
}
OCT_INLINE void f_store_f16(uint16_t* p, VF x) { OCT_LANES p[i] = float_to_half(x[i]); }
OCT_INLINE void f_store_bf16(uint16_t* p, VF x) { OCT_LANES p[i] = float_to_bf16(x[i]); }
OCT_INLINE void i_store_i8(int8_t* p, VI x) { OCT_LANES p[i] = (int8_t)(x[i] > 127 ? 127 : x[i] < -128 ? -128 : x[i]); }

OCT_INLINE VI i_zero() { return VI{}; }
OCT_INLINE VI i_add(VI a, VI b) { return a + b; }
OCT_INLINE int i_sum(VI a) {
  int s = 0;
  OCT_LANES s += a[i];
  return s;
}

OCT_INLINE VI i_load(const int32_t* p) { return load_as<VI>(p); }
OCT_INLINE VI i_set(int32_t x) { return VI{} + x; }
OCT_INLINE VI i_xor(VI a, VI b) { return a ^ b; }
// Low halves of the products of unsigned lanes with b; `high`: the upper halves.
OCT_INLINE VI i_multiply(VI a, uint32_t b, VI* high) {
  VI low;
  OCT_LANES {
    uint64_t product = (uint64_t)(uint32_t)a[i] * b;
    low[i] = (int32_t)product;
    (*high)[i] = (int32_t)(product >> 32);
  }
  return low;
}
OCT_INLINE VF f_from_unsigned(VI a) { return __builtin_convertvector((VU)a, VF); }

OCT_INLINE VB b_load(const uint8_t* p) { return load_as<VB>(p); }
OCT_INLINE VB b_and(VB a, uint8_t mask) { return a & mask; }
OCT_INLINE VB b_or(VB a, VB b) { return a | b; }
// Bytes of `table` (16 of them) by indices below 16.
OCT_INLINE VB b_lookup(const uint8_t* table, VB index) {
  VB r;
  for (int i = 0; i < 64; i++) r[i] = table[index[i]];
  return r;
}
template <int N>
OCT_INLINE VB b_shr(VB a) {
  return a >> (uint8_t)N;
}
template <int N>
OCT_INLINE VB b_shl(VB a) {
  return a << (uint8_t)N;
}
// Byte J of every lane.
template <int J>
OCT_INLINE VI byte_of(VB a) {
  VU lanes;
  memcpy(&lanes, &a, 64);
  return (VI)((lanes >> (8 * J)) & 0xffu);
}
OCT_INLINE VI dot4(VI acc, VB u, const int8_t* a) {
  return acc + byte_of<0>(u) * a[0] + byte_of<1>(u) * a[1] + byte_of<2>(u) * a[2] + byte_of<3>(u) * a[3];
}
template <int J>
OCT_INLINE VF b_float(VB a) {
  return f_from(byte_of<J>(a));
}
OCT_INLINE VF bf16_low(VB a) {
  VU lanes;
  memcpy(&lanes, &a, 64);
  return (VF)(lanes << 16);
}
OCT_INLINE VF bf16_high(VB a) {
  VU lanes;
  memcpy(&lanes, &a, 64);
  return (VF)(lanes & 0xffff0000u);
}
OCT_INLINE VF dot2_bf16(VF acc, VB w, const uint16_t* a) {
  VF low = f_set(bits_to_float((uint32_t)a[0] << 16)), high = f_set(bits_to_float((uint32_t)a[1] << 16));
  return f_fma(bf16_low(w), low, f_fma(bf16_high(w), high, acc));
}
OCT_INLINE void prefetch(const void*) {}

OCT_INLINE VF f_sum16(VF* x) {
  VF r;
  OCT_LANES r[i] = f_sum(x[i]);
  return r;
}
OCT_INLINE VF f_max16(VF* x) {
  VF r;
  OCT_LANES r[i] = f_largest(x[i]);
  return r;
}
OCT_INLINE void f_transpose16(VF* x) {
  float rows[16][16];
  memcpy(rows, x, sizeof rows);
  OCT_LANES {
    VF column;
    for (int j = 0; j < 16; j++) column[j] = rows[j][i];
    x[i] = column;
  }
}

#undef OCT_LANES

}  // namespace OCT_ISA
