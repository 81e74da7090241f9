// One row of a packed matrix back as floats: embeddings, dequantization, tests.
#pragma once
#include "kernels.h"
#include "linear.h"

namespace OCT_ISA {

template <int CodeKind, int ScaleKind>
static void unpack_of(const oct_matrix& w, int64_t row, int64_t columns, float factor, float* out) {
  int64_t panel = row / kPanel, lane = row % kPanel;
  const uint8_t* codes = w.codes + panel * panel_code_bytes(w);
  const uint8_t* scales = w.scales + panel * panel_scale_bytes(w);
  float scale[16], offset[16], scale_high[16], offset_high[16];
  for (int64_t b = 0; b * kBlock < columns; b++) {
    int64_t count = columns - b * kBlock < kBlock ? columns - b * kBlock : kBlock;
    float* to = out + b * kBlock;
    if constexpr (CodeKind == OCT_F32) {
      for (int64_t k = 0; k < count; k++) to[k] = factor * ((const float*)(codes + b * 2048))[16 * k + lane];
    } else if constexpr (CodeKind == OCT_BF16) {
      const uint16_t* p = (const uint16_t*)(codes + b * 1024);
      for (int64_t k = 0; k < count; k++) {
        uint32_t bits = (uint32_t)p[32 * (k / 2) + 2 * lane + k % 2] << 16;
        float x;
        memcpy(&x, &bits, 4);
        to[k] = factor * x;
      }
    } else {
      const uint8_t* p = codes + b * Codes<CodeKind>::kBytes;
      BlockScales s = scales_at<ScaleKind>(scales, b, (float)w.zero);
      f_store(scale, s.scale);
      f_store(offset, s.offset);
      constexpr bool kHalves = kHalvesOf<ScaleKind>;
      if constexpr (kHalves) f_store(scale_high, s.scale_high), f_store(offset_high, s.offset_high);
      for (int64_t k = 0; k < count; k++) {
        int64_t g = k / 4, at = 4 * lane + k % 4;
        int code;
        if constexpr (CodeKind == OCT_U8) code = p[64 * g + at];
        else if constexpr (CodeKind == OCT_U2) code = (p[64 * (g & 1) + at] >> (2 * (g >> 1))) & 3;
        else code = (p[64 * (g & 3) + at] >> (g < 4 ? 0 : 4)) & 15;
        if constexpr (CodeKind == OCT_U5) code |= ((p[256 + at] >> g) & 1) << 4;
        if constexpr (CodeKind == OCT_U6) code |= ((p[256 + 64 * (g >> 2) + at] >> (2 * (g & 3))) & 3) << 4;
        if constexpr (CodeKind == OCT_NL4 || CodeKind == OCT_FP4) code = Codes<CodeKind>::kValues[code];
        bool high = kHalves && k >= 16;
        to[k] = factor * ((high ? scale_high : scale)[lane] * (float)code + (high ? offset_high : offset)[lane]);
      }
    }
  }
}

static void unpack_row(const oct_matrix& w, int64_t row, int64_t columns, float factor, float* out) {
  switch (w.code_kind * 8 + w.scale_kind) {
    case OCT_F32 * 8: return unpack_of<OCT_F32, OCT_NONE>(w, row, columns, factor, out);
    case OCT_BF16 * 8: return unpack_of<OCT_BF16, OCT_NONE>(w, row, columns, factor, out);
    case OCT_U4 * 8 + OCT_D: return unpack_of<OCT_U4, OCT_D>(w, row, columns, factor, out);
    case OCT_U4 * 8 + OCT_DM: return unpack_of<OCT_U4, OCT_DM>(w, row, columns, factor, out);
    case OCT_U4 * 8 + OCT_K_DM: return unpack_of<OCT_U4, OCT_K_DM>(w, row, columns, factor, out);
    case OCT_U4 * 8 + OCT_K_D16: return unpack_of<OCT_U4, OCT_K_D16>(w, row, columns, factor, out);
    case OCT_U5 * 8 + OCT_D: return unpack_of<OCT_U5, OCT_D>(w, row, columns, factor, out);
    case OCT_U5 * 8 + OCT_DM: return unpack_of<OCT_U5, OCT_DM>(w, row, columns, factor, out);
    case OCT_U5 * 8 + OCT_K_DM: return unpack_of<OCT_U5, OCT_K_DM>(w, row, columns, factor, out);
    case OCT_U6 * 8 + OCT_K_D16: return unpack_of<OCT_U6, OCT_K_D16>(w, row, columns, factor, out);
    case OCT_U8 * 8 + OCT_DM: return unpack_of<OCT_U8, OCT_DM>(w, row, columns, factor, out);
    case OCT_U2 * 8 + OCT_K_DM16: return unpack_of<OCT_U2, OCT_K_DM16>(w, row, columns, factor, out);
    case OCT_NL4 * 8 + OCT_D: return unpack_of<OCT_NL4, OCT_D>(w, row, columns, factor, out);
    case OCT_NL4 * 8 + OCT_K_D16: return unpack_of<OCT_NL4, OCT_K_D16>(w, row, columns, factor, out);
    case OCT_FP4 * 8 + OCT_E8: return unpack_of<OCT_FP4, OCT_E8>(w, row, columns, factor, out);
    default: return unpack_of<OCT_U8, OCT_D>(w, row, columns, factor, out);
  }
}

}  // namespace OCT_ISA
