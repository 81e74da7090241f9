"""How ranks find each other: a store they all reach, and the groups made on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import FileStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError, EngineDeadError, ModelLoadError, OctavoError
from octavo_engine.parallel.communicator import Communicator
from octavo_engine.parallel.host import Nodes, RankHost, backend_for, rank_device, topology_of
from octavo_engine.parallel.rank import Rank

_JOIN_TIMEOUT_S = 600.0
_POLL_S = 0.05
_KINDS: dict[str, type[OctavoError]] = {"ConfigError": ConfigError, "ModelLoadError": ModelLoadError}


def open_store(config: EngineConfig, nodes: Nodes, rendezvous: str, rank: int) -> Store:
    """A shared file where there is one machine, so that nothing listens; else TCP on the first node."""
    store: Store
    if rendezvous:
        store = FileStore(rendezvous, config.num_ranks)
        return store
    timeout = timedelta(seconds=_JOIN_TIMEOUT_S)
    store = TCPStore(nodes.address, nodes.port, None, rank == 0, timeout=timeout, wait_for_workers=False)
    return store


def announce(store: Store, rank: int) -> None:
    """This rank is alive and about to join."""
    store.set(f"here/{rank}", "1")


def report_failure(store: Store, rank: int, error: Exception) -> None:
    """Leave the reason where the first rank finds it."""
    kind = type(error).__name__ if isinstance(error, OctavoError) else ""
    text = str(error) if kind else f"{type(error).__name__}: {error}"
    store.set(f"failed/{rank}", f"{kind}\n{text}")


def failure(store: Store, ranks: Sequence[int]) -> OctavoError | None:
    """What the first of these ranks reported, if one did."""
    for rank in ranks:
        if store.check([f"failed/{rank}"]):
            kind, _, text = store.get(f"failed/{rank}").decode().partition("\n")
            return _KINDS.get(kind, EngineDeadError)(text if kind in _KINDS else f"rank {rank}: {text}")
    return None


def wait_for_ranks(store: Store, ranks: Sequence[int], lost: Callable[[], str]) -> None:
    """Until all ranks have announced themselves. Raises `EngineDeadError` when one is lost or none comes in time."""
    deadline = time.monotonic() + _JOIN_TIMEOUT_S
    while True:
        missing = [rank for rank in ranks if not store.check([f"here/{rank}"])]
        if not missing:
            return
        failed = failure(store, ranks)
        if failed is not None:
            raise failed
        if lost():
            raise EngineDeadError(f"{lost()} before it had joined the others")
        if time.monotonic() > deadline:
            names = ", ".join(map(str, missing))
            raise EngineDeadError(f"ranks {names} have not joined within {_JOIN_TIMEOUT_S:.0f} s; are their nodes up?")
        time.sleep(_POLL_S)


def join(config: EngineConfig, nodes: Nodes, store: Store, index: int, ranks_here: int) -> RankHost:
    """Make this rank's groups; all ranks do so in the same order."""
    topology = topology_of(config)
    device = rank_device(config, index - nodes.ranks_here(topology.world_size).start)
    backend = backend_for(config, device)
    interface = nodes.address if nodes.count == 1 else None
    stage, tensor_rank = topology.place(index)

    def group(name: str, rank: int, size: int, kind: str) -> Communicator | None:
        return Communicator(store, name, rank, size, kind, interface) if size > 1 else None

    control = Communicator(store, "control", index, topology.world_size, "gloo", interface)
    tensor_group = group(f"tensor-{stage}", tensor_rank, topology.tensor, backend)
    stage_group = group(f"stages-{tensor_rank}", stage, topology.pipeline, backend)
    return RankHost(Rank(topology, index, tensor_group, stage_group), device, ranks_here, control)
