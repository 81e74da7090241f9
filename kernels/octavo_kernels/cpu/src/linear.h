// Products of a packed matrix with a tile of activations, for every storage format.
#pragma once
#include "kernels.h"
#include "vector_math.h"

namespace OCT_ISA {

// Codes of block `b` of a panel: `group<G>()` gives the 64 bytes of four columns.
template <int Kind>
struct Codes;

template <>
struct Codes<OCT_U8> {
  static constexpr int kBytes = 512;
  static constexpr bool kSmall = false;
  const uint8_t* p;
  OCT_INLINE Codes at(const uint8_t* p) { return {p}; }
  template <int G>
  inline __attribute__((always_inline)) VB group() const {
    return b_load(p + 64 * G);
  }
};

template <>
struct Codes<OCT_U4> {
  static constexpr int kBytes = 256;
  static constexpr bool kSmall = true;
  const uint8_t* p;
  OCT_INLINE Codes at(const uint8_t* p) { return {p}; }
  template <int G>
  inline __attribute__((always_inline)) VB group() const {
    VB v = b_load(p + 64 * (G & 3));
    return G < 4 ? b_and(v, 0x0f) : b_and(b_shr<4>(v), 0x0f);
  }
};

template <int N>
OCT_INLINE VB shift_to(VB v) {  // left by N, right by -N
  if constexpr (N >= 0) return b_shl<(N >= 0 ? N : 0)>(v);
  else return b_shr<(N < 0 ? -N : 0)>(v);
}

template <>
struct Codes<OCT_U5> {
  static constexpr int kBytes = 320;
  static constexpr bool kSmall = true;
  const uint8_t* p;
  OCT_INLINE Codes at(const uint8_t* p) { return {p}; }
  template <int G>
  inline __attribute__((always_inline)) VB group() const {
    VB v = b_load(p + 64 * (G & 3));
    VB low = G < 4 ? b_and(v, 0x0f) : b_and(b_shr<4>(v), 0x0f);
    return b_or(low, b_and(shift_to<4 - G>(b_load(p + 256)), 0x10));
  }
};

template <>
struct Codes<OCT_U6> {
  static constexpr int kBytes = 384;
  static constexpr bool kSmall = true;
  const uint8_t* p;
  OCT_INLINE Codes at(const uint8_t* p) { return {p}; }
  template <int G>
  inline __attribute__((always_inline)) VB group() const {
    VB v = b_load(p + 64 * (G & 3));
    VB low = G < 4 ? b_and(v, 0x0f) : b_and(b_shr<4>(v), 0x0f);
    return b_or(low, b_and(shift_to<4 - 2 * (G & 3)>(b_load(p + 256 + 64 * (G >> 2))), 0x30));
  }
};

template <>
struct Codes<OCT_U2> {
  static constexpr int kBytes = 128;
  static constexpr bool kSmall = true;
  const uint8_t* p;
  OCT_INLINE Codes at(const uint8_t* p) { return {p}; }
  template <int G>
  inline __attribute__((always_inline)) VB group() const {
    return b_and(shift_to<-2 * (G >> 1)>(b_load(p + 64 * (G & 1))), 0x03);
  }
};

// What a nibble stands for, above the kind's zero: GGML's non-linear values and E2M1 numbers in halves.
constexpr uint8_t kNonLinear[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
constexpr uint8_t kTwiceE2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

template <>
struct Codes<OCT_NL4> {
  static constexpr int kBytes = 256;
  static constexpr bool kSmall = false;
  static constexpr const uint8_t* kValues = kNonLinear;
  const uint8_t* p;
  OCT_INLINE Codes at(const uint8_t* p) { return {p}; }
  template <int G>
  inline __attribute__((always_inline)) VB group() const {
    return b_lookup(kValues, Codes<OCT_U4>{p}.template group<G>());
  }
};

template <>
struct Codes<OCT_FP4> {
  static constexpr int kBytes = 256;
  static constexpr bool kSmall = true;
  static constexpr const uint8_t* kValues = kTwiceE2M1;
  const uint8_t* p;
  OCT_INLINE Codes at(const uint8_t* p) { return {p}; }
  template <int G>
  inline __attribute__((always_inline)) VB group() const {
    return b_lookup(kValues, Codes<OCT_U4>{p}.template group<G>());
  }
};

// Kinds with a scale for each half of a block.
template <int ScaleKind>
constexpr bool kHalvesOf = ScaleKind == OCT_K_D16 || ScaleKind == OCT_K_DM16;

// Scales of one block as float vectors: w = scale * code + offset for the first (low) and last (high) 16 columns.
struct BlockScales {
  VF scale, offset, scale_high, offset_high;
};

template <int Kind>
OCT_INLINE BlockScales scales_at(const uint8_t* panel, int64_t block, float zero) {
  BlockScales s;
  if constexpr (Kind == OCT_D) {
    s.scale = f_load_f16((const uint16_t*)(panel + 32 * block));
    s.offset = f_mul(s.scale, f_set(-zero));
  } else if constexpr (Kind == OCT_DM) {
    const uint16_t* p = (const uint16_t*)(panel + 64 * block);
    s.scale = f_load_f16(p);
    s.offset = f_load_f16(p + 16);
  } else if constexpr (Kind == OCT_K_DM) {
    const uint8_t* group = panel + (block >> 3) * (64 + 8 * 32);
    const uint8_t* p = group + 64 + 32 * (block & 7);
    s.scale = f_mul(f_load_f16((const uint16_t*)group), f_load_u8(p));
    s.offset = f_mul(f_mul(f_load_f16((const uint16_t*)(group + 32)), f_set(-1.0f)), f_load_u8(p + 16));
  } else if constexpr (Kind == OCT_K_DM16) {
    const uint8_t* group = panel + (block >> 3) * (64 + 16 * 32);
    const uint8_t* p = group + 64 + 64 * (block & 7);
    VF d = f_load_f16((const uint16_t*)group);
    VF minus = f_mul(f_load_f16((const uint16_t*)(group + 32)), f_set(-1.0f));
    s.scale = f_mul(d, f_load_u8(p));
    s.offset = f_mul(minus, f_load_u8(p + 16));
    s.scale_high = f_mul(d, f_load_u8(p + 32));
    s.offset_high = f_mul(minus, f_load_u8(p + 48));
  } else if constexpr (Kind == OCT_E8) {
    // Below 2^-126 the least normal number: no weight that small counts.
    VF exponent = f_max(f_sub(f_load_u8(panel + 16 * block), f_set(128.0f)), f_set(-126.0f));
    s.scale = f_scale2(f_set(1.0f), exponent);
    s.offset = f_mul(s.scale, f_set(-zero));
  } else {
    const uint8_t* group = panel + (block >> 3) * (32 + 16 * 16);
    const int8_t* p = (const int8_t*)(group + 32 + 32 * (block & 7));
    VF d = f_load_f16((const uint16_t*)group);
    s.scale = f_mul(d, f_load_i8(p));
    s.scale_high = f_mul(d, f_load_i8(p + 16));
    s.offset = f_mul(s.scale, f_set(-zero));
    s.offset_high = f_mul(s.scale_high, f_set(-zero));
  }
  return s;
}

template <bool Small>
OCT_INLINE VI dot4_of(VI acc, VB u, const int8_t* a) {
#ifdef OCT_HAS_DOT4_SMALL
  if constexpr (Small) return dot4_small(acc, u, a);
#endif
  return dot4(acc, u, a);
}

OCT_INLINE void store_rows(const Output& out, int64_t row, int64_t rows, int64_t token, VF value) {
  int64_t line = out.rows ? out.rows[token] : token - out.first_token;
  float* p = out.data + line * out.stride + (row - out.first_row);
  value = f_capped(value, out.soft_cap);
  if (rows - row >= kPanel) {
    if (out.bias) value = f_add(value, f_load(out.bias + row));
    if (out.accumulate) value = f_add(value, f_load(p));
    f_store(p, value);
    return;
  }
  float lanes[kPanel];
  f_store(lanes, value);
  for (int64_t i = 0; i < rows - row; i++) {
    float x = lanes[i] + (out.bias ? out.bias[row + i] : 0.0f);
    p[i] = out.accumulate ? p[i] + x : x;
  }
}

constexpr int kAhead = 1536;  // bytes of codes fetched ahead of their use

// What one tile fetches of the panel that is multiplied next: every `passes`-th piece, the other tiles the rest.
struct NextPanel {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t passes;
  int64_t due;  // pieces until the next one of this tile

  template <int Bytes>
  inline __attribute__((always_inline)) void fetch(int64_t codes_at, int64_t scales_at = -1) {
    if (--due) return;
    due = passes;
#pragma GCC unroll 8
    for (int line = 0; line < Bytes; line += 64) prefetch(codes + codes_at + line);
    if (scales_at >= 0) prefetch(scales + scales_at);
  }
};

// One panel times one tile, int8 activations.
template <int CodeKind, int ScaleKind, int M>
OCT_INLINE void panel_int8(const oct_matrix& w, const uint8_t* codes, const uint8_t* scales, const Activations& x,
                           int64_t start, NextPanel next, VF* result) {
  using C = Codes<CodeKind>;
  constexpr bool kHalves = kHalvesOf<ScaleKind>;
  constexpr int kChains = kHalves || M <= 2 ? 2 : 1;
  int64_t blocks = w.columns / kBlock;
  const int8_t* a = x.int8 + start * x.columns;
  const float* scale = x.scale + start * blocks;
  const float* sum = x.sum + start * blocks;
  const float* sum_low = x.sum_low + start * blocks;
  int64_t scale_step = panel_scale_bytes(w) / blocks;
  float zero = (float)w.zero;
  VF acc[M];
  for (int m = 0; m < M; m++) acc[m] = f_zero();
  for (int64_t b = 0; b < blocks; b++) {
    C code = C::at(codes + b * C::kBytes);
    if constexpr (M <= 2) {
#pragma GCC unroll 8
      for (int line = 0; line < C::kBytes; line += 64) prefetch(code.p + kAhead + line);
    } else {
      next.fetch<C::kBytes>(b * C::kBytes, b * scale_step);
    }
    VI dot[M][kChains];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      for (int c = 0; c < kChains; c++) dot[m][c] = i_zero();
#define OCT_GROUP(G)                                                                                  \
  {                                                                                                   \
    VB u = code.template group<G>();                                                                  \
    _Pragma("GCC unroll 8") for (int m = 0; m < M; m++) dot[m][kChains == 1 ? 0 : (kHalves ? G >> 2 : G & 1)] = \
        dot4_of<C::kSmall>(dot[m][kChains == 1 ? 0 : (kHalves ? G >> 2 : G & 1)], u, a + (G * M + m) * 4);     \
  }
    OCT_GROUP(0) OCT_GROUP(4) OCT_GROUP(1) OCT_GROUP(5) OCT_GROUP(2) OCT_GROUP(6) OCT_GROUP(3) OCT_GROUP(7)
#undef OCT_GROUP
    BlockScales s = scales_at<ScaleKind>(scales, b, zero);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      VF d = f_set(scale[m]);
      if constexpr (kHalves) {
        VF low = f_set(sum_low[m]), high = f_set(sum[m] - sum_low[m]);
        acc[m] = f_fma(f_mul(s.scale, d), f_from(dot[m][0]), acc[m]);
        acc[m] = f_fma(f_mul(s.scale_high, d), f_from(dot[m][1]), acc[m]);
        acc[m] = f_fma(s.offset, low, f_fma(s.offset_high, high, acc[m]));
      } else {
        VI total = dot[m][0];
        if constexpr (kChains == 2) total = i_add(total, dot[m][1]);
        acc[m] = f_fma(f_mul(s.scale, d), f_from(total), acc[m]);
        acc[m] = f_fma(s.offset, f_set(sum[m]), acc[m]);
      }
    }
    a += kBlock * M;
    scale += M, sum += M, sum_low += M;
  }
  for (int m = 0; m < M; m++) result[m] = acc[m];
}

// One panel times one tile, float activations: every code becomes its weight first, as `dequantize` says.
template <int CodeKind, int ScaleKind, int M>
OCT_INLINE void panel_f32(const oct_matrix& w, const uint8_t* codes, const uint8_t* scales, const Activations& x,
                          int64_t start, VF* result) {
  constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;
  int64_t blocks = w.columns / kBlock;
  const float* a = x.f32 + start * x.columns;
  float zero = (float)w.zero;
  VF acc[M][kChains];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < kChains; c++) acc[m][c] = f_zero();
#define OCT_COLUMN(K, WEIGHT)                                                                              \
  {                                                                                                        \
    VF weight = WEIGHT;                                                                                    \
    _Pragma("GCC unroll 8") for (int m = 0; m < M; m++) acc[m][(K) % kChains] =                            \
        f_fma(weight, f_set(a[(K)*M + m]), acc[m][(K) % kChains]);                                         \
  }
  for (int64_t b = 0; b < blocks; b++) {
    if constexpr (CodeKind == OCT_F32) {
      const float* p = (const float*)(codes + b * 2048);
#pragma GCC unroll 4
      for (int k = 0; k < kBlock; k++) OCT_COLUMN(k, f_load(p + 16 * k))
    } else if constexpr (CodeKind == OCT_BF16) {
      const uint8_t* p = codes + b * 1024;
#pragma GCC unroll 4
      for (int k = 0; k < kBlock; k += 2) {
        VB pair = b_load(p + 32 * k);
        OCT_COLUMN(k, bf16_low(pair))
        OCT_COLUMN(k + 1, bf16_high(pair))
      }
    } else {
      using C = Codes<CodeKind>;
      C code = C::at(codes + b * C::kBytes);
      BlockScales s = scales_at<ScaleKind>(scales, b, zero);
      constexpr bool kHalves = kHalvesOf<ScaleKind>;
#define OCT_GROUP(G)                                                             \
  {                                                                              \
    VB u = code.template group<G>();                                             \
    VF d = kHalves && G >= 4 ? s.scale_high : s.scale;                           \
    VF o = kHalves && G >= 4 ? s.offset_high : s.offset;                         \
    OCT_COLUMN(4 * G, f_fma(d, b_float<0>(u), o))                                \
    OCT_COLUMN(4 * G + 1, f_fma(d, b_float<1>(u), o))                            \
    OCT_COLUMN(4 * G + 2, f_fma(d, b_float<2>(u), o))                            \
    OCT_COLUMN(4 * G + 3, f_fma(d, b_float<3>(u), o))                            \
  }
      OCT_GROUP(0) OCT_GROUP(1) OCT_GROUP(2) OCT_GROUP(3) OCT_GROUP(4) OCT_GROUP(5) OCT_GROUP(6) OCT_GROUP(7)
#undef OCT_GROUP
    }
    a += kBlock * M;
  }
#undef OCT_COLUMN
  for (int m = 0; m < M; m++) {
    result[m] = acc[m][0];
    for (int c = 1; c < kChains; c++) result[m] = f_add(result[m], acc[m][c]);
  }
}

// One panel times one tile, bfloat16 weights and activations.
template <int M>
OCT_INLINE void panel_bf16(const oct_matrix& w, const uint8_t* codes, const Activations& x, int64_t start,
                           NextPanel next, VF* result) {
  constexpr int kChains = M == 1 ? 4 : M == 2 ? 2 : 1;
  int64_t pairs = w.columns / 2;
  const uint16_t* a = x.bf16 + start * x.columns;
  VF acc[M][kChains];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < kChains; c++) acc[m][c] = f_zero();
  for (int64_t p = 0; p < pairs; p += 4) {
    if constexpr (M > 2) next.fetch<256>(64 * p);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      VB pair = b_load(codes + 64 * (p + i));
      if constexpr (M <= 2) prefetch(codes + 64 * (p + i) + kAhead);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
        acc[m][i % kChains] = dot2_bf16(acc[m][i % kChains], pair, a + ((p + i) * M + m) * 2);
    }
  }
  for (int m = 0; m < M; m++) {
    result[m] = acc[m][0];
    for (int c = 1; c < kChains; c++) result[m] = f_add(result[m], acc[m][c]);
  }
}

template <int CodeKind, int ScaleKind, int Act, int M>
OCT_INLINE void panel_tile(const oct_matrix& w, int64_t panel, const uint8_t* codes, const uint8_t* scales,
                           const Activations& x, int64_t start, const NextPanel& next, const Output& out) {
  VF result[M];
  if constexpr (Act == OCT_ACT_INT8) panel_int8<CodeKind, ScaleKind, M>(w, codes, scales, x, start, next, result);
  else if constexpr (Act == OCT_ACT_BF16) panel_bf16<M>(w, codes, x, start, next, result);
  else panel_f32<CodeKind, ScaleKind, M>(w, codes, scales, x, start, result);
  for (int m = 0; m < M; m++) store_rows(out, panel * kPanel, w.rows, start + m, result[m]);
}

template <int CodeKind, int ScaleKind, int Act>
__attribute__((noinline)) void linear_of(const oct_matrix& w, int64_t begin, int64_t end, const Activations& x,
                                         const Tile* tiles, int64_t tile_begin, int64_t tile_end, const Output& out,
                                         int64_t passes) {
  int64_t code_bytes = panel_code_bytes(w), scale_bytes = panel_scale_bytes(w);
  int64_t panels = panels_of(w);
  for (int64_t panel = begin; panel < end; panel++) {
    const uint8_t* codes = w.codes + panel * code_bytes;
    const uint8_t* scales = w.scales + panel * scale_bytes;
    int64_t step = panel + (end - begin) < panels ? end - begin : 0;  // after the last: what is cached anyhow
    for (int64_t i = tile_begin; i < tile_end; i++) {
      int64_t start = tiles[i].start;
      NextPanel next{codes + step * code_bytes, scales + step * scale_bytes, passes, i % passes + 1};
      switch (tiles[i].size) {
        case 1: panel_tile<CodeKind, ScaleKind, Act, 1>(w, panel, codes, scales, x, start, next, out); break;
        case 2: panel_tile<CodeKind, ScaleKind, Act, 2>(w, panel, codes, scales, x, start, next, out); break;
        default:
          if constexpr (kMaxTile >= 4) {
            if (tiles[i].size == 4) panel_tile<CodeKind, ScaleKind, Act, 4>(w, panel, codes, scales, x, start, next, out);
            else panel_tile<CodeKind, ScaleKind, Act, 8>(w, panel, codes, scales, x, start, next, out);
          }
      }
    }
  }
}

using LinearFunction = void (*)(const oct_matrix&, int64_t, int64_t, const Activations&, const Tile*, int64_t, int64_t,
                                const Output&, int64_t);

template <int CodeKind, int ScaleKind>
OCT_INLINE LinearFunction quantized_linear(int act) {
  return act == OCT_ACT_INT8 ? linear_of<CodeKind, ScaleKind, OCT_ACT_INT8> : linear_of<CodeKind, ScaleKind, OCT_ACT_F32>;
}

static LinearFunction linear_for(const oct_matrix& w) {
  int act = w.activations;
  switch (w.code_kind * 8 + w.scale_kind) {
    case OCT_F32 * 8: return linear_of<OCT_F32, OCT_NONE, OCT_ACT_F32>;
    case OCT_BF16 * 8:
      return act == OCT_ACT_BF16 ? linear_of<OCT_BF16, OCT_NONE, OCT_ACT_BF16> : linear_of<OCT_BF16, OCT_NONE, OCT_ACT_F32>;
    case OCT_U4 * 8 + OCT_D: return quantized_linear<OCT_U4, OCT_D>(act);
    case OCT_U4 * 8 + OCT_DM: return quantized_linear<OCT_U4, OCT_DM>(act);
    case OCT_U4 * 8 + OCT_K_DM: return quantized_linear<OCT_U4, OCT_K_DM>(act);
    case OCT_U5 * 8 + OCT_D: return quantized_linear<OCT_U5, OCT_D>(act);
    case OCT_U5 * 8 + OCT_DM: return quantized_linear<OCT_U5, OCT_DM>(act);
    case OCT_U5 * 8 + OCT_K_DM: return quantized_linear<OCT_U5, OCT_K_DM>(act);
    case OCT_U4 * 8 + OCT_K_D16: return quantized_linear<OCT_U4, OCT_K_D16>(act);
    case OCT_U6 * 8 + OCT_K_D16: return quantized_linear<OCT_U6, OCT_K_D16>(act);
    case OCT_U8 * 8 + OCT_DM: return quantized_linear<OCT_U8, OCT_DM>(act);
    case OCT_U2 * 8 + OCT_K_DM16: return quantized_linear<OCT_U2, OCT_K_DM16>(act);
    case OCT_NL4 * 8 + OCT_D: return quantized_linear<OCT_NL4, OCT_D>(act);
    case OCT_NL4 * 8 + OCT_K_D16: return quantized_linear<OCT_NL4, OCT_K_D16>(act);
    case OCT_FP4 * 8 + OCT_E8: return quantized_linear<OCT_FP4, OCT_E8>(act);
    default: return quantized_linear<OCT_U8, OCT_D>(act);
  }
}

static void linear(const oct_matrix& w, int64_t begin, int64_t end, const Activations& x, const Tile* tiles,
                   int64_t tile_begin, int64_t tile_end, const Output& out, int64_t passes) {
  linear_for(w)(w, begin, end, x, tiles, tile_begin, tile_end, out, passes);
}

}  // namespace OCT_ISA
