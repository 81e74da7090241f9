"""Dequantization of GGML's block formats, vectorised over blocks (source: block layouts of the GGUF specification)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo_kernels.gguf_types import GGMLType

Blocks = torch.Tensor  # [num_blocks, bytes] uint8

# What a code of the IQ4 types stands for: levels that fit the bell shape of weights (llama.cpp).
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantize_rows(data: torch.Tensor, ggml_type: GGMLType, in_features: int) -> torch.Tensor:
    """Rows of blocks as float32. data: [rows, in_features / block_size * block_bytes] uint8 -> [rows, in_features]."""
    if not ggml_type.is_quantized:
        return data.contiguous().view(_PLAIN[ggml_type]).float()
    blocks = data.reshape(-1, ggml_type.block_bytes)
    return _DEQUANTIZERS[ggml_type](blocks).reshape(data.shape[0], in_features)


def _half(blocks: Blocks, start: int) -> torch.Tensor:
    """The float16 number at byte `start` of every block: [num_blocks, 1] float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low nibbles, then high nibbles: [n, bytes] -> [n, 2 * bytes] uint8."""
    return torch.cat((packed & 0x0F, packed >> 4), dim=-1)


def _fifth_bits(blocks: Blocks, start: int) -> torch.Tensor:
    """The 32 high bits of a 5-bit block, each shifted to bit 4: [n, 32] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = (blocks[:, start : start + 4].unsqueeze(-1) >> shifts) & 1
    return bits.flatten(1) << 4


def _q4_0(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).to(torch.int8) - 8).float()


def _q4_1(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Blocks) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.to(torch.int8) - 16).float()


def _q5_1(blocks: Blocks) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _two_bit_codes(packed: torch.Tensor) -> torch.Tensor:
    """64 bytes of a 256-weight block hold four 2-bit planes for each half of 32 bytes: [n, 64] -> [n, 256] uint8."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device).view(1, 1, 4, 1)
    return ((packed.view(-1, 2, 1, 32) >> shifts) & 3).flatten(1)


def _q2_k(blocks: Blocks) -> torch.Tensor:
    scales, codes = blocks[:, :16], _two_bit_codes(blocks[:, 16:80].contiguous())
    d, dmin = _half(blocks, 80), _half(blocks, 82)
    scale, minimum = d * (scales & 0x0F).float(), dmin * (scales >> 4).float()
    return (scale.unsqueeze(-1) * codes.view(-1, 16, 16).float() - minimum.unsqueeze(-1)).flatten(1)


def q3_k_scales(packed: torch.Tensor) -> torch.Tensor:
    """Sixteen signed 6-bit scales from 12 bytes: low nibbles in bytes 0-7, high pairs in bytes 8-11."""
    low = torch.cat((packed[:, :8] & 0x0F, packed[:, :8] >> 4), dim=1)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device).view(1, 4, 1)
    high = ((packed[:, 8:12].unsqueeze(1) >> shifts) & 3).flatten(1)
    return (low | (high << 4)).to(torch.int8) - 32


def _q3_k(blocks: Blocks) -> torch.Tensor:
    low = _two_bit_codes(blocks[:, 32:96].contiguous())
    planes = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(1, 8, 1)
    high = ((blocks[:, :32].unsqueeze(1) >> planes) & 1).flatten(1)
    codes = low.to(torch.int8) - ((high ^ 1) << 2).to(torch.int8)  # a clear high bit subtracts four
    scale = _half(blocks, 108) * q3_k_scales(blocks[:, 96:108]).float()
    return (scale.unsqueeze(-1) * codes.view(-1, 16, 16).float()).flatten(1)


def _k_scales_and_minima(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight 6-bit scales and eight 6-bit minima from 12 bytes (Q4_K, Q5_K)."""
    first, second, mixed = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)), dim=1)
    minima = torch.cat((second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)), dim=1)
    return scales, minima


def _k_affine(blocks: Blocks, codes: torch.Tensor) -> torch.Tensor:
    """d * scale * code - dmin * minimum with one scale and minimum for 32 codes. codes: [n, 8, 32]."""
    scales, minima = _k_scales_and_minima(blocks[:, 4:16])
    scale, minimum = _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()
    return (scale.unsqueeze(-1) * codes.float() - minimum.unsqueeze(-1)).flatten(1)


def _k_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Four groups of 32 bytes, each holding 32 low nibbles then 32 high ones: [n, 128] -> [n, 8, 32]."""
    groups = packed.reshape(-1, 4, 1, 32)
    return torch.cat((groups & 0x0F, groups >> 4), dim=2).view(-1, 8, 32)


def _q4_k(blocks: Blocks) -> torch.Tensor:
    return _k_affine(blocks, _k_nibbles(blocks[:, 16:]))


def _q5_k(blocks: Blocks) -> torch.Tensor:
    planes = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(1, 8, 1)
    high = (blocks[:, 16:48].unsqueeze(1) >> planes) & 1
    return _k_affine(blocks, _k_nibbles(blocks[:, 48:]) | (high << 4))


def _q6_k(blocks: Blocks) -> torch.Tensor:
    packed = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((packed & 0x0F, packed >> 4), dim=2).view(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(1, 1, 4, 1)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).view(-1, 8, 32)
    codes = (low | (high << 4)).to(torch.int8) - 32
    scale = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    return (scale.unsqueeze(-1) * codes.view(-1, 16, 16).float()).flatten(1)


def _iq4_values(nibbles: torch.Tensor) -> torch.Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=nibbles.device)[nibbles.long()]


def _iq4_nl(blocks: Blocks) -> torch.Tensor:
    return _half(blocks, 0) * _iq4_values(_nibbles(blocks[:, 2:]))


def iq4_xs_scales(blocks: Blocks) -> torch.Tensor:
    """Eight signed scales of each block: low nibbles in bytes 4-7, high pairs in bytes 2-3. [n, 8] float32."""
    pairs = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    halves = torch.tensor([0, 4], dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, 2:4].unsqueeze(-1) >> pairs) & 3).flatten(1)
    low = ((blocks[:, 4:8].unsqueeze(-1) >> halves) & 15).flatten(1)
    return _half(blocks, 0) * ((low | (high << 4)).to(torch.int8) - 32).float()


def _iq4_xs(blocks: Blocks) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:].reshape(-1, 8, 16))
    return (iq4_xs_scales(blocks).unsqueeze(-1) * _iq4_values(codes)).flatten(1)


def _mxfp4(blocks: Blocks) -> torch.Tensor:
    """4-bit floats (E2M1) with a shared power-of-two scale (OCP microscaling formats)."""
    values = torch.tensor(_MXFP4_VALUES, dtype=torch.float32, device=blocks.device)
    scale = torch.exp2(blocks[:, :1].float() - 127.0)
    return scale * values[_nibbles(blocks[:, 1:]).long()]


_PLAIN = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}

_DEQUANTIZERS: dict[GGMLType, Callable[[Blocks], torch.Tensor]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
}
