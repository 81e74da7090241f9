"""One step from its launch to its end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.sequence import Sequence, SequenceState
from octavo_engine.stepping.choices import Chosen


@dataclass(slots=True)
class Step:
    """scheduled: what it was launched with. batch: what of that is computed; after a failure in front of it, without
    what ended there. logits: waits for those of the whole batch. chosen: set once it is known who goes on."""

    scheduled: Batch
    batch: Batch
    launched_s: float
    logits: Callable[[], torch.Tensor]
    chosen: Future[Chosen] | None = None


def still_running(batch: Batch) -> Batch:
    """The part of a batch whose sequences have not ended, with the tokens that were being chosen when it was
    scheduled; the steps before it are over."""
    kept = [
        (seq, _known(seq, piece))
        for seq, piece in zip(batch.sequences, batch.slices, strict=True)
        if seq.state is SequenceState.RUNNING
    ]
    return replace(batch, sequences=[seq for seq, _ in kept], slices=[piece for _, piece in kept])


def _known(seq: Sequence, piece: SequenceSlice) -> SequenceSlice:
    if piece.sampled_row is None:
        return piece
    return replace(piece, token_ids=[seq.tokens[piece.start]], sampled_row=None)
