"""GPU kernels in Triton. Importing registers every op they implement; see docs/kernels.md for which runs when."""

from __future__ import annotations

from octavo_kernels.registry import BackendUnavailableError, describe_backend

try:
    from octavo_kernels.triton import environment
except ModuleNotFoundError as error:
    raise BackendUnavailableError(f"{error.name} is not installed; pip install 'octavo[gpu]'") from error

DESCRIPTION = environment.require_device()

from octavo_kernels.triton import (  # noqa: E402
    activation,
    attention,
    fp8_gemm,
    kv_cache,
    linear,
    lora,
    mla,
    moe,
    norm,
    rope,
    sampling,
)

__all__ = [
    "activation",
    "attention",
    "environment",
    "fp8_gemm",
    "kv_cache",
    "linear",
    "lora",
    "mla",
    "moe",
    "norm",
    "rope",
    "sampling",
]

describe_backend("triton", DESCRIPTION)
