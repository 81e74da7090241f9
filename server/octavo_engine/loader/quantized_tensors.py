"""Reading the quantized layers of GPTQ, AWQ, compressed-tensors and FP8 checkpoints as one weight each.

A layer's `weight` is put together from the tensors its format keeps beside each other. What a format may say and we
do not read is refused by name, never guessed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from octavo_engine.errors import ModelLoadError
from octavo_engine.models.raw_config import RawConfig
from octavo_kernels.quantized_weights import Fp8Weight, IntWeight, from_awq, from_gptq
from octavo_kernels.weights import Weight

ReadTensor = Callable[[str], torch.Tensor]


class QuantizedTensors(ABC):
    """How one format stores the weight of a layer. parts: the tensors it keeps instead of, or beside, `weight`."""

    marker: str  # the tensor that tells a quantized layer from a dense one
    parts: tuple[str, ...]

    def __init__(self, config: RawConfig) -> None:
        self.config = config

    @abstractmethod
    def assemble(self, prefix: str, read: ReadTensor, names: frozenset[str]) -> Weight:
        """The layer's weight. Raises `ModelLoadError` for shapes that do not fit together."""


class GPTQ(QuantizedTensors):
    """4-bit integers, eight inputs in an int32; `g_idx` names each input's group where they were re-ordered."""

    marker = "qweight"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: RawConfig) -> None:
        super().__init__(config)
        _expect(config, "bits", (4,))
        self._zeros_are_plain = config.text("checkpoint_format", "gptq") == "gptq_v2"

    def assemble(self, prefix: str, read: ReadTensor, names: frozenset[str]) -> Weight:
        qweight, qzeros, scales = (read(f"{prefix}.{part}") for part in self.parts[:3])
        _check(prefix, qweight.shape[0] * 8 % scales.shape[0] == 0 and qweight.shape[1] == scales.shape[1])
        _check(prefix, qzeros.shape == (scales.shape[0], scales.shape[1] // 8))
        weight = from_gptq(qweight, qzeros, scales)
        if self._zeros_are_plain and weight.zeros is not None:
            weight = IntWeight(weight.codes, weight.scales, weight.zeros - 1, 4)
        if f"{prefix}.g_idx" not in names:
            return weight
        groups = read(f"{prefix}.g_idx").long()
        in_order = torch.arange(weight.shape[1]) // weight.group_size
        return weight if torch.equal(groups, in_order) else _reordered(prefix, weight, groups)


class AWQ(QuantizedTensors):
    """4-bit integers, eight outputs in an int32, interleaved."""

    marker = "qweight"
    parts = ("qweight", "qzeros", "scales")

    def __init__(self, config: RawConfig) -> None:
        super().__init__(config)
        _expect(config, "bits", (4,))
        if config.text("version", "gemm").lower() != "gemm":
            raise config.wrong("version", "gemm")

    def assemble(self, prefix: str, read: ReadTensor, names: frozenset[str]) -> Weight:
        qweight, qzeros, scales = (read(f"{prefix}.{part}") for part in self.parts)
        _check(prefix, qweight.shape[0] % scales.shape[0] == 0 and qweight.shape[1] * 8 == scales.shape[1])
        _check(prefix, qzeros.shape == (scales.shape[0], qweight.shape[1]))
        return from_awq(qweight, qzeros, scales)


class CompressedTensors(QuantizedTensors):
    """The formats pack-quantized (int4 and int8 beside 16-bit activations), int-quantized and float-quantized."""

    marker = "weight_scale"
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale")

    def assemble(self, prefix: str, read: ReadTensor, names: frozenset[str]) -> Weight:
        scale = read(f"{prefix}.weight_scale")
        if f"{prefix}.weight_g_idx" in names:
            raise ModelLoadError(f"{prefix}: compressed-tensors with activation re-ordering is not supported")
        if f"{prefix}.weight_packed" in names:
            return self._packed(prefix, read, names, scale)
        codes = read(f"{prefix}.weight")
        if codes.dtype == torch.float8_e4m3fn:
            return _fp8(prefix, codes, scale)
        _check(prefix, codes.dtype == torch.int8 and scale.dim() == 2 and scale.shape[0] == codes.shape[0])
        return IntWeight(codes, scale, None, 8)

    def _packed(self, prefix: str, read: ReadTensor, names: frozenset[str], scale: torch.Tensor) -> Weight:
        packed, shape = read(f"{prefix}.weight_packed"), read(f"{prefix}.weight_shape").tolist()
        _check(prefix, len(shape) == 2 and packed.dim() == 2 and shape[1] > 0)
        bits = packed.shape[1] * 32 // shape[1]
        _check(prefix, bits in (4, 8) and packed.shape[0] == shape[0] == scale.shape[0])
        codes = _unpack(packed, bits)[:, : shape[1]]
        zeros = None
        if f"{prefix}.weight_zero_point" in names:
            stored = read(f"{prefix}.weight_zero_point")
            zeros = _unpack(stored.t().contiguous(), bits).t()[: shape[0]].float().contiguous()
            _check(prefix, zeros.shape == scale.shape)
        if bits == 4:
            return IntWeight(codes.contiguous(), scale, zeros, 4)
        _check(prefix, zeros is None)
        return IntWeight((codes.to(torch.int16) - 128).to(torch.int8).contiguous(), scale, None, 8)


class FP8(QuantizedTensors):
    """Float8 codes with one scale for blocks of 128 by 128, or for the tensor."""

    marker = "weight_scale_inv"
    parts = ("weight_scale_inv", "input_scale")

    def __init__(self, config: RawConfig) -> None:
        super().__init__(config)
        if config.numbers("weight_block_size", (128.0, 128.0)) != (128.0, 128.0):
            raise config.wrong("weight_block_size", "[128, 128]")

    def assemble(self, prefix: str, read: ReadTensor, names: frozenset[str]) -> Weight:
        return _fp8(prefix, read(f"{prefix}.weight"), read(f"{prefix}.weight_scale_inv"))


_FORMATS: dict[str, type[QuantizedTensors]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "fp8": FP8,
}
_READ_BY_MODEL = ("mxfp4",)


def quantized_tensors(config: RawConfig | None) -> QuantizedTensors | None:
    """The reader for a checkpoint's `quantization_config`; None for a dense one, or one its model reads itself."""
    if config is None:
        return None
    method = config.text("quant_method")
    if method in _READ_BY_MODEL:
        return None
    if method not in _FORMATS:
        raise config.wrong("quant_method", f"one of {', '.join((*_FORMATS, *_READ_BY_MODEL))}")
    return _FORMATS[method](config)


def _expect(config: RawConfig, key: str, allowed: tuple[int, ...]) -> None:
    if config.integer(key) not in allowed:
        raise config.wrong(key, " or ".join(map(str, allowed)))


def _check(prefix: str, fits: bool) -> None:
    if not fits:
        raise ModelLoadError(f"{prefix}: the shapes of its quantized tensors do not fit together")


def _fp8(prefix: str, codes: torch.Tensor, scale: torch.Tensor) -> Fp8Weight:
    rows, columns = codes.shape
    blocks = (-(-rows // Fp8Weight.BLOCK), -(-columns // Fp8Weight.BLOCK))
    _check(prefix, codes.dtype == torch.float8_e4m3fn and scale.is_floating_point())
    if scale.numel() == 1 or tuple(scale.shape) in ((rows,), (rows, 1)):
        return Fp8Weight(codes, scale.float().reshape(-1))
    _check(prefix, tuple(scale.shape) == blocks)
    return Fp8Weight(codes, scale.float())


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes from int32, lowest bits first: [rows, n] -> [rows, n * 32 / bits] uint8."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: torch.Tensor = (packed.unsqueeze(2) >> shifts) & (2**bits - 1)
    return codes.flatten(1).to(torch.uint8)


def _reordered(prefix: str, weight: IntWeight, groups: torch.Tensor) -> torch.Tensor:
    """The dense matrix of a layer whose inputs are not in the order of their groups: no kernel takes such a form."""
    _check(prefix, groups.shape == (weight.shape[1],) and 0 <= int(groups.min()) <= int(groups.max()))
    _check(prefix, int(groups.max()) < weight.scales.shape[1] and weight.zeros is not None)
    zeros = weight.zeros if weight.zeros is not None else torch.zeros_like(weight.scales)
    return (weight.codes.float() - zeros[:, groups]) * weight.scales.float()[:, groups]
