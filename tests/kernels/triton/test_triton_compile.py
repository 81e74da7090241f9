"""Every kind of launch compiles to machine code for Hopper, without a GPU, without asking a tensor for its values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_static.py"
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KINDS = [
    "add_rms_norm_quantize", "silu_and_mul_quantize", "qk-norm fp8", "decode 64 x 4k fp8", "window, sinks",
    "3k shared", "prefill 8 x 2k heads", "mla", "int4-g128 1 rows", "Q6_K 16 rows", "fp8 block 64", "int8 x int8",
    "experts 64 tokens fp8", "adapters", "top-k 50 top-p", "token_logprobs", "apply_", "verify_drafts",
]  # fmt: skip
MAY_SPILL_BYTES = 192  # some were measured faster than smaller tiles that spill nothing

needs_tools = pytest.mark.skipif(
    not (BIN / "cuobjdump").is_file() or not list(BIN.glob("ptxas*")), reason="the Triton wheel has no ptxas here"
)


def compiled(*only: str) -> list[list[str]]:
    """Rows of the static table: workload, kernel, registers, spilled, shared, ..."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *(["--only", *only] if only else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    return rows[2:]


def assert_fits(rows):
    for workload, kernel, registers, spilled, shared, _warps, programs, *_ in rows:
        assert int(registers) <= 255, (workload, kernel)
        assert int(spilled) <= MAY_SPILL_BYTES, (workload, kernel, spilled)
        assert int(shared) <= 227 * 1024, (workload, kernel, shared)
        assert int(programs) >= 1, (workload, kernel)


@needs_tools
@pytest.mark.timeout(600)
def test_every_kind_of_kernel_compiles_for_hopper():
    rows = compiled(*KINDS)
    kernels = {row[1] for row in rows}
    assert_fits(rows)
    assert {"flash_kernel", "merge_kernel", "gemm_kernel", "scaled_kernel", "grouped_kernel"} <= kernels
    assert {"mla_kernel", "sample_kernel", "rope_store_kernel", "rms_norm_kernel", "recover_kernel"} <= kernels


@needs_tools
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_workloads_compile_for_hopper():
    assert_fits(compiled())


CHANGING_BATCHES = """
import torch
from octavo_kernels import ops
from octavo_kernels.registry import use_backends
from octavo_kernels.triton.offline import compile_launches
from octavo_kernels.triton.workloads import new_batch, new_cache

meta = torch.device("meta")
cache = new_cache(meta, 5000, 8, 128, torch.bfloat16)

def steps():
    for count in (1, 3, 16, 33, 64):
        for length in (1, 200, 4096):
            batch = new_batch(meta, [(1, length)] * count)
            query = torch.empty(count, 32, 128, dtype=torch.bfloat16, device=meta)
            ops.rms_norm(query.view(count, 4096), query.view(count, 4096)[0], 1e-5)
            ops.paged_attention(query, cache, batch, 0.1)

with use_backends("triton"):
    print(*sorted(report.kernel for report in compile_launches(steps)))
"""


@needs_tools
def test_changing_batches_compile_nothing_new():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["OCTAVO_TRITON_COMPILE_ONLY"] = "1"
    command = [sys.executable, "-c", CHANGING_BATCHES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = done.stdout.split()
    assert kernels.count("rms_norm_kernel") == 1
    assert kernels.count("flash_kernel") == 2  # split over keys, and not
