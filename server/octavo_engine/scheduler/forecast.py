"""How much work waits, in seconds, and when a refused client should come back."""

from __future__ import annotations

from collections import OrderedDict

from octavo_engine.scheduler.step_time import StepLoad, StepTimeModel

MAX_RETRY_AFTER_S = 60.0
_MAX_TENANTS = 1_024
_FIRST_GUESS_TOKENS = 128.0
_WEIGHT = 0.1


class OutputLengths:
    """Expected output length of a tenant's requests: a running mean of what ended, the replica's mean until then."""

    def __init__(self) -> None:
        self._overall = _FIRST_GUESS_TOKENS
        self._by_tenant: OrderedDict[str, float] = OrderedDict()

    def observe(self, tenant: str, num_tokens: int) -> None:
        self._overall += _WEIGHT * (num_tokens - self._overall)
        known = self._by_tenant.pop(tenant, self._overall)
        self._by_tenant[tenant] = known + _WEIGHT * (num_tokens - known)
        if len(self._by_tenant) > _MAX_TENANTS:
            self._by_tenant.popitem(last=False)

    def expected(self, tenant: str, max_tokens: int) -> float:
        return min(self._by_tenant.get(tenant, self._overall), float(max_tokens))


class Forecast:
    """Turns queued tokens into seconds with the step-time model.

    The work of a waiting sequence is its prefill, plus its share of the decode steps it will take part in: a decode
    step is shared by all that run in it.
    """

    def __init__(self, model: StepTimeModel, lengths: OutputLengths, max_num_seqs: int) -> None:
        self._model = model
        self._lengths = lengths
        self._max_num_seqs = max_num_seqs

    def queued_work_s(self, num_waiting: int, num_prompt_tokens: int, num_running: int) -> float:
        """Seconds until everything that waits now would be done, at full batches; 0 when the model knows nothing."""
        if not num_waiting:
            return 0.0
        batch = max(1, min(self._max_num_seqs, num_running + num_waiting))
        step_s = self._model.predict(StepLoad(batch))
        outputs = num_waiting * self._lengths.expected("", 1 << 30)
        return num_prompt_tokens * self._model.seconds_per_token + outputs * step_s / batch

    def retry_after_s(self, num_waiting: int, num_prompt_tokens: int, num_running: int) -> float:
        """When one more place in the queue should be free: one waiting sequence's part of the queued work."""
        work_s = self.queued_work_s(num_waiting, num_prompt_tokens, num_running)
        return min(MAX_RETRY_AFTER_S, max(1.0, work_s / max(1, num_waiting)))
