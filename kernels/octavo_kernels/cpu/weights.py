"""Weights repacked into the panels that the native products read (layouts in src/octavo_cpu.h)."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import NamedTuple

import torch

from octavo_kernels.cpu.bindings import Activations, Codes, Matrix, Scales, check, native
from octavo_kernels.cpu.int_blocks import to_gguf_blocks
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.quantized_weights import IntWeight
from octavo_kernels.weights import GGUFWeight, QuantizedWeight, Weight

ENV_ACTIVATIONS = "OCTAVO_CPU_ACTIVATIONS"


class _Form(NamedTuple):
    codes: Codes
    scales: Scales
    zero: int


_GGUF_FORMS: dict[GGMLType, _Form] = {
    GGMLType.Q4_0: _Form(Codes.U4, Scales.D, 8),
    GGMLType.Q4_1: _Form(Codes.U4, Scales.DM, 0),
    GGMLType.Q5_0: _Form(Codes.U5, Scales.D, 16),
    GGMLType.Q5_1: _Form(Codes.U5, Scales.DM, 0),
    GGMLType.Q8_0: _Form(Codes.U8, Scales.D, 128),
    GGMLType.Q2_K: _Form(Codes.U2, Scales.K_DM16, 0),
    GGMLType.Q3_K: _Form(Codes.U4, Scales.K_D16, 4),
    GGMLType.Q4_K: _Form(Codes.U4, Scales.K_DM, 0),
    GGMLType.Q5_K: _Form(Codes.U5, Scales.K_DM, 0),
    GGMLType.Q6_K: _Form(Codes.U6, Scales.K_D16, 32),
    GGMLType.IQ4_NL: _Form(Codes.NL4, Scales.D, 128),
    GGMLType.IQ4_XS: _Form(Codes.NL4, Scales.K_D16, 128),
    GGMLType.MXFP4: _Form(Codes.FP4, Scales.E8, 12),
}


class PackedWeight(QuantizedWeight):
    """A matrix [out_features, in_features] in native memory; freed with the object."""

    def __init__(self, shape: tuple[int, int], form: _Form, name: str) -> None:
        rows, columns = shape
        padded = -(-columns // 32) * 32
        code_bytes = native.oct_codes_bytes(form.codes, rows, padded)
        scale_bytes = native.oct_scales_bytes(form.scales, rows, padded)
        memory = native.oct_alloc(code_bytes + 64 + scale_bytes)
        if not memory:
            raise MemoryError(f"no memory for a {rows} x {columns} weight ({code_bytes + scale_bytes} bytes)")
        weakref.finalize(self, native.oct_free, memory)
        scales = memory + -(-code_bytes // 64) * 64
        self._shape = shape
        self._name = name
        self._nbytes = code_bytes + scale_bytes
        self.matrix = Matrix(memory, scales, rows, padded, form.codes, form.scales, form.zero, Activations.FLOAT32)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def nbytes(self) -> int:
        return int(self._nbytes)

    @property
    def format(self) -> str:
        return self._name

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._rows(None, self._shape[0]).to(dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows by index as float32. ids: [n] int64 -> [n, in_features]."""
        ids = ids.contiguous()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self._shape[0]:
            raise IndexError(f"row index out of range: the weight has {self._shape[0]} rows")
        return self._rows(ids, ids.shape[0])

    def _rows(self, ids: torch.Tensor | None, count: int) -> torch.Tensor:
        out = torch.empty(count, self._shape[1])
        pointer = None if ids is None else ids.data_ptr()
        check(native.oct_unpack_rows(ctypes.byref(self.matrix), pointer, count, self._shape[1], out.data_ptr()))
        return out

    def multiplied_with(self, dtype: torch.dtype) -> Matrix:
        """The C struct, set to the kind of activations that a model computing in `dtype` wants."""
        matrix = Matrix.from_buffer_copy(self.matrix)
        matrix.activations = activations_for(Codes(matrix.code_kind), dtype)
        return matrix


def activations_for(codes: Codes, dtype: torch.dtype) -> Activations:
    """Float32 models stay exact; in 16 bits, quantized weights meet int8 activations and bfloat16 ones bfloat16.

    `OCTAVO_CPU_ACTIVATIONS=float32` keeps activations in float32 everywhere, `=int8` quantizes them for quantized
    weights even in float32 models.
    """
    chosen = os.environ.get(ENV_ACTIVATIONS, "").strip() or "auto"
    if chosen not in ("auto", "float32", "int8"):
        raise ValueError(f"{ENV_ACTIVATIONS}: must be auto, float32 or int8, got {chosen!r}")
    exact = dtype == torch.float32 if chosen == "auto" else chosen == "float32"
    if codes == Codes.F32 or (exact and codes == Codes.BF16):
        return Activations.FLOAT32
    if codes == Codes.BF16:
        fast = dtype == torch.bfloat16 and bool(native.oct_has_bf16_dot())
        return Activations.BFLOAT16 if fast else Activations.FLOAT32
    return Activations.FLOAT32 if exact else Activations.INT8


# What was packed from which tensor, while both live: a tied embedding and output head become one matrix.
# By id; the weak reference tells a reused id from the tensor itself.
_known: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[PackedWeight]]] = {}


def pack(weight: Weight) -> PackedWeight | None:
    """The weight in panels, or None where its form has no native layout (float16, types not in `_GGUF_FORMS`)."""
    if isinstance(weight, PackedWeight):
        return weight
    if isinstance(weight, IntWeight):
        blocks = to_gguf_blocks(weight)
        return None if blocks is None else _pack_gguf(blocks, weight.format)
    source = weight.data if isinstance(weight, GGUFWeight) else weight
    if not isinstance(source, torch.Tensor) or source.ndim != 2:
        return None
    packed = _packed_before(source)
    if packed is None or packed.shape != tuple(weight.shape):
        packed = _pack_gguf(weight) if isinstance(weight, GGUFWeight) else _pack_dense(source)
        if packed is not None:
            key = id(source)
            _known[key] = (weakref.ref(source, lambda _: _known.pop(key, None)), weakref.ref(packed))
    return packed


def _packed_before(source: torch.Tensor) -> PackedWeight | None:
    known = _known.get(id(source))
    return known[1]() if known is not None and known[0]() is source else None


def _pack_gguf(weight: GGUFWeight, name: str = "") -> PackedWeight | None:
    if not weight.ggml_type.is_quantized:
        return _pack_dense(weight.dequantize(torch.bfloat16 if weight.ggml_type is GGMLType.BF16 else torch.float32))
    form = _GGUF_FORMS.get(weight.ggml_type)
    if form is None or weight.in_features % weight.ggml_type.block_size:
        return None
    data = weight.data.contiguous()
    packed = PackedWeight(weight.shape, form, name or weight.format)
    check(native.oct_pack_gguf(int(weight.ggml_type), data.data_ptr(), ctypes.byref(packed.matrix)))
    return packed


def _pack_dense(weight: torch.Tensor) -> PackedWeight | None:
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    data = weight.detach().contiguous()
    bf16 = data.dtype == torch.bfloat16
    form = _Form(Codes.BF16 if bf16 else Codes.F32, Scales.NONE, 0)
    rows, columns = data.shape
    packed = PackedWeight((rows, columns), form, "bfloat16" if bf16 else "float32")
    check(native.oct_pack_dense(int(bf16), data.data_ptr(), columns, ctypes.byref(packed.matrix)))
    return packed
