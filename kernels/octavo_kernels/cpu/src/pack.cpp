// Repacking of rows as files hold them into panels (see octavo_cpu.h for the layout, gguf_types.py for GGML's blocks).
#include <cstring>

#include "dispatch.h"
#include "pool.h"

namespace {

enum Ggml { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14,
            IQ4_NL = 20, IQ4_XS = 23, MXFP4 = 39 };

// One row's block of 32 columns, taken apart.
struct Parts {
  uint8_t codes[32];
};

void nibbles(const uint8_t* packed, uint8_t* codes) {
  for (int i = 0; i < 16; i++) codes[i] = packed[i] & 15, codes[i + 16] = packed[i] >> 4;
}
void fifth_bits(const uint8_t* bits, uint8_t* codes) {
  for (int i = 0; i < 32; i++) codes[i] |= ((bits[i / 8] >> (i % 8)) & 1) << 4;
}

// Codes of lane `lane` of a panel into its block.
void put_codes(uint8_t* block, int kind, int lane, const uint8_t* codes) {
  for (int g = 0; g < 8; g++) {
    for (int j = 0; j < 4; j++) {
      int at = 4 * lane + j;
      uint8_t code = codes[4 * g + j];
      if (kind == OCT_U8) {
        block[64 * g + at] = code;
        continue;
      }
      if (kind == OCT_U2) {
        block[64 * (g & 1) + at] |= (uint8_t)(code << (2 * (g >> 1)));
        continue;
      }
      block[64 * (g & 3) + at] |= (uint8_t)((code & 15) << (g < 4 ? 0 : 4));
      if (kind == OCT_U5) block[256 + at] |= (uint8_t)((code >> 4) << g);
      if (kind == OCT_U6) block[256 + 64 * (g >> 2) + at] |= (uint8_t)((code >> 4) << (2 * (g & 3)));
    }
  }
}

void put_half(uint8_t* vector, int lane, const uint8_t* half) { memcpy(vector + 2 * lane, half, 2); }

// The simple types: one block of 32, f16 d (and m) first.
void pack_simple_block(int type, const uint8_t* in, int kind, int lane, uint8_t* codes_out, uint8_t* scales_out) {
  uint8_t codes[32];
  switch (type) {
    case Q4_0:
    case IQ4_NL: nibbles(in + 2, codes); break;
    case Q4_1: nibbles(in + 4, codes); break;
    case Q5_0: nibbles(in + 6, codes), fifth_bits(in + 2, codes); break;
    case Q5_1: nibbles(in + 8, codes), fifth_bits(in + 4, codes); break;
    default:
      for (int i = 0; i < 32; i++) codes[i] = (uint8_t)(in[2 + i] + 128);
  }
  put_codes(codes_out, kind, lane, codes);
  put_half(scales_out, lane, in);
  if (type == Q4_1 || type == Q5_1) put_half(scales_out + 32, lane, in + 2);
}

// Q4_K and Q5_K: d, dmin, 12 bytes of 6-bit scales and minima, (fifth bits,) nibbles.
void pack_k_affine(int type, const uint8_t* in, int kind, int lane, uint8_t* codes_out, uint8_t* scales_out) {
  put_half(scales_out, lane, in);
  put_half(scales_out + 32, lane, in + 2);
  const uint8_t* packed = in + 4;
  const uint8_t* high = in + 16;
  const uint8_t* low = in + (type == Q5_K ? 48 : 16);
  for (int b = 0; b < 8; b++) {
    uint8_t scale, minimum;
    if (b < 4) {
      scale = packed[b] & 63, minimum = packed[b + 4] & 63;
    } else {
      scale = (uint8_t)((packed[b + 4] & 15) | ((packed[b - 4] >> 2) & 0x30));
      minimum = (uint8_t)((packed[b + 4] >> 4) | ((packed[b] >> 2) & 0x30));
    }
    scales_out[64 + 32 * b + lane] = scale;
    scales_out[64 + 32 * b + 16 + lane] = minimum;
    uint8_t codes[32];
    for (int i = 0; i < 32; i++) {
      codes[i] = b & 1 ? low[32 * (b / 2) + i] >> 4 : low[32 * (b / 2) + i] & 15;
      if (type == Q5_K) codes[i] |= (uint8_t)(((high[i] >> b) & 1) << 4);
    }
    put_codes(codes_out + b * block_code_bytes(kind), kind, lane, codes);
  }
}

// Q6_K: 128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d.
void pack_q6_k(const uint8_t* in, int kind, int lane, uint8_t* codes_out, uint8_t* scales_out) {
  put_half(scales_out, lane, in + 208);
  for (int b = 0; b < 8; b++) {
    int half = b / 4, quarter = b % 4;  // halves of 128 columns; in each, 64 bytes of nibbles and 32 of pairs
    const uint8_t* low = in + 64 * half + 32 * (quarter & 1);
    const uint8_t* high = in + 128 + 32 * half;
    uint8_t codes[32];
    for (int i = 0; i < 32; i++) {
      uint8_t nibble = quarter < 2 ? low[i] & 15 : low[i] >> 4;
      codes[i] = (uint8_t)(nibble | (((high[i] >> (2 * quarter)) & 3) << 4));
    }
    put_codes(codes_out + b * block_code_bytes(kind), kind, lane, codes);
    for (int h = 0; h < 2; h++) scales_out[32 + 32 * b + 16 * h + lane] = in[192 + 2 * b + h];
  }
}

// Q3_K: 32 bytes of high bits, 64 of low pairs, 12 of 6-bit scales, d; a code is its three bits, minus 4.
void pack_q3_k(const uint8_t* in, int kind, int lane, uint8_t* codes_out, uint8_t* scales_out) {
  put_half(scales_out, lane, in + 108);
  const uint8_t* packed = in + 96;
  for (int b = 0; b < 8; b++) {
    const uint8_t* low = in + 32 + 32 * (b / 4);
    uint8_t codes[32];
    for (int i = 0; i < 32; i++)
      codes[i] = (uint8_t)(((low[i] >> (2 * (b % 4))) & 3) | (((in[i] >> b) & 1) << 2));
    put_codes(codes_out + b * block_code_bytes(kind), kind, lane, codes);
    for (int h = 0; h < 2; h++) {
      int s = 2 * b + h;
      int scale = (s < 8 ? packed[s] & 15 : packed[s - 8] >> 4) | (((packed[8 + s % 4] >> (2 * (s / 4))) & 3) << 4);
      scales_out[32 + 32 * b + 16 * h + lane] = (uint8_t)(int8_t)(scale - 32);
    }
  }
}

// Q2_K: 16 bytes of 4-bit scales and minima, 64 of codes, d, dmin.
void pack_q2_k(const uint8_t* in, int kind, int lane, uint8_t* codes_out, uint8_t* scales_out) {
  put_half(scales_out, lane, in + 80);
  put_half(scales_out + 32, lane, in + 82);
  for (int b = 0; b < 8; b++) {
    const uint8_t* packed = in + 16 + 32 * (b / 4);
    uint8_t codes[32];
    for (int i = 0; i < 32; i++) codes[i] = (packed[i] >> (2 * (b % 4))) & 3;
    put_codes(codes_out + b * block_code_bytes(kind), kind, lane, codes);
    for (int h = 0; h < 2; h++) {
      scales_out[64 + 64 * b + 32 * h + lane] = in[2 * b + h] & 15;
      scales_out[64 + 64 * b + 32 * h + 16 + lane] = in[2 * b + h] >> 4;
    }
  }
}

// IQ4_XS: d, 16 bits of high pairs and 4 bytes of low nibbles of eight 6-bit scales, nibbles of codes.
void pack_iq4_xs(const uint8_t* in, int kind, int lane, uint8_t* codes_out, uint8_t* scales_out) {
  put_half(scales_out, lane, in);
  for (int b = 0; b < 8; b++) {
    int low = (in[4 + b / 2] >> (4 * (b & 1))) & 15, high = (in[2 + b / 4] >> (2 * (b % 4))) & 3;
    uint8_t codes[32];
    nibbles(in + 8 + 16 * b, codes);
    put_codes(codes_out + b * block_code_bytes(kind), kind, lane, codes);
    for (int h = 0; h < 2; h++) scales_out[32 + 32 * b + 16 * h + lane] = (uint8_t)(int8_t)((low | high << 4) - 32);
  }
}

// MXFP4: the scale's exponent, then nibbles.
void pack_mxfp4(const uint8_t* in, int kind, int lane, uint8_t* codes_out, uint8_t* scales_out) {
  uint8_t codes[32];
  nibbles(in + 1, codes);
  put_codes(codes_out, kind, lane, codes);
  scales_out[lane] = in[0];
}

struct Source {
  int columns;
  int bytes;
};
Source source_of(int type) {
  switch (type) {
    case Q4_0: return {32, 18};
    case Q4_1: return {32, 20};
    case Q5_0: return {32, 22};
    case Q5_1: return {32, 24};
    case Q8_0: return {32, 34};
    case IQ4_NL: return {32, 18};
    case MXFP4: return {32, 17};
    case Q2_K: return {256, 84};
    case Q3_K: return {256, 110};
    case IQ4_XS: return {256, 136};
    case Q4_K: return {256, 144};
    case Q5_K: return {256, 176};
    case Q6_K: return {256, 210};
    default: return {0, 0};
  }
}

void pack_panel(int type, const uint8_t* data, const oct_matrix& w, int64_t panel) {
  Source source = source_of(type);
  int64_t pieces = w.columns / source.columns, row_bytes = pieces * source.bytes;
  int64_t code_step = source.columns / kBlock * block_code_bytes(w.code_kind);
  int64_t scale_step = group_scale_bytes(w.scale_kind);
  uint8_t* codes = const_cast<uint8_t*>(w.codes) + panel * panel_code_bytes(w);
  uint8_t* scales = const_cast<uint8_t*>(w.scales) + panel * panel_scale_bytes(w);
  memset(codes, 0, panel_code_bytes(w));
  memset(scales, 0, panel_scale_bytes(w));
  for (int lane = 0; lane < kPanel && panel * kPanel + lane < w.rows; lane++) {
    const uint8_t* row = data + (panel * kPanel + lane) * row_bytes;
    for (int64_t p = 0; p < pieces; p++) {
      const uint8_t* in = row + p * source.bytes;
      uint8_t* c = codes + p * code_step;
      uint8_t* s = scales + p * scale_step;
      switch (type) {
        case Q4_K:
        case Q5_K: pack_k_affine(type, in, w.code_kind, lane, c, s); break;
        case Q6_K: pack_q6_k(in, w.code_kind, lane, c, s); break;
        case Q2_K: pack_q2_k(in, w.code_kind, lane, c, s); break;
        case Q3_K: pack_q3_k(in, w.code_kind, lane, c, s); break;
        case IQ4_XS: pack_iq4_xs(in, w.code_kind, lane, c, s); break;
        case MXFP4: pack_mxfp4(in, w.code_kind, lane, c, s); break;
        default: pack_simple_block(type, in, w.code_kind, lane, c, s);
      }
    }
  }
}

void pack_dense_panel(bool source_is_bf16, const void* data, int64_t columns, const oct_matrix& w, int64_t panel) {
  uint8_t* codes = const_cast<uint8_t*>(w.codes) + panel * panel_code_bytes(w);
  memset(codes, 0, panel_code_bytes(w));
  for (int lane = 0; lane < kPanel && panel * kPanel + lane < w.rows; lane++) {
    int64_t start = (panel * kPanel + lane) * columns;
    for (int64_t k = 0; k < columns; k++) {
      if (source_is_bf16) reinterpret_cast<uint16_t*>(codes)[32 * (k / 2) + 2 * lane + k % 2] =
          static_cast<const uint16_t*>(data)[start + k];
      else reinterpret_cast<float*>(codes)[16 * k + lane] = static_cast<const float*>(data)[start + k];
    }
  }
}

}  // namespace

extern "C" int64_t oct_codes_bytes(int code_kind, int64_t rows, int64_t columns) {
  return (rows + kPanel - 1) / kPanel * (columns / kBlock) * block_code_bytes(code_kind);
}

extern "C" int64_t oct_scales_bytes(int scale_kind, int64_t rows, int64_t columns) {
  oct_matrix shape{};
  shape.scale_kind = scale_kind;
  shape.columns = columns;
  return (rows + kPanel - 1) / kPanel * panel_scale_bytes(shape);
}

extern "C" int oct_pack_gguf(int ggml_type, const uint8_t* data, oct_matrix* matrix) {
  if (source_of(ggml_type).columns == 0) return -1;
  auto body = [&](Member& member) {
    member.each(panels_of(*matrix), [&](int64_t panel) { pack_panel(ggml_type, data, *matrix, panel); });
  };
  run_team(body);
  return 0;
}

extern "C" int oct_pack_dense(int source_is_bf16, const void* data, int64_t source_columns, oct_matrix* matrix) {
  auto body = [&](Member& member) {
    member.each(panels_of(*matrix),
                [&](int64_t panel) { pack_dense_panel(source_is_bf16, data, source_columns, *matrix, panel); });
  };
  run_team(body);
  return 0;
}

extern "C" int oct_unpack_rows(const oct_matrix* matrix, const int64_t* ids, int64_t count, int64_t columns, float* out) {
  const KernelTable& table = kernels();
  auto body = [&](Member& member) {
    member.each(count, [&](int64_t i) {
      table.unpack_row(*matrix, ids ? ids[i] : i, columns, 1.0f, out + i * columns);
    });
  };
  run_team(body);
  return 0;
}
