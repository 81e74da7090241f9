"""A group of ranks and the few things they do together, over NCCL or gloo.

Process groups are made directly on a store, without torch's global default group, so that engines in one process do
not meet and a user's own `torch.distributed` is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d

_FOREVER = timedelta(days=365)  # an idle engine is silent; a lost peer closes its connections


class Communicator:
    """rank of size members. With gloo, tensors of a GPU go through the host."""

    def __init__(
        self, store: c10d.Store, name: str, rank: int, size: int, backend: str, interface: str | None = None
    ) -> None:
        """interface: the address to listen on, None for that of the host's name. backend: nccl or gloo."""
        self.rank = rank
        self.size = size
        self._backend = backend
        prefixed = c10d.PrefixStore(name, store)
        self._group: Any = (
            c10d.ProcessGroupNCCL(prefixed, rank, size, c10d.ProcessGroupNCCL.Options())
            if backend == "nccl"
            else _gloo(prefixed, rank, size, interface)
        )

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all members, on every member; x itself may be overwritten."""
        here = self._here(x)
        self._group.allreduce([here]).wait()
        return here.to(x.device)

    def minimum(self, value: int) -> int:
        """The smallest of all members' numbers."""
        x = torch.tensor([value], dtype=torch.int64)
        options: Any = c10d.AllreduceOptions()
        options.reduceOp = c10d.ReduceOp.MIN
        self._group.allreduce([x], options).wait()
        return int(x.item())

    def gather_columns(self, x: torch.Tensor, total: int) -> torch.Tensor:
        """Members' columns side by side on the first member: [n, held] -> [n, total]; others get their own back.

        Members hold `share`s of total.
        """
        widest = math.ceil(total / self.size)
        here = self._here(torch.nn.functional.pad(x, (0, widest - x.shape[1])).contiguous())
        parts = [torch.empty_like(here) for _ in range(self.size)] if self.rank == 0 else []
        options = c10d.GatherOptions()
        options.rootRank = 0
        self._group.gather([parts] if parts else [], [here], options).wait()
        if not parts:
            return x
        wide = total % self.size or self.size  # the first members hold one column more than the others
        trimmed = [part[:, : widest - (index >= wide)] for index, part in enumerate(parts)]
        return torch.cat(trimmed, dim=1).to(x.device)

    def send(self, x: torch.Tensor, to: int, tag: int = 0) -> None:
        self._group.send([self._here(x.contiguous())], to, tag).wait()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, sender: int) -> torch.Tensor:
        return self.expect(shape, dtype, device, sender)()

    def expect(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, sender: int
    ) -> Callable[[], torch.Tensor]:
        """Be ready to receive; the result waits until it is there. A sender's messages come in their order."""
        place = device if self._backend == "nccl" else torch.device("cpu")
        x = torch.empty(shape, dtype=dtype, device=place)
        work = self._group.recv([x], sender, 0)

        def wait() -> torch.Tensor:
            work.wait()
            return x.to(device)

        return wait

    def broadcast(self, x: torch.Tensor) -> None:
        """The first member's tensor into everybody's."""
        self.announce(x)()

    def announce(self, x: torch.Tensor) -> Callable[[], None]:
        """As `broadcast`, but the result waits until everybody has it."""
        options = c10d.BroadcastOptions()
        options.rootRank = 0
        work = self._group.broadcast([x], options)

        def wait() -> None:
            work.wait()
            x.size()  # it must live until then

        return wait

    def abort(self) -> None:
        """Let go of whatever waits for a peer that is lost (NCCL never notices by itself)."""
        self._group.abort()

    def _here(self, x: torch.Tensor) -> torch.Tensor:
        return x.cpu() if self._backend == "gloo" else x


def _gloo(store: c10d.Store, rank: int, size: int, interface: str | None) -> Any:
    gloo: Any = c10d.ProcessGroupGloo
    if interface is None:  # that of the host's name, or GLOO_SOCKET_IFNAME
        return gloo(store, rank, size, timeout=_FOREVER)
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=interface)]
    options._timeout = _FOREVER
    return gloo(store, rank, size, options)
