// From a row of logits to a token: the best one, and the best one under noise that depends on the token alone.
#pragma once
#include <math.h>

#include "kernels.h"
#include "vector_math.h"

namespace OCT_ISA {

OCT_INLINE VF f_load_logits(const float* row, int64_t i, int64_t count) {  // -inf beyond the end
  if (count - i >= 16) return f_load(row + i);
  float lanes[16];
  for (int64_t j = 0; j < 16; j++) lanes[j] = i + j < count ? row[i + j] : -INFINITY;
  return f_load(lanes);
}

// Index of the first greatest entry of row[count]; `*best` is its value, or NaN where the row holds one.
static int64_t best_of(const float* row, int64_t count, float* best) {
  constexpr int64_t kStretch = 1024;
  float largest = -INFINITY;
  int64_t stretch = 0;
  VF spoiled = f_zero();  // x - x is not zero for NaN and infinities
  for (int64_t first = 0; first < count; first += kStretch) {
    int64_t end = count - first < kStretch ? count : first + kStretch;
    VF top = f_set(-INFINITY);
    for (int64_t i = first; i < end; i += 16) {
      VF x = f_load_logits(row, i, count);
      top = f_max(top, x);
      spoiled = f_add(spoiled, f_sub(x, x));
    }
    float found = f_largest(top);
    if (found > largest) largest = found, stretch = first;
  }
  if (f_sum(spoiled) != 0.0f) {  // NaN compares as unequal; infinities are looked at one by one
    for (int64_t i = 0; i < count; i++)
      if (row[i] != row[i]) return *best = NAN, i;
  }
  *best = largest;
  int64_t at = stretch;
  while (at < count && row[at] != largest) at++;
  return at < count ? at : 0;
}

// Sum of exp(row[i] / temperature - top).
static double mass_of(const float* row, int64_t count, float temperature, float top) {
  double total = 0;
  for (int64_t first = 0; first < count; first += 1024) {
    int64_t end = count - first < 1024 ? count : first + 1024;
    VF sum = f_zero();
    for (int64_t i = first; i < end; i += 16) {
      VF shifted = f_sub(f_div(f_load_logits(row, i, count), f_set(temperature)), f_set(top));
      VF kept = f_min(f_max(f_add(shifted, f_set(80.0f)), f_zero()), f_set(1.0f));  // f_exp clamps at -87
      sum = f_add(sum, f_mul(f_exp(shifted), kept));
    }
    total += (double)f_sum(sum);
  }
  return total;
}

// The first word of Philox4x32-10 (Salmon et al., SC 2011) at counter (ids, counter, 0, 0), lane by lane.
OCT_INLINE VI philox(VI ids, uint32_t counter, uint64_t seed) {
  VI c0 = ids, c1 = i_set((int32_t)counter), c2 = i_zero(), c3 = i_zero();
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    VI high0, high2;
    VI low0 = i_multiply(c0, 0xD2511F53u, &high0), low2 = i_multiply(c2, 0xCD9E8D57u, &high2);
    c0 = i_xor(i_xor(high2, c1), i_set((int32_t)k0));
    c1 = low2;
    c2 = i_xor(i_xor(high0, c3), i_set((int32_t)k1));
    c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0;
}

// Gumbel noise of a uniform number in (0, 1].
static inline float gumbel(float u) {
  float waiting = u < 1e-3f ? u + 0.5f * u * u : -logf(1.0f - u);
  return -logf(waiting);
}

// Position of the largest row[i] / temperature + noise of token ids[i] (null: i itself). Whatever noise could not lift
// above the best so far is passed over: the noise of u exceeds g only where u < exp(-g).
static int64_t draw(const float* row, const int32_t* ids, int64_t count, float temperature, uint64_t seed,
                    uint32_t counter) {
  constexpr float kMostNoise = 23.0f;  // of the smallest u, 2^-33
  static const int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  float best = -INFINITY;
  int64_t chosen = 0;
  for (int64_t i = 0; i < count; i += 16) {
    VF x = f_div(f_load_logits(row, i, count), f_set(temperature));
    if (f_largest(x) + kMostNoise < best) continue;
    int32_t names[16];
    if (ids)
      for (int64_t j = 0; j < 16; j++) names[j] = i + j < count ? ids[i + j] : 0;
    VI name = ids ? i_load(names) : i_add(i_load(kLanes), i_set((int32_t)i));
    VF u = f_add(f_mul(f_from_unsigned(philox(name, counter, seed)), f_set(0x1p-32f)), f_set(0x1p-33f));
    VF reach = f_mul(f_exp(f_sub(x, f_set(best == -INFINITY ? -80.0f : best))), f_set(1.0001f));
    if (best > -INFINITY && f_largest(f_sub(reach, u)) < 0.0f) continue;
    float lanes[16], uniforms[16];
    f_store(lanes, x);
    f_store(uniforms, u);
    for (int64_t j = 0; j < 16 && i + j < count; j++) {
      if (lanes[j] == -INFINITY) continue;
      float noisy = lanes[j] + gumbel(uniforms[j]);
      if (noisy > best) best = noisy, chosen = i + j;
    }
  }
  return chosen;
}

}  // namespace OCT_ISA
