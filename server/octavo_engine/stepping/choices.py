"""What is chosen from a step's logits, and for whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from octavo_engine.messages import TokenLogprobs
from octavo_engine.sampler.logprobs import LogprobsOnTheWay
from octavo_engine.sampler.sampler import Choosing, Sampled, Sampler
from octavo_engine.sampler.state import SamplerState
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.sequence import Sequence, SequenceState
from octavo_engine.staging import numbers, select


@dataclass(frozen=True, slots=True)
class PromptRows:
    """A prompt's tokens `targets`, which the rows of logits from `first_row` on predict."""

    seq: Sequence
    targets: list[int]
    first_row: int
    is_start: bool


@dataclass(frozen=True, slots=True)
class Results:
    """What was chosen. prompts: the log-probabilities of each `PromptRows`."""

    choices: Choices
    sampled: Sampled | None
    prompts: list[list[TokenLogprobs | None]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The same on its way to the host."""

    choices: Choices
    tokens: Choosing | None
    prompts: list[LogprobsOnTheWay]

    def wait(self) -> Results:
        """Waits for the step, and for nothing behind it."""
        sampled = None if self.tokens is None else self.tokens.wait()
        return Results(self.choices, sampled, [part.wait() for part in self.prompts])


@dataclass(frozen=True, slots=True)
class Choices:
    """Which rows of a step's logits are wanted.

    rows, states, ahead: one entry for each token to choose, as `Sampler` takes them. sequences: whose they are, one
    after the other; one that verifies guesses has a row for each of them and one more.
    """

    num_logits: int
    rows: list[int]
    states: list[SamplerState]
    ahead: list[int]
    sequences: list[Sequence]
    prompts: list[PromptRows]

    def choose(self, sampler: Sampler, logits: torch.Tensor) -> Chosen:
        """logits: [num_logits, vocab_size]."""
        prompts = [_prompt_logprobs(part, logits) for part in self.prompts]
        if not self.rows:
            return Chosen(self, None, prompts)
        wanted = logits if len(self.rows) == self.num_logits else select(logits, self.rows)
        return Chosen(self, sampler.choose(wanted, self.states, self.ahead), prompts)


def choices_of(batch: Batch) -> Choices:
    """For a batch whose sequences know all their tokens; those that have ended meanwhile are left out.

    Sets where each sequence's token will be found, `pending_row`.
    """
    rows: list[int] = []
    states: list[SamplerState] = []
    ahead: list[int] = []
    sequences: list[Sequence] = []
    prompts: list[PromptRows] = []
    end_row = 0
    for seq, piece in zip(batch.sequences, batch.slices, strict=True):
        first_row, end_row = end_row, end_row + piece.num_logits
        if first_row == end_row or seq.state is not SequenceState.RUNNING:
            continue
        end = piece.start + len(piece.token_ids)
        if seq.wants_prompt_logprobs:
            targets = seq.tokens[piece.start + 1 : min(end + 1, seq.num_prompt_tokens)]
            prompts.append(PromptRows(seq, targets, first_row, is_start=piece.start == 0))
        num_drafted = len(seq.drafted)
        if end != len(seq.tokens) + num_drafted:
            continue
        seq.pending_row = len(rows)
        sequences.append(seq)
        for guess in range(1 + num_drafted):
            rows.append(end_row - 1 - num_drafted + guess)
            states.append(seq.sampler)
            ahead.append(guess)
    return Choices(end_row, rows, states, ahead, sequences, prompts)


def _prompt_logprobs(part: PromptRows, logits: torch.Tensor) -> LogprobsOnTheWay:
    rows = logits[part.first_row : part.first_row + len(part.targets)]
    num_top = [part.seq.sampling.prompt_logprobs or 0] * len(part.targets)
    return LogprobsOnTheWay(rows, numbers(part.targets, logits.device, np.int64), num_top)
