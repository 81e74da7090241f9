// The C interface of the library: plain structs, mirrored field by field in `bindings.py`. Nothing throws across it.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define OCT_ABI_VERSION 4

#pragma GCC visibility push(default)

// A weight matrix is stored in panels of 16 output rows; within a panel in blocks of 32 input columns.
// Codes of one block, for the eight groups g of four columns: 64 bytes, byte 4 * row + j for column 4 * g + j.
enum oct_codes {
  OCT_F32 = 0,   // float32, [32 columns][16 rows]: 2048 bytes a block
  OCT_BF16 = 1,  // bfloat16, [16 column pairs][16 rows][2]: 1024 bytes
  OCT_U8 = 2,    // unsigned bytes, [8 groups][64]: 512 bytes
  OCT_U4 = 3,    // group g in the low nibbles and g + 4 in the high nibbles of vector g: 256 bytes
  OCT_U5 = 4,    // as U4, then one vector whose bit g is bit 4 of group g: 320 bytes
  OCT_U6 = 5,    // as U4, then two vectors: bits 2 * (g % 4) .. of vector g / 4 are bits 4 and 5 of group g: 384 bytes
  OCT_U2 = 6,    // bits 2 * (g / 2) .. of vector g % 2 are group g: 128 bytes
  OCT_NL4 = 7,   // as U4, each nibble standing for one of GGML's 16 non-linear values plus 128: 256 bytes
  OCT_FP4 = 8,   // as U4, each nibble an E2M1 number, counted in halves, plus 12: 256 bytes
};
// How codes become weights. All vectors have one entry for each of the 16 rows.
enum oct_scales {
  OCT_NONE = 0,    // dense
  OCT_D = 1,       // each block: f16 d[16]; w = d * (code - zero)
  OCT_DM = 2,      // each block: f16 d[16], m[16]; w = d * code + m
  OCT_K_DM = 3,    // each 8 blocks: f16 d[16], dmin[16], then for each block u8 s[16], n[16]; w = d * s * code - dmin * n
  OCT_K_D16 = 4,   // each 8 blocks: f16 d[16], then for each 16 columns i8 s[16]; w = d * s * (code - zero)
  OCT_K_DM16 = 5,  // each 8 blocks: f16 d[16], dmin[16], then for each 16 columns u8 s[16], n[16]; w as in K_DM
  OCT_E8 = 6,      // each block: u8 e[16]; w = 2^(e - 128) * (code - zero)
};

typedef struct oct_matrix {
  const uint8_t* codes;
  const uint8_t* scales;
  int64_t rows;
  int64_t columns;  // a multiple of 32 (256 for the K kinds), zero-padded
  int32_t code_kind;
  int32_t scale_kind;
  int32_t zero;
  int32_t activations;  // oct_activations this matrix is multiplied with
} oct_matrix;

enum oct_activations { OCT_ACT_F32 = 0, OCT_ACT_INT8 = 1, OCT_ACT_BF16 = 2 };
enum oct_dtype { OCT_KV_F32 = 0, OCT_KV_BF16 = 1, OCT_KV_F16 = 2, OCT_KV_INT8 = 3 };

typedef struct oct_kv_cache {  // [num_blocks, kv_heads, block_size, head_dim]; scales [num_blocks, kv_heads, block_size]
  void* key;
  void* value;
  float* key_scale;
  float* value_scale;
} oct_kv_cache;

typedef struct oct_batch {
  int64_t num_tokens;
  int64_t num_seqs;
  int64_t num_decodes;
  int64_t max_blocks;   // columns of block_tables
  int64_t block_size;
  int64_t num_blocks;
  int32_t kv_dtype;
  int32_t reserved;
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* slot_mapping;
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const int32_t* block_tables;
  const int32_t* adapter_slots;  // of each token, below 0: none; or null
} oct_batch;

typedef struct oct_attention {  // what attention needs to know of a layer
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotary_dim;  // 0: no rotary embedding
  int32_t sliding_window;
  int32_t bf16_products;  // 1: products in bfloat16 (float32 sums) where the cache is bfloat16, in prefill also int8
  int64_t max_positions;  // rows of cos_sin
  float scale;
  float soft_cap;
  float eps;
  int32_t row_norms;     // 1: q_norm and k_norm are of all heads together, [heads * head_dim]
  const float* cos_sin;  // [max_positions, rotary_dim]
  const float* q_norm;   // [head_dim] or null
  const float* k_norm;
  const float* sinks;    // [num_heads] or null
} oct_attention;

#define OCT_MAX_PARTS 3
typedef struct oct_layer {
  oct_attention attention;
  const float* input_norm;  // before attention; or null
  const float* post_attention_norm;  // before the MLP; or null
  const float* attention_out_norm;  // of what attention gives, before it joins the residual stream; or null
  const float* mlp_out_norm;
  const float* qkv_bias;
  const float* output_bias;
  const float* gate_up_bias;
  const float* down_bias;
  oct_matrix qkv[OCT_MAX_PARTS];
  oct_matrix output;
  oct_matrix gate_up[OCT_MAX_PARTS];
  oct_matrix down;
  int32_t num_qkv;
  int32_t num_gate_up;
} oct_layer;

typedef struct oct_model {
  int64_t hidden_size;
  int64_t intermediate_size;
  int64_t vocab_size;
  int64_t num_layers;
  const oct_layer* layers;
  oct_matrix embedding;
  oct_matrix lm_head;
  const float* final_norm;
  float embedding_scale;
  float eps;
  int32_t gelu;  // 0: silu, 1: gelu (tanh)
  float final_soft_cap;  // cap * tanh(logits / cap), 0: none
} oct_model;

// What an adapter adds to a projection of a layer: out[first ..] += scale * up @ (down @ x).
enum oct_place { OCT_IN_QKV = 0, OCT_IN_OUTPUT = 1, OCT_IN_GATE_UP = 2, OCT_IN_DOWN = 3 };
typedef struct oct_low_rank {
  int32_t layer;
  int32_t place;
  int64_t first;  // row of the fused projection; in gate_up a multiple of 32
  float scale;
  float reserved_f;
  oct_matrix down;  // [rank, inputs]
  oct_matrix up;    // [rows, rank], multiplied with float32
} oct_low_rank;

int oct_abi_version(void);
// Best usable instruction set, at most `limit` (a name, or null); returns its name, null if `limit` is not a name.
const char* oct_select_isa(const char* limit);
const char* oct_isa(void);
// Which instruction sets this processor and build can run, best first, separated by spaces.
const char* oct_available_isas(void);
int oct_has_bf16_dot(void);

int oct_set_threads(int threads, int pin);
int oct_threads(void);

// 64-byte aligned memory from huge-page-backed chunks.
void* oct_alloc(int64_t bytes);
void oct_free(void* memory);

int64_t oct_codes_bytes(int code_kind, int64_t rows, int64_t columns);
int64_t oct_scales_bytes(int scale_kind, int64_t rows, int64_t columns);
// Repacks rows of GGML blocks / dense rows into the panels of `matrix` (its buffers already allocated).
int oct_pack_gguf(int ggml_type, const uint8_t* data, oct_matrix* matrix);
int oct_pack_dense(int source_is_bf16, const void* data, int64_t source_columns, oct_matrix* matrix);
// Rows `ids` (or 0 .. count - 1 where null) of the matrix as float32 [count, columns of out].
int oct_unpack_rows(const oct_matrix* matrix, const int64_t* ids, int64_t count, int64_t columns, float* out);

// out[tokens, rows] = x[tokens, columns] @ matrix.T + bias
int oct_linear(const oct_matrix* matrix, const float* x, int64_t tokens, int64_t columns, const float* bias, float* out);
int oct_rms_norm(const float* x, const float* weight, int64_t tokens, int64_t dim, float eps, float* out);
int oct_gated(const float* gate_up, int64_t tokens, int64_t dim, int gelu, float* out);
// In place on query [T, heads, head_dim] and key; writes the cache where given.
int oct_rope_and_store(const oct_attention* attention, const oct_batch* batch, const oct_kv_cache* cache, float* query,
                       float* key, const float* value);
int oct_paged_attention(const oct_attention* attention, const oct_batch* batch, const oct_kv_cache* cache,
                        const float* query, float* out);

// One token a row; arguments and codes of failure are those of `ops.sample`.
int oct_sample(const float* logits, int64_t rows, int64_t vocab, const float* temperature, const int32_t* top_k,
               const float* top_p, const float* min_p, const int64_t* seeds, const int64_t* counters, int64_t* tokens);

void* oct_step_create(const oct_model* model);
void oct_step_destroy(void* step);
// Runs the decoder; logits: [num_logits, vocab_size].
int oct_step_run(void* step, const oct_batch* batch, const oct_kv_cache* caches, const int64_t* logits_indices,
                 int64_t num_logits, float* logits);
// Puts an adapter into a slot in place of what was there; its matrices must outlive their use. count 0 empties the slot.
int oct_step_place_adapter(void* step, int64_t slot, const oct_low_rank* changes, int64_t count);
// Nanoseconds spent in each kind of phase since the last call, while profiling is on (see step.cpp for the kinds).
void oct_step_profile(void* step, int on, int64_t* nanoseconds, int count);

const char* oct_last_error(void);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
