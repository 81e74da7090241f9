// The kernels built for: avx2.
#define OCT_ISA octavo_avx2
#include "simd_avx2.h"

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "prefill.h"
#include "sampling.h"
#include "unpack.h"

const KernelTable* kernels_avx2() {
  using namespace OCT_ISA;
  static const KernelTable table = {
      "avx2", kMaxTile, kHasBf16Dot, linear, prepare, gate, rms_norm, gated, rope_heads, store_kv, attend_decode,
      attend_prefill, combine, unpack_row, best_of, mass_of, draw,
  };
  return &table;
}
