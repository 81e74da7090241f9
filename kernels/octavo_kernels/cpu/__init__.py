"""Native CPU kernels: C++ for x86-64 (AVX2, AVX-512, chosen at run time) and a portable path.

`OCTAVO_CPU_ISA` forces a lower instruction set, `OCTAVO_CPU_THREADS` and `OCTAVO_CPU_PIN` the team of threads,
`OCTAVO_CPU_ACTIVATIONS` whether quantized weights meet int8 or float32 activations.
"""

from __future__ import annotations

import os

from octavo_kernels.cpu import bindings as _bindings
from octavo_kernels.cpu import lora as _lora  # noqa: F401  registers the op
from octavo_kernels.cpu import ops as _ops  # noqa: F401  registers the ops
from octavo_kernels.cpu import threads as _threads
from octavo_kernels.cpu.step import NativeStep
from octavo_kernels.registry import BackendUnavailableError, describe_backend
from octavo_kernels.step import DecoderPlan, register_step_compiler

ENV_ISA = "OCTAVO_CPU_ISA"

__all__ = ["available_instruction_sets", "instruction_set", "num_threads", "select_instruction_set", "set_num_threads"]


def instruction_set() -> str:
    """The instruction set in use: portable, avx2, avx512 or avx512_bf16."""
    return str(_bindings.native.oct_isa().decode())


def select_instruction_set(limit: str) -> str:
    """Use the best instruction set up to `limit` (empty: the best); for steps compiled from now on. Returns it."""
    chosen = _bindings.native.oct_select_isa(limit.encode())
    if chosen is None:
        raise ValueError(f"{ENV_ISA}: must be portable, avx2, avx512, avx512_bf16 or amx, got {limit!r}")
    _describe()
    return str(chosen.decode())


def available_instruction_sets() -> tuple[str, ...]:
    """What this processor and build can run, best first."""
    return tuple(_bindings.native.oct_available_isas().decode().split())


def num_threads() -> int:
    """Threads of the team, the caller among them."""
    return int(_bindings.native.oct_threads())


def set_num_threads(count: int) -> None:
    """Resize the team; the thread that calls an op is one of them."""
    _bindings.check(_bindings.native.oct_set_threads(count, int(_threads.pinning_requested())))
    _describe()


def _describe() -> None:
    count = num_threads()
    describe_backend("cpu", f"{instruction_set()}, {count} thread{'' if count == 1 else 's'}")


def _start() -> None:
    try:
        select_instruction_set(os.environ.get(ENV_ISA, "").strip())
        set_num_threads(_threads.requested_threads())
    except ValueError as error:
        raise BackendUnavailableError(str(error)) from error


@register_step_compiler("cpu")
def compile_step(plan: DecoderPlan) -> NativeStep:
    """Raises `UnsupportedPlanError`. The team takes the size that torch was given since this backend was loaded."""
    set_num_threads(_threads.requested_threads())
    return NativeStep(plan)


_start()
