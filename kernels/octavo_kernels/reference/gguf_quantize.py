"""Quantizing dense matrices to GGML blocks by rounding to nearest, as llama.cpp's reference does, or closer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.weights import GGUFWeight

_BLOCK = 32
_CHUNK = 1 << 14  # blocks whose intermediate values stay in the processor's cache
_FITTINGS = 4


def quantize_to_ggml(weight: torch.Tensor, ggml_type: GGMLType, *, fitted: bool = False) -> GGUFWeight:
    """weight: [out, in] floating point, `in` a multiple of 32. Raises ValueError for a type not in `QUANTIZABLE`.

    fitted: Q4_1 blocks with the least squared error instead of those that span from the smallest to the largest value.
    """
    rows, columns = weight.shape
    if ggml_type not in _QUANTIZERS or columns % _BLOCK:
        raise ValueError(f"a {rows} x {columns} matrix cannot be quantized to {ggml_type.name}")
    quantizer = _q4_1_fitted if fitted and ggml_type is GGMLType.Q4_1 else _QUANTIZERS[ggml_type]
    parts = torch.split(weight.detach().float().reshape(-1, _BLOCK), _CHUNK)
    blocks = torch.cat([quantizer(part) for part in parts])
    return GGUFWeight(blocks.view(rows, -1), ggml_type, columns)


def _q8_0(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(1) / 127
    codes = _round(x * _inverse(scale)).to(torch.int8)
    return torch.cat((_halves(scale), codes.view(torch.uint8)), dim=1)


def _q4_0(x: torch.Tensor) -> torch.Tensor:
    extreme = x.gather(1, x.abs().argmax(1, keepdim=True)).squeeze(1)
    scale = extreme / -8
    codes = (x * _inverse(scale) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((_halves(scale), _nibbles(codes)), dim=1)


def _q4_1(x: torch.Tensor) -> torch.Tensor:
    low, high = x.amin(1), x.amax(1)
    scale = (high - low) / 15
    codes = ((x - low.unsqueeze(1)) * _inverse(scale) + 0.5).trunc().clamp(0, 15).to(torch.uint8)
    return torch.cat((_halves(scale), _halves(low), _nibbles(codes)), dim=1)


def _q4_1_fitted(x: torch.Tensor) -> torch.Tensor:
    """Codes by the scale and minimum, and these by least squares for the codes, in turn; the best of all turns."""
    low = x.amin(1).half().float()
    scale = ((x.amax(1) - low) / 15).half().float()
    best_scale, best_low, best_error = scale, low, torch.full_like(low, torch.inf)
    codes = best_codes = torch.empty_like(x)
    for turn in range(_FITTINGS + 1):
        codes = ((x - low.unsqueeze(1)) * _inverse(scale)).round_().clamp_(0, 15)
        error = (codes * scale.unsqueeze(1) + low.unsqueeze(1) - x).square_().sum(1)
        better = error < best_error
        best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, low, best_low)
        best_codes = torch.where(better.unsqueeze(1), codes, best_codes)
        best_error = torch.minimum(error, best_error)
        if turn < _FITTINGS:
            mean = codes.mean(1)
            centred = codes - mean.unsqueeze(1)
            spread = centred.square().sum(1)
            slope = torch.where(spread == 0, scale, (centred * x).sum(1) / spread.clamp_min(1e-6))
            scale, low = slope.half().float(), (x.mean(1) - slope * mean).half().float()
    return torch.cat((_halves(best_scale), _halves(best_low), _nibbles(best_codes.to(torch.uint8))), dim=1)


def _halves(values: torch.Tensor) -> torch.Tensor:
    """[n] -> the bytes of float16 numbers [n, 2] uint8."""
    return values.half().view(torch.uint8).view(-1, 2)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale).unsqueeze(1)


def _round(x: torch.Tensor) -> torch.Tensor:
    """Half away from zero, as C's roundf."""
    return x.sign() * (x.abs() + 0.5).floor()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    return codes[:, :16] | (codes[:, 16:] << 4)


_QUANTIZERS: dict[GGMLType, Callable[[torch.Tensor], torch.Tensor]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q8_0: _q8_0,
}
QUANTIZABLE = tuple(_QUANTIZERS)
