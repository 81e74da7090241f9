"""What this machine offers: processors, memory, and the number format it multiplies fastest."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from octavo_engine.errors import ConfigError
from octavo_kernels import registry
from octavo_kernels.registry import REFERENCE

_CGROUP = Path("/sys/fs/cgroup")


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises `ConfigError` for a device that is absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for but PyTorch finds no CUDA device; use device=cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def choose_dtype(name: str, device: torch.device, *, quantized: bool = False) -> torch.dtype:
    """What activations and dense weights are computed in, where `auto` leaves the choice.

    GPU: bfloat16 where the hardware has it. CPU, quantized weights: bfloat16 where native kernels multiply them (they
    accumulate in float32 and take int8 activations), else float32, for plain torch makes such weights dense once and
    precision then costs only memory. CPU, dense weights: bfloat16 where the CPU multiplies it natively (AVX-512 BF16,
    AMX: 1.5 to 3 times as fast as float32 from batch 1 up), else float32, because emulated bfloat16 is slower.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    fast = has_native_kernels() if quantized else bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
    return torch.bfloat16 if fast else torch.float32


def has_native_kernels() -> bool:
    """Whether a compiled backend runs on the CPU here."""
    return any(status.available and status.name != REFERENCE for status in registry.status("cpu"))


def choose_kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """`auto` stores keys and values as they are computed."""
    stored = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": torch.int8,
        "fp8": torch.float8_e4m3fn,
    }
    return stored.get(name, dtype)


def cpu_flags() -> frozenset[str]:
    """Instruction set extensions as the kernel names them; none where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Threads of torch's ops inside the block. One is right for small ops between native ones: torch's threads and the
    native ones would wait for the same processors in turn, each of them spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_cpus(cgroup: Path = _CGROUP) -> int:
    """Processors this process may use: its affinity, cut by the container's CPU quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(cgroup / "cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        count = min(count, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    return count


def free_memory_bytes(device: torch.device, cgroup: Path = _CGROUP) -> int:
    """Memory that can still be taken: the GPU's, or the machine's cut by the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, int(limit) - int(used) + _reclaimable(cgroup))
    return max(0, free)


def return_freed_memory() -> None:
    """Give the system what was freed since and the C library keeps for later (glibc; elsewhere nothing happens)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reclaimable(cgroup: Path) -> int:
    """Page cache the kernel gives up under pressure; it counts as used in memory.current."""
    for line in _read(cgroup / "memory.stat").splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
