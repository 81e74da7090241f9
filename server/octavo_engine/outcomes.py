"""What becomes of sequences: tokens appended, ends reached, and the outputs that tell of both."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from octavo_engine.errors import InvalidRequestError, OctavoError, RequestFailedError
from octavo_engine.lora.manager import AdapterManager
from octavo_engine.messages import FinishReason, SequenceOutput, TokenLogprobs
from octavo_engine.sampler.sampler import ALL_EXCLUDED, NOT_FINITE
from octavo_engine.sampler.state import TokenConstraint
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.sequence import Sequence, SequenceState

_FAILURES = {
    NOT_FINITE: "the model produced NaN or infinite logits for this request",
    ALL_EXCLUDED: "together with the request's other constraints every token is excluded",
}
# Settings that exclude tokens and their names in requests, the likeliest culprit first.
_EXCLUDING = {
    "allowed_token_ids": "allowed_token_ids",
    "structured": "structured",
    "bad_words_ids": "bad_words",
    "logit_bias": "logit_bias",
}


class Outcomes:
    """Collects outputs until they are taken, and counts what was produced."""

    def __init__(self, scheduler: Scheduler, adapters: AdapterManager | None) -> None:
        self._scheduler = scheduler
        self._adapters = adapters
        self._outputs: list[SequenceOutput] = []
        self.num_finished = {reason.value: 0 for reason in FinishReason}
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0

    def __len__(self) -> int:
        return len(self._outputs)

    def add(self, outputs: Iterable[SequenceOutput]) -> None:
        """Outputs that others made."""
        self._outputs.extend(outputs)

    def take(self) -> list[SequenceOutput]:
        """Everything since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def append_verified(
        self, seq: Sequence, token_ids: list[int], logprobs: Items[TokenLogprobs | None] | None
    ) -> None:
        """Append what the model chose: every guess it agrees with, and the first token of its own.

        The model chooses after a guess exactly as it would without guessing, from the same logits with the same
        draw, so a guess is kept just when it is that choice: the output is the same, token for token, with and
        without speculation, for greedy and for random sequences.
        """
        drafted = seq.drafted
        if drafted:
            logprobs = logprobs or [None] * len(token_ids)
            num_accepted = 0
            while num_accepted < len(drafted) and token_ids[num_accepted] == drafted[num_accepted]:
                num_accepted += 1
            seq.drafted = []
            if self._scheduler.speculator is not None:
                self._scheduler.speculator.observe(seq, len(drafted), num_accepted)
            for token, entry in zip(token_ids[:num_accepted], logprobs, strict=False):
                self._append(seq, token, entry)
                if seq.state is not SequenceState.RUNNING:
                    return
            self._scheduler.advance(seq, 1 + num_accepted)
            seq.num_launched = seq.num_computed
            token_ids, logprobs = token_ids[num_accepted:], logprobs[num_accepted:]
        self._append(seq, token_ids[0], logprobs[0] if logprobs else None)

    def finish(self, seq: Sequence, reason: FinishReason, error: OctavoError | None = None) -> None:
        """End a sequence without a new token. The caller gets an `InvalidRequestError` as such."""
        self._end(seq, reason)
        by_request = isinstance(error, InvalidRequestError)
        self._outputs.append(
            SequenceOutput(
                request_id=seq.request_id,
                token_ids=[],
                finish_reason=reason,
                num_cached_tokens=seq.num_cached_tokens,
                num_preemptions=seq.num_preemptions,
                error=None if error is None else str(error),
                error_kind=InvalidRequestError.__name__ if by_request else None,
                error_param=error.param if isinstance(error, InvalidRequestError) else None,
            )
        )

    def fail(self, seq: Sequence, error: OctavoError) -> None:
        """End a sequence whose computation went wrong; nothing it wrote to the cache is given to others."""
        self._scheduler.blocks.distrust(seq.table)
        self.finish(seq, FinishReason.ERROR, error)

    def _append(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        """Add a sampled token, report it, and end the sequence if it is the last one."""
        if token < 0:
            self.fail(seq, seq.sampler.failure or _no_token(seq, token))
            return
        constraint = seq.sampler.constraint
        if constraint is not None and not self._follow(seq, constraint, token):
            return
        seq.tokens.append(token)
        self.num_generated_tokens += 1
        self._scheduler.fairness.charge_output(seq.tenant)
        reason = self._reason_to_end(seq, token)
        is_first = seq.num_output_tokens == seq.num_resumed + 1
        if reason is None and not is_first and logprobs is None:
            self._outputs.append(SequenceOutput(request_id=seq.request_id, token_ids=[token]))
            return
        prompt_logprobs = None
        if is_first:
            self.num_prompt_tokens += seq.num_prompt_tokens
            if seq.wants_prompt_logprobs:
                prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, []
                seq.wants_prompt_logprobs = False
        if reason is not None:
            self._end(seq, reason)
        self._outputs.append(
            SequenceOutput(
                request_id=seq.request_id,
                token_ids=[token],
                logprobs=None if logprobs is None else [logprobs],
                prompt_logprobs=prompt_logprobs,
                finish_reason=reason,
                stop_token_id=token if token in seq.end_token_ids and reason is FinishReason.STOP else None,
                num_cached_tokens=seq.num_cached_tokens,
                num_preemptions=seq.num_preemptions,
                queue_time_s=(seq.first_scheduled_s or seq.arrival_s) - seq.arrival_s,
            )
        )

    def _reason_to_end(self, seq: Sequence, token: int) -> FinishReason | None:
        """Why `token`, just appended, is the last one of its sequence; None if it is not."""
        if token in seq.end_token_ids and seq.num_output_tokens >= seq.sampling.min_tokens:
            return FinishReason.STOP
        constraint = seq.sampler.constraint
        if constraint is not None and constraint.is_complete:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(seq.tokens) >= seq.max_length else None

    def _follow(self, seq: Sequence, constraint: TokenConstraint, token: int) -> bool:
        """Move a constraint past a token; a grammar that breaks down ends its request."""
        try:
            constraint.accept(token)
        except InvalidRequestError as error:
            self.fail(seq, error)
            return False
        return True

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        self._scheduler.finish(seq)
        if self._adapters is not None and seq.adapter is not None:
            self._adapters.end(seq.adapter)
        self.num_finished[reason.value] += 1


def _no_token(seq: Sequence, failure: int) -> OctavoError:
    """Why the sampler found no token for a sequence."""
    if failure != ALL_EXCLUDED:
        return RequestFailedError(_FAILURES[failure])
    param = next((name for field, name in _EXCLUDING.items() if getattr(seq.sampling, field)), "min_tokens")
    return InvalidRequestError(f"{param}: {_FAILURES[failure]}", param)
