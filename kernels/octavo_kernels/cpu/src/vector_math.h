// Transcendental functions of sixteen lanes.
#pragma once

namespace OCT_ISA {

// exp(x) within 2 ulp for x in [-87, 88], clamped outside: what lies below is at most 2e-38 (range reduction by ln 2,
// polynomial of the Cephes library).
OCT_INLINE VF f_exp(VF x) {
  x = f_min(f_max(x, f_set(kLeastExponent)), f_set(88.0f));
  VF n = f_whole(f_mul(x, f_set(1.44269504088896341f)));
  VF r = f_fma(n, f_set(-0.693359375f), x);
  r = f_fma(n, f_set(2.12194440e-4f), r);
  VF p = f_set(1.9875691500e-4f);
  p = f_fma(p, r, f_set(1.3981999507e-3f));
  p = f_fma(p, r, f_set(8.3334519073e-3f));
  p = f_fma(p, r, f_set(4.1665795894e-2f));
  p = f_fma(p, r, f_set(1.6666665459e-1f));
  p = f_fma(p, r, f_set(5.0000001201e-1f));
  p = f_fma(f_mul(r, r), p, f_add(r, f_set(1.0f)));
  return f_scale2(p, n);
}
// 2^x for x <= 0 within 3e-6 of the value, finer than a bfloat16 by two orders: least squares on [-0.5, 0.5].
OCT_INLINE VF f_exp2_coarse(VF x) {
  x = f_max(x, f_set(1.44269504f * kLeastExponent));
  VF n = f_whole(x), r = f_sub(x, n);
  VF p = f_fma(r, f_set(9.5605105e-3f), f_set(5.5917040e-2f));
  p = f_fma(p, r, f_set(2.4024981e-1f));
  p = f_fma(p, r, f_set(6.9312197e-1f));
  p = f_fma(p, r, f_set(9.9999917e-1f));
  return f_scale2(p, n);
}
OCT_INLINE VF f_tanh(VF x) {  // 1 - 2 / (exp(2x) + 1)
  VF e = f_exp(f_add(x, x));
  return f_sub(f_set(1.0f), f_div(f_set(2.0f), f_add(e, f_set(1.0f))));
}
OCT_INLINE VF f_capped(VF x, float cap) {  // 0: no cap
  return cap > 0 ? f_mul(f_tanh(f_mul(x, f_set(1.0f / cap))), f_set(cap)) : x;
}
OCT_INLINE VF f_silu(VF x) { return f_div(x, f_add(f_set(1.0f), f_exp(f_sub(f_zero(), x)))); }
OCT_INLINE VF f_gelu(VF x) {  // tanh approximation
  VF inner = f_mul(f_mul(x, f_set(0.7978845608028654f)), f_fma(f_mul(x, x), f_set(0.044715f), f_set(1.0f)));
  return f_mul(f_mul(x, f_set(0.5f)), f_add(f_set(1.0f), f_tanh(inner)));
}

}  // namespace OCT_ISA
