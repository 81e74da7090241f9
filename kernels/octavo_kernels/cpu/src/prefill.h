// Attention of several queries of a sequence at once: scores and weighted values as small matrix products.
#pragma once
#include "attention.h"

namespace OCT_ISA {

// c[R][16 N] (+)= a[R][depth] * b[depth][16 N].
template <int R, int N>
OCT_INLINE void micro(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                      bool add) {
  VF acc[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) acc[r][n] = add ? f_load(c + r * ldc + 16 * n) : f_zero();
  for (int64_t k = 0; k < depth; k++) {
    VF column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) column[n] = f_load(b + k * ldb + 16 * n);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      VF x = f_set(a[r * lda + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[r][n] = f_fma(x, column[n], acc[r][n]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) f_store(c + r * ldc + 16 * n, acc[r][n]);
}

template <int N>
OCT_INLINE void strip(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t depth, float* c,
                      int64_t ldc, bool add) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) micro<6, N>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc, add);
  for (; r + 3 <= rows; r += 3) micro<3, N>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc, add);
  for (; r < rows; r++) micro<1, N>(a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc, add);
}

// c[rows][columns] (+)= a[rows][depth] * b[depth][columns]; columns a multiple of 16.
static void product(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t depth, float* c,
                    int64_t ldc, int64_t columns, bool add) {
  constexpr int kWide = kMaxTile >= 8 ? 4 : 1;
  int64_t n = 0;
  for (; n + 16 * kWide <= columns; n += 16 * kWide) strip<kWide>(a, lda, rows, b + n, ldb, depth, c + n, ldc, add);
  for (; n < columns; n += 16) strip<1>(a, lda, rows, b + n, ldb, depth, c + n, ldc, add);
}

// transposed[dim][kPrefillKeys] and values[kPrefillKeys][dim] of up to kPrefillKeys keys, zero beyond `count`.
template <int DType>
static void load_keys(const oct_attention& a, const oct_kv_cache& cache, const int64_t* rows, int64_t count,
                      float* transposed, float* values) {
  int64_t dim = a.head_dim, padded = (count + 15) & ~15;
  for (int64_t first = 0; first < padded; first += 16) {
    for (int64_t c = 0; c < dim; c += 16) {
      VF tile[16];
      for (int j = 0; j < 16; j++) {
        int64_t k = first + j;
        VF key = f_zero(), value = f_zero();
        if (k < count) {
          key = kv_load<DType>(cache.key, rows[k] * dim + c);
          value = kv_load<DType>(cache.value, rows[k] * dim + c);
          if constexpr (DType == OCT_KV_INT8) {
            key = f_mul(key, f_set(cache.key_scale[rows[k]]));
            value = f_mul(value, f_set(cache.value_scale[rows[k]]));
          }
        }
        tile[j] = key;
        f_store(values + k * dim + c, value);
      }
      f_transpose16(tile);
      for (int j = 0; j < 16; j++) f_store(transposed + (c + j) * kPrefillKeys + first, tile[j]);
    }
  }
}

#ifdef __AVX512BF16__
// The same in bfloat16 with float32 sums: a[R][pairs][2], b[pairs][16 N lanes][2]; strides in elements and lanes.
template <int R, int N>
OCT_INLINE void micro_bf16(const uint16_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t pairs, float* c,
                           int64_t ldc, bool add) {
  VF acc[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) acc[r][n] = add ? f_load(c + r * ldc + 16 * n) : f_zero();
  for (int64_t k = 0; k < pairs; k++) {
    VB column[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) column[n] = b_load((const uint8_t*)(b + k * ldb + 16 * n));
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) acc[r][n] = dot2_bf16(acc[r][n], column[n], a + r * lda + 2 * k);
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) f_store(c + r * ldc + 16 * n, acc[r][n]);
}

template <int N>
OCT_INLINE void strip_bf16(const uint16_t* a, int64_t lda, int64_t rows, const uint32_t* b, int64_t ldb, int64_t pairs,
                           float* c, int64_t ldc, bool add) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) micro_bf16<6, N>(a + r * lda, lda, b, ldb, pairs, c + r * ldc, ldc, add);
  for (; r < rows; r++) micro_bf16<1, N>(a + r * lda, lda, b, ldb, pairs, c + r * ldc, ldc, add);
}

static void product_bf16(const uint16_t* a, int64_t lda, int64_t rows, const uint32_t* b, int64_t ldb, int64_t pairs,
                         float* c, int64_t ldc, int64_t columns, bool add) {
  int64_t n = 0;
  for (; n + 64 <= columns; n += 64) strip_bf16<4>(a, lda, rows, b + n, ldb, pairs, c + n, ldc, add);
  for (; n < columns; n += 16) strip_bf16<1>(a, lda, rows, b + n, ldb, pairs, c + n, ldc, add);
}

// Row `row` of the cache in bfloat16: where it lies, or in `wide` after a conversion.
template <int DType>
OCT_INLINE const uint16_t* bf16_row(const void* data, const float* scales, int64_t row, int64_t dim, uint16_t* wide) {
  if constexpr (DType == OCT_KV_BF16) return (const uint16_t*)data + row * dim;
  VF scale = f_set(scales[row]);
  for (int64_t c = 0; c < dim; c += 16) f_store_bf16(wide + c, f_mul(kv_load<DType>(data, row * dim + c), scale));
  return wide;
}

// transposed[dim / 2][kPrefillKeys] pairs of columns and values[kPrefillKeys / 2][dim] pairs of keys, of a bfloat16 or
// int8 cache; zero beyond `count`. head_dim is a multiple of 32.
template <int DType>
static void load_pairs(const oct_attention& a, const oct_kv_cache& cache, const int64_t* rows, int64_t count,
                       uint32_t* transposed, uint32_t* values) {
  static const uint16_t zeros[kMaxHeadDim] = {0};
  uint16_t wide[16 * kMaxHeadDim];
  const uint16_t* from[16];
  int64_t dim = a.head_dim, padded = (count + 15) & ~15;
  auto fill = [&](const void* data, const float* scales, int64_t first) {
    for (int j = 0; j < 16; j++)
      from[j] = first + j < count ? bf16_row<DType>(data, scales, rows[first + j], dim, wide + j * dim) : zeros;
  };
  for (int64_t first = 0; first < padded; first += 16) {
    fill(cache.key, cache.key_scale, first);
    for (int64_t c = 0; c < dim; c += 32) {
      VF tile[16];
      for (int j = 0; j < 16; j++) tile[j] = f_load((const float*)(from[j] + c));
      f_transpose16(tile);
      for (int j = 0; j < 16; j++) f_store((float*)(transposed + (c / 2 + j) * kPrefillKeys + first), tile[j]);
    }
    fill(cache.value, cache.value_scale, first);
    for (int j = 0; j < 16; j += 2)
      for (int64_t c = 0; c < dim; c += 16)
        _mm512_storeu_si512(values + (first + j) / 2 * dim + c, bf16_interleave(from[j] + c, from[j + 1] + c));
  }
}
#endif

// Scores of `num` rows, `group` for each query from `position` on, beside `padded` keys from `first` on: capped, hidden
// where a query may not look, then replaced by exp(score - new maximum), in bfloat16 (at the row's beginning) if asked
// for; what the rows have in `acc` and `sum` is rescaled. Sixteen rows at a time: their maxima and sums lie side by side.
template <bool kBf16>
static void soften_rows(const oct_attention& a, int64_t position, int64_t group, int64_t num, int64_t first,
                        int64_t padded, float* scores, float* maximum, float* sum, float* acc) {
  constexpr float kLog2E = 1.44269504f;
  for (int64_t begin = 0; begin < num; begin += 16) {
    int64_t rows = num - begin < 16 ? num - begin : 16;
    VF folded[16];
    for (int64_t r = 0; r < 16; r++) {
      folded[r] = f_set(-INFINITY);
      if (r >= rows) continue;
      float* row = scores + (begin + r) * kPrefillKeys;
      if (a.soft_cap > 0)
        for (int64_t i = 0; i < padded; i += 16) f_store(row + i, f_capped(f_load(row + i), a.soft_cap));
      int64_t at = position + (begin + r) / group, seen = at + 1 - first;  // keys of this stretch at or before the query
      for (int64_t i = seen < 0 ? 0 : seen; i < padded; i++) row[i] = -INFINITY;
      if (a.sliding_window)
        for (int64_t i = 0; i < at - a.sliding_window + 1 - first && i < padded; i++) row[i] = -INFINITY;
      for (int64_t i = 0; i < padded; i += 16) folded[r] = f_max(folded[r], f_load(row + i));
    }
    VF before = f_load(maximum + begin), now = f_max(before, f_max16(folded));
    VF base = f_max(now, f_set(-1e30f));  // of a row that sees nothing yet: its weights become 0, not NaN
    VF factor = f_exp(f_sub(before, base));
    f_store(maximum + begin, now);
    float bases[16], factors[16];
    f_store(bases, base);
    f_store(factors, factor);
    for (int64_t r = 0; r < 16; r++) {
      folded[r] = f_zero();
      if (r >= rows) continue;
      float* row = scores + (begin + r) * kPrefillKeys;
      VF least = f_set(kBf16 ? -kLog2E * bases[r] : bases[r]);
      for (int64_t i = 0; i < padded; i += 16) {
        VF score = f_load(row + i);
        VF weight = kBf16 ? f_exp2_coarse(f_fma(score, f_set(kLog2E), least)) : f_exp(f_sub(score, least));
        if constexpr (kBf16) f_store_bf16((uint16_t*)row + i, weight);
        else f_store(row + i, weight);
        folded[r] = f_add(folded[r], weight);
      }
      if (factors[r] == 1.0f) continue;
      float* own = acc + (begin + r) * a.head_dim;
      for (int64_t c = 0; c < a.head_dim; c += 16) f_store(own + c, f_mul(f_load(own + c), f_set(factors[r])));
    }
    f_store(sum + begin, f_fma(f_load(sum + begin), factor, f_sum16(folded)));
  }
}

template <int DType>
static void prefill_of(const oct_attention& a, const oct_batch& batch, const oct_kv_cache& cache,
                       const AttentionTask& task, const float* query, int64_t query_stride, float* out,
                       int64_t out_stride, float* scratch) {
  int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim, num = task.count * group;
  float* queries = scratch;
  float* acc = queries + num * dim;
  float* scores = acc + num * dim;
  float* maximum = scores + num * kPrefillKeys;
  float* sum = maximum + ((num + 15) & ~15);
  float* transposed = sum + ((num + 15) & ~15);
  float* values = transposed + dim * kPrefillKeys;
  int64_t rows[kPrefillKeys];
  constexpr bool kPairs = kHasBf16Dot && (DType == OCT_KV_BF16 || DType == OCT_KV_INT8);
  bool pairs = kPairs && a.bf16_products && dim % 32 == 0;
  for (int64_t i = 0; i < task.count; i++)
    scale_query(a, query + (task.first + i) * query_stride + task.kv_head * group * dim, queries + i * group * dim);
  if (pairs)  // in place: a row of bfloat16 takes the first half of its float32 row
    for (int64_t r = 0; r < num; r++)
      for (int64_t c = 0; c < dim; c += 16) f_store_bf16((uint16_t*)(queries + r * dim) + c, f_load(queries + r * dim + c));
  memset(acc, 0, sizeof(float) * num * dim);
  for (int64_t r = 0; r < num; r += 16) f_store(maximum + r, f_set(-INFINITY)), f_store(sum + r, f_zero());
  int64_t start = batch.seq_lens[task.seq] - batch.query_start_loc[task.seq + 1];  // position = start + token
  for (int64_t first = task.key_begin; first < task.key_end; first += kPrefillKeys) {
    int64_t count = task.key_end - first < kPrefillKeys ? task.key_end - first : kPrefillKeys;
    int64_t padded = (count + 15) & ~15;
    cache_rows(a, batch, task.seq, task.kv_head, first, count, rows);
    if constexpr (kPairs) {
      if (pairs) {
#ifdef __AVX512BF16__
        uint32_t* key_pairs = (uint32_t*)transposed;
        uint32_t* value_pairs = (uint32_t*)values;
        load_pairs<DType>(a, cache, rows, count, key_pairs, value_pairs);
        product_bf16((uint16_t*)queries, 2 * dim, num, key_pairs, kPrefillKeys, dim / 2, scores, kPrefillKeys, padded,
                     false);
        soften_rows<true>(a, start + task.first, group, num, first, padded, scores, maximum, sum, acc);
        product_bf16((uint16_t*)scores, 2 * kPrefillKeys, num, value_pairs, dim, padded / 2, acc, dim, dim, true);
#endif
        continue;
      }
    }
    load_keys<DType>(a, cache, rows, count, transposed, values);
    product(queries, dim, num, transposed, kPrefillKeys, dim, scores, kPrefillKeys, padded, false);
    soften_rows<false>(a, start + task.first, group, num, first, padded, scores, maximum, sum, acc);
    product(scores, kPrefillKeys, num, values, dim, count, acc, dim, dim, true);
  }
  for (int64_t r = 0; r < num; r++) {
    int64_t head = task.kv_head * group + r % group;
    VF last = f_set(closing_factor(a, head, maximum[r], sum[r]));
    float* to = out + (task.first + r / group) * out_stride + head * dim;
    for (int64_t c = 0; c < dim; c += 16) f_store(to + c, f_mul(f_load(acc + r * dim + c), last));
  }
}

static void attend_prefill(const oct_attention& a, const oct_batch& batch, const oct_kv_cache& cache,
                           const AttentionTask& task, const float* query, int64_t query_stride, float* out,
                           int64_t out_stride, float* scratch) {
  switch (batch.kv_dtype) {
    case OCT_KV_F32: return prefill_of<OCT_KV_F32>(a, batch, cache, task, query, query_stride, out, out_stride, scratch);
    case OCT_KV_BF16: return prefill_of<OCT_KV_BF16>(a, batch, cache, task, query, query_stride, out, out_stride, scratch);
    case OCT_KV_F16: return prefill_of<OCT_KV_F16>(a, batch, cache, task, query, query_stride, out, out_stride, scratch);
    default: return prefill_of<OCT_KV_INT8>(a, batch, cache, task, query, query_stride, out, out_stride, scratch);
  }
}

}  // namespace OCT_ISA
