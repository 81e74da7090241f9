// Sixteen-lane vectors as two AVX2 registers (AVX2, FMA, F16C; VNNI where the translation unit is built with it).
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define OCT_INLINE static inline __attribute__((always_inline))

namespace OCT_ISA {

constexpr int kMaxTile = 2;
constexpr bool kHasBf16Dot = false;

struct VF {
  __m256 a, b;
};
struct VI {
  __m256i a, b;
};
using VB = VI;

OCT_INLINE VF f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
OCT_INLINE VF f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
OCT_INLINE VF f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
OCT_INLINE void f_store(float* p, VF x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
OCT_INLINE VF f_add(VF x, VF y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
OCT_INLINE VF f_sub(VF x, VF y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
OCT_INLINE VF f_mul(VF x, VF y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
OCT_INLINE VF f_div(VF x, VF y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
OCT_INLINE VF f_max(VF x, VF y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
OCT_INLINE VF f_min(VF x, VF y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
OCT_INLINE VF f_abs(VF x) {
  __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
OCT_INLINE VF f_fma(VF x, VF y, VF z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
OCT_INLINE float f_sum8(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
OCT_INLINE float f_sum(VF x) { return f_sum8(_mm256_add_ps(x.a, x.b)); }
OCT_INLINE float f_largest(VF x) {
  __m256 m = _mm256_max_ps(x.a, x.b);
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
OCT_INLINE VI f_round(VF x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
OCT_INLINE VF f_from(VI x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
OCT_INLINE __m256 pow2_half(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
// x * 2^n for whole n from -126 to 127.
OCT_INLINE VF f_scale2(VF x, VF n) { return {_mm256_mul_ps(x.a, pow2_half(n.a)), _mm256_mul_ps(x.b, pow2_half(n.b))}; }
OCT_INLINE VF f_whole(VF x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}
constexpr float kLeastExponent = -87.0f;  // exp of it is the least that f_scale2 can make
OCT_INLINE VF f_load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
OCT_INLINE __m256 wide_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
OCT_INLINE VF f_load_bf16(const uint16_t* p) { return {wide_bf16(p), wide_bf16(p + 8)}; }
OCT_INLINE __m128i half16(const void* p) { return _mm_loadl_epi64((const __m128i*)p); }
OCT_INLINE VF f_load_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half16(p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(half16(p + 8)))};
}
OCT_INLINE VF f_load_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(half16(p))), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(half16(p + 8)))};
}
OCT_INLINE void f_store_f16(uint16_t* p, VF x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
OCT_INLINE __m256i bf16_bits(__m256 x) {
  __m256i bits = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
}
OCT_INLINE void f_store_bf16(uint16_t* p, VF x) {
  __m256i packed = _mm256_packus_epi32(bf16_bits(x.a), bf16_bits(x.b));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
OCT_INLINE void i_store_i8(int8_t* p, VI x) {
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128((__m128i*)p, bytes);
}

OCT_INLINE VI i_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
OCT_INLINE VI i_add(VI x, VI y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
OCT_INLINE int i_sum(VI x) {
  __m256i t = _mm256_add_epi32(x.a, x.b);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

OCT_INLINE VI i_load(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
OCT_INLINE VI i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
OCT_INLINE VI i_xor(VI x, VI y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
OCT_INLINE __m256i multiply_half(__m256i a, __m256i factor, __m256i* high) {
  __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
// Low halves of the products of unsigned lanes with b; `high`: the upper halves.
OCT_INLINE VI i_multiply(VI x, uint32_t b, VI* high) {
  __m256i factor = _mm256_set1_epi64x(b);
  return {multiply_half(x.a, factor, &high->a), multiply_half(x.b, factor, &high->b)};
}
OCT_INLINE __m256 from_unsigned_half(__m256i x) {  // both halves are exact, so the sum is rounded once
  __m256 upper = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
  __m256 lower = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
  return _mm256_fmadd_ps(upper, _mm256_set1_ps(65536.0f), lower);
}
OCT_INLINE VF f_from_unsigned(VI x) { return {from_unsigned_half(x.a), from_unsigned_half(x.b)}; }

OCT_INLINE VB b_load(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
OCT_INLINE VB b_and(VB x, uint8_t mask) {
  __m256i m = _mm256_set1_epi8((char)mask);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
OCT_INLINE VB b_or(VB x, VB y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
// Bytes of `table` (16 of them) by indices below 16.
OCT_INLINE VB b_lookup(const uint8_t* table, VB index) {
  __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(values, index.a), _mm256_shuffle_epi8(values, index.b)};
}
template <int N>
OCT_INLINE VB b_shr(VB x) {
  return {_mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)};
}
template <int N>
OCT_INLINE VB b_shl(VB x) {
  return {_mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)};
}
OCT_INLINE __m256i dot4_half(__m256i acc, __m256i u, __m256i a) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, u, a);
#else
  // Pairs of products of full bytes overflow 16 bits: widen even and odd bytes instead of vpmaddubsw.
  __m256i low = _mm256_set1_epi16(0xff);
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, low), _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(a, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
OCT_INLINE VI dot4(VI acc, VB u, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  __m256i every = _mm256_set1_epi32(four);
  return {dot4_half(acc.a, u.a, every), dot4_half(acc.b, u.b, every)};
}
// The same for codes below 128, whose pairs of products fit 16 bits.
OCT_INLINE __m256i dot4_small_half(__m256i acc, __m256i u, __m256i a) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, u, a);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, a), _mm256_set1_epi16(1)));
#endif
}
OCT_INLINE VI dot4_small(VI acc, VB u, const int8_t* a) {
  int32_t four;
  memcpy(&four, a, 4);
  __m256i every = _mm256_set1_epi32(four);
  return {dot4_small_half(acc.a, u.a, every), dot4_small_half(acc.b, u.b, every)};
}
#define OCT_HAS_DOT4_SMALL 1
template <int J>
OCT_INLINE VF b_float(VB x) {
  __m256i m = _mm256_set1_epi32(0xff);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * J), m)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.b, 8 * J), m))};
}
OCT_INLINE VF bf16_low(VB x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
OCT_INLINE VF bf16_high(VB x) {
  __m256i m = _mm256_set1_epi32((int)0xffff0000u);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, m)), _mm256_castsi256_ps(_mm256_and_si256(x.b, m))};
}
OCT_INLINE VF dot2_bf16(VF acc, VB w, const uint16_t* a) {
  int32_t two;
  memcpy(&two, a, 4);
  VB pair = {_mm256_set1_epi32(two), _mm256_set1_epi32(two)};
  return f_fma(bf16_low(w), bf16_low(pair), f_fma(bf16_high(w), bf16_high(pair), acc));
}
// Into the second cache: the first has too few misses in flight to keep memory busy, and what it holds is needed.
OCT_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

OCT_INLINE VF f_sum16(VF* x) {
  alignas(32) float sums[16];
  for (int i = 0; i < 16; i++) sums[i] = f_sum(x[i]);
  return f_load(sums);
}
OCT_INLINE VF f_max16(VF* x) {
  alignas(32) float largest[16];
  for (int i = 0; i < 16; i++) largest[i] = f_largest(x[i]);
  return f_load(largest);
}
OCT_INLINE void f_transpose16(VF* x) {
  alignas(32) float rows[16][16];
  for (int i = 0; i < 16; i++) f_store(rows[i], x[i]);
  for (int i = 0; i < 16; i++) {
    alignas(32) float column[16];
    for (int j = 0; j < 16; j++) column[j] = rows[j][i];
    x[i] = f_load(column);
  }
}

}  // namespace OCT_ISA
