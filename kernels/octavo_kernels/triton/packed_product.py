"""The inside of every product with packed integers or 4-bit floats: segments of codes become 16-bit tiles in registers.

A few instructions unpack four codes; scale and minimum are applied in float32 and the result is rounded once. All of it
happens in the layout the tensor core reads, and whatever is loaded feeds a product, so Triton fetches it ahead.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from octavo_kernels.triton.environment import INTERPRETED, dot
from octavo_kernels.triton.packed_weight import PackedWeight


@triton.jit
def _twice_e2m1(code):
    """Twice the value of a 4-bit float (sign, two bits of exponent, one of mantissa), as an integer."""
    exponent = (code >> 1) & 3
    mantissa = code & 1
    size = tl.where(exponent == 0, mantissa, (2 + mantissa) << (tl.maximum(exponent, 1) - 1))
    return tl.where(code > 7, -size, size)


@triton.jit
def _number(code, OFFSET: tl.constexpr, FLOAT4: tl.constexpr, DTYPE: tl.constexpr):
    value = code.to(tl.int32)
    if FLOAT4:
        value = _twice_e2m1(value)
    return (value - OFFSET).to(tl.float32).to(DTYPE)


@triton.jit
def load_codes(
    codes_ptr, high_ptr, segment, n, valid, weight_rows,
    BITS: tl.constexpr, SEGMENT: tl.constexpr, LANES: tl.constexpr, OFFSET: tl.constexpr, FLOAT4: tl.constexpr,
    LOW_ASM: tl.constexpr, HIGH_ASM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows n [N] of a segment without their scales: (low codes [N, LANES], high codes) as DTYPE; 8-bit codes have no
    second half and give the low ones twice. LANES: SEGMENT, but at least 16."""
    j = tl.arange(0, LANES)
    place = (segment.to(tl.int64) * weight_rows + n)[:, None] * SEGMENT + j[None, :]
    mask = valid[:, None] if LANES == SEGMENT else valid[:, None] & (j < SEGMENT)[None, :]
    raw = tl.load(codes_ptr + place, mask=mask, other=0)
    if BITS == 6:  # four segments of 16 bytes read the same 32 bytes of upper bits
        piece = segment // 4 * 2 + segment % 2
        upper = tl.load(high_ptr + (piece.to(tl.int64) * weight_rows + n)[:, None] * 16 + j[None, :], mask, other=0)
        upper = upper >> (segment % 4 // 2 * 2).to(tl.uint8)
    if LOW_ASM != "":
        if BITS == 6:
            low = tl.inline_asm_elementwise(LOW_ASM, "=r,=r,r,r", [raw, upper], DTYPE.value, True, 4)
            high = tl.inline_asm_elementwise(HIGH_ASM, "=r,=r,r,r", [raw, upper], DTYPE.value, True, 4)
        else:
            low = tl.inline_asm_elementwise(LOW_ASM, "=r,=r,r", [raw], DTYPE.value, True, 4)
            high = low
            if BITS == 4:
                high = tl.inline_asm_elementwise(HIGH_ASM, "=r,=r,r", [raw], DTYPE.value, True, 4)
    elif BITS == 8:
        low = _number(raw, OFFSET, FLOAT4, DTYPE)
        high = low
    elif BITS == 6:
        low = _number((raw & 15) | ((upper & 3) << 4), OFFSET, FLOAT4, DTYPE)
        high = _number((raw >> 4) | (upper & 48), OFFSET, FLOAT4, DTYPE)
    else:
        low = _number(raw & 15, OFFSET, FLOAT4, DTYPE)
        high = _number(raw >> 4, OFFSET, FLOAT4, DTYPE)
    return low, high


@triton.jit
def first_input(segment, BITS: tl.constexpr, HALF: tl.constexpr, SEGMENT: tl.constexpr):
    """The input that the first (low) code of a segment belongs to; its high code's lies HALF further."""
    place = segment * SEGMENT
    return place if BITS == 8 else place // HALF * (2 * HALF) + place % HALF


@triton.jit
def load_factors(factors_ptr, k, n, valid, weight_rows, GROUP: tl.constexpr, MINIMA: tl.constexpr):
    """(scales [N], minima [N]) of rows n at input k, float32; without minima the scales twice."""
    factors = tl.load(factors_ptr + (k // GROUP).to(tl.int64) * weight_rows + n, mask=valid, other=0)
    if MINIMA:
        scale = (factors & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        minimum = (factors >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scale = factors
        minimum = factors
    return scale, minimum


@triton.jit
def scaled(codes, scale, minimum, MINIMA: tl.constexpr, DTYPE: tl.constexpr):
    """codes [N, K] -> weights of DTYPE, rounded once."""
    weights = codes.to(tl.float32) * scale[:, None]
    if MINIMA:
        weights -= minimum[:, None]
    return weights.to(DTYPE)


@triton.jit
def add_segment(
    acc, x_rows, x_valid, codes_ptr, high_ptr, factors_ptr, segment, n, valid, weight_rows,
    BITS: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr, MINIMA: tl.constexpr,
    SEGMENT: tl.constexpr, LANES: tl.constexpr, FLOAT4: tl.constexpr, LOW_ASM: tl.constexpr, HIGH_ASM: tl.constexpr,
):  # fmt: skip
    """acc [M, N] + x @ weights.T over the inputs of one segment. x_rows [M]: pointers to rows of inputs."""
    dtype: tl.constexpr = x_rows.dtype.element_ty
    low, high = load_codes(
        codes_ptr, high_ptr, segment, n, valid, weight_rows, BITS, SEGMENT, LANES, OFFSET, FLOAT4, LOW_ASM, HIGH_ASM,
        dtype,
    )  # fmt: skip
    k = first_input(segment, BITS, HALF, SEGMENT)
    j = tl.arange(0, LANES)
    columns = k + j
    if LANES == SEGMENT:  # says what the compiler cannot see: whole vectors may be loaded
        columns = tl.max_contiguous(tl.multiple_of(columns, SEGMENT), SEGMENT)
    x_mask = x_valid[:, None] if LANES == SEGMENT else x_valid[:, None] & (j < SEGMENT)[None, :]
    x = tl.load(x_rows[:, None] + columns[None, :], mask=x_mask, other=0.0)
    scale, minimum = load_factors(factors_ptr, k, n, valid, weight_rows, GROUP, MINIMA)
    acc = dot(x, tl.trans(scaled(low, scale, minimum, MINIMA, dtype)), acc)
    if BITS != 8:
        x = tl.load(x_rows[:, None] + (columns + HALF)[None, :], mask=x_mask, other=0.0)
        if GROUP % (2 * HALF) != 0:  # the halves lie in different groups
            scale, minimum = load_factors(factors_ptr, k + HALF, n, valid, weight_rows, GROUP, MINIMA)
        acc = dot(x, tl.trans(scaled(high, scale, minimum, MINIMA, dtype)), acc)
    return acc


def pointers(weight: PackedWeight) -> tuple[torch.Tensor | None, ...]:
    """The tensors `add_segment` reads, in its order, and the rows' scales."""
    return weight.codes, weight.high, weight.factors, weight.row_scale


def constants(weight: PackedWeight, dtype: torch.dtype) -> dict[str, int | str]:
    """The kernels' compile-time description of the format, for inputs of `dtype`."""
    low, high = ("", "")
    if not INTERPRETED and dtype in (torch.bfloat16, torch.float16):
        signed = weight.codes.dtype == torch.int8
        low, high = unpacking(weight.bits, weight.offset, weight.float4, signed, dtype == torch.bfloat16)
    return {
        "BITS": weight.bits,
        "HALF": weight.half,
        "OFFSET": weight.offset,
        "GROUP": weight.group,
        "MINIMA": weight.minima,
        "ROW_SCALE": weight.row_scale is not None,
        "SEGMENT": weight.segment,
        "LANES": max(16, weight.segment),
        "FLOAT4": weight.float4,
        "LOW_ASM": low,
        "HIGH_ASM": high,
    }


@functools.cache
def unpacking(bits: int, offset: int, float4: bool, signed: bool, bf16: bool) -> tuple[str, str]:
    """Instructions that turn four bytes ($2, and $3 with the upper bits of six) into the 16-bit floats of their low and
    of their high codes, two a register ($0, $1), offset taken off. Every step is exact."""
    nibble = "and.b32 c, {}, 0x0f0f0f0f;"
    shifted = "shr.u32 c, $2, 4; " + nibble.format("c")
    match bits:
        case 8:
            return _from_bytes("mov.b32 c, $2;", 8, offset, False, signed, bf16), ""
        case 6:
            low = nibble.format("$2") + " and.b32 t, $3, 0x03030303; shl.b32 t, t, 4; or.b32 c, c, t;"
            high = shifted + " and.b32 t, $3, 0x30303030; or.b32 c, c, t;"
        case _:
            low, high = nibble.format("$2"), shifted
    return tuple(_from_bytes(take, bits, offset, float4, False, bf16) for take in (low, high))  # type: ignore[return-value]


def _from_bytes(take: str, bits: int, offset: int, float4: bool, signed: bool, bf16: bool) -> str:
    """`take` leaves four codes in the bytes of c."""
    if float4:
        lanes, convert = _spread(0), _float4(bf16)
    elif bf16 and bits == 8:
        flip = "" if signed else "xor.b32 c, c, 0x80808080;"
        lanes, convert = flip + _spread(0), _signed_bytes_bf16(0 if signed else 128 - offset)
    else:
        flip = "xor.b32 c, c, 0x80808080;" if signed else ""
        less = 128 if signed else offset
        magic, lanes = (_bf16(-128.0 - less), _spread(0x43)) if bf16 else (_fp16(-1024.0 - less), _spread(0x64))
        kind, one = ("bf16x2", "0x3f803f80") if bf16 else ("f16x2", "0x3c003c00")
        lanes = flip + lanes
        convert = f"mov.b32 a, {one}; mov.b32 b, {magic};" + "".join(
            f" fma.rn.{kind} ${i}, x{i}, a, b;" for i in (0, 1)
        )
    return "{ .reg .b32 c, t, a, b, m, x0, x1; " + take + " " + lanes + " " + convert + " }"


def _spread(upper: int) -> str:
    """Bytes of c into the lower halves of 16-bit lanes, `upper` into the upper ones."""
    return f" mov.b32 m, {upper:#04x}; prmt.b32 x0, c, m, 0x4140; prmt.b32 x1, c, m, 0x4342;"


def _float4(bf16: bool) -> str:
    """Sign, exponent and mantissa moved to where the 16-bit float has them, then scaled up: twice the value."""
    shift, mask, factor = (6, "0x01c001c0", "0x7f007f00") if bf16 else (9, "0x0e000e00", "0x78007800")
    text = f"mov.b32 m, {factor}; mov.b32 t, 0x80008000;"
    for i in (0, 1):
        text += (
            f" shl.b32 a, x{i}, {shift}; and.b32 a, a, {mask}; shl.b32 b, x{i}, 12;"
            f" lop3.b32 a, b, 0x80008000, a, 0xEA; fma.rn.{'bf16x2' if bf16 else 'f16x2'} ${i}, a, m, t;"
        )
    return text


def _signed_bytes_bf16(more: int) -> str:
    """128 + low seven bits, less 128 or (sign set) 256, plus `more`."""
    text = "mov.b32 m, 0xbf80bf80;"
    for i in (0, 1):
        text += (
            f" lop3.b32 a, x{i}, 0x007f007f, 0x43004300, 0xEA; lop3.b32 b, x{i}, 0x00800080, 0x43004300, 0xEA;"
            f" fma.rn.bf16x2 ${i}, b, m, a;"
        )
    if more:
        text += f" mov.b32 a, 0x3f803f80; mov.b32 b, {_bf16(more)};"
        text += " fma.rn.bf16x2 $0, $0, a, b; fma.rn.bf16x2 $1, $1, a, b;"
    return text


def _bf16(value: float) -> str:
    return _twice(torch.tensor(value, dtype=torch.bfloat16), value)


def _fp16(value: float) -> str:
    return _twice(torch.tensor(value, dtype=torch.float16), value)


def _twice(number: torch.Tensor, value: float) -> str:
    """A 16-bit float's bits in both halves of a register."""
    if number.item() != value:
        raise ValueError(f"{value} is not exact in {number.dtype}")
    bits = int(number.view(torch.int16).item()) & 0xFFFF
    return f"{bits * 0x10001:#010x}"
