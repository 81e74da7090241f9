"""What is taken from the machine respects the container's limits."""

from __future__ import annotations

import platform
from pathlib import Path

import psutil
import pytest
import torch

from octavo_engine.errors import ConfigError
from octavo_engine.runner import machine
from octavo_kernels.registry import use_backends

CPU = torch.device("cpu")


def test_a_cpu_quota_cuts_the_threads(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000")

    assert machine.usable_cpus(tmp_path) == 1


def test_no_quota_leaves_the_affinity(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000")

    assert machine.usable_cpus(tmp_path) == machine.usable_cpus(tmp_path / "absent") >= 1


def test_a_memory_limit_cuts_what_is_free(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000")
    (tmp_path / "memory.current").write_text("700")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")

    assert machine.free_memory_bytes(CPU, tmp_path) == 500


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to return memory")
def test_freed_memory_goes_back_to_the_system() -> None:
    pieces = [bytes(range(256)) * 256 for _ in range(1_000)]  # 64 MiB in pieces that malloc keeps when they are freed
    last = pieces[-1]  # holds the end of the heap, which is all that it shrinks by itself
    del pieces
    before = psutil.Process().memory_info().rss

    machine.return_freed_memory()

    assert psutil.Process().memory_info().rss < before - (32 << 20)
    assert len(last) == 1 << 16


def test_no_limit_leaves_what_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max")

    assert machine.free_memory_bytes(CPU, tmp_path) > 1 << 20


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"avx2"}, torch.float32), ({"avx512_bf16"}, torch.bfloat16), ({"amx_bf16"}, torch.bfloat16)],
)
def test_dense_weights_compute_in_bfloat16_only_where_the_cpu_multiplies_it(
    flags: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags))

    assert machine.choose_dtype("auto", CPU) == expected


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_quantized_weights_compute_in_bfloat16_only_with_native_kernels(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_native_kernels", lambda: native)

    assert machine.choose_dtype("auto", CPU, quantized=True) == expected


def test_the_reference_alone_is_no_native_kernel() -> None:
    with use_backends("reference"):
        assert not machine.has_native_kernels()


def test_a_named_dtype_is_taken_as_it_is() -> None:
    assert machine.choose_dtype("float16", CPU) == torch.float16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="finds no CUDA device; use device=cpu"):
        machine.choose_device("cuda")
