"""Where a step's work is done: in order, one thing after the other, and perhaps while the caller goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.messages import ModelInfo

Result = TypeVar("Result")


class DeviceQueue(Protocol):
    """First in, first out."""

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Do `call` after everything submitted before."""


class CallerQueue:
    """Calls at once. On a GPU that hides the host's work too: the calls only put kernels on the device's own queue."""

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)
        return future


class ThreadQueue:
    """One thread. For a model on the CPU, whose kernels let go of the interpreter lock while they compute."""

    def __init__(self) -> None:
        count = torch.get_num_threads()  # OpenMP keeps it for each thread
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="steps", initializer=lambda: torch.set_num_threads(count)
        )

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        return self._thread.submit(call)


def runs_ahead(config: EngineConfig, model: ModelInfo) -> bool:
    """Whether steps are launched before the one in front of them is over.

    Where `auto` leaves the choice: on one GPU, and over stages, which compute side by side. On a CPU the host's work
    and the model's would only compete for the same cores.
    """
    if config.async_scheduling == "auto":
        one_gpu = torch.device(model.device).type == "cuda" and model.num_ranks == 1
        return one_gpu or (config.pipeline_parallel_size > 1 and not config.num_speculative_tokens)
    return config.async_scheduling == "on"


def queue_for(device: str, *, ahead: bool, staged: bool) -> DeviceQueue:
    """A thread where the device is the CPU and steps run ahead, but not over stages, which are processes."""
    return ThreadQueue() if ahead and not staged and torch.device(device).type == "cpu" else CallerQueue()
