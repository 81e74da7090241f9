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


// The query of one token for a KV head's group, times the scale.
OCT_INLINE void scale_query(const oct_attention& a, const float* query, float* scaled) {
  int64_t count = (int64_t)(a.num_heads / a.num_kv_heads) * a.head_dim;
  for (int64_t i = 0; i < count; i += 16) f_store(scaled + i, f_mul(f_load(query + i), f_set(a.scale)));
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
  VF top = f_set(now), total = f_zero();
  for (int64_t i = 0; i < count; i += 16) {
    VF e = f_exp(f_sub(f_load(scores + i), top));  // of a masked score: at most 2e-38, beside a greatest of 1
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
  int64_t each;  // rows to fetch beside a key of this stretch
};
template <int DType>
OCT_INLINE void prefetch_rows(const void* data, const Ahead& ahead, int64_t key, int64_t dim) {
  int64_t end = (key + 1) * ahead.each < ahead.count ? (key + 1) * ahead.each : ahead.count;
  for (int64_t i = key * ahead.each; i < end; i++) {
    const char* row = (const char*)data + ahead.rows[i] * dim * kv_bytes<DType>();
    for (int64_t line = 0; line < dim * kv_bytes<DType>(); line += 64) prefetch(row + line);
  }
}

// scores[g][0..15] of 16 keys (rows beyond the last repeat it) for every head of the group.
template <int DType>
OCT_INLINE void score16(const oct_attention& a, const oct_kv_cache& cache, const int64_t* rows, int64_t first,
                        const Ahead& ahead, const float* query, int64_t group, float* scores, int64_t scores_stride) {
  int64_t dim = a.head_dim;
  rows += first;
  for (int64_t j = 0; j < 16; j++) prefetch_rows<DType>(cache.key, ahead, first + j, dim);
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
    f_store(scores + g * scores_stride, f_capped(sums, a.soft_cap));
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
    if (c == 0) prefetch_rows<DType>(cache.value, ahead, k, dim);
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

// Keys that a task scores at once: all stretches but the last, which would have no time to fetch the next one's keys
// if it were short, are as long.
OCT_INLINE int64_t stretch_of(const AttentionTask& task) {
  int64_t keys = task.key_end - task.key_begin, stretches = (keys + kDecodeKeys - 1) / kDecodeKeys;
  return stretches ? ((keys + stretches - 1) / stretches + 15) & ~15 : kDecodeKeys;
}

// Rows of a task's stretch of keys from `first` on.
OCT_INLINE void look_ahead(const oct_attention& a, const oct_batch& batch, const AttentionTask& task, int64_t first,
                           Ahead& ahead) {
  int64_t left = task.key_end - first, stretch = stretch_of(task);
  ahead.count = left < 0 ? 0 : left < stretch ? left : stretch;
  cache_rows(a, batch, task.seq, task.kv_head, first, ahead.count, ahead.rows);
}

#ifdef __AVX512BF16__
// The same scores from queries and keys in bfloat16; head_dim is a multiple of 32.
OCT_INLINE void score16_pairs(const oct_attention& a, const oct_kv_cache& cache, const int64_t* rows, int64_t first,
                              const Ahead& ahead, const uint16_t* query, int64_t group, float* scores,
                              int64_t scores_stride) {
  int64_t dim = a.head_dim;
  const uint16_t* keys = (const uint16_t*)cache.key;
  rows += first;
  for (int64_t j = 0; j < 16; j++) prefetch_rows<OCT_KV_BF16>(cache.key, ahead, first + j, dim);
  for (int64_t g = 0; g < group; g++) {
    VF acc[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) acc[j] = f_zero();
    for (int64_t c = 0; c < dim; c += 32) {
      __m512bh q = (__m512bh)_mm512_loadu_si512(query + g * dim + c);
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++)
        acc[j] = _mm512_dpbf16_ps(acc[j], q, (__m512bh)_mm512_loadu_si512(keys + rows[j] * dim + c));
    }
    f_store(scores + g * scores_stride, f_capped(f_sum16(acc), a.soft_cap));
  }
}

// As `weigh_columns` for 32 N columns, two keys at a time. p: [G][kDecodeKeys] weights, rounded to bfloat16 here.
template <int G, int N>
OCT_INLINE void weigh_pairs(const oct_kv_cache& cache, const int64_t* rows, int64_t count, const Ahead& ahead,
                            int64_t dim, int64_t c, const uint16_t* p, const float* factor, float* acc) {
  // Unpacking two rows leaves quarters 0, 2, 4, 6 of the 32 columns in one vector and 1, 3, 5, 7 in the other.
  const VI low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const VI high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const VI even = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const VI odd = _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  VF sum[G][N][2];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      VF first = f_mul(f_load(acc + g * dim + c + 32 * n), f_set(factor[g]));
      VF second = f_mul(f_load(acc + g * dim + c + 32 * n + 16), f_set(factor[g]));
      sum[g][n][0] = _mm512_permutex2var_ps(first, even, second);
      sum[g][n][1] = _mm512_permutex2var_ps(first, odd, second);
    }
  const uint16_t* values = (const uint16_t*)cache.value;
  for (int64_t k = 0; k < count; k += 2) {  // rows beyond the last repeat it, with weight 0
    if (c == 0) {
      prefetch_rows<OCT_KV_BF16>(cache.value, ahead, k, dim);
      prefetch_rows<OCT_KV_BF16>(cache.value, ahead, k + 1, dim);
    }
    __m512bh pairs[N][2];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      VB a = _mm512_loadu_si512(values + rows[k] * dim + c + 32 * n);
      VB b = _mm512_loadu_si512(values + rows[k + 1] * dim + c + 32 * n);
      pairs[n][0] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      pairs[n][1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      int32_t two;
      memcpy(&two, p + g * kDecodeKeys + k, 4);
      __m512bh weight = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        sum[g][n][0] = _mm512_dpbf16_ps(sum[g][n][0], pairs[n][0], weight);
        sum[g][n][1] = _mm512_dpbf16_ps(sum[g][n][1], pairs[n][1], weight);
      }
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; g++)
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      f_store(acc + g * dim + c + 32 * n, _mm512_permutex2var_ps(sum[g][n][0], low, sum[g][n][1]));
      f_store(acc + g * dim + c + 32 * n + 16, _mm512_permutex2var_ps(sum[g][n][0], high, sum[g][n][1]));
    }
}

template <int G>
OCT_INLINE void weigh_all_pairs(const oct_kv_cache& cache, const int64_t* rows, int64_t count, const Ahead& ahead,
                                int64_t dim, const uint16_t* p, const float* factor, float* acc) {
  int64_t c = 0;
  for (; c + 64 <= dim; c += 64) weigh_pairs<G, 2>(cache, rows, count, ahead, dim, c, p, factor, acc);
  for (; c < dim; c += 32) weigh_pairs<G, 1>(cache, rows, count, ahead, dim, c, p, factor, acc);
}
#endif

// Runs call<G>(g) for groups of up to four heads.
#define OCT_HEADS(group, CALL)                             \
  {                                                        \
    int64_t g = 0;                                         \
    for (; g + 4 <= (group); g += 4) CALL(4);              \
    if ((group) - g == 3) CALL(3);                         \
    else if ((group) - g == 2) CALL(2);                    \
    else if ((group) - g == 1) CALL(1);                    \
  }

template <int DType, bool Pairs>
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
  int64_t stretch = stretch_of(task);
  for (int64_t first = task.key_begin, turn = 0; first < task.key_end; first += stretch, turn ^= 1) {
    int64_t* rows = both[turn].rows;
    Ahead& ahead = both[turn ^ 1];
    int64_t count = both[turn].count, padded = (count + 15) & ~15;
    for (int64_t i = count; i < padded; i++) rows[i] = rows[count - 1];
    if (first + stretch < task.key_end) look_ahead(a, batch, task, first + stretch, ahead);
    else if (next) look_ahead(a, batch, *next, next->key_begin, ahead);
    else ahead.count = 0;
    ahead.each = (ahead.count + count - 1) / count;
    for (int64_t i = 0; i < padded; i += 16) {
#ifdef __AVX512BF16__
      if constexpr (Pairs) {
        score16_pairs(a, cache, rows, i, ahead, (const uint16_t*)query, group, scores + i, kDecodeKeys);
        continue;
      }
#endif
      score16<DType>(a, cache, rows, i, ahead, query, group, scores + i, kDecodeKeys);
    }
    for (int64_t g = 0; g < group; g++) {
      float* row = scores + g * kDecodeKeys;
      for (int64_t i = count; i < padded; i++) row[i] = -INFINITY;
      factor[g] = soften(row, padded, maximum + g, sum + g);
      if constexpr (DType == OCT_KV_INT8)
        for (int64_t i = 0; i < count; i++) row[i] *= cache.value_scale[rows[i]];
    }
#ifdef __AVX512BF16__
    if constexpr (Pairs) {
      uint16_t weights[kMaxGroup * kDecodeKeys];
      for (int64_t g = 0; g < group; g++)
        for (int64_t i = 0; i < padded; i += 16)
          f_store_bf16(weights + g * kDecodeKeys + i, f_load(scores + g * kDecodeKeys + i));
#define OCT_WEIGH(G) \
  weigh_all_pairs<G>(cache, rows, count, ahead, dim, weights + g * kDecodeKeys, factor + g, acc + g * dim)
      OCT_HEADS(group, OCT_WEIGH)
#undef OCT_WEIGH
      continue;
    }
#endif
#define OCT_WEIGH(G) \
  weigh_values<DType, G>(cache, rows, count, ahead, dim, scores + g * kDecodeKeys, factor + g, acc + g * dim)
    OCT_HEADS(group, OCT_WEIGH)
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
#undef OCT_HEADS

static void attend_decode(const oct_attention& a, const oct_batch& batch, const oct_kv_cache& cache,
                          const AttentionTask& task, const AttentionTask* next, const float* query, float* out,
                          float* partials) {
  alignas(64) float scaled[kMaxGroup * kMaxHeadDim];
  scale_query(a, query, scaled);
  switch (batch.kv_dtype) {
    case OCT_KV_F32: return decode_of<OCT_KV_F32, false>(a, batch, cache, task, next, scaled, out, partials);
    case OCT_KV_F16: return decode_of<OCT_KV_F16, false>(a, batch, cache, task, next, scaled, out, partials);
    case OCT_KV_INT8: return decode_of<OCT_KV_INT8, false>(a, batch, cache, task, next, scaled, out, partials);
    default: break;
  }
  if (kHasBf16Dot && a.bf16_products && a.head_dim % 32 == 0) {
    int64_t count = (int64_t)(a.num_heads / a.num_kv_heads) * a.head_dim;
    for (int64_t i = 0; i < count; i += 16) f_store_bf16((uint16_t*)scaled + i, f_load(scaled + i));  // in place
    return decode_of<OCT_KV_BF16, kHasBf16Dot>(a, batch, cache, task, next, scaled, out, partials);
  }
  decode_of<OCT_KV_BF16, false>(a, batch, cache, task, next, scaled, out, partials);
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
