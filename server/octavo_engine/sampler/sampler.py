"""The sampler: one token for every row of logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo_engine.errors import InvalidRequestError, RequestFailedError
from octavo_engine.messages import TokenLogprobs
from octavo_engine.sampler.argmax import row_max
from octavo_engine.sampler.device import sample_on_device
from octavo_engine.sampler.filters import sample_rows
from octavo_engine.sampler.logprobs import token_logprobs
from octavo_engine.sampler.noise import uniform
from octavo_engine.sampler.processors import process_row
from octavo_engine.sampler.state import SamplerState

logger = logging.getLogger(__name__)

NOT_FINITE = -1
ALL_EXCLUDED = -2


@dataclass(slots=True)
class Sampled:
    """One entry a row. A negative token id is a failure of that row: `NOT_FINITE` (the model's logits hold NaN or
    infinity) or `ALL_EXCLUDED` (the request's own constraints leave no token)."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


class Sampler:
    """Chooses tokens; keeps no state of its own, everything about a sequence is in its `SamplerState`."""

    @torch.inference_mode()  # logits come from it, and can only be edited in it
    def sample(
        self, logits: torch.Tensor, states: Sequence[SamplerState], ahead: Sequence[int] | None = None
    ) -> Sampled:
        """`logits` [R, V] float32, one row a state; rows of sequences with processors are edited in place.

        `ahead` says how many guessed tokens lie between a sequence's last token and the row's position.
        """
        reported = [i for i, state in enumerate(states) if state.params.logprobs is not None]
        raw = logits[torch.tensor(reported, device=logits.device)] if reported else None
        for i, state in enumerate(states):
            if state.has_processors:
                _process(logits[i], state)
        token_ids = self._choose(logits, states, ahead)
        if raw is None:
            return Sampled(token_ids)
        return Sampled(token_ids, self._report(raw, states, reported, token_ids))

    def _choose(self, logits: torch.Tensor, states: Sequence[SamplerState], ahead: Sequence[int] | None) -> list[int]:
        """One kernel for the whole batch where there is one, so that greedy and random rows cost one call."""
        indices = [state.num_output_tokens + (ahead[i] if ahead else 0) for i, state in enumerate(states)]
        tokens = sample_on_device(logits, [s.params for s in states], [s.seed for s in states], indices)
        if tokens is None:
            return self._choose_on_host(logits, states, indices)
        typical = [i for i, state in enumerate(states) if state.params.typical_p < 1.0 and not state.is_greedy]
        chosen: list[int] = tokens.tolist()
        typical = [i for i in typical if chosen[i] >= 0]  # failed rows stay failed
        if typical:
            for i, token in zip(typical, _draw(logits, states, indices, typical).tolist(), strict=True):
                chosen[i] = token
        return chosen

    def _choose_on_host(
        self, logits: torch.Tensor, states: Sequence[SamplerState], indices: Sequence[int]
    ) -> list[int]:
        best, tokens = row_max(logits)
        random = [i for i, state in enumerate(states) if not state.is_greedy]
        if random:
            drawn = _draw(logits, states, indices, random)
            tokens = tokens.index_copy(0, torch.tensor(random, device=logits.device), drawn)
        failure = torch.where(best == float("-inf"), ALL_EXCLUDED, NOT_FINITE)
        chosen: list[int] = torch.where(torch.isfinite(best), tokens, failure).tolist()
        return chosen

    def _report(
        self, raw: torch.Tensor, states: Sequence[SamplerState], reported: list[int], token_ids: list[int]
    ) -> list[TokenLogprobs | None]:
        """Log-probabilities for the rows that ask for them; failed rows report nothing."""
        logprobs: list[TokenLogprobs | None] = [None] * len(states)
        rows = [k for k, i in enumerate(reported) if token_ids[i] >= 0]
        if rows:
            found = token_logprobs(
                raw[torch.tensor(rows, device=raw.device)],
                [token_ids[reported[k]] for k in rows],
                [states[reported[k]].params.logprobs or 0 for k in rows],
            )
            for k, entry in zip(rows, found, strict=True):
                logprobs[reported[k]] = entry
        return logprobs


def _draw(
    logits: torch.Tensor, states: Sequence[SamplerState], indices: Sequence[int], rows: list[int]
) -> torch.Tensor:
    """Tokens [len(rows)] int64 for some rows, by the definition of `filters`."""
    wanted = logits if len(rows) == len(states) else logits[torch.tensor(rows, device=logits.device)]
    draws = [uniform(states[i].seed, indices[i]) for i in rows]
    return sample_rows(wanted, [states[i].params for i in rows], draws)


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
