"""Adapters: whatever replicas do, the steps lead to exactly what is wanted, and failures come later and later."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_operator.adapters import (
    RETRY_MAX_S,
    Action,
    AdapterState,
    Attempts,
    Holding,
    Step,
    adapter_steps,
    adapter_views,
)

NAMES = st.sampled_from(["sql", "chat", "code"])
PATHS = st.dictionaries(NAMES, st.sampled_from(["hf://a/one", "hf://a/two"]), max_size=3)


def holding(loaded: set[str], ours: Mapping[str, str], replica: str = "chat-1") -> Holding:
    return Holding(replica, frozenset(loaded), ours)


def take(held: Holding, step: Step) -> Holding:
    """What an engine does with a step; it refuses a second adapter of the same name, as real engines do."""
    ours = {name: path for name, path in held.ours.items() if name != step.name}
    if step.action is Action.UNLOAD:
        return Holding(held.replica, held.loaded - {step.name}, ours)
    assert step.name not in held.loaded, "it is loaded already"
    return Holding(held.replica, held.loaded | {step.name}, {**ours, step.name: step.path})


@settings(deadline=None)
@given(PATHS, st.sets(NAMES), PATHS)
def test_the_steps_lead_to_what_is_wanted_and_then_nothing_is_left_to_do(
    wanted: dict[str, str], loaded: set[str], ours: dict[str, str]
) -> None:
    held = holding(loaded, ours)
    foreign = loaded - ours.keys()
    for step in adapter_steps(wanted, [held]):
        held = take(held, step)
    assert held.loaded == wanted.keys() | foreign
    assert all(held.ours[name] == path for name, path in wanted.items() if name not in foreign)
    assert adapter_steps(wanted, [held]) == ()


def test_an_adapter_of_the_command_line_is_left_alone() -> None:
    assert adapter_steps({}, [holding({"base", "static"}, {})]) == ()


def test_an_engine_that_restarted_gets_its_adapters_again() -> None:
    (step,) = adapter_steps({"sql": "hf://a/sql"}, [holding(set(), {"sql": "hf://a/sql"})])
    assert (step.action, step.name) == (Action.LOAD, "sql")


def test_a_changed_address_is_unloaded_before_it_is_loaded() -> None:
    steps = adapter_steps({"sql": "hf://a/new"}, [holding({"sql"}, {"sql": "hf://a/old"})])
    assert [(s.action, s.path) for s in steps] == [(Action.UNLOAD, "hf://a/old"), (Action.LOAD, "hf://a/new")]


def test_failures_are_tried_later_and_later_and_do_not_hold_up_other_adapters() -> None:
    bad, good = Step("chat-1", Action.LOAD, "bad", "x"), Step("chat-1", Action.LOAD, "good", "y")
    attempts, now, pauses = Attempts(), 0.0, []
    for _ in range(10):
        attempts.failed(bad, now, "rank 128 is above 64", refused=True)
        assert attempts.due([bad, good], now) == (good,)
        pauses.append(attempts.failures[bad].again_at - now)
        now = attempts.failures[bad].again_at
        assert attempts.due([bad, good], now) == (bad, good)
    assert pauses == sorted(pauses)
    assert pauses[-1] == RETRY_MAX_S


def test_a_failure_that_is_no_longer_wanted_is_forgotten() -> None:
    step = Step("chat-1", Action.LOAD, "bad", "x")
    attempts = Attempts()
    attempts.failed(step, 0.0, "no", refused=True)
    attempts.due([], 0.0)
    assert attempts.failures == {}


def test_an_adapter_is_loaded_when_every_ready_replica_holds_it() -> None:
    wanted = {"sql": "hf://a/sql"}
    has, lacks = holding({"sql"}, wanted), holding(set(), {}, "chat-2")
    (view,) = adapter_views(wanted, [has, lacks], 2, {})
    assert (view.state, view.ready_replicas) == (AdapterState.PENDING, 1)
    (view,) = adapter_views(wanted, [has], 1, {})
    assert (view.state, view.ready_replicas) == (AdapterState.LOADED, 1)
    (view,) = adapter_views(wanted, [], 1, {})
    assert view.state is AdapterState.PENDING, "a replica that did not answer may not hold it"


def test_a_refusal_is_a_failure_and_silence_is_not() -> None:
    wanted = {"sql": "hf://a/sql"}
    step = Step("chat-1", Action.LOAD, "sql", "hf://a/sql")
    attempts = Attempts()
    attempts.failed(step, 0.0, "timed out", refused=False)
    (view,) = adapter_views(wanted, [holding(set(), {})], 1, attempts.failures)
    assert (view.state, view.message) == (AdapterState.PENDING, "chat-1: timed out")
    attempts.failed(step, 0.0, "400 rank 128 is above 64", refused=True)
    (view,) = adapter_views(wanted, [holding(set(), {})], 1, attempts.failures)
    assert (view.state, view.message) == (AdapterState.FAILED, "chat-1: 400 rank 128 is above 64")
