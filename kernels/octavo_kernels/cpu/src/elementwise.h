// Norms, gated activations, rotary embedding, cache writes, and the layouts in which products want their activations.
#pragma once
#include <math.h>

#include "kernels.h"
#include "vector_math.h"

namespace OCT_ISA {

// Sixteen floats from p, zeros where fewer than 16 are left.
OCT_INLINE VF f_load_part(const float* p, int64_t left) {
  if (left >= 16) return f_load(p);
  float lanes[16] = {0};
  for (int64_t i = 0; i < left; i++) lanes[i] = p[i];
  return f_load(lanes);
}
OCT_INLINE void f_store_part(float* p, VF x, int64_t left) {
  if (left >= 16) return f_store(p, x);
  float lanes[16];
  f_store(lanes, x);
  for (int64_t i = 0; i < left; i++) p[i] = lanes[i];
}

// Writes 32 columns of token `m` of a tile of `size` into the layouts of `kinds`.
OCT_INLINE void put_block(VF low, VF high, int64_t block, int m, const Tile& tile, int kinds, const Activations& out) {
  int64_t blocks = out.columns / kBlock, base = tile.start * out.columns + block * kBlock * tile.size;
  int size = tile.size;
  if (kinds & kActInt8) {
    float largest = f_largest(f_max(f_abs(low), f_abs(high)));
    float inverse = largest > 0 ? 127.0f / largest : 0.0f, scale = largest / 127.0f;
    VI first = f_round(f_mul(low, f_set(inverse))), second = f_round(f_mul(high, f_set(inverse)));
    int8_t* codes = out.int8 + base;
    alignas(32) int8_t lanes[32];
    i_store_i8(lanes, first);
    i_store_i8(lanes + 16, second);
    if (size == 1) memcpy(codes, lanes, 32);
    else
      for (int g = 0; g < 8; g++) memcpy(codes + (g * size + m) * 4, lanes + 4 * g, 4);
    int64_t at = tile.start * blocks + block * size + m;
    out.scale[at] = scale;
    out.sum_low[at] = scale * (float)i_sum(first);
    out.sum[at] = scale * (float)i_sum(i_add(first, second));
  }
  if (kinds & kActF32) {
    float* p = out.f32 + base;
    if (size == 1) {
      f_store(p, low);
      f_store(p + 16, high);
    } else {
      float lanes[32];
      f_store(lanes, low);
      f_store(lanes + 16, high);
      for (int k = 0; k < kBlock; k++) p[k * size + m] = lanes[k];
    }
  }
  if (kinds & kActBf16) {
    uint16_t* p = out.bf16 + base;
    uint16_t lanes[32];
    f_store_bf16(lanes, low);
    f_store_bf16(lanes + 16, high);
    for (int k = 0; k < 16; k++) memcpy(p + (k * size + m) * 2, lanes + 2 * k, 4);
  }
}

OCT_INLINE float inverse_rms(const float* x, int64_t dim, float eps) {
  VF a = f_zero(), b = f_zero();
  int64_t i = 0;
  for (; i + 32 <= dim; i += 32) {
    VF u = f_load(x + i), v = f_load(x + i + 16);
    a = f_fma(u, u, a);
    b = f_fma(v, v, b);
  }
  for (; i < dim; i += 16) {
    VF u = f_load_part(x + i, dim - i);
    a = f_fma(u, u, a);
  }
  return 1.0f / sqrtf(f_sum(f_add(a, b)) / (float)dim + eps);
}

static void prepare(const float* x, int64_t stride, int64_t dim, const float* norm, float eps, const Tile& tile,
                    const int32_t* rows, int kinds, const Activations& out) {
  for (int m = 0; m < tile.size; m++) {
    const float* row = x + (rows ? rows[tile.start + m] : tile.start + m) * stride;
    VF factor = f_set(norm ? inverse_rms(row, dim, eps) : 1.0f);
    for (int64_t block = 0; block < out.columns / kBlock; block++) {
      int64_t i = block * kBlock;
      VF low = f_load_part(row + i, dim - i), high = f_load_part(row + i + 16, dim - i - 16);
      if (norm) {
        low = f_mul(f_mul(low, factor), f_load_part(norm + i, dim - i));
        high = f_mul(f_mul(high, factor), f_load_part(norm + i + 16, dim - i - 16));
      }
      put_block(low, high, block, m, tile, kinds, out);
    }
  }
}

static void gate(const float* gates, const float* ups, bool gelu, const Tile& tile, int64_t column, int kinds,
                 const Activations& out) {
  for (int m = 0; m < tile.size; m++) {
    VF low = f_load(gates + 32 * m), high = f_load(gates + 32 * m + 16);
    low = f_mul(gelu ? f_gelu(low) : f_silu(low), f_load(ups + 32 * m));
    high = f_mul(gelu ? f_gelu(high) : f_silu(high), f_load(ups + 32 * m + 16));
    put_block(low, high, column / kBlock, m, tile, kinds, out);
  }
}

static void rms_norm(const float* x, const float* weight, int64_t dim, float eps, float* out) {
  VF factor = f_set(inverse_rms(x, dim, eps));
  for (int64_t i = 0; i < dim; i += 16) {
    int64_t left = dim - i;
    f_store_part(out + i, f_mul(f_mul(f_load_part(x + i, left), factor), f_load_part(weight + i, left)), left);
  }
}

static void gated(const float* gates, const float* ups, int64_t dim, bool gelu, float* out) {
  for (int64_t i = 0; i < dim; i += 16) {
    VF g = f_load_part(gates + i, dim - i);
    f_store_part(out + i, f_mul(gelu ? f_gelu(g) : f_silu(g), f_load_part(ups + i, dim - i)), dim - i);
  }
}

static void rope_heads(const oct_attention& a, const float* norm, int64_t heads, int64_t position, float* x) {
  int64_t half = a.rotary_dim / 2;
  const float* cosines = a.cos_sin + position * a.rotary_dim;
  const float* sines = cosines + half;
  for (int64_t h = 0; h < heads; h++, x += a.head_dim) {
    if (norm) rms_norm(x, norm, a.head_dim, a.eps, x);
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
      VF low = f_load(x + i), high = f_load(x + half + i), c = f_load(cosines + i), s = f_load(sines + i);
      f_store(x + i, f_sub(f_mul(low, c), f_mul(high, s)));
      f_store(x + half + i, f_fma(high, c, f_mul(low, s)));
    }
    for (; i < half; i++) {
      float low = x[i], high = x[half + i];
      x[i] = low * cosines[i] - high * sines[i];
      x[half + i] = high * cosines[i] + low * sines[i];
    }
  }
}

OCT_INLINE void store_row(int dtype, const float* x, int64_t dim, void* data, float* scales, int64_t row) {
  float inverse = 1.0f;
  if (dtype == OCT_KV_INT8) {
    VF largest = f_zero();
    for (int64_t i = 0; i < dim; i += 16) largest = f_max(largest, f_abs(f_load(x + i)));
    float limit = f_largest(largest), scale = limit > 0 ? limit / 127.0f : 1.0f;
    scales[row] = scale;
    inverse = 1.0f / scale;
  }
  int64_t at = row * dim;
  for (int64_t i = 0; i < dim; i += 16) {
    VF v = f_load(x + i);
    if (dtype == OCT_KV_F32) f_store((float*)data + at + i, v);
    else if (dtype == OCT_KV_BF16) f_store_bf16((uint16_t*)data + at + i, v);
    else if (dtype == OCT_KV_F16) f_store_f16((uint16_t*)data + at + i, v);
    else i_store_i8((int8_t*)data + at + i, f_round(f_mul(v, f_set(inverse))));
  }
}

static void store_kv(const oct_attention& a, int dtype, int64_t block_size, int64_t slot, const oct_kv_cache& cache,
                     int64_t head, const float* key, const float* value) {
  int64_t row = (slot / block_size * a.num_kv_heads + head) * block_size + slot % block_size;
  store_row(dtype, key, a.head_dim, cache.key, cache.key_scale, row);
  store_row(dtype, value, a.head_dim, cache.value, cache.value_scale, row);
}

}  // namespace OCT_ISA
