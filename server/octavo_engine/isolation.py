"""One request's failure stays its own: a failing batch is halved until the culprits stand alone."""

from __future__ import annotations

import torch

from octavo_engine.errors import EngineDeadError
from octavo_engine.runner.interface import ModelRunner, SequenceSlice
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.sequence import Sequence


class StepFailedError(EngineDeadError):
    """The runner fails whatever it is given; the engine cannot go on."""


def run_isolated(
    runner: ModelRunner, batch: Batch, error: Exception | None
) -> tuple[list[tuple[Batch, torch.Tensor]], list[tuple[Sequence, str]]]:
    """Compute a batch that has failed with `error`, or has not been tried; all its tokens are known.

    Returns the parts that worked with their logits, and the sequences that cannot be computed. Computing a slice again
    is harmless: it writes the same keys and values to the same places. A device that no longer works at all is told
    from a bad request by a step over one token; raises `StepFailedError`.
    """
    parts: list[tuple[Batch, torch.Tensor]] = []
    failed: list[tuple[Sequence, str]] = []
    if not batch.slices:
        return parts, failed
    if error is None:
        _compute(runner, batch, parts, failed)
    else:
        _bisect(runner, batch, error, parts, failed)
    if not parts:
        _probe(runner, batch, failed[0][1])
    return parts, failed


def _compute(
    runner: ModelRunner,
    batch: Batch,
    parts: list[tuple[Batch, torch.Tensor]],
    failed: list[tuple[Sequence, str]],
) -> None:
    try:
        parts.append((batch, runner.forward(batch.slices)))
    except torch.AcceleratorError as error:
        raise StepFailedError(f"the device failed: {first_line(error)}") from error
    except EngineDeadError:
        raise
    except Exception as error:
        _bisect(runner, batch, error, parts, failed)


def _bisect(
    runner: ModelRunner,
    batch: Batch,
    error: Exception,
    parts: list[tuple[Batch, torch.Tensor]],
    failed: list[tuple[Sequence, str]],
) -> None:
    """`batch` has failed with `error`: try its halves."""
    if len(batch) == 1:
        failed.append((batch.sequences[0], first_line(error)))
        return
    middle = len(batch) // 2
    for half in (slice(None, middle), slice(middle, None)):
        _compute(runner, Batch(batch.sequences[half], batch.slices[half]), parts, failed)


def _probe(runner: ModelRunner, batch: Batch, reason: str) -> None:
    """Nothing of the batch could be computed: does the runner still work at all?"""
    # The last block of a failed sequence is its own, and the sequence ends now.
    try:
        runner.forward([SequenceSlice([0], 0, batch.slices[0].block_table[-1:], 1)])
    except Exception as error:
        raise StepFailedError(
            f"the model runner fails on every request ({reason}) and on a single token ({first_line(error)})"
        ) from error


def first_line(error: BaseException) -> str:
    """An error's kind and the start of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
