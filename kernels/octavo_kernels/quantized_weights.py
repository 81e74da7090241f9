"""Weights quantized by Octavo or by GPTQ/AWQ tools: integer codes with scales for groups of inputs, and float8.

Codes are kept the way the formats define them; backends repack them with `ops.pack_weight`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo_kernels.weights import QuantizedWeight

FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class IntWeight(QuantizedWeight):
    """(codes - zeros) * scales, one scale (and zero) for `group_size` consecutive inputs of an output row.

    codes: [out, in] uint8 for 4 bits (two's values 0..15, one a byte before packing), int8 for 8 bits.
    scales: [out, in / group_size] float16, bfloat16 or float32. zeros: [out, in / group_size] float32 or None for
    symmetric weights (zero is 8 for 4 bits, 0 for 8 bits). bits: 4 or 8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (self.zeros.nbytes if self.zeros is not None else 0)

    @property
    def format(self) -> str:
        return f"int{self.bits}-g{self.group_size}"

    def to(self, device: torch.device) -> IntWeight:
        zeros = self.zeros.to(device) if self.zeros is not None else None
        return IntWeight(self.codes.to(device), self.scales.to(device), zeros, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        rows, columns = self.shape
        grouped = self.codes.float().view(rows, -1, self.group_size)
        centred = grouped - (self.zeros.unsqueeze(-1) if self.zeros is not None else self.symmetric_zero)
        return (centred * self.scales.float().unsqueeze(-1)).view(rows, columns).to(dtype)

    @property
    def symmetric_zero(self) -> int:
        """The code that stands for 0 where no zeros are stored."""
        return 8 if self.bits == 4 else 0


@dataclass(frozen=True, slots=True)
class Fp8Weight(QuantizedWeight):
    """codes * scale. codes: [out, in] float8_e4m3fn. scale, float32: [1] for the tensor, [out] for rows, or
    [ceil(out / 128), ceil(in / 128)] for blocks (DeepSeek-V3, arXiv 2412.19437)."""

    codes: torch.Tensor
    scale: torch.Tensor

    BLOCK = 128

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def is_blockwise(self) -> bool:
        return self.scale.dim() == 2

    @property
    def format(self) -> str:
        return "fp8-block" if self.is_blockwise else "fp8" if self.scale.numel() == 1 else "fp8-row"

    def to(self, device: torch.device) -> Fp8Weight:
        return Fp8Weight(self.codes.to(device), self.scale.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        wide = self.codes.float()
        if not self.is_blockwise:
            return (wide * self.scale.view(-1, 1)).to(dtype)
        spread = self.scale.repeat_interleave(self.BLOCK, 0).repeat_interleave(self.BLOCK, 1)
        return (wide * spread[: wide.shape[0], : wide.shape[1]]).to(dtype)


_SHRINKS = (0.95, 0.9, 0.85, 0.8)


def quantize_int4(weight: torch.Tensor, group_size: int = 128, symmetric: bool = False) -> IntWeight:
    """Round to nearest in groups, whose extremes are cut off where that leaves less squared error.

    weight: [out, in], `in` a multiple of group_size. Raises ValueError otherwise.
    """
    grouped = _grouped(weight, group_size)
    low, high = grouped.amin(-1, keepdim=True).clamp_max(0), grouped.amax(-1, keepdim=True).clamp_min(0)
    best = _int4_grid(grouped, low, high, symmetric)
    for shrink in _SHRINKS:
        found = _int4_grid(grouped, low * shrink, high * shrink, symmetric)
        better = found[3] < best[3]
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    codes, scales, zeros, _ = best
    kept = None if symmetric else zeros.squeeze(-1)
    return IntWeight(codes.to(torch.uint8).view(weight.shape), scales.squeeze(-1).half(), kept, 4)


def _int4_grid(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor, symmetric: bool
) -> tuple[torch.Tensor, ...]:
    """(codes, scales, zeros, squared error) of groups between two values; only codes are as wide as the groups."""
    if symmetric:
        scales = (torch.maximum(-low, high) / 7).clamp_min(1e-7).half().float()
        zeros = torch.full_like(scales, 8)
    else:
        scales = ((high - low) / 15).clamp_min(1e-7).half().float()
        zeros = (-low / scales).round_().clamp_(0, 15)
    codes = (grouped / scales).round_().add_(zeros).clamp_(0, 15)
    return codes, scales, zeros, ((codes - zeros) * scales - grouped).square_().sum(-1, keepdim=True)


def quantize_int8(weight: torch.Tensor, group_size: int = 0) -> IntWeight:
    """Symmetric, round to nearest, one scale a row (group_size 0) or a group. weight: [out, in]."""
    grouped = _grouped(weight, group_size or weight.shape[1])
    scales = (grouped.abs().amax(-1) / 127).clamp_min(1e-10)
    codes = (grouped / scales.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8).view(weight.shape)
    return IntWeight(codes, scales, None, 8)


def quantize_fp8(weight: torch.Tensor, blockwise: bool = False) -> Fp8Weight:
    """One scale a row, or one for each block of 128 by 128. weight: [out, in]."""
    if not blockwise:
        scale = (weight.float().abs().amax(1) / FP8_MAX).clamp_min(1e-12)
        return Fp8Weight((weight.float() / scale.unsqueeze(1)).to(torch.float8_e4m3fn), scale)
    size = Fp8Weight.BLOCK
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % size, 0, -rows % size))
    tiles = padded.view(padded.shape[0] // size, size, padded.shape[1] // size, size)
    scale = (tiles.abs().amax((1, 3)) / FP8_MAX).clamp_min(1e-12)
    codes = (tiles / scale[:, None, :, None]).view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return Fp8Weight(codes.contiguous(), scale)


def from_gptq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> IntWeight:
    """GPTQ's 4-bit checkpoints (without activation order): eight inputs in an int32, zeros stored minus one.

    qweight: [in / 8, out] int32; qzeros: [groups, out / 8] int32; scales: [groups, out].
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=qweight.device)
    codes = ((qweight.unsqueeze(1) >> shifts.view(1, 8, 1)) & 15).flatten(0, 1).t()
    zeros = (((qzeros.unsqueeze(2) >> shifts) & 15).flatten(1) + 1).t()
    return IntWeight(codes.to(torch.uint8).contiguous(), scales.t().contiguous(), zeros.float().contiguous(), 4)


def from_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> IntWeight:
    """AWQ's 4-bit checkpoints: eight outputs in an int32, in the order 0 2 4 6 1 3 5 7.

    qweight: [in, out / 8] int32; qzeros: [groups, out / 8] int32; scales: [groups, out].
    """
    place = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.int32, device=qweight.device) * 4

    def unpack(packed: torch.Tensor) -> torch.Tensor:
        return ((packed.unsqueeze(2) >> place) & 15).flatten(1).t()

    codes = unpack(qweight).to(torch.uint8).contiguous()
    return IntWeight(codes, scales.t().contiguous(), unpack(qzeros).float().contiguous(), 4)


def _grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    rows, columns = weight.shape
    if columns % group_size:
        raise ValueError(f"{columns} inputs cannot be quantized in groups of {group_size}")
    return weight.float().view(rows, -1, group_size)
