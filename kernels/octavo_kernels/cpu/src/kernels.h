// What an instruction set offers to the code that orchestrates: one table of functions, built once per instruction set.
#pragma once
#include <stdint.h>

#include "octavo_cpu.h"

constexpr int kPanel = 16;      // output rows computed together
constexpr int kBlock = 32;      // input columns that share an activation scale
constexpr int kSuperBlock = 8;  // blocks in a 256-column K block

// Consecutive tokens multiplied together.
struct Tile {
  int32_t start;
  int32_t size;  // 1, 2, 4 or 8
};

// Activations of several tokens, laid out for products. Everything of the tile that starts at token t lies at offset
// t * columns (or t * columns / 32): int8 [block][group of 4][token][4], float [column][token], bf16 [pair][token][2];
// scales [block][token].
struct Activations {
  int8_t* int8;
  float* scale;     // of the int8 codes
  float* sum;       // scale * sum of the block's codes
  float* sum_low;   // the same over the first 16 columns of the block
  float* f32;
  uint16_t* bf16;
  int64_t columns;  // a multiple of 32
};

constexpr int kActF32 = 1 << OCT_ACT_F32;
constexpr int kActInt8 = 1 << OCT_ACT_INT8;
constexpr int kActBf16 = 1 << OCT_ACT_BF16;

struct Output {
  float* data;  // element [token][row] at data[(rows ? rows[token] : token - first_token) * stride + row - first_row]
  int64_t stride;
  const float* bias;  // [rows] or null
  bool accumulate;    // add to what is there
  int64_t first_token;
  int64_t first_row;
  float soft_cap = 0;  // cap * tanh(value / cap) unless 0; without bias and accumulate
  const int32_t* rows = nullptr;  // where each token's result goes
};

// Queries of one sequence that attend together: tokens first .. first + count - 1 of the batch, one KV head's group.
struct AttentionTask {
  int32_t seq;
  int32_t kv_head;
  int32_t first;
  int32_t count;
  int32_t key_begin;  // keys [key_begin, key_end) of the sequence
  int32_t key_end;
  int32_t partial;    // index of the partial result, or -1 to write the final one
  int32_t cost;
};

struct KernelTable {
  const char* name;
  int max_tile;
  bool bf16_dot;
  // Panels [begin, end) of the matrix for tiles [tile_begin, tile_end). `passes`: tiles that meet these panels in all, in
  // this call or the ones beside it; each fetches its share of the panels that come next.
  void (*linear)(const oct_matrix& w, int64_t begin, int64_t end, const Activations& x, const Tile* tiles,
                 int64_t tile_begin, int64_t tile_end, const Output& out, int64_t passes);
  // RMSNorm (weight may be null: none) of the tile's tokens x[t * stride ..] into the layouts of `kinds`; token t of
  // the tile is row rows[t] of x unless null.
  void (*prepare)(const float* x, int64_t stride, int64_t dim, const float* norm, float eps, const Tile& tile,
                  const int32_t* rows, int kinds, const Activations& out);
  // act(gate) * up for `tile`'s tokens, columns [column, column + 32), from [token][32] buffers into activations.
  void (*gate)(const float* gate, const float* up, bool gelu, const Tile& tile, int64_t column, int kinds,
               const Activations& out);
  void (*rms_norm)(const float* x, const float* weight, int64_t dim, float eps, float* out);
  void (*gated)(const float* gate, const float* up, int64_t dim, bool gelu, float* out);
  void (*rope_heads)(const oct_attention& a, const float* norm, int64_t heads, int64_t position, float* x);
  // One token's key and value [head_dim] of one KV head into its slot.
  void (*store_kv)(const oct_attention& a, int dtype, int64_t block_size, int64_t slot, const oct_kv_cache& cache,
                   int64_t head, const float* key, const float* value);
  // One token: query and out are [group heads][head_dim]. A partial result is [group heads] maxima, [group heads] sums
  // and [group heads][head_dim] of weighted values. `next` (or null): a task whose keys may be fetched meanwhile.
  void (*attend_decode)(const oct_attention& a, const oct_batch& batch, const oct_kv_cache& cache,
                        const AttentionTask& task, const AttentionTask* next, const float* query, float* out,
                        float* partials);
  // Several tokens: query and out are [token][num_heads][head_dim] of the whole batch.
  void (*attend_prefill)(const oct_attention& a, const oct_batch& batch, const oct_kv_cache& cache,
                         const AttentionTask& task, const float* query, int64_t query_stride, float* out,
                         int64_t out_stride, float* scratch);
  // Joins the partial results [first, first + count) of one token and KV head into out[group heads][head_dim].
  void (*combine)(const oct_attention& a, int kv_head, const float* partials, int64_t first, int64_t count, float* out);
  void (*unpack_row)(const oct_matrix& w, int64_t row, int64_t columns, float factor, float* out);
  // Rows of logits: see sampling.h.
  int64_t (*best_of)(const float* row, int64_t count, float* best);
  double (*mass_of)(const float* row, int64_t count, float temperature, float top);
  int64_t (*draw)(const float* row, const int32_t* ids, int64_t count, float temperature, uint64_t seed,
                  uint32_t counter);
};

constexpr int kPrefillRows = 96;     // query heads times queries that a prefill task aims at
constexpr int kPrefillKeys = 64;     // keys scored at once by a prefill task
// Floats of scratch that a prefill task of so many rows takes.
constexpr int64_t prefill_scratch(int64_t rows, int64_t head_dim) {
  return rows * (2 * head_dim + kPrefillKeys) + 2 * ((rows + 15) & ~15) + 2 * head_dim * kPrefillKeys;
}
constexpr int kDecodeKeys = 64;      // keys scored at once by a decode task
constexpr int kMaxGroup = 64;        // query heads that share a KV head
constexpr int kMaxHeadDim = 512;

const KernelTable* kernels_portable();
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
const KernelTable* kernels_avx512_bf16();
const KernelTable* kernels_amx();

inline int64_t panels_of(const oct_matrix& w) { return (w.rows + kPanel - 1) / kPanel; }
inline int64_t block_code_bytes(int code_kind) {
  switch (code_kind) {
    case OCT_F32: return 2048;
    case OCT_BF16: return 1024;
    case OCT_U8: return 512;
    case OCT_U2: return 128;
    case OCT_U4:
    case OCT_NL4:
    case OCT_FP4: return 256;
    case OCT_U5: return 320;
    default: return 384;
  }
}
// Bytes of scales for 8 blocks (the K kinds) or 1 block of a panel.
inline int64_t group_scale_bytes(int scale_kind) {
  switch (scale_kind) {
    case OCT_D: return 32;
    case OCT_DM: return 64;
    case OCT_K_DM: return 64 + 8 * 32;
    case OCT_K_D16: return 32 + 16 * 16;
    case OCT_K_DM16: return 64 + 16 * 32;
    case OCT_E8: return 16;
    default: return 0;
  }
}
inline int64_t panel_code_bytes(const oct_matrix& w) { return w.columns / kBlock * block_code_bytes(w.code_kind); }
inline int64_t panel_scale_bytes(const oct_matrix& w) {
  int64_t blocks = w.columns / kBlock;
  bool wide = w.scale_kind == OCT_K_DM || w.scale_kind == OCT_K_D16 || w.scale_kind == OCT_K_DM16;
  return (wide ? blocks / kSuperBlock : blocks) * group_scale_bytes(w.scale_kind);
}
