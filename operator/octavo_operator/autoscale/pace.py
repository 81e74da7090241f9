"""How fast the number may change: stabilization windows and policies with the meaning of autoscaling/v2."""

from __future__ import annotations

import math
from collections.abc import Iterable

from octavo_operator.api.autoscaling import SelectPolicy
from octavo_operator.autoscale.history import Change, Recommendation
from octavo_operator.autoscale.policy import Pace, PaceLimit


def stabilized_up(wanted: int, past: Iterable[Recommendation], pace: Pace, now: float) -> int:
    """The smallest recommendation of the window: a short peak does not scale up."""
    return min([wanted, *(r.replicas for r in past if now - r.time <= pace.stabilization_s)])


def stabilized_down(wanted: int, past: Iterable[Recommendation], pace: Pace, now: float) -> int:
    """The largest recommendation of the window: a short dip does not scale down."""
    return max([wanted, *(r.replicas for r in past if now - r.time <= pace.stabilization_s)])


def limit_up(current: int, wanted: int, changes: Iterable[Change], pace: Pace, now: float) -> int:
    """`wanted`, cut to what the policies allow above `current`. From zero at least one replica is always allowed."""
    if pace.select is SelectPolicy.DISABLED:
        return current
    changes = tuple(changes)
    ceilings = [_ceiling(current, changes, limit, now) for limit in pace.limits]
    if not ceilings:
        return wanted
    ceiling = min(ceilings) if pace.select is SelectPolicy.MIN else max(ceilings)
    return max(current, min(wanted, max(ceiling, 1)))


def limit_down(current: int, wanted: int, changes: Iterable[Change], pace: Pace, now: float) -> int:
    """`wanted`, raised to what the policies allow below `current`."""
    if pace.select is SelectPolicy.DISABLED:
        return current
    changes = tuple(changes)
    floors = [_floor(current, changes, limit, now) for limit in pace.limits]
    if not floors:
        return wanted
    floor = max(floors) if pace.select is SelectPolicy.MIN else min(floors)
    return min(current, max(wanted, floor))


def within_tolerance(current: int, wanted: int, tolerance: float) -> bool:
    """Whether the deviation is too small to act on."""
    return current > 0 and abs(wanted / current - 1.0) <= tolerance


def _ceiling(current: int, changes: tuple[Change, ...], limit: PaceLimit, now: float) -> int:
    added = sum(c.delta for c in changes if c.delta > 0 and now - c.time < limit.period_s)
    start = current - added
    return math.ceil(start * (1 + limit.value / 100)) if limit.percent else start + limit.value


def _floor(current: int, changes: tuple[Change, ...], limit: PaceLimit, now: float) -> int:
    removed = -sum(c.delta for c in changes if c.delta < 0 and now - c.time < limit.period_s)
    start = current + removed
    return math.floor(start * (1 - limit.value / 100)) if limit.percent else start - limit.value
