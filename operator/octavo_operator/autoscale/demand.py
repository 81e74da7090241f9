"""How many replicas the present load needs, signal by signal: the formulas of the scaling law.

Let ready replicas have W waiting and R running requests and use a fraction K of their KV cache, Q requests be held in
the gateway, and kbar be the fraction of a cache that one request uses. Then B = W + Q is the backlog and
- feedback: d = sum(K) + min(B, Tq * ready) * kbar, n = ceil(d / T). The cap keeps a backlog, which is an integral of
  past overload, from being taken for load;
- feed-forward (offered load in Erlang, and the backlog drained in time): n = ceil(kbar*S*(rate + excess/T_drain) / T).
Engines without a KV signal use 1/c for kbar/T, with c the concurrency that one replica should have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo_operator.autoscale.history import History
from octavo_operator.autoscale.policy import ScalingPolicy
from octavo_operator.autoscale.signals import ReplicaSample, Signals, total

DEFAULT_QUEUE_TARGET = 4.0
CONCURRENCY_FRACTION = 0.8
MAX_GROWTH = 3  # feed-forward asks for at most this multiple per evaluation
LOOK_AHEAD_MAX_S = 300.0


@dataclass(frozen=True, slots=True)
class Demand:
    """What each signal asks for; None where it says nothing. `replicas_worth` is d, in caches or in replicas."""

    replicas_worth: float
    kv: int | None
    concurrency: int | None
    load: int | None
    down: int  # the fewest replicas that would still do, against the lower target

    @property
    def up(self) -> int:
        """The largest of the signals that scale up."""
        return max((n for n in (self.kv, self.concurrency, self.load) if n is not None), default=0)


def demand(
    signals: Signals, fresh: tuple[ReplicaSample, ...], history: History, policy: ScalingPolicy, stale: int
) -> Demand:
    """The demand of a service with the estimates of its history."""
    running = total(s.running for s in fresh)
    backlog = total(s.waiting for s in fresh) + signals.held
    queue_target = policy.queue_target or DEFAULT_QUEUE_TARGET
    counted = min(backlog, queue_target * signals.ready)
    excess = max(0.0, backlog - queue_target * signals.ready)

    concurrency = policy.concurrency_target or CONCURRENCY_FRACTION * policy.max_num_seqs
    knows_kv = policy.kv_target is not None and (not fresh or any(s.kv_utilization is not None for s in fresh))
    per_request = (history.kbar or 1.0 / policy.max_num_seqs) if knows_kv else 1.0 / concurrency
    target = policy.kv_target if knows_kv and policy.kv_target is not None else 1.0

    used = total(s.kv_utilization for s in fresh) if knows_kv else running / concurrency
    waiting = (
        _waiting_worth(signals, fresh, history, per_request, counted, backlog) if knows_kv else counted * per_request
    )
    worth = used + waiting
    by_use = _ceil(worth / target)
    by_concurrency = _ceil((running + counted) / concurrency) if policy.concurrency_target and knows_kv else None

    rate = _expected_rate(history, signals, policy)
    load = None
    if history.service_s is not None and (history.arrival_rate is not None or excess > 0):
        erlang = per_request * history.service_s * (rate + excess / policy.drain_horizon_s)
        load = min(_ceil(erlang / target), MAX_GROWTH * max(signals.ready + signals.pending, 1))
    offered = per_request * (history.service_s or 0.0) * (history.arrival_rate or 0.0)
    down_target = target * policy.down_ratio
    down = _ceil(max(worth + stale, offered) / down_target)
    if by_concurrency is not None:
        down = max(down, _ceil((running + counted) / (concurrency * policy.down_ratio)))
    return Demand(
        replicas_worth=worth,
        kv=by_use if knows_kv else None,
        concurrency=by_concurrency if knows_kv else by_use,
        load=load,
        down=down,
    )


def from_zero(signals: Signals, history: History, policy: ScalingPolicy) -> int:
    """Replicas to wake for the held requests; one for a request that came and went."""
    if not signals.held and not history.arrived:
        return 0
    per_request = history.kbar or 1.0 / policy.max_num_seqs
    target = policy.kv_target or 1.0
    if policy.kv_target is None:
        per_request = 1.0 / (policy.concurrency_target or CONCURRENCY_FRACTION * policy.max_num_seqs)
    return max(1, _ceil(signals.held * per_request / target))


def _waiting_worth(
    signals: Signals,
    fresh: tuple[ReplicaSample, ...],
    history: History,
    per_request: float,
    counted: float,
    backlog: float,
) -> float:
    """Caches that the counted part of the backlog will fill; exact where engines tell their queued tokens."""
    exact = bool(fresh) and all(s.queued_kv_tokens is not None for s in fresh)
    if not exact or not history.capacity_tokens or backlog <= 0:
        return counted * per_request
    queued = total(s.queued_kv_tokens for s in fresh) / history.capacity_tokens
    return (queued + signals.held * per_request) * counted / backlog


def _expected_rate(history: History, signals: Signals, policy: ScalingPolicy) -> float:
    rate = history.arrival_rate or 0.0
    if policy.look_ahead and signals.cold_start_s:
        rate += max(0.0, history.rate_slope()) * min(signals.cold_start_s, LOOK_AHEAD_MAX_S)
    return rate


def _ceil(value: float) -> int:
    """Round up, but not for the dust of floating point."""
    return math.ceil(value - 1e-9)
