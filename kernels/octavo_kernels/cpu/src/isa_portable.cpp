// The kernels built for: portable.
#define OCT_ISA octavo_portable
#include "simd_portable.h"

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "prefill.h"
#include "sampling.h"
#include "unpack.h"

const KernelTable* kernels_portable() {
  using namespace OCT_ISA;
  static const KernelTable table = {
      "portable", kMaxTile, kHasBf16Dot, linear, prepare, gate, rms_norm, gated, rope_heads, store_kv, attend_decode,
      attend_prefill, combine, unpack_row, best_of, mass_of, draw,
  };
  return &table;
}
