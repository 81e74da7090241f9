// The kernels built for: avx512.
#define OCT_ISA octavo_avx512
#include "simd_avx512.h"

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "prefill.h"
#include "sampling.h"
#include "unpack.h"

const KernelTable* kernels_avx512() {
  using namespace OCT_ISA;
  static const KernelTable table = {
      "avx512", kMaxTile, kHasBf16Dot, linear, prepare, gate, rms_norm, gated, rope_heads, store_kv, attend_decode,
      attend_prefill, combine, unpack_row, best_of, mass_of, draw,
  };
  return &table;
}
