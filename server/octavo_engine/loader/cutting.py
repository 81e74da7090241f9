"""Parts of weights, whatever form they are stored in; what the form cannot be cut at is refused by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_engine.errors import ConfigError
from octavo_engine.parallel.sections import Section
from octavo_kernels.quantized_weights import Fp8Weight, IntWeight
from octavo_kernels.weights import GGUFWeight, Weight


def cut(weight: Weight, rows: Sequence[Section], columns: Section, name: str) -> Weight:
    """The sections' rows below each other, and of those the columns. Views where that is possible.

    Raises `ConfigError` where a cut would go through a quantization group.
    """
    offset = 0
    kept: list[slice] = []
    for section in rows:
        kept.append(slice(offset + section.start, offset + section.stop))
        offset += section.size
    if not all(section.is_whole for section in rows):
        weight = _rows(weight, kept, name)
    return weight if columns.is_whole else _columns(weight, columns, name)


def cut_vector(vector: torch.Tensor, sections: Sequence[Section]) -> torch.Tensor:
    """The same of one value a row: [sum of sizes] -> [sum of lengths]."""
    parts = torch.split(vector, [section.size for section in sections])
    return torch.cat([part[section.start : section.stop] for part, section in zip(parts, sections, strict=True)])


def _rows(weight: Weight, kept: list[slice], name: str) -> Weight:
    match weight:
        case GGUFWeight(data=data, ggml_type=ggml_type, in_features=in_features):
            return GGUFWeight(_pick(data, kept), ggml_type, in_features)
        case IntWeight(codes=codes, scales=scales, zeros=zeros, bits=bits):
            return IntWeight(
                _pick(codes, kept), _pick(scales, kept), None if zeros is None else _pick(zeros, kept), bits
            )
        case Fp8Weight(codes=codes, scale=scale):
            if weight.is_blockwise:
                blocks = [
                    _blocks(part.start, part.stop, codes.shape[0], Fp8Weight.BLOCK, name, "rows") for part in kept
                ]
                return Fp8Weight(_pick(codes, kept), _pick(scale, blocks))
            return Fp8Weight(_pick(codes, kept), scale if scale.numel() == 1 else _pick(scale, kept))
        case torch.Tensor():
            return _pick(weight, kept)
    raise _refusal(name, f"{weight.format} weights cannot be divided")


def _columns(weight: Weight, columns: Section, name: str) -> Weight:
    start, stop = columns.start, columns.stop
    match weight:
        case GGUFWeight(data=data, ggml_type=ggml_type, in_features=in_features):
            blocks = _blocks(start, stop, in_features, ggml_type.block_size, name, "columns")
            size = ggml_type.block_bytes
            return GGUFWeight(data[:, blocks.start * size : blocks.stop * size].contiguous(), ggml_type, stop - start)
        case IntWeight(codes=codes, scales=scales, zeros=zeros, bits=bits):
            codes = codes[:, start:stop].contiguous()
            if scales.shape[1] == 1:
                return IntWeight(codes, scales, zeros, bits)
            groups = _blocks(start, stop, weight.shape[1], weight.group_size, name, "columns")
            zeros = None if zeros is None else zeros[:, groups].contiguous()
            return IntWeight(codes, scales[:, groups].contiguous(), zeros, bits)
        case Fp8Weight(codes=codes, scale=scale):
            if weight.is_blockwise:
                scale = scale[:, _blocks(start, stop, codes.shape[1], Fp8Weight.BLOCK, name, "columns")].contiguous()
            return Fp8Weight(codes[:, start:stop].contiguous(), scale)
        case torch.Tensor():
            return weight[:, start:stop].contiguous()
    raise _refusal(name, f"{weight.format} weights cannot be divided")


def _pick(data: torch.Tensor, kept: list[slice]) -> torch.Tensor:
    if len(kept) == 1:
        return data[kept[0]]
    return torch.cat([data[part].view(torch.uint8) for part in kept]).view(data.dtype)  # torch joins no float8


def _blocks(start: int, stop: int, total: int, size: int, name: str, what: str) -> slice:
    """The blocks a cut covers; its ends must be those of blocks, or of the matrix."""
    if start % size or (stop % size and stop != total):
        raise _refusal(name, f"{what} {start} to {stop} would go through groups of {size}")
    return slice(start // size, -(-stop // size))


def _refusal(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"tensor_parallel_size: {name}: {reason}; use fewer tensor ranks, pipeline_parallel_size, "
        "or a checkpoint in another format"
    )
