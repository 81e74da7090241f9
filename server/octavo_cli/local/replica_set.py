"""Pure: which replica processes to start, drain, kill or restart so that the wanted number serves.

The supervisor observes processes, asks `next_actions`, and carries the answers out; nothing here does IO.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Phase(enum.StrEnum):
    """Where one replica process stands."""

    STARTING = "Starting"  # spawned, not ready yet
    READY = "Ready"
    UNREADY = "Unready"  # was ready, its readiness probe fails now
    DRAINING = "Draining"  # told to stop, finishing its requests
    BACK_OFF = "BackOff"  # exited; waits for `restart_at`


@dataclass(frozen=True, slots=True)
class Replica:
    """What is known of one replica. `since` and `restart_at` are seconds on the caller's clock."""

    index: int
    phase: Phase
    since: float
    running: int = 0  # requests in flight, for choosing whom to stop
    restarts: int = 0  # consecutive, since it was last stable
    restart_at: float = 0.0
    not_live_since: float | None = None  # when its liveness probe began to fail


@dataclass(frozen=True, slots=True)
class ReplicaPolicy:
    """Times in seconds. A replica ready for `stable_after_s` has its restart count forgiven."""

    startup_timeout_s: float = 1_800.0
    drain_timeout_s: float = 330.0
    not_live_timeout_s: float = 30.0
    probe_period_s: float = 2.0  # of a replica that is ready; others are asked at every tick
    probe_timeout_s: float = 5.0
    back_off_initial_s: float = 1.0
    back_off_max_s: float = 60.0
    stable_after_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    index: int
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Drain:
    index: int


@dataclass(frozen=True, slots=True)
class Kill:
    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop a replica that is not wanted any more and has no process."""

    index: int


Action = Start | Drain | Kill | Forget


def back_off_s(restarts: int, policy: ReplicaPolicy) -> float:
    """Seconds to wait before restart number `restarts` (1-based), doubling up to the maximum."""
    exponent = min(max(restarts - 1, 0), 32)
    return float(min(policy.back_off_initial_s * 2**exponent, policy.back_off_max_s))


def after_exit(replica: Replica, now: float, policy: ReplicaPolicy) -> Replica | None:
    """The replica after its process ended; None when it was draining and is simply gone."""
    if replica.phase is Phase.DRAINING:
        return None
    was_stable = replica.phase is Phase.READY and now - replica.since >= policy.stable_after_s
    restarts = 1 if was_stable else replica.restarts + 1
    return Replica(
        index=replica.index,
        phase=Phase.BACK_OFF,
        since=now,
        restarts=restarts,
        restart_at=now + back_off_s(restarts, policy),
    )


def next_actions(replicas: Sequence[Replica], desired: int, now: float, policy: ReplicaPolicy) -> list[Action]:
    """Steps that bring the observed replicas to `desired`. Idempotent: carried out or not, asking again is safe."""
    actions: list[Action] = []
    kept = [r for r in replicas if r.phase is not Phase.DRAINING]
    surplus = _victims(kept, len(kept) - desired)
    for replica in replicas:
        if replica.phase is Phase.DRAINING:
            if now - replica.since > policy.drain_timeout_s:
                actions.append(Kill(replica.index, f"did not drain within {policy.drain_timeout_s:g} s"))
        elif replica.index in surplus:
            actions.append(Forget(replica.index) if replica.phase is Phase.BACK_OFF else Drain(replica.index))
        else:
            actions.extend(_keep_alive(replica, now, policy))
    free = (index for index in range(len(replicas) + desired) if index not in {r.index for r in replicas})
    actions.extend(Start(next(free)) for _ in range(desired - len(kept)))
    return actions


def _keep_alive(replica: Replica, now: float, policy: ReplicaPolicy) -> list[Action]:
    if replica.phase is Phase.BACK_OFF:
        return [Start(replica.index, replica.restarts)] if now >= replica.restart_at else []
    if replica.phase is Phase.STARTING:
        if now - replica.since > policy.startup_timeout_s:
            return [Kill(replica.index, f"was not ready within {policy.startup_timeout_s:g} s")]
        return []
    if replica.not_live_since is not None and now - replica.not_live_since >= policy.not_live_timeout_s:
        return [Kill(replica.index, f"failed its liveness probe for {policy.not_live_timeout_s:g} s")]
    return []


_STOP_ORDER = {Phase.BACK_OFF: 0, Phase.STARTING: 1, Phase.UNREADY: 2, Phase.READY: 3}


def _victims(kept: Sequence[Replica], count: int) -> set[int]:
    """Whom to stop: the broken first, then the still starting, then the idlest; the youngest among equals."""
    ranked = sorted(kept, key=lambda r: (_STOP_ORDER[r.phase], r.running, -r.since, -r.index))
    return {r.index for r in ranked[: max(count, 0)]}
