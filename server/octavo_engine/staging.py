"""Small copies between host and device that wait for neither: pinned memory, in the order of the stream."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

_ALIGNMENT = 16  # bytes, so that every kind of tensor may start there


def to_device(arrays: Sequence[Array], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors; on another device all in one copy. Torch keeps pinned memory until the copy is done."""
    hosts = [torch.from_numpy(array) for array in arrays]
    if device.type == "cpu":
        return hosts
    ends = list(itertools.accumulate(-(-host.nbytes // _ALIGNMENT) * _ALIGNMENT for host in hosts))
    starts = [0, *ends[:-1]]
    staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for host, start in zip(hosts, starts, strict=True):
        staging[start : start + host.nbytes].view(host.dtype).copy_(host.view(-1))
    moved = staging.to(device, non_blocking=True)
    return [
        moved[start : start + host.nbytes].view(host.dtype).view(host.shape)
        for host, start in zip(hosts, starts, strict=True)
    ]


def numbers(values: npt.ArrayLike, device: torch.device, dtype: npt.DTypeLike) -> torch.Tensor:
    """Numbers of the host as a tensor of the same shape on the device."""
    return to_device((np.array(values, dtype=dtype),), device)[0]


def select(x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """A copy of some rows of x."""
    return x.index_select(0, numbers(rows, x.device, np.int64))


class OnTheWay:
    """Tensors on their way to host memory. On a CPU they are there already."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors and tensors[0].is_cuda:
            self._tensors = tuple(_pinned_copy(tensor) for tensor in tensors)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors in host memory; waits for what the device computes up to them, and for nothing after."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
