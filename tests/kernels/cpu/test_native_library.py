"""Finding the library, choosing instruction sets and threads, and saying so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo_kernels import cpu, registry
from octavo_kernels.cpu import bindings
from octavo_kernels.cpu.threads import requested_threads, usable_cpus

_REPORT = """
import octavo_kernels.registry as registry
print(registry.load_backend("cpu").detail)
"""


def _run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.strip()


def test_an_install_without_the_library_falls_back_and_says_why() -> None:
    code = """
import torch
from pathlib import Path
import octavo_kernels.registry as registry
real = Path.exists
Path.exists = lambda self: False if self.name == "_octavo_cpu.so" else real(self)
from octavo_kernels import ops
print(float(ops.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).sum()))
print(registry.load_backend("cpu").available, registry.load_backend("cpu").detail)
"""
    total, status = _run(code).splitlines()
    assert total == "4.0"
    assert status.startswith("False")
    assert "was not built" in status
    assert "C++ compiler" in status


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_the_environment_forces_a_lower_instruction_set(native: None, name: str) -> None:
    if name not in cpu.available_instruction_sets():
        pytest.skip(f"this processor or build has no {name}")
    assert _run(_REPORT, OCTAVO_CPU_ISA=name, OCTAVO_CPU_THREADS="1") == f"{name}, 1 thread"


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages")
def test_memory_for_weights_asks_for_huge_pages(native: None) -> None:
    memory = bindings.native.oct_alloc(8 << 20)
    try:
        assert memory % 64 == 0
        assert " hg" in _mapping_flags(memory)
    finally:
        bindings.native.oct_free(memory)


def _mapping_flags(address: int) -> str:
    """What the kernel notes of the mapping that holds an address (`VmFlags`, see proc(5))."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return line
    raise AssertionError(f"no mapping holds {address:#x}")


def test_an_instruction_set_beyond_the_machine_is_only_a_limit(native: None) -> None:
    try:
        assert cpu.select_instruction_set("amx") == cpu.available_instruction_sets()[0]
    finally:
        cpu.select_instruction_set("")


def test_an_unknown_instruction_set_is_refused_with_the_choices(native: None) -> None:
    with pytest.raises(ValueError, match=r"OCTAVO_CPU_ISA.*portable, avx2, avx512"):
        cpu.select_instruction_set("sse9")


def test_a_thread_count_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CPU_THREADS", "many")
    with pytest.raises(ValueError, match=r"OCTAVO_CPU_THREADS.*'many'"):
        requested_threads()


def test_threads_follow_torch_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAVO_CPU_THREADS", raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert requested_threads() == 1
    monkeypatch.setenv("OCTAVO_CPU_THREADS", "5")
    assert requested_threads() == 5


def test_the_team_of_threads_can_be_resized(native: None) -> None:
    before = cpu.num_threads()
    try:
        for count in (3, 1, 2):
            cpu.set_num_threads(count)
            assert cpu.num_threads() == count
            assert f"{count} thread" in registry.load_backend("cpu").detail
    finally:
        cpu.set_num_threads(before)


def test_a_forked_child_computes_with_its_own_threads(native: None) -> None:
    code = """
import os, torch
from octavo_kernels import cpu, ops
cpu.set_num_threads(2)
x, w = torch.randn(64, 64), torch.ones(64)
ops.rms_norm(x, w, 1e-5)
child = os.fork()
if child == 0:
    ops.rms_norm(x, w, 1e-5)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _run(code) == "7"


def _cgroup(root: Path, **limits: str) -> Path:
    """A cgroup v2 tree with `cpu.max` files by folder (dots for slashes), and the process in pod/container."""
    for folder, text in limits.items():
        place = root / folder.replace("_", "/")
        place.mkdir(parents=True, exist_ok=True)
        (place / "cpu.max").write_text(text)
    own = root / "own"
    own.write_text("0::/pod/container\n")
    return own


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"pod_container": "100000 100000"}, 1),
        ({"pod_container": "150000 100000"}, 2),
        ({"pod_container": "max 100000", "pod": "100000 100000"}, 1),
        ({"pod_container": "50000 100000"}, 1),
        ({"pod_container": "not a limit"}, None),
        ({}, None),
    ],
)
def test_threads_follow_the_tightest_cgroup_quota(tmp_path: Path, limits: dict[str, str], expected: int | None) -> None:
    own = _cgroup(tmp_path, **limits)
    allowed = len(os.sched_getaffinity(0))
    assert usable_cpus(tmp_path, own) == (allowed if expected is None else min(allowed, expected))


def test_a_cgroup_v1_quota_counts_too(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cpus(tmp_path, tmp_path / "none") == 1
