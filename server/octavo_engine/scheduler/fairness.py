"""Service received by each tenant, in virtual tokens.

After the virtual token counter of Sheng et al., Fairness in Serving Large Language Models (OSDI 2024): the waiting
tenant with the least service goes first, and one that comes back after a pause is lifted to where the others are, so
that idle time earns no credit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

MAX_ABSENT_TENANTS = 1_024
OUTPUT_TOKEN_COST = 2.0  # an output token occupies a place in the batch for a whole step; a prompt token does not


class VirtualTokens:
    """Counters per tenant, divided by the tenant's weight; a tenant is active while it has sequences."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._service: dict[str, float] = {}
        self._num_sequences: Counter[str] = Counter()
        self._floor = 0.0

    def service(self, tenant: str) -> float:
        return self._service.get(tenant, self._floor)

    def enter(self, tenant: str) -> None:
        """A sequence of this tenant came in."""
        if not self._num_sequences[tenant]:
            self._service[tenant] = max(self._service.get(tenant, 0.0), self._floor)
        self._num_sequences[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A sequence of this tenant ended. What an absent tenant owes is remembered within a bound."""
        self._num_sequences[tenant] -= 1
        if self._num_sequences[tenant] <= 0:
            del self._num_sequences[tenant]
            if len(self._service) > len(self._num_sequences) + MAX_ABSENT_TENANTS:
                self._service = {name: self._service[name] for name in self._num_sequences}

    def pick(self, tenant: str) -> None:
        """This tenant had the least service of those that wait: nobody comes in below it from now on."""
        self._floor = max(self._floor, self.service(tenant))

    def charge_prompt(self, tenant: str, num_tokens: int) -> None:
        self._charge(tenant, float(num_tokens))

    def charge_output(self, tenant: str, num_tokens: int = 1) -> None:
        self._charge(tenant, OUTPUT_TOKEN_COST * num_tokens)

    def _charge(self, tenant: str, cost: float) -> None:
        if tenant in self._service:
            self._service[tenant] += cost / self._weights.get(tenant, 1.0)
