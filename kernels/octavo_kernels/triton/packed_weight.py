"""One storage for every integer-quantized weight on the GPU, made once from GGUF blocks or from `IntWeight`.

A weight is code * scale, or (code * scale - minimum) * row scale where there are minima. Codes are kept in 4 bits,
4 + 2 bits (Q6_K) or 8 bits; the parts lie in separate, dense arrays. What a group of codes needs beside them is one
word of 32 bits, `factors[k / group, n]`, so that a product fetches it like the codes, ahead of time: a float32 scale,
exact for every format, or scale and minimum as two float16 numbers. The latter is exact for Q4_1 and Q5_1; two-level
scales (Q2_K, Q4_K, Q5_K) and scales of other types are multiplied out and rounded once, relative to the power of two
above the row's largest (`row_scale`): by 0.05 % at most.

In the 4-bit forms byte b of a row holds two codes `half` inputs apart: with c = b // half and j = b % half, the low
nibble belongs to input 2 * half * c + j and the high one to the input `half` further. That is GGML's own order
(half 16 in Q4_0, 32 in Q4_K, 64 in Q6_K), so its bytes are only moved.

The bytes of a row are cut into segments, short enough that all low (and all high) codes of a segment share one scale,
and segments of neighbouring rows lie side by side: a tile of rows is one dense piece of memory for every segment, and
a product needs one scale for each row and segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.quantized_weights import IntWeight
from octavo_kernels.reference.gguf_blocks import IQ4_VALUES, iq4_xs_scales, q3_k_scales
from octavo_kernels.weights import GGUFWeight, QuantizedWeight

MAX_SEGMENT = 64
_TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@dataclass(frozen=True, slots=True)
class PackedWeight(QuantizedWeight):
    """codes: [segments, out, segment bytes] uint8 or int8. high: [in / 64, out, 16] uint8, the two upper bits of Q6_K.

    factors: [in / group, out], float32 scales, or int32 with a float16 scale in the lower and a float16 minimum in the
    upper half (`minima`). row_scale: [1, out] float32, None for ones. offset: subtracted from every code. float4: codes
    are E2M1 numbers (MXFP4), taken as twice their value.
    """

    ROW_DIMENSION: ClassVar[int] = 1

    codes: torch.Tensor
    factors: torch.Tensor
    in_features: int
    bits: int  # 4, 6 or 8
    group: int
    offset: int
    source: str
    half: int = 0
    float4: bool = False
    high: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None

    @property
    def minima(self) -> bool:
        """Whether factors hold minima too."""
        return self.factors.dtype == torch.int32

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[1], self.in_features

    @property
    def segment(self) -> int:
        """Bytes of a row that lie together."""
        return self.codes.shape[2]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._tensors().values())

    @property
    def format(self) -> str:
        return self.source

    def to(self, device: torch.device) -> PackedWeight:
        moved: dict[str, Any] = {name: part.to(device) for name, part in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, torch.Tensor]:
        names = ("codes", "factors", "high", "row_scale")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows, columns = self.shape
        grouped = (self._codes().float() - self.offset).view(rows, -1, self.group)
        if self.minima:
            scales, minima = self.factors.view(torch.float16).view(*self.factors.shape, 2).float().unbind(-1)
            dense = grouped * scales.t().unsqueeze(-1) - minima.t().unsqueeze(-1)
        else:
            dense = grouped * self.factors.t().unsqueeze(-1)
        if self.row_scale is not None:
            dense = dense * self.row_scale.view(rows, 1, 1)
        return dense.view(rows, columns).to(dtype)

    def _codes(self) -> torch.Tensor:
        if self.bits == 8:
            return _in_rows(self.codes)
        if self.float4:
            values = torch.tensor(_TWICE_E2M1, dtype=torch.int8, device=self.device)
            return values[self._nibbles().long()]
        return self._nibbles()

    def _nibbles(self) -> torch.Tensor:
        rows = self.shape[0]
        halves = _in_rows(self.codes).view(rows, -1, 1, self.half)
        codes = torch.cat((halves & 15, halves >> 4), dim=2).view(rows, self.in_features)
        if self.high is not None:
            shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=codes.device).view(1, 1, 4, 1)
            upper = ((_in_rows(self.high).view(rows, -1, 1, 32) >> shifts) & 3).view(rows, self.in_features)
            codes = codes | (upper << 4)
        return codes


def segment_bytes(group: int, half: int) -> int:
    """The longest segment: at most 64 bytes, inside one group and one half."""
    return math.gcd(group, half or MAX_SEGMENT, MAX_SEGMENT)


def in_segments(rows: torch.Tensor, segment: int) -> torch.Tensor:
    """[out, bytes] -> [bytes / segment, out, segment]."""
    return rows.view(rows.shape[0], -1, segment).transpose(0, 1).contiguous()


def _in_rows(segments: torch.Tensor) -> torch.Tensor:
    """[segments, out, bytes of each] -> [out, bytes]."""
    return segments.transpose(0, 1).flatten(1)


def pack_gguf(weight: GGUFWeight) -> PackedWeight | None:
    """The packed form of GGML blocks, or None for types that have none."""
    packer = _PACKERS.get(weight.ggml_type)
    if packer is None:
        return None
    rows = weight.data.shape[0]
    blocks = weight.data.view(rows, -1, weight.ggml_type.block_bytes)
    return packer(blocks, weight.in_features)


def pack_int(weight: IntWeight) -> PackedWeight:
    """The packed form of `IntWeight`: nibbles `group / 2` apart, zeros as minima."""
    scales, group = weight.scales, weight.group_size
    minima = weight.scales.float() * weight.zeros if weight.zeros is not None else None
    offset = 0 if weight.zeros is not None else weight.symmetric_zero
    if weight.bits == 8:
        return _packed(weight.codes, scales, weight.shape[1], 8, group, offset, weight.format, minima=minima)
    half = min(64, group // 2)
    pairs = weight.codes.view(weight.shape[0], -1, 2, half)
    codes = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
    return _packed(codes, scales, weight.shape[1], 4, group, offset, weight.format, half=half, minima=minima)


def _packed(
    codes: torch.Tensor,
    scales: torch.Tensor,
    in_features: int,
    bits: int,
    group: int,
    offset: int,
    source: str,
    *,
    half: int = 0,
    float4: bool = False,
    high: torch.Tensor | None = None,
    minima: torch.Tensor | None = None,
) -> PackedWeight:
    """From parts whose first dimension is the output row."""
    factors, row_scale = scales.float(), None
    if minima is not None:
        factors, row_scale = _with_minima(scales, minima)
    return PackedWeight(
        in_segments(codes.contiguous(), segment_bytes(group, half)), factors.t().contiguous(), in_features, bits, group,
        offset, source, half, float4, None if high is None else in_segments(high, 16), row_scale,
    )  # fmt: skip


def _with_minima(scales: torch.Tensor, minima: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(factors [out, groups] int32, row scales [1, out]) of scales and minima [out, groups]."""
    row_scale = None
    if not scales.dtype == minima.dtype == torch.float16:
        scales, minima = scales.float(), minima.float()
        largest = torch.maximum(scales.abs(), minima.abs()).amax(1, keepdim=True)
        row_scale = torch.exp2(torch.ceil(torch.log2(largest.clamp_min(2.0**-126))))
        scales, minima = (scales / row_scale).half(), (minima / row_scale).half()
    factors = torch.stack((scales, minima), dim=-1).contiguous().view(torch.int32).squeeze(-1)
    return factors, None if row_scale is None else row_scale.t().contiguous()


Blocks = torch.Tensor  # [out, blocks in a row, bytes of a block] uint8


def _halves(blocks: Blocks, start: int) -> torch.Tensor:
    """The float16 at byte `start` of every block: [out, blocks]."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).squeeze(-1)


def _rows(part: torch.Tensor) -> torch.Tensor:
    return part.flatten(1).contiguous()


def _q4_0(blocks: Blocks, columns: int) -> PackedWeight:
    return _packed(_rows(blocks[..., 2:]), _halves(blocks, 0), columns, 4, 32, 8, "Q4_0", half=16)


def _q4_1(blocks: Blocks, columns: int) -> PackedWeight:
    minima = -_halves(blocks, 2)
    return _packed(_rows(blocks[..., 4:]), _halves(blocks, 0), columns, 4, 32, 0, "Q4_1", half=16, minima=minima)


def _q8_0(blocks: Blocks, columns: int) -> PackedWeight:
    codes = _rows(blocks[..., 2:]).view(torch.int8)
    return _packed(codes, _halves(blocks, 0), columns, 8, 32, 0, "Q8_0")


def _q5(blocks: Blocks, columns: int, high_at: int, minima: torch.Tensor | None, name: str) -> PackedWeight:
    """Five bits do not pack densely: kept as bytes."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    upper = ((blocks[..., high_at : high_at + 4].unsqueeze(-1) >> shifts) & 1).flatten(2) << 4
    low = blocks[..., high_at + 4 :]
    codes = torch.cat((low & 15, low >> 4), dim=-1) | upper
    return _packed(_rows(codes), _halves(blocks, 0), columns, 8, 32, 16 if minima is None else 0, name,
                   minima=minima)  # fmt: skip


def _q5_0(blocks: Blocks, columns: int) -> PackedWeight:
    return _q5(blocks, columns, 2, None, "Q5_0")


def _q5_1(blocks: Blocks, columns: int) -> PackedWeight:
    return _q5(blocks, columns, 4, -_halves(blocks, 2), "Q5_1")


def _k_scales_and_minima(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and minima of a block of Q4_K or Q5_K: 6-bit numbers in 12 bytes, times two float16 numbers. Each
    [out, blocks * 8] float32."""
    packed = blocks[..., 4:16]
    first, second, mixed = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = torch.cat((first & 0x3F, (mixed & 0x0F) | ((first >> 2) & 0x30)), dim=-1)
    minima = torch.cat((second & 0x3F, (mixed >> 4) | ((second >> 2) & 0x30)), dim=-1)
    return (_rows(scales.float() * _halves(blocks, 0).float().unsqueeze(-1)),
            _rows(minima.float() * _halves(blocks, 2).float().unsqueeze(-1)))  # fmt: skip


def _q4_k(blocks: Blocks, columns: int) -> PackedWeight:
    scales, minima = _k_scales_and_minima(blocks)
    return _packed(_rows(blocks[..., 16:]), scales, columns, 4, 32, 0, "Q4_K", half=32, minima=minima)


def _q5_k(blocks: Blocks, columns: int) -> PackedWeight:
    scales, minima = _k_scales_and_minima(blocks)
    planes = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    upper = ((blocks[..., 16:48].unsqueeze(-2) >> planes) & 1) << 4
    low = blocks[..., 48:].unflatten(-1, (4, 1, 32))
    codes = torch.cat((low & 15, low >> 4), dim=-2).flatten(2, 3) | upper
    return _packed(_rows(codes), scales, columns, 8, 32, 0, "Q5_K", minima=minima)


def _two_bits(packed: torch.Tensor) -> torch.Tensor:
    """Four 2-bit planes for each 32 of 64 bytes: [out, blocks, 64] -> [out, blocks, 256] uint8."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device).view(4, 1)
    return ((packed.unflatten(-1, (2, 1, 32)) >> shifts) & 3).flatten(2)


def _sixteens(codes: torch.Tensor) -> torch.Tensor:
    """Codes below 16 as nibbles 16 apart: [out, blocks, columns] -> [out, bytes]."""
    pairs = codes.flatten(1).unflatten(1, (-1, 2, 16))
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


def _q2_k(blocks: Blocks, columns: int) -> PackedWeight:
    """Two bits are kept in four."""
    both, d, dmin = blocks[..., :16], _halves(blocks, 80).float(), _halves(blocks, 82).float()
    scales, minima = (both & 15).float() * d.unsqueeze(-1), (both >> 4).float() * dmin.unsqueeze(-1)
    codes = _sixteens(_two_bits(blocks[..., 16:80]))
    return _packed(codes, _rows(scales), columns, 4, 16, 0, "Q2_K", half=16, minima=_rows(minima))


def _q3_k(blocks: Blocks, columns: int) -> PackedWeight:
    """Three bits are kept in four."""
    planes = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    high = ((blocks[..., :32].unsqueeze(-2) >> planes) & 1).flatten(2) << 2
    codes = _sixteens(_two_bits(blocks[..., 32:96]) | high)
    scales = q3_k_scales(blocks[..., 96:108].flatten(0, 1)).view(*blocks.shape[:2], 16).float()
    return _packed(
        codes, _rows(scales * _halves(blocks, 108).float().unsqueeze(-1)), columns, 4, 16, 4, "Q3_K", half=16
    )


def _q6_k(blocks: Blocks, columns: int) -> PackedWeight:
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float() * _halves(blocks, 208).float().unsqueeze(-1)
    high = _rows(blocks[..., 128:192])
    return _packed(_rows(blocks[..., :128]), _rows(scales), columns, 6, 16, 32, "Q6_K", half=64, high=high)


def _iq4_codes(packed: torch.Tensor) -> torch.Tensor:
    """What nibbles 16 apart stand for, as bytes: [..., 16] uint8 -> [..., 32] int8."""
    values = torch.tensor(IQ4_VALUES, dtype=torch.int8, device=packed.device)
    return values[torch.cat((packed & 15, packed >> 4), dim=-1).long()]


def _iq4_nl(blocks: Blocks, columns: int) -> PackedWeight:
    """Non-linear values do not multiply as nibbles: kept as bytes."""
    return _packed(_rows(_iq4_codes(blocks[..., 2:])), _halves(blocks, 0), columns, 8, 32, 0, "IQ4_NL")


def _iq4_xs(blocks: Blocks, columns: int) -> PackedWeight:
    codes = _iq4_codes(blocks[..., 8:].unflatten(-1, (8, 16)))
    scales = iq4_xs_scales(blocks.flatten(0, 1)).view(*blocks.shape[:2], 8)
    return _packed(_rows(codes), _rows(scales), columns, 8, 32, 0, "IQ4_XS")


def _mxfp4(blocks: Blocks, columns: int) -> PackedWeight:
    """The scale is a power of two; halved because codes count in halves."""
    scales = torch.exp2(blocks[..., 0].float() - 128.0)
    return _packed(_rows(blocks[..., 1:]), scales, columns, 4, 32, 0, "MXFP4", half=16, float4=True)


_PACKERS: dict[GGMLType, Callable[[Blocks, int], PackedWeight]] = {
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
