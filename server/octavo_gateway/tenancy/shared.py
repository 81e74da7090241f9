"""Limits shared by several gateways through Redis or Valkey: one script call to reserve, one to settle.

Redis' own clock and single thread make the arithmetic exact. A gateway applies its own limiter first, which never
refuses earlier than the shared one would; so when Redis is away, each gateway alone still holds the limit, and that is
told once in the log and in a metric.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import redis.asyncio
from redis.exceptions import RedisError

from octavo_gateway.errors import BudgetExceededError, ConfigError, RateLimitError
from octavo_gateway.tenancy.budget import Period, budgets
from octavo_gateway.tenancy.limiter import BUCKET_WORDS, bucket_amounts, bucket_changes
from octavo_gateway.tenancy.tenant import Tenant

log = logging.getLogger("octavo.gateway.tenancy")

TIMEOUT_S = 0.25
KEEP_S = {Period.DAY: 2 * 24 * 3600, Period.MONTH: 40 * 24 * 3600}  # longer than any such period

# KEYS: buckets, running, then what was spent in the day and in the month. ARGV: request id, seconds after which a lost
# request is forgotten, concurrency limit ("" for none), budgets of tokens and of cost of the day and of the month, then
# per bucket: name, capacity, amount.
RESERVE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
for i, period in ipairs({'daily', 'monthly'}) do
  local spent = redis.call('HMGET', KEYS[i + 2], 'tokens', 'cost')
  for j = 1, 2 do
    local budget = ARGV[2 * i + 1 + j]
    if budget ~= '' and tonumber(spent[j] or 0) >= tonumber(budget) then return {'budget', period} end
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if ARGV[3] ~= '' and redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[3]) then return {'concurrent', '1'} end
local levels = {}
for i = 8, #ARGV, 3 do
  local capacity, amount = tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local saved = redis.call('HMGET', KEYS[1], ARGV[i] .. ':used', ARGV[i] .. ':at')
  local used, at = tonumber(saved[1] or 0), tonumber(saved[2] or now)
  used = math.max(0, used - capacity * (now - at) / 60)
  local missing = math.min(amount, capacity) - (capacity - used)
  if missing > 1e-9 then return {ARGV[i], tostring(missing / capacity * 60)} end
  levels[#levels + 1] = {ARGV[i], used + amount}
end
for _, level in ipairs(levels) do
  redis.call('HSET', KEYS[1], level[1] .. ':used', tostring(level[2]), level[1] .. ':at', tostring(now))
end
redis.call('EXPIRE', KEYS[1], 3600)
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[1])
redis.call('EXPIRE', KEYS[2], 86400)
return {'ok', '0'}
"""

# KEYS as above. ARGV: request id, tokens, cost, seconds to keep a day and a month, then per bucket: name, change.
# A request settled twice counts once; without an id it is a correction of one that was settled.
SETTLE = """
if ARGV[1] ~= '' and redis.call('ZREM', KEYS[2], ARGV[1]) == 0 then return 0 end
for i = 6, #ARGV, 2 do
  local used = redis.call('HGET', KEYS[1], ARGV[i] .. ':used')
  if used then redis.call('HSET', KEYS[1], ARGV[i] .. ':used', tostring(math.max(0, tonumber(used) + tonumber(ARGV[i + 1])))) end
end
for i = 1, 2 do
  redis.call('HINCRBYFLOAT', KEYS[i + 2], 'tokens', ARGV[2])
  redis.call('HINCRBYFLOAT', KEYS[i + 2], 'cost', ARGV[3])
  redis.call('EXPIRE', KEYS[i + 2], ARGV[i + 3])
end
return 1
"""  # noqa: E501 - Lua


@dataclass(frozen=True, slots=True)
class SharedReservation:
    """What a running request holds in Redis."""

    request_id: str
    tenant: Tenant
    input_tokens: float
    output_tokens: float


class SharedLimiter:
    """A client of one Redis. `on_failure` hears each call that could not be made."""

    def __init__(self, url: str, request_timeout_s: float, on_failure: Callable[[], None]) -> None:
        try:
            self._redis = redis.asyncio.Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, decode_responses=True
            )
        except ValueError as error:
            raise ConfigError(f"redis_url: {error}") from error
        self._reserve = self._redis.register_script(RESERVE)
        self._settle = self._redis.register_script(SETTLE)
        self._forget_s = request_timeout_s + 60
        self._on_failure = on_failure
        self._away = False
        self._settling: set[asyncio.Task[None]] = set()

    async def reserve(
        self, request_id: str, tenant: Tenant, input_tokens: float, output_tokens: float, today: str
    ) -> SharedReservation | None:
        """Take from the shared limits; None when Redis is away. Raises `RateLimitError` or `BudgetExceededError`."""
        limits = tenant.limits
        arguments: list[str | float] = [
            request_id,
            self._forget_s,
            _text(limits.max_concurrent_requests),
        ]
        for _, tokens, cost in budgets(limits):
            arguments += [_text(tokens), _text(cost)]
        for name, capacity, amount in bucket_amounts(limits, input_tokens, output_tokens):
            if capacity is not None:
                arguments += [name, capacity, amount]
        try:
            which, wait = await self._reserve(keys=_keys(tenant.name, today), args=arguments)
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)
            return None
        self._back()
        if which == "ok":
            return SharedReservation(request_id, tenant, input_tokens, output_tokens)
        if which == "budget":
            raise BudgetExceededError(f"The {wait} budget is used up.")
        words = BUCKET_WORDS.get(which, "concurrent requests")
        raise RateLimitError(f"Limit of {words} reached.", retry_after_s=max(1, math.ceil(float(wait))))

    def settle(
        self, held: SharedReservation, input_tokens: float, cached_tokens: float, output_tokens: float, cost: float,
        today: str,
    ) -> None:  # fmt: skip
        """Replace the estimate by the true count, in the background."""
        changes = bucket_changes(held.input_tokens, held.output_tokens, input_tokens, cached_tokens, output_tokens)
        self._count(held.tenant, held.request_id, changes, input_tokens + output_tokens, cost, today)

    def correct(
        self, tenant: Tenant, input_tokens: float, cached_tokens: float, output_tokens: float, cost: float, today: str
    ) -> None:
        """Add (or take back) what a settled request has turned out to differ by, in the background."""
        changes = bucket_changes(0, 0, input_tokens, cached_tokens, output_tokens)
        self._count(tenant, "", changes, input_tokens + output_tokens, cost, today)

    def _count(
        self, tenant: Tenant, request_id: str, changes: Mapping[str, float], tokens: float, cost: float, today: str
    ) -> None:
        arguments: list[str | float] = [request_id, tokens, cost, *KEEP_S.values()]
        for name, change in changes.items():
            arguments += [name, change]
        task = asyncio.ensure_future(self._send_settlement(_keys(tenant.name, today), arguments))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def close(self) -> None:
        """Finish what is being settled and disconnect."""
        await asyncio.gather(*self._settling, return_exceptions=True)
        await self._redis.aclose()

    async def _send_settlement(self, keys: list[str], arguments: list[str | float]) -> None:
        try:
            await self._settle(keys=keys, args=arguments)
        except (RedisError, OSError, TimeoutError) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._on_failure()
        if not self._away:
            self._away = True
            log.warning("shared limits: Redis is away (%s); each gateway holds the limits by itself", error)

    def _back(self) -> None:
        if self._away:
            self._away = False
            log.info("shared limits: Redis is back")


def _keys(tenant: str, today: str) -> list[str]:
    """In one hash slot, so that a Redis cluster runs the script too."""
    spent = [f"octavo:{{{tenant}}}:spent:{period.label(today)}" for period in Period]
    return [f"octavo:{{{tenant}}}:buckets", f"octavo:{{{tenant}}}:running", *spent]


def _text(limit: float | None) -> str:
    return "" if limit is None else str(limit)
