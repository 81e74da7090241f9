"""The sampler: one token for every row of logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from octavo_engine.errors import InvalidRequestError, RequestFailedError
from octavo_engine.messages import TokenLogprobs
from octavo_engine.sampler.argmax import row_max
from octavo_engine.sampler.device import DeviceSampling
from octavo_engine.sampler.filters import sample_rows
from octavo_engine.sampler.logprobs import LogprobsOnTheWay
from octavo_engine.sampler.noise import uniform
from octavo_engine.sampler.processors import process_row
from octavo_engine.sampler.state import SamplerState
from octavo_engine.staging import OnTheWay, numbers, select

logger = logging.getLogger(__name__)

NOT_FINITE = -1
ALL_EXCLUDED = -2


@dataclass(slots=True)
class Sampled:
    """One entry a row. A negative token id is a failure of that row: `NOT_FINITE` (the model's logits hold NaN or
    infinity) or `ALL_EXCLUDED` (the request's own constraints leave no token)."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


class Choosing:
    """Tokens while the device chooses them. tokens: [R] int64 on the device, negative as in `Sampled`."""

    def __init__(self, tokens: torch.Tensor, reported: Sequence[int], logprobs: LogprobsOnTheWay | None) -> None:
        self.tokens = tokens
        self._on_host = OnTheWay(tokens)
        self._reported = reported
        self._logprobs = logprobs

    def wait(self) -> Sampled:
        """The tokens on the host."""
        token_ids: list[int] = self._on_host.wait()[0].tolist()
        if self._logprobs is None:
            return Sampled(token_ids)
        logprobs: list[TokenLogprobs | None] = [None] * len(token_ids)
        for i, entry in zip(self._reported, self._logprobs.wait(), strict=True):
            logprobs[i] = entry
        return Sampled(token_ids, logprobs)


class Sampler:
    """Chooses tokens; everything about a sequence is in its `SamplerState`.

    num_waits: choices on a GPU that had to wait for the device, because no kernel makes them (typical-p).
    """

    def __init__(self) -> None:
        self.num_waits = 0
        self._on_device = DeviceSampling()

    def sample(
        self, logits: torch.Tensor, states: Sequence[SamplerState], ahead: Sequence[int] | None = None
    ) -> Sampled:
        """`logits` [R, V] float32, one row a state; rows of sequences with processors are edited in place.

        `ahead` says how many guessed tokens lie between a sequence's last token and the row's position.
        """
        return self.choose(logits, states, ahead).wait()

    @torch.inference_mode()  # logits come from it, and can only be edited in it
    def choose(
        self, logits: torch.Tensor, states: Sequence[SamplerState], ahead: Sequence[int] | None = None
    ) -> Choosing:
        """As `sample`, but on a GPU the tokens are still being chosen when this returns."""
        reported = [i for i, state in enumerate(states) if state.params.logprobs is not None]
        raw = select(logits, reported) if reported else None
        for i, state in enumerate(states):
            if state.has_processors:
                _process(logits[i], state)
        tokens = self._choose(logits, states, ahead)
        if raw is None:
            return Choosing(tokens, reported, None)
        num_top = [states[i].params.logprobs or 0 for i in reported]
        return Choosing(tokens, reported, LogprobsOnTheWay(raw, select(tokens, reported), num_top))

    def _choose(
        self, logits: torch.Tensor, states: Sequence[SamplerState], ahead: Sequence[int] | None
    ) -> torch.Tensor:
        """One kernel for the whole batch where there is one, so that greedy and random rows cost one call."""
        indices = [state.num_output_tokens + (ahead[i] if ahead else 0) for i, state in enumerate(states)]
        tokens = self._on_device.sample(logits, [s.params for s in states], [s.seed for s in states], indices)
        if tokens is None:
            best, tokens = row_max(logits)
            failure = torch.where(best == float("-inf"), ALL_EXCLUDED, NOT_FINITE)
            tokens = torch.where(torch.isfinite(best), tokens, failure)
            drawn = [i for i, state in enumerate(states) if not state.is_greedy]
        else:
            drawn = [i for i, state in enumerate(states) if state.params.typical_p < 1.0 and not state.is_greedy]
        return self._redraw(tokens, logits, states, indices, drawn) if drawn else tokens

    def _redraw(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        states: Sequence[SamplerState],
        indices: Sequence[int],
        rows: list[int],
    ) -> torch.Tensor:
        """Draw these rows by the definition of `filters`; failed ones stay failed."""
        self.num_waits += logits.is_cuda
        places = numbers(rows, logits.device, np.int64)
        draws = [uniform(states[i].seed, indices[i]) for i in rows]
        wanted = logits if len(rows) == len(states) else select(logits, rows)
        drawn = sample_rows(wanted, [states[i].params for i in rows], draws)
        before = tokens.index_select(0, places)
        return tokens.index_copy(0, places, torch.where(before >= 0, drawn, before))


def _process(row: torch.Tensor, state: SamplerState) -> None:
    """Apply a request's processors; whatever goes wrong in them is that request's failure and nobody else's."""
    try:
        process_row(row, state)
    except InvalidRequestError as error:
        state.failure = error
        row.fill_(float("nan"))
    except Exception as error:
        # The message could hold text of the request; logs never do.
        logger.error("the logit processors of a request failed with %s", type(error).__name__)
        state.failure = RequestFailedError("the request's sampling settings could not be applied")
        row.fill_(float("nan"))
