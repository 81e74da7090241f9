"""Compile kernels for a GPU that is not here, and read what the compiler says about them.

The real launchers run on tensors of torch's `meta` device (shapes without memory), with launching replaced by
compiling: what is checked is exactly what a GPU would be given. A launcher that reads a tensor's values fails, which
shows that no launch makes the host wait for the device. Needs `OCTAVO_TRITON_COMPILE_ONLY=1` at import, and not
`TRITON_INTERPRET`. Figures are the compiler's, not measurements.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from octavo_kernels.triton import environment

HOPPER = 90  # compute capability 9.0: H100, H200
REGISTERS_PER_SM = 65_536
SHARED_PER_SM = 228 * 1_024
MAX_WARPS_PER_SM = 64
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NotCompileOnlyError(RuntimeError):
    """The process was not started for compiling offline."""


@dataclass(frozen=True, slots=True)
class KernelReport:
    """What ptxas made of one specialisation of a kernel.

    registers: for each thread. spill_bytes: local memory for each thread. shared_bytes: for each program.
    """

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    matrix_instruction: str

    @property
    def programs_per_sm(self) -> int:
        """How many programs fit a Hopper multiprocessor at once."""
        by_warps = MAX_WARPS_PER_SM // self.num_warps
        by_registers = REGISTERS_PER_SM // (max(self.registers, 24) * 32 * self.num_warps)
        by_shared = SHARED_PER_SM // (self.shared_bytes + 1_024)
        return min(by_warps, by_registers, by_shared, 32)


def tools_are_here() -> bool:
    """Whether the Triton wheel brought the assembler and the reader of its output."""
    return any((BIN / name).is_file() for name in ("ptxas", "ptxas-blackwell")) and (BIN / "cuobjdump").is_file()


def compile_launches(call: Callable[[], object], capability: int = HOPPER) -> list[KernelReport]:
    """Run `call` (on meta tensors) and report on every kernel it would have launched."""
    if not environment.COMPILE_ONLY or environment.INTERPRETED:
        raise NotCompileOnlyError(f"set {environment.ENV_COMPILE_ONLY}=1 and unset TRITON_INTERPRET, then start again")
    launched: dict[int, tuple[str, Any]] = {}
    with _compiling(launched, capability):
        call()
    return [_report(name, kernel) for name, kernel in launched.values()]


class _OfflineDriver:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling(launched: dict[int, tuple[str, Any]], capability: int) -> Iterator[None]:
    real_run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = real_run(self, *args, grid=grid, warmup=True, **kwargs)
        launched[id(kernel)] = (self.__name__, kernel)
        return kernel

    driver.set_active(_OfflineDriver(capability))
    JITFunction.run = compile_instead
    try:
        yield
    finally:
        JITFunction.run = real_run


def _report(name: str, kernel: Any) -> KernelReport:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(BIN / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    found = sorted(set(re.findall(r"\b(wgmma|mma)\.\S*?(m\d+n\d+k\d+)", kernel.asm["ptx"])))
    return KernelReport(
        kernel=name.strip("_"),
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        matrix_instruction=", ".join(f"{kind}.{shape}" for kind, shape in found) or "-",
    )
