// Sixteen-lane vectors on AVX-512 (F, BW, DQ, VL, VNNI; BF16 where the translation unit is built with it).
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define OCT_INLINE static inline __attribute__((always_inline))

namespace OCT_ISA {

constexpr int kMaxTile = 8;  // tokens a product keeps in registers at once
#ifdef __AVX512BF16__
constexpr bool kHasBf16Dot = true;
#else
constexpr bool kHasBf16Dot = false;
#endif

using VF = __m512;
using VI = __m512i;
using VB = __m512i;

OCT_INLINE VF f_zero() { return _mm512_setzero_ps(); }
OCT_INLINE VF f_set(float x) { return _mm512_set1_ps(x); }
OCT_INLINE VF f_load(const float* p) { return _mm512_loadu_ps(p); }
OCT_INLINE void f_store(float* p, VF x) { _mm512_storeu_ps(p, x); }
OCT_INLINE VF f_add(VF a, VF b) { return _mm512_add_ps(a, b); }
OCT_INLINE VF f_sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
OCT_INLINE VF f_mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
OCT_INLINE VF f_div(VF a, VF b) { return _mm512_div_ps(a, b); }
OCT_INLINE VF f_max(VF a, VF b) { return _mm512_max_ps(a, b); }
OCT_INLINE VF f_min(VF a, VF b) { return _mm512_min_ps(a, b); }
OCT_INLINE VF f_abs(VF a) { return _mm512_abs_ps(a); }
OCT_INLINE VF f_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
OCT_INLINE float f_sum(VF a) { return _mm512_reduce_add_ps(a); }
OCT_INLINE float f_largest(VF a) { return _mm512_reduce_max_ps(a); }
OCT_INLINE VI f_round(VF a) { return _mm512_cvtps_epi32(a); }
OCT_INLINE VF f_from(VI a) { return _mm512_cvtepi32_ps(a); }
// x * 2^n for whole n, with graceful underflow.
OCT_INLINE VF f_scale2(VF x, VF n) { return _mm512_scalef_ps(x, n); }
OCT_INLINE VF f_whole(VF a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
constexpr float kLeastExponent = -104.0f;  // exp of it is 0
OCT_INLINE VF f_load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
OCT_INLINE VF f_load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
OCT_INLINE VF f_load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
OCT_INLINE VF f_load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
OCT_INLINE void f_store_f16(uint16_t* p, VF x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
OCT_INLINE VI bf16_bits(VF x) {  // round to nearest even, in the low half of every lane
  VI bits = _mm512_castps_si512(x);
  VI odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
}
OCT_INLINE void f_store_bf16(uint16_t* p, VF x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x));
#else
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bf16_bits(x)));
#endif
}
OCT_INLINE void i_store_i8(int8_t* p, VI x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(x)); }

OCT_INLINE VI i_zero() { return _mm512_setzero_si512(); }
OCT_INLINE VI i_add(VI a, VI b) { return _mm512_add_epi32(a, b); }
OCT_INLINE int i_sum(VI a) { return _mm512_reduce_add_epi32(a); }

OCT_INLINE VI i_load(const int32_t* p) { return _mm512_loadu_si512(p); }
OCT_INLINE VI i_set(int32_t x) { return _mm512_set1_epi32(x); }
OCT_INLINE VI i_xor(VI a, VI b) { return _mm512_xor_si512(a, b); }
// Low halves of the products of unsigned lanes with b; `high`: the upper halves.
OCT_INLINE VI i_multiply(VI a, uint32_t b, VI* high) {
  VI factor = _mm512_set1_epi64(b), even = _mm512_mul_epu32(a, factor);
  VI odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  *high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  return _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
OCT_INLINE VF f_from_unsigned(VI a) { return _mm512_cvtepu32_ps(a); }

OCT_INLINE VB b_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
OCT_INLINE VB b_and(VB a, uint8_t mask) { return _mm512_and_si512(a, _mm512_set1_epi8((char)mask)); }
OCT_INLINE VB b_or(VB a, VB b) { return _mm512_or_si512(a, b); }
// Bytes of `table` (16 of them) by indices below 16.
OCT_INLINE VB b_lookup(const uint8_t* table, VB index) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), index);
}
// Shifts of 16-bit units: the caller masks away what crosses bytes.
template <int N>
OCT_INLINE VB b_shr(VB a) {
  return _mm512_srli_epi16(a, N);
}
template <int N>
OCT_INLINE VB b_shl(VB a) {
  return _mm512_slli_epi16(a, N);
}
// acc[r] += sum over j of u[4r + j] * a[j], u unsigned, a signed.
OCT_INLINE VI dot4(VI acc, VB u, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  return _mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(four));
}
// Byte J of every lane as float.
template <int J>
OCT_INLINE VF b_float(VB a) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a, 8 * J), _mm512_set1_epi32(0xff)));
}
// Low and high half of every lane read as bfloat16.
OCT_INLINE VF bf16_low(VB a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
OCT_INLINE VF bf16_high(VB a) { return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000u))); }
// acc[r] += w[2r] * a[0] + w[2r + 1] * a[1] in bfloat16.
OCT_INLINE VF dot2_bf16(VF acc, VB w, const uint16_t* a) {
  int32_t two;
  memcpy(&two, a, 4);
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(two));
#else
  VB pair = _mm512_set1_epi32(two);
  return f_fma(bf16_low(w), bf16_low(pair), f_fma(bf16_high(w), bf16_high(pair), acc));
#endif
}
// Lane r: even[r] in the low half, odd[r] in the high half.
OCT_INLINE VB bf16_interleave(const uint16_t* even, const uint16_t* odd) {
  VB low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
  VB high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
// Into the second cache: the first has too few misses in flight to keep memory busy, and what it holds is needed.
OCT_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

// Lane j of the result is all lanes of x[j] folded by `op`, which adds or takes the larger.
template <class Op>
OCT_INLINE VF f_fold16(VF* x, Op op) {
  for (int i = 0; i < 8; i++) {  // halves of 256 bits
    VF low = _mm512_shuffle_f32x4(x[i], x[i + 8], 0x44), high = _mm512_shuffle_f32x4(x[i], x[i + 8], 0xee);
    x[i] = op(low, high);  // [x_i (8 lanes) | x_{i+8} (8 lanes)]
  }
  for (int i = 0; i < 4; i++) {  // quarters: [x_i | x_{i+8}] and [x_{i+4} | x_{i+12}]
    VF even = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), odd = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    x[i] = op(even, odd);  // lanes of 4: x_i, x_{i+8}, x_{i+4}, x_{i+12}
  }
  VF a = op(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));  // per 4: (0,1,0,1) of partial results
  VF b = op(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  VF all = op(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  return _mm512_shuffle_f32x4(all, all, 0xd8);  // quarters stand for 0, 8, 4, 12: put them in order
}
OCT_INLINE VF f_sum16(VF* x) {
  return f_fold16(x, [](VF a, VF b) __attribute__((always_inline)) { return f_add(a, b); });
}
OCT_INLINE VF f_max16(VF* x) {
  return f_fold16(x, [](VF a, VF b) __attribute__((always_inline)) { return f_max(a, b); });
}
// 16 x 16 transpose in place.
OCT_INLINE void f_transpose16(VF* x) {
  VF t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    x[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    x[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    x[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    x[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    x[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

}  // namespace OCT_ISA
