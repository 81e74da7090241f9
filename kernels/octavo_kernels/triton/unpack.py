"""Eight and four stored bits become 16-bit floats in a few integer instructions, several values in a register.

Converting narrow integers and float8 one by one costs more than the memory they save. So their bits are placed inside
a 16-bit float whose exponent makes the value exact, two at a time (the idea of FasterTransformer's converters and of
Marlin, arXiv 2408.11743). The instructions are Hopper's and Ampere's; interpreted, plain arithmetic gives the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo_kernels.triton.environment import INT8, INTERPRETED_KERNELS

# A float8 placed in a bfloat16 is 2**-120 of its value, in a float16 2**-8.
FP8_IN_BF16 = 2.0**120
FP8_IN_FP16 = 2.0**8


def _fp8_pair(odd: bool, bf16: bool) -> tl.constexpr:
    """Sign to bit 15, exponent and mantissa below it: two shifts, two masks."""
    mask, down = ("0x07f007f0", 4) if bf16 else ("0x3f803f80", 1)
    up = 4 if bf16 else 7
    body = f"shr.u32 a, $1, {down}; mov.b32 b, $1;" if odd else f"shl.b32 a, $1, {up}; shl.b32 b, $1, 8;"
    return tl.constexpr("{ .reg .b32 a, b; " + body + f" and.b32 a, a, {mask}; lop3.b32 $0, b, 0x80008000, a, 0xEA; }}")


def _int8_pair(odd: bool, bf16: bool) -> tl.constexpr:
    """bfloat16: 128 + low seven bits, less 128 or (sign set) 256. float16: 1024 + 128 + value, less 1152."""
    take = "shr.u32 x, $1, 8;" if odd else "mov.b32 x, $1;"
    if bf16:
        return tl.constexpr(
            "{ .reg .b32 x, a, b, m; " + take + " lop3.b32 a, x, 0x007f007f, 0x43004300, 0xEA;"
            " lop3.b32 b, x, 0x00800080, 0x43004300, 0xEA; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, b, m, a; }"
        )
    return tl.constexpr(
        "{ .reg .b32 x, a, b; " + take + " lop3.b32 a, x, 0x00ff00ff, 0x64806480, 0x6A; mov.b32 b, 0x64806480;"
        " sub.f16x2 $0, a, b; }"
    )


_FP8_EVEN_BF16, _FP8_ODD_BF16 = _fp8_pair(False, True), _fp8_pair(True, True)
_FP8_EVEN_FP16, _FP8_ODD_FP16 = _fp8_pair(False, False), _fp8_pair(True, False)
_INT8_EVEN_BF16, _INT8_ODD_BF16 = _int8_pair(False, True), _int8_pair(True, True)
_INT8_EVEN_FP16, _INT8_ODD_FP16 = _int8_pair(False, False), _int8_pair(True, False)


@triton.jit
def bytes_of(pairs, ODD: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """The low (ODD: the high) bytes of int16 `pairs` (int8 or float8_e4m3fn) as DTYPE. Float8 is scaled down: see
    FP8_IN_BF16 for bfloat16 and FP8_IN_FP16 for every other type."""
    if INTERPRETED_KERNELS or DTYPE == tl.float32:
        found = _byte(pairs if ODD else pairs << 8, KIND).to(DTYPE)
    elif DTYPE == tl.bfloat16 and KIND == INT8:
        found = tl.inline_asm_elementwise(
            _INT8_ODD_BF16 if ODD else _INT8_EVEN_BF16, "=r,r", [pairs], tl.bfloat16, True, 2
        )
    elif DTYPE == tl.bfloat16:
        found = tl.inline_asm_elementwise(
            _FP8_ODD_BF16 if ODD else _FP8_EVEN_BF16, "=r,r", [pairs], tl.bfloat16, True, 2
        )
    elif KIND == INT8:
        found = tl.inline_asm_elementwise(
            _INT8_ODD_FP16 if ODD else _INT8_EVEN_FP16, "=r,r", [pairs], tl.float16, True, 2
        )
    else:
        found = tl.inline_asm_elementwise(
            _FP8_ODD_FP16 if ODD else _FP8_EVEN_FP16, "=r,r", [pairs], tl.float16, True, 2
        )
    return found


@triton.jit
def _byte(x, KIND: tl.constexpr):
    """The upper byte of int16 x: int8 as it is, float8 scaled down by FP8_IN_FP16."""
    if KIND == INT8:
        value = (x >> 8).to(tl.float32)
    else:
        bits = (x & -32768) | ((x >> 1) & 0x3F80)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    return value
