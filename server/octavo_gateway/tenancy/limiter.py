"""Limits of tenants: token buckets, concurrency and budgets, reserved before a request and settled after it.

Exact within one process. Pure: time comes in as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from octavo_gateway.errors import RateLimitError
from octavo_gateway.tenancy.budget import Period, Spent, budgets
from octavo_gateway.tenancy.tenant import Limits, Tenant

MINUTE_S = 60.0


class TokenBucket:
    """Holds up to a minute's worth and refills evenly. May go below zero when a settled cost exceeds its reserve."""

    __slots__ = ("_at", "_level", "capacity")

    def __init__(self, capacity: float, now: float) -> None:
        self.capacity = capacity
        self._level = capacity
        self._at = now

    def resize(self, capacity: float, now: float) -> None:
        """Change the limit; what was used stays used."""
        if capacity != self.capacity:
            used = self.capacity - self.level(now)
            self.capacity = capacity
            self._level = capacity - used

    def level(self, now: float) -> float:
        """What is left now."""
        if now > self._at:
            self._level = min(self.capacity, self._level + self.capacity * (now - self._at) / MINUTE_S)
            self._at = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` can be taken; 0 when it can be now.

        An amount above the capacity passes once the bucket is full: a limit slows a tenant, it forbids nothing.
        """
        missing = min(amount, self.capacity) - self.level(now)
        return max(0.0, missing / self.capacity * MINUTE_S)

    def take(self, amount: float, now: float) -> None:
        """Take (negative: give back)."""
        self._level = min(self.capacity, self.level(now) - amount)


@dataclass(slots=True)
class Reservation:
    """What a running request holds of its tenant's limits."""

    tenant: str
    input_tokens: float
    output_tokens: float
    settled: bool = False


class _Account:
    """One tenant's buckets and counts."""

    __slots__ = ("_spent", "buckets", "concurrent")

    def __init__(self) -> None:
        self.buckets: dict[str, TokenBucket] = {}
        self.concurrent = 0
        self._spent = {period: Spent() for period in Period}

    def spent(self, period: Period, today: str) -> Spent:
        """Of the period that `today` lies in; a new one begins at zero."""
        spent, label = self._spent[period], period.label(today)
        if spent.label != label:
            spent = self._spent[period] = Spent(label)
        return spent

    def charge(self, changes: Mapping[str, float], tokens: float, cost: float, now: float, today: str) -> None:
        """Count in the buckets and in what was spent."""
        for name, change in changes.items():
            if name in self.buckets:
                self.buckets[name].take(change, now)
        for period in Period:
            spent = self.spent(period, today)
            spent.tokens += tokens
            spent.cost += cost

    def bucket(self, name: str, capacity: int | None, now: float) -> TokenBucket | None:
        if capacity is None:
            self.buckets.pop(name, None)
            return None
        bucket = self.buckets.get(name)
        if bucket is None:
            bucket = self.buckets[name] = TokenBucket(capacity, now)
        bucket.resize(capacity, now)
        return bucket


BUCKET_WORDS = {
    "requests": "requests per minute",
    "tokens": "tokens per minute",
    "input": "input tokens per minute",
    "output": "output tokens per minute",
}


def bucket_amounts(limits: Limits, input_tokens: float, output_tokens: float) -> list[tuple[str, int | None, float]]:
    """Per bucket: its name, its limit, and what a request takes of it."""
    return [
        ("requests", limits.requests_per_minute, 1.0),
        ("tokens", limits.tokens_per_minute, input_tokens + output_tokens),
        ("input", limits.input_tokens_per_minute, input_tokens),
        ("output", limits.output_tokens_per_minute, output_tokens),
    ]


def bucket_changes(
    reserved_input: float, reserved_output: float, input_tokens: float, cached_tokens: float, output_tokens: float
) -> dict[str, float]:
    """Per bucket: by how much the truth exceeds what was reserved. Cached tokens are no input."""
    more_out = output_tokens - reserved_output
    return {
        "tokens": input_tokens - reserved_input + more_out,
        "input": input_tokens - cached_tokens - reserved_input,
        "output": more_out,
    }


class Limiter:
    """Admits requests of tenants. One per gateway process."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def reserve(self, tenant: Tenant, input_tokens: float, output_tokens: float, now: float, today: str) -> Reservation:
        """Take the estimated tokens; when `RateLimitError` or `BudgetExceededError` is raised nothing is taken.

        `today` is YYYY-MM-DD (UTC).
        """
        account = self._account(tenant.name)
        for period, tokens, cost in budgets(tenant.limits):
            account.spent(period, today).check(period, tokens, cost)
        limit = tenant.limits.max_concurrent_requests
        if limit is not None and account.concurrent >= limit:
            raise RateLimitError(f"Limit of {limit} concurrent requests reached.", retry_after_s=1.0)
        wanted = self._wanted(account, tenant.limits, input_tokens, output_tokens, now)
        for name, bucket, amount in wanted:
            wait_s = bucket.wait_s(amount, now)
            if wait_s > 0:
                raise RateLimitError(
                    f"Limit of {bucket.capacity:.0f} {BUCKET_WORDS[name]} reached.", retry_after_s=math.ceil(wait_s)
                )
        for _, bucket, amount in wanted:
            bucket.take(amount, now)
        account.concurrent += 1
        return Reservation(tenant.name, input_tokens, output_tokens)

    def settle(
        self, reservation: Reservation, input_tokens: float, cached_tokens: float, output_tokens: float,
        cost: float, now: float, today: str,
    ) -> None:  # fmt: skip
        """Replace the estimate by the true count, exactly once per reservation."""
        if reservation.settled:
            raise RuntimeError(f"a reservation of tenant {reservation.tenant} was settled twice")
        reservation.settled = True
        account = self._account(reservation.tenant)
        account.concurrent -= 1
        changes = bucket_changes(
            reservation.input_tokens, reservation.output_tokens, input_tokens, cached_tokens, output_tokens
        )
        account.charge(changes, input_tokens + output_tokens, cost, now, today)

    def correct(
        self, tenant: str, input_tokens: float, cached_tokens: float, output_tokens: float,
        cost: float, now: float, today: str,
    ) -> None:  # fmt: skip
        """Add (or take back) what a settled request has turned out to differ by."""
        changes = bucket_changes(0, 0, input_tokens, cached_tokens, output_tokens)
        self._account(tenant).charge(changes, input_tokens + output_tokens, cost, now, today)

    def remaining(self, tenant: Tenant, now: float) -> dict[str, tuple[int, int, float]]:
        """Per limited bucket: (limit, what is left, seconds until it is full again)."""
        account = self._accounts.get(tenant.name)
        if account is None:
            return {}
        return {
            name: (
                int(bucket.capacity),
                max(0, int(bucket.level(now))),
                (bucket.capacity - bucket.level(now)) / bucket.capacity * MINUTE_S,
            )
            for name, bucket in account.buckets.items()
        }

    def learn_spent(self, tenant: str, period: Period, today: str, tokens: float, cost: float) -> None:
        """Take what the ledger says was spent, which may be more than what this process has seen."""
        spent = self._account(tenant).spent(period, today)
        spent.tokens = max(spent.tokens, tokens)
        spent.cost = max(spent.cost, cost)

    def retain(self, tenants: set[str]) -> None:
        """Forget tenants that are gone and have nothing running."""
        for gone in [n for n, a in self._accounts.items() if n not in tenants and a.concurrent == 0]:
            del self._accounts[gone]

    def running(self) -> dict[str, int]:
        """Requests not settled, of the tenants that have any."""
        return {name: account.concurrent for name, account in self._accounts.items() if account.concurrent}

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account()
        return account

    def _wanted(
        self, account: _Account, limits: Limits, input_tokens: float, output_tokens: float, now: float
    ) -> list[tuple[str, TokenBucket, float]]:
        rows = bucket_amounts(limits, input_tokens, output_tokens)
        found = ((name, account.bucket(name, capacity, now), amount) for name, capacity, amount in rows)
        return [(name, bucket, amount) for name, bucket, amount in found if bucket is not None]
