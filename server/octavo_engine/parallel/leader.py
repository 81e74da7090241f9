"""The first rank: a runner that has all ranks do what it does."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from torch.distributed.distributed_c10d import Store

from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError, EngineDeadError
from octavo_engine.kv.transfers import Transfer
from octavo_engine.loader.load import Phases, load_rank
from octavo_engine.lora.adapter import Adapter
from octavo_engine.messages import ModelInfo
from octavo_engine.parallel.control import send_order
from octavo_engine.parallel.host import RankHost, read_nodes
from octavo_engine.parallel.joining import failure, join, open_store, wait_for_ranks
from octavo_engine.parallel.processes import RankProcesses
from octavo_engine.parallel.steps import Numbers, Order, encode_adapter, encode_lists, encode_slices, encode_transfer
from octavo_engine.process.private_folder import PrivateFolder
from octavo_engine.runner.batch_builder import check_slices
from octavo_engine.runner.interface import SequenceSlice, with_sampled
from octavo_engine.runner.machine import usable_cpus
from octavo_engine.runner.torch_runner import TorchModelRunner

Result = TypeVar("Result")


def lead(config: EngineConfig, path: Path, phases: Phases) -> ParallelRunner:
    """Start this machine's other ranks, load this one's part beside them, and return what drives them all.

    Raises what any rank raised while it loaded.
    """
    nodes = read_nodes(config)
    if nodes.index:
        raise ConfigError("NODE_RANK: the engine runs on node 0; other nodes hold ranks only (octavo serve does that)")
    ranks = nodes.ranks_here(config.num_ranks)
    config = msgspec.structs.replace(
        config, model=str(path), num_threads=config.num_threads or max(1, usable_cpus() // len(ranks))
    )
    torch.set_num_threads(config.num_threads)
    folder = PrivateFolder()  # only this user can join
    rendezvous = f"{folder.path}/store" if nodes.count == 1 else ""
    store = open_store(config, nodes, rendezvous, 0)
    processes = RankProcesses(config, ranks[1:], len(ranks), rendezvous)
    others = range(1, config.num_ranks)
    try:
        wait_for_ranks(store, others, lambda: processes.lost)
        host = join(config, nodes, store, 0, len(ranks))
        processes.on_lost(lambda: _let_go(host))
        runner = load_rank(config, path, phases, host)
        host.control.minimum(0)  # all are warm
    except BaseException as error:
        processes.wait_for_loss(1.0)
        cause = failure(store, others)
        _clean_up(processes, folder)
        if cause is not None:
            raise cause from error
        raise
    leader = ParallelRunner(runner, host, processes, store)
    weakref.finalize(leader, _clean_up, processes, folder)
    return leader


class ParallelRunner:
    """Every call is announced to the other ranks, then computed by all of them together.

    Ranks that have lost one of theirs cannot go on: every failure after the announcement ends the engine with
    `EngineDeadError`. What a request can get wrong is therefore checked before.
    """

    def __init__(self, runner: TorchModelRunner, host: RankHost, processes: RankProcesses, store: Store) -> None:
        self._runner = runner
        self._host = host
        self._processes = processes
        self._store = store
        self._announced: deque[list[Callable[[], None]]] = deque()
        topology = host.rank.topology
        backend = f"{runner.info.backend}; {topology.world_size} ranks ({topology.describe()}), no whole steps"
        self._info = msgspec.structs.replace(runner.info, backend=backend)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def rank_pids(self) -> dict[int, int]:
        """Process ids of the other ranks on this machine."""
        return self._processes.pids

    @property
    def num_stages(self) -> int:
        return self._host.rank.topology.pipeline

    def forward(self, slices: Sequence[SequenceSlice], sampled: torch.Tensor | None = None) -> torch.Tensor:
        return self.begin(with_sampled(slices, sampled))()

    def begin(self, slices: Sequence[SequenceSlice]) -> Callable[[], torch.Tensor]:
        if not slices:
            return lambda: self._runner.forward(slices)
        block_size = self._info.kv_block_size
        check_slices(slices, block_size)
        shape = (sum(piece.num_logits for piece in slices), self._info.vocab_size)
        logits = self._together(
            Order.FORWARD,
            encode_slices(slices, block_size),
            lambda: self._from_last_stage(lambda: self._runner.forward(slices), shape),
        )
        return lambda: self._or_dead(logits)

    def embed(self, prompts: Sequence[Sequence[int]], second_starts: Sequence[int] = ()) -> torch.Tensor:
        """Decoders, which alone have ranks, do not tell the texts of a pair apart."""
        if not prompts or not all(prompts):
            return self._runner.embed(prompts)
        shape = (len(prompts), len(self._info.labels) or self._info.hidden_size)
        vectors = self._together(
            Order.EMBED,
            encode_lists(prompts),
            lambda: self._from_last_stage(lambda: self._runner.embed(prompts), shape),
        )
        return self._or_dead(vectors)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        if pairs:
            self._together(Order.COPY_BLOCKS, encode_lists(pairs), lambda: self._runner.copy_blocks(pairs))

    def move_blocks(self, transfer: Transfer) -> None:
        self._together(*encode_transfer(transfer), lambda: self._runner.move_blocks(transfer))

    def read_adapter(self, name: str, path: Path, max_rank: int) -> Adapter:
        return self._runner.read_adapter(name, path, max_rank)

    def place_adapter(self, slot: int, adapter: Adapter) -> None:
        numbers = encode_adapter(slot, adapter)
        self._together(Order.PLACE_ADAPTER, numbers, lambda: self._runner.place_adapter(slot, adapter))

    def heartbeat(self) -> None:
        self._together(Order.HEARTBEAT, None, lambda: self._host.control.minimum(0))

    def _together(self, order: Order, numbers: Numbers | None, compute: Callable[[], Result]) -> Result:
        def announced() -> Result:
            self._announced.append(send_order(self._host.control, order, numbers))
            while len(self._announced) >= self.num_stages:  # a later stage hears of a step once it is done with others
                for heard in self._announced.popleft():
                    heard()
            return compute()

        return self._or_dead(announced)

    def _or_dead(self, call: Callable[[], Result]) -> Result:
        try:
            if not self._processes.lost:
                result = call()
        except Exception as error:
            raise EngineDeadError(self._reason(error)) from error
        if self._processes.lost:  # found before the step, or let go of in the middle of it
            raise EngineDeadError(self._reason(None))
        return result

    def _from_last_stage(
        self, compute: Callable[[], torch.Tensor], shape: tuple[int, int]
    ) -> Callable[[], torch.Tensor]:
        """Do this stage's part; the result waits for the last stage's."""
        group = self._host.rank.stage_group
        if group is None:
            own = compute()
            return lambda: own
        # Ready before the next stage has anything: it must not wait for this one, which may wait for it.
        answer = group.expect(shape, torch.float32, self._host.device, group.size - 1)
        compute()
        return answer

    def _reason(self, error: Exception | None) -> str:
        lost = self._processes.wait_for_loss()
        reported = failure(self._store, range(1, self._info.num_ranks))
        if reported is not None:
            return f"{reported}; its engine cannot go on and must be restarted"
        if lost:
            return f"{lost}; its engine cannot go on and must be restarted"
        return f"a step failed on one of the ranks, which cannot go on alone: {type(error).__name__}: {error}"


def _clean_up(processes: RankProcesses, folder: PrivateFolder) -> None:
    processes.stop()
    folder.remove()


def _let_go(host: RankHost) -> None:
    """NCCL would wait for the lost rank for ever."""
    if host.device.type == "cuda":
        for group in (host.rank.tensor_group, host.rank.stage_group):
            if group is not None:
                group.abort()
