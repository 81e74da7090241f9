"""A rank's process: loads its part, then does what the first rank says until that is gone."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import msgspec
import torch

from octavo_engine.errors import OctavoError
from octavo_engine.loader.load import Phases, load_rank
from octavo_engine.parallel.control import receive_order
from octavo_engine.parallel.host import RankHost, read_nodes
from octavo_engine.parallel.joining import announce, join, open_store, report_failure
from octavo_engine.parallel.processes import RankJob
from octavo_engine.parallel.steps import Order, decode_adapter, decode_lists, decode_slices, decode_transfer
from octavo_engine.process.parent import die_with_parent
from octavo_engine.runner.torch_runner import TorchModelRunner

_log = logging.getLogger(__name__)


def main() -> None:
    """Entry point: the job comes as JSON on standard input."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=RankJob)
    die_with_parent(job.parent_pid)
    # Only the process that started this one decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format=f"rank {job.rank}: %(message)s")
    config = job.config
    torch.set_num_threads(config.num_threads)
    nodes = read_nodes(config)
    store = open_store(config, nodes, job.rendezvous, job.rank)
    announce(store, job.rank)
    try:
        host = join(config, nodes, store, job.rank, job.ranks_here)
        runner = load_rank(config, Path(config.model), Phases(lambda _: None), host)
        host.control.minimum(0)
        follow(runner, host)
    except Exception as error:
        if not isinstance(error, OctavoError):
            _log.exception("ended with an unexpected error")
        report_failure(store, job.rank, error)
        sys.exit(1)


def follow(runner: TorchModelRunner, host: RankHost) -> None:
    """Carry out orders; returns when the first rank is gone."""
    rank = host.rank
    answers = rank.stage_group if rank.is_last_stage else None
    while True:
        try:
            order, numbers = receive_order(host.control)
        except RuntimeError:  # the connection is closed
            return
        match order:
            case Order.FORWARD:
                logits = runner.forward(decode_slices(numbers))
                if answers is not None and rank.tensor_rank == 0:
                    answers.send(logits, 0)
            case Order.EMBED:
                vectors = runner.embed(decode_lists(numbers))
                if answers is not None and rank.tensor_rank == 0:
                    answers.send(vectors, 0)
            case Order.COPY_BLOCKS:
                runner.copy_blocks([(source, target) for source, target in decode_lists(numbers)])
            case Order.TO_HOST | Order.TO_DEVICE:
                runner.move_blocks(decode_transfer(order, numbers))
            case Order.PLACE_ADAPTER:
                runner.place_adapter(*decode_adapter(numbers))
            case Order.HEARTBEAT:
                host.control.minimum(0)


if __name__ == "__main__":
    main()
