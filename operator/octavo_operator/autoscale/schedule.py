"""Bounds that hold at certain times of day."""

from __future__ import annotations

import datetime as dt
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from octavo_operator.autoscale.policy import ScalingPolicy, ScheduleBounds


def bounds_at(policy: ScalingPolicy, now: float) -> tuple[int, int, str]:
    """(least, most, names of the schedules that hold) at a Unix time.

    Of several schedules the largest least and the largest most count, so that none is starved by another.
    """
    active = [schedule for schedule in policy.schedules if holds(schedule, now)]
    least = max((s.min_replicas for s in active if s.min_replicas is not None), default=policy.min_replicas)
    most = max((s.max_replicas for s in active if s.max_replicas is not None), default=policy.max_replicas)
    return least, max(least, most), ", ".join(s.name for s in active)


def holds(schedule: ScheduleBounds, now: float) -> bool:
    """Whether the schedule holds; one that ends before it starts runs past midnight of the day it started on."""
    local = dt.datetime.fromtimestamp(now, tz=_zone(schedule.timezone))
    minute = local.hour * 60 + local.minute
    today, yesterday = local.weekday(), (local.weekday() - 1) % 7
    if schedule.start_minute < schedule.end_minute:
        return today in schedule.days and schedule.start_minute <= minute < schedule.end_minute
    return (today in schedule.days and minute >= schedule.start_minute) or (
        yesterday in schedule.days and minute < schedule.end_minute
    )


def is_known_zone(name: str) -> bool:
    """Whether this machine knows the time zone."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return False
    return True


def _zone(name: str) -> dt.tzinfo:
    return ZoneInfo(name) if is_known_zone(name) else dt.UTC
