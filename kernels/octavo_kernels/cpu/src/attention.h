// Attention over the paged cache with an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).
#pragma once
#include <math.h>

#include "kernels.h"
#include "vector_math.h"

namespace OCT_ISA {

template <int DType>
OCT_INLINE VF kv_load(const void* data, int64_t at) {
  if constexpr (DType == OCT_KV_F32) return f_load((const float*)data + at);
  else if constexpr (DType == OCT_KV_BF16) return f_load_bf16((const uint16_t*)data + at);
  else if constexpr (DType == OCT_KV_F16) return f_load_f16((const uint16_t*)data + at);
  else return f_load_i8((const int8_t*)data + at);
}

// Rows of the cache (in units of head_dim) of keys first .. first + count - 1 of a sequence.
OCT_INLINE void cache_rows(const oct_attention& a, const oct_batch& batch, int64_t seq, int64_t kv_head, int64_t first,
                           int64_t count, int64_t* rows) {
  const int32_t* table = batch.block_tables + seq * batch.max_blocks;
  int64_t block = first / batch.block_size, offset = first % batch.block_size;
  for (int64_t i = 0; i < count; i++) {
    rows[i] = ((int64_t)table[block] * a.num_kv_heads + kv_head) * batch.block_size + offset;
    if (++offset == batch.block_size) offset = 0, block++;
  }
}

OCT_INLINE VF shaped_scores(VF scores, const oct_attention& a) {
  scores = f_mul(scores, f_set(a.scale));
  if (a.soft_cap > 0) scores = f_mul(f_tanh(f_mul(scores, f_set(1.0f / a.soft_cap))), f_set(a.soft_cap));
  return scores;
}

// Replaces `count` (a multiple of 16) scores by exp(score - new maximum); returns the factor for what was summed before.
OCT_INLINE float soften(float* scores, int64_t count, float* maximum, float* sum) {
  VF largest = f_load(scores);
  for (int64_t i = 16; i < count; i += 16) largest = f_max(largest, f_load(scores + i));
  float before = *maximum, now = fmaxf(before, f_largest(largest));
  if (now == -INFINITY) {  // nothing visible yet
    for (int64_t i = 0; i < count; i += 16) f_store(scores + i, f_zero());
    return 1.0f;
  }
  VF top = f_set(now), total = f_zero(), lowest = f_set(-80.0f);
  for (int64_t i = 0; i < count; i += 16) {
    VF shifted = f_sub(f_load(scores + i), top);
    VF e = f_exp(shifted);
    // exp clamps at -87: what lies below -80 (masked scores are -inf) must count as nothing.
    e = f_mul(e, f_min(f_max(f_sub(shifted, lowest), f_zero()), f_set(1.0f)));
    f_store(scores + i, e);
    total = f_add(total, e);
  }
  float factor = before == -INFINITY ? 0.0f : expf(before - now);
  *sum = *sum * factor + f_sum(total);
  *maximum = now;
  return factor;
}

// A sink is one more logit in the denominator; returns what the weighted values must be multiplied by.
OCT_INLINE float closing_factor(const oct_attention& a, int64_t head, float maximum, float sum) {
  if (!a.sinks) return sum > 0 ? 1.0f / sum : 0.0f;
  float sink = a.sinks[head], top = fmaxf(maximum, sink);
  float kept = maximum == -INFINITY ? 0.0f : expf(maximum - top);
  return kept / (sum * kept + expf(sink - top));
}

template <int DType>
constexpr int64_t kv_bytes() {
  return DType == OCT_KV_F32 ? 4 : DType == OCT_KV_INT8 ? 1 : 2;
}

// Blocks lie scattered where no processor guesses them: what the next stretch of keys needs is fetched during this one.
struct Ahead {
  int64_t rows[kDecodeKeys];
  int64_t count;
};
template <int DType>
OCT_INLINE void prefetch_row(const void* data, const Ahead& ahead, int64_t i, int64_t dim) {
  if (i >= ahead.count) return;
  const char* row = (const char*)data + ahead.rows[i] * dim * kv_bytes<DType>();
  for (int64_t line = 0; line < dim * kv_bytes<DType>(); line += 64) prefetch(row + line);
}

// scores[g][0..15] of 16 keys (rows beyond the last repeat it) for every head of the group.
template <int DType>
OCT_INLINE void score16(const oct_attention& a, const oct_kv_cache& cache, const int64_t* rows, int64_t first,
                        const Ahead& ahead, const float* query, int64_t group, float* scores, int64_t scores_stride) {
  int64_t dim = a.head_dim;
  rows += first;
  for (int64_t j = 0; j < 16; j++) prefetch_row<DType>(cache.key, ahead, first + j, dim);
  for (int64_t g = 0; g < group; g++) {
    VF acc[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) acc[j] = f_zero();
    for (int64_t c = 0; c < dim; c += 16) {
      VF q = f_load(query + g * dim + c);
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) acc[j] = f_fma(q, kv_load<DType>(cache.key, rows[j] * dim + c), acc[j]);
    }
    VF sums = f_sum16(acc);
    if constexpr (DType == OCT_KV_INT8) {
      float factors[16];
      for (int j = 0; j < 16; j++) factors[j] = cache.key_scale[rows[j]];
      sums = f_mul(sums, f_load(factors));
    }
    f_store(scores + g * scores_stride, shaped_scores(sums, a));
  }
}

// acc[g][c ..] = acc * factor[g] + sum over keys of p[g][key] * value[key] for G heads, N times 16 columns at a time.
template <int DType, int G, int N>
OCT_INLINE void weigh_columns(const oct_kv_cache& cache, const int64_t* rows, int64_t count, const Ahead& ahead,
                              int64_t dim, int64_t c, const float* p, const float* factor, float* acc) {
  VF sum[G][N];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[g][n] = f_mul(f_load(acc + g * dim + c + 16 * n), f_set(factor[g]));
  for (int64_t k = 0; k < count; k++) {
    if (c == 0) prefetch_row<DType>(cache.value, ahead, k, dim);
    VF v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) v[n] = kv_load<DType>(cache.value, rows[k] * dim + c + 16 * n);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      VF weight = f_set(p[g * kDecodeKeys + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[g][n] = f_fma(v[n], weight, sum[g][n]);
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) f_store(acc + g * dim + c + 16 * n, sum[g][n]);
}

template <int DType, int G>
OCT_INLINE void weigh_values(const oct_kv_cache& cache, const int64_t* rows, int64_t count, const Ahead& ahead,
                             int64_t dim, const float* p, const float* factor, float* acc) {
  constexpr int kWide = kMaxTile >= 8 ? 4 : 1;
  int64_t c = 0;
  for (; c + 16 * kWide <= dim; c += 16 * kWide)
    weigh_columns<DType, G, kWide>(cache, rows, count, ahead, dim, c, p, factor, acc);
  for (; c < dim; c += 16) weigh_columns<DType, G, 1>(cache, rows, count, ahead, dim, c, p, factor, acc);
}

// Rows of the keys [first, end) of a task, at most kDecodeKeys.
OCT_INLINE void look_ahead(const oct_attention& a, const oct_batch& batch, const AttentionTask& task, int64_t first,
                           Ahead& ahead) {
  int64_t left = task.key_end - first;
  ahead.count = left < 0 ? 0 : left < kDecodeKeys ? left : kDecodeKeys;
  cache_rows(a, batch, task.seq, task.kv_head, first, ahead.count, ahead.rows);
}

template <int DType>
static void decode_of(const oct_attention& a, const oct_batch& batch, const oct_kv_cache& cache,
                      const AttentionTask& task, const AttentionTask* next, const float* query, float* out,
                      float* partials) {
  int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim;
  float maximum[kMaxGroup], sum[kMaxGroup], factor[kMaxGroup];
  float* acc = task.partial >= 0 ? partials + task.partial * group * (dim + 2) + 2 * group : out;
  for (int64_t g = 0; g < group; g++) maximum[g] = -INFINITY, sum[g] = 0;
  memset(acc, 0, sizeof(float) * group * dim);
  float scores[kMaxGroup * kDecodeKeys];
  Ahead both[2];
  look_ahead(a, batch, task, task.key_begin, both[0]);
  for (int64_t first = task.key_begin, turn = 0; first < task.key_end; first += kDecodeKeys, turn ^= 1) {
    int64_t* rows = both[turn].rows;
    Ahead& ahead = both[turn ^ 1];
    int64_t count = both[turn].count, padded = (count + 15) & ~15;
    for (int64_t i = count; i < padded; i++) rows[i] = rows[count - 1];
    if (first + kDecodeKeys < task.key_end) look_ahead(a, batch, task, first + kDecodeKeys, ahead);
    else if (next) look_ahead(a, batch, *next, next->key_begin, ahead);
    else ahead.count = 0;
    for (int64_t i = 0; i < padded; i += 16)
      score16<DType>(a, cache, rows, i, ahead, query, group, scores + i, kDecodeKeys);
    for (int64_t g = 0; g < group; g++) {
      float* row = scores + g * kDecodeKeys;
      for (int64_t i = count; i < padded; i++) row[i] = -INFINITY;
      factor[g] = soften(row, padded, maximum + g, sum + g);
      if constexpr (DType == OCT_KV_INT8)
        for (int64_t i = 0; i < count; i++) row[i] *= cache.value_scale[rows[i]];
    }
    int64_t g = 0;
#define OCT_WEIGH(G) \
  weigh_values<DType, G>(cache, rows, count, ahead, dim, scores + g * kDecodeKeys, factor + g, acc + g * dim)
    for (; g + 4 <= group; g += 4) OCT_WEIGH(4);
    if (group - g == 3) OCT_WEIGH(3);
    else if (group - g == 2) OCT_WEIGH(2);
    else if (group - g == 1) OCT_WEIGH(1);
#undef OCT_WEIGH
  }
  if (task.partial >= 0) {
    float* state = acc - 2 * group;
    for (int64_t g = 0; g < group; g++) state[g] = maximum[g], state[group + g] = sum[g];
    return;
  }
  for (int64_t g = 0; g < group; g++) {
    VF last = f_set(closing_factor(a, task.kv_head * group + g, maximum[g], sum[g]));
    for (int64_t c = 0; c < dim; c += 16) f_store(out + g * dim + c, f_mul(f_load(out + g * dim + c), last));
  }
}

static void attend_decode(const oct_attention& a, const oct_batch& batch, const oct_kv_cache& cache,
                          const AttentionTask& task, const AttentionTask* next, const float* query, float* out,
                          float* partials) {
  switch (batch.kv_dtype) {
    case OCT_KV_F32: return decode_of<OCT_KV_F32>(a, batch, cache, task, next, query, out, partials);
    case OCT_KV_BF16: return decode_of<OCT_KV_BF16>(a, batch, cache, task, next, query, out, partials);
    case OCT_KV_F16: return decode_of<OCT_KV_F16>(a, batch, cache, task, next, query, out, partials);
    default: return decode_of<OCT_KV_INT8>(a, batch, cache, task, next, query, out, partials);
  }
}

static void combine(const oct_attention& a, int kv_head, const float* partials, int64_t first, int64_t count,
                    float* out) {
  int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim, size = group * (dim + 2);
  const float* base = partials + first * size;
  for (int64_t g = 0; g < group; g++) {
    float maximum = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count; i++) maximum = fmaxf(maximum, base[i * size + g]);
    memset(out + g * dim, 0, sizeof(float) * dim);
    for (int64_t i = 0; i < count; i++) {
      float m = base[i * size + g], factor = m == -INFINITY ? 0.0f : expf(m - maximum);
      sum += factor * base[i * size + group + g];
      const float* acc = base + i * size + 2 * group + g * dim;
      for (int64_t c = 0; c < dim; c += 16)
        f_store(out + g * dim + c, f_fma(f_load(acc + c), f_set(factor), f_load(out + g * dim + c)));
    }
    VF last = f_set(closing_factor(a, kv_head * group + g, maximum, sum));
    for (int64_t c = 0; c < dim; c += 16) f_store(out + g * dim + c, f_mul(f_load(out + g * dim + c), last));
  }
}

}  // namespace OCT_ISA
