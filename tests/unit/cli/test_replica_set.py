from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_cli.local.replica_set import (
    Drain,
    Forget,
    Kill,
    Phase,
    Replica,
    ReplicaPolicy,
    Start,
    after_exit,
    back_off_s,
    next_actions,
)

POLICY = ReplicaPolicy()


def ready(index: int, **changes: object) -> Replica:
    return replace(Replica(index=index, phase=Phase.READY, since=0.0), **changes)


def test_missing_replicas_are_started_at_free_indices() -> None:
    assert next_actions([ready(1)], 3, 10.0, POLICY) == [Start(0), Start(2)]


def test_nothing_is_done_when_all_is_well() -> None:
    assert next_actions([ready(0), ready(1)], 2, 10.0, POLICY) == []


def test_the_idlest_ready_replica_is_drained() -> None:
    replicas = [ready(0, running=4), ready(1, running=1), ready(2, running=9)]
    assert next_actions(replicas, 2, 10.0, POLICY) == [Drain(1)]


def test_a_broken_replica_goes_before_a_working_one() -> None:
    broken = Replica(index=0, phase=Phase.BACK_OFF, since=0.0, restarts=2, restart_at=99.0)
    assert next_actions([broken, ready(1)], 1, 10.0, POLICY) == [Forget(0)]


def test_a_starting_replica_goes_before_a_serving_one() -> None:
    starting = Replica(index=1, phase=Phase.STARTING, since=5.0)
    assert next_actions([ready(0), starting], 1, 10.0, POLICY) == [Drain(1)]


def test_a_crashed_replica_waits_for_its_back_off_and_then_starts_again() -> None:
    crashed = after_exit(ready(0, since=5.0), 10.0, POLICY)
    assert crashed is not None
    assert next_actions([crashed], 1, 10.5, POLICY) == []
    assert next_actions([crashed], 1, 11.0, POLICY) == [Start(0, restarts=1)]


def test_back_off_doubles_and_is_bounded() -> None:
    waits = [back_off_s(n, POLICY) for n in (1, 2, 3, 4, 100)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 60.0]


def test_a_replica_that_was_stable_starts_its_back_off_afresh() -> None:
    crashed = after_exit(ready(0, since=0.0, restarts=7), 120.0, POLICY)
    assert crashed is not None
    assert crashed.restarts == 1


def test_a_drained_replica_is_gone_after_its_exit() -> None:
    assert after_exit(Replica(index=0, phase=Phase.DRAINING, since=0.0), 1.0, POLICY) is None


def test_a_drain_that_overruns_is_killed() -> None:
    draining = Replica(index=0, phase=Phase.DRAINING, since=0.0)
    (action,) = next_actions([draining], 0, 331.0, POLICY)
    assert isinstance(action, Kill)


def test_a_start_that_overruns_is_killed() -> None:
    starting = Replica(index=0, phase=Phase.STARTING, since=0.0)
    (action,) = next_actions([starting], 1, 1_801.0, POLICY)
    assert isinstance(action, Kill)


def test_a_hung_replica_is_killed_after_repeated_liveness_failures() -> None:
    assert next_actions([ready(0, not_live_since=10.0)], 1, 39.9, POLICY) == []
    (action,) = next_actions([ready(0, not_live_since=10.0)], 1, 40.0, POLICY)
    assert isinstance(action, Kill)


replicas_strategy = st.lists(
    st.builds(
        Replica,
        index=st.integers(0, 30),
        phase=st.sampled_from(Phase),
        since=st.floats(0, 100),
        running=st.integers(0, 9),
        restarts=st.integers(0, 9),
        restart_at=st.floats(0, 200),
        not_live_since=st.none() | st.floats(0, 100),
    ),
    max_size=12,
    unique_by=lambda r: r.index,
)


@settings(max_examples=200, deadline=None)
@given(replicas_strategy, st.integers(0, 10), st.floats(0, 500))
def test_carrying_the_actions_out_leaves_exactly_the_desired_number(
    replicas: list[Replica], desired: int, now: float
) -> None:
    actions = next_actions(replicas, desired, now, POLICY)
    kept = {r.index for r in replicas if r.phase is not Phase.DRAINING}
    leaving = {a.index for a in actions if isinstance(a, Drain | Forget)}
    arriving = {a.index for a in actions if isinstance(a, Start)} - kept
    assert len((kept - leaving) | arriving) == desired
    assert len({a.index for a in actions}) == len(actions), "at most one action per replica"
    assert not leaving or not arriving, "never stops and adds replicas at once"
