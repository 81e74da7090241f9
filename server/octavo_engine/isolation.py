"""One request's failure stays its own: a failing batch is halved until the culprits stand alone."""

from __future__ import annotations

import torch

from octavo_engine.errors import EngineDeadError
from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.runner.interface import ModelRunner, SequenceSlice
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.sequence import Sequence


class StepFailedError(EngineDeadError):
    """The runner fails whatever it is given; the engine cannot go on."""


def run_isolated(
    runner: ModelRunner, batch: Batch, pool: BlockPool
) -> tuple[list[tuple[Batch, torch.Tensor]], list[tuple[Sequence, str]]]:
    """Compute a batch; return the parts that worked with their logits, and the sequences that cannot be computed.

    Computing a slice again is harmless: it writes the same keys and values to the same places. A device that no
    longer works at all is told from a bad request by a step over one token in a spare block; raises `StepFailedError`.
    """
    try:
        return [(batch, runner.forward(batch.slices))], []
    except torch.AcceleratorError as error:
        raise StepFailedError(f"the device failed: {_first_line(error)}") from error
    except EngineDeadError:
        raise
    except Exception as error:
        parts: list[tuple[Batch, torch.Tensor]] = []
        failed: list[tuple[Sequence, str]] = []
        _bisect(runner, batch, error, parts, failed)
        if not parts:
            _probe(runner, batch, pool, error)
        return parts, failed


def _bisect(
    runner: ModelRunner,
    batch: Batch,
    error: Exception,
    parts: list[tuple[Batch, torch.Tensor]],
    failed: list[tuple[Sequence, str]],
) -> None:
    """`batch` has failed with `error`: try its halves."""
    if len(batch) == 1:
        failed.append((batch.sequences[0], _first_line(error)))
        return
    middle = len(batch) // 2
    for half in (slice(None, middle), slice(middle, None)):
        part = Batch(batch.sequences[half], batch.slices[half])
        try:
            parts.append((part, runner.forward(part.slices)))
        except torch.AcceleratorError as device_error:
            raise StepFailedError(f"the device failed: {_first_line(device_error)}") from device_error
        except Exception as part_error:
            _bisect(runner, part, part_error, parts, failed)


def _probe(runner: ModelRunner, batch: Batch, pool: BlockPool, error: Exception) -> None:
    """Nothing of the batch could be computed: does the runner still work at all?"""
    block = pool.allocate(1) if pool.num_free else []
    try:
        # Without a spare block the failed sequence's own last block serves: that sequence ends now anyway.
        spare = block or [batch.slices[0].block_table[-1]]
        runner.forward([SequenceSlice([0], 0, spare, 1)])
    except Exception as probe_error:
        raise StepFailedError(
            f"the model runner fails on every request ({_first_line(error)}) and on a single token "
            f"({_first_line(probe_error)})"
        ) from error
    finally:
        pool.release(block)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
