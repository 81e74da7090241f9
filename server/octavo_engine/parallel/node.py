"""A node that holds ranks of an engine whose first rank, and server, is on another one."""

from __future__ import annotations

import logging
import signal
import threading

import msgspec

from octavo_engine.config import EngineConfig
from octavo_engine.parallel.host import read_nodes
from octavo_engine.parallel.processes import RankProcesses
from octavo_engine.runner.machine import usable_cpus
from octavo_engine.storage import resolve

_log = logging.getLogger(__name__)


def is_follower_node(config: EngineConfig) -> bool:
    """Whether this machine only holds ranks. Raises `ConfigError` for an environment that makes no sense."""
    return read_nodes(config).index > 0


def run_node(config: EngineConfig) -> int:
    """Hold this node's ranks until one of them, or the first node, is gone, or a signal ends them; the exit code."""
    nodes = read_nodes(config)
    ranks = nodes.ranks_here(config.num_ranks)
    path = resolve(config.model, revision=config.revision)
    threads = config.num_threads or max(1, usable_cpus() // len(ranks))
    config = msgspec.structs.replace(config, model=str(path), num_threads=threads)
    ended = threading.Event()
    signals: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        signals.append(number)
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    processes = RankProcesses(config, ranks, len(ranks), "")
    processes.on_lost(ended.set)
    _log.warning("node %d of %d: ranks %d to %d", nodes.index, nodes.count, ranks.start, ranks.stop - 1)
    ended.wait()
    processes.stop()
    return 0 if signals else 1
