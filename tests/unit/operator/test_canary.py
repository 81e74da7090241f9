"""Trials of new revisions, on a clock of the test: they promote when healthy, go when not, and never run ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_operator.api.operations import Canary
from octavo_operator.autoscale.metrics import Histogram, parse_page
from octavo_operator.canary import (
    Phase,
    TrackCounts,
    Trial,
    TrialView,
    advance,
    canary_replicas,
    canary_weight,
    judge,
    news,
    split_replicas,
)
from octavo_operator.canary_meter import CanaryMeter

CANARY = Canary.model_validate(
    {"steps": [{"weight": 5, "pauseSeconds": 600}, {"weight": 50, "pauseSeconds": 300}], "rollbackOnFailure": True}
)
VIEW = TrialView(wanted="new", stable="old", replicas=4, stable_ready=4)


def seen(**changes: Any) -> TrialView:
    return replace(VIEW, **changes)


def run(canary: Canary, views: list[tuple[float, TrialView]], trial: Trial | None = None) -> Trial | None:
    for now, view in views:
        trial = advance(trial, view, canary, now)
    return trial


def first_bytes(seconds: float, count: int) -> Histogram:
    bounds = (0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
    return Histogram({b: float(count if seconds <= b else 0) for b in bounds}, float(count), seconds * count)


def test_a_healthy_revision_goes_through_every_step_and_takes_over() -> None:
    trial = advance(None, VIEW, CANARY, 0.0)
    assert trial == Trial("new", Phase.STARTING, 0, 0.0)
    assert canary_weight(trial, CANARY) == 0, "no request before its replicas are ready"
    trial = run(CANARY, [(100.0, seen(canary_ready=0)), (200.0, seen(canary_ready=1))], trial)
    assert trial == Trial("new", Phase.RUNNING, 0, 200.0)
    assert canary_weight(trial, CANARY) == 5
    trial = run(CANARY, [(799.0, seen(canary_ready=1)), (800.0, seen(canary_ready=1))], trial)
    assert trial == Trial("new", Phase.STARTING, 1, 800.0)
    assert canary_weight(trial, CANARY) == 5, "the next weight waits for its replicas"
    assert split_replicas(trial, CANARY, 4) == (4, 2)
    trial = run(CANARY, [(820.0, seen(canary_ready=2)), (1_120.0, seen(canary_ready=2))], trial)
    assert trial == Trial("new", Phase.PROMOTING, 1, 1_120.0)
    assert split_replicas(trial, CANARY, 4) == (4, 2)
    replacing = seen(stable="new", canary_ready=2)
    assert run(CANARY, [(1_130.0, replacing)], trial) == trial
    assert run(CANARY, [(1_200.0, replace(replacing, promoted=True))], trial) is None


def test_nothing_is_tried_where_nothing_serves_or_nothing_changed() -> None:
    assert advance(None, seen(stable=""), CANARY, 0.0) is None
    assert advance(None, seen(stable="new"), CANARY, 0.0) is None
    assert advance(None, seen(stable_ready=0), CANARY, 0.0) is None, "there is nothing to protect"
    assert advance(None, seen(replicas=0), CANARY, 0.0) is None


def test_a_revision_that_cannot_run_is_taken_back_for_good_until_the_spec_changes() -> None:
    trial = run(CANARY, [(0.0, VIEW), (10.0, seen(fault="chat-1: boom")), (9_999.0, seen(canary_ready=4))])
    assert trial == Trial("new", Phase.ROLLED_BACK, 0, 10.0, "chat-1: boom")
    assert split_replicas(trial, CANARY, 4) == (4, 0)
    assert run(CANARY, [(10_000.0, seen(wanted="newer"))], trial) == Trial("newer", Phase.STARTING, 0, 10_000.0)
    assert run(CANARY, [(10_000.0, seen(wanted="old"))], trial) is None


def test_errors_take_a_revision_back_only_when_they_are_no_accident() -> None:
    def with_errors(errors: int, requests: int) -> TrialView:
        return seen(canary_ready=1, canary_counts=TrackCounts(requests, errors))

    assert judge(with_errors(1, 20), CANARY.analysis) == "", "one failure in twenty may be chance"
    assert "3.0% of 1000 requests failed" in judge(with_errors(30, 1_000), CANARY.analysis)
    assert judge(with_errors(5, 1_000), CANARY.analysis) == ""
    trial = run(CANARY, [(0.0, VIEW), (1.0, seen(canary_ready=1)), (30.0, with_errors(30, 100))])
    assert trial is not None
    assert (trial.phase, trial.since) == (Phase.ROLLED_BACK, 30.0)


def test_a_slower_revision_is_taken_back_and_a_little_slower_one_is_not() -> None:
    def with_times(new: float, old: float, count: int = 100) -> TrialView:
        stable = TrackCounts(count, 0, first_bytes(old, count))
        return seen(stable_counts=stable, canary_counts=TrackCounts(count, 0, first_bytes(new, count)))

    assert "maxTTFTRatio is 1.2" in judge(with_times(0.35, 0.15), CANARY.analysis)
    assert judge(with_times(0.15, 0.15), CANARY.analysis) == ""
    assert judge(with_times(0.35, 0.15, count=10), CANARY.analysis) == "", "too few to compare medians"


def test_without_rollback_a_failing_step_waits_and_goes_on_when_it_heals() -> None:
    patient = CANARY.model_copy(update={"rollback_on_failure": False})
    failing = seen(canary_ready=1, canary_counts=TrackCounts(100, 50))
    trial = run(patient, [(0.0, VIEW), (1.0, seen(canary_ready=1)), (5_000.0, failing)])
    assert trial is not None
    assert (trial.phase, trial.step, bool(trial.failing)) == (Phase.RUNNING, 0, True)
    trial = run(patient, [(5_100.0, seen(canary_ready=1))], trial)
    assert trial == Trial("new", Phase.STARTING, 1, 5_100.0)


def test_a_service_that_falls_asleep_begins_its_step_again_when_it_wakes() -> None:
    awake = seen(canary_ready=1)
    trial = run(CANARY, [(0.0, VIEW), (1.0, awake), (590.0, seen(replicas=0)), (5_000.0, seen(replicas=0))])
    assert trial == Trial("new", Phase.STARTING, 0, 590.0)
    assert run(CANARY, [(6_000.0, awake)], trial) == Trial("new", Phase.RUNNING, 0, 6_000.0)


VIEWS = st.builds(
    TrialView,
    wanted=st.sampled_from(["new", "new", "new", "newer", "old"]),
    stable=st.sampled_from(["old", "old", "new", ""]),
    replicas=st.integers(0, 6),
    stable_ready=st.integers(0, 6),
    canary_ready=st.integers(0, 6),
    fault=st.sampled_from(["", "", "", "boom"]),
    promoted=st.booleans(),
)
STEPS = st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True).map(sorted)


@settings(deadline=None)
@given(STEPS, st.booleans(), st.lists(st.tuples(st.floats(0.0, 900.0), VIEWS), max_size=30))
def test_whatever_happens_weights_stay_within_the_steps_and_looking_twice_changes_nothing(
    weights: list[int], rollback: bool, looks: list[tuple[float, TrialView]]
) -> None:
    canary = Canary.model_validate(
        {"steps": [{"weight": w, "pauseSeconds": 300} for w in weights], "rollbackOnFailure": rollback}
    )
    trial, now = None, 0.0
    for elapsed, view in looks:
        now += elapsed
        before, trial = trial, advance(trial, view, canary, now)
        assert advance(trial, view, canary, now) == trial or _moves_on(trial, view)
        if trial is None:
            continue
        weight = canary_weight(trial, canary)
        assert weight in (0, *weights)
        stable, on_trial = split_replicas(trial, canary, view.replicas)
        assert stable >= (view.replicas * (100 - weight)) / 100, "never fewer than its requests need"
        assert stable + on_trial <= view.replicas * 2 + 1
        if before is not None and before.revision == trial.revision and trial.phase is not Phase.ROLLED_BACK:
            asleep = view.replicas == 0
            assert weight >= canary_weight(before, canary) or asleep, "a share shrinks only with a rollback"
            assert trial.step <= before.step + 1
        if before is not None and before.phase is Phase.ROLLED_BACK and before.revision == trial.revision:
            assert trial == before


def _moves_on(trial: Trial | None, view: TrialView) -> bool:
    """A step whose replicas are ready already begins at the next look; a trial that ended may begin anew."""
    if trial is None:
        return view.stable not in ("", view.wanted) and view.stable_ready > 0 and view.replicas > 0
    return trial.phase in (Phase.STARTING, Phase.PROMOTING)


@pytest.mark.parametrize(("weight", "replicas", "wanted"), [(5, 3, 1), (50, 3, 2), (99, 10, 10), (5, 0, 0), (1, 1, 1)])
def test_a_canary_has_replicas_for_its_weight(weight: int, replicas: int, wanted: int) -> None:
    assert canary_replicas(weight, replicas) == wanted


def test_people_hear_of_every_turn_once() -> None:
    start, runs = Trial("new", Phase.STARTING, 0, 0.0), Trial("new", Phase.RUNNING, 0, 1.0)
    back = Trial("new", Phase.ROLLED_BACK, 0, 2.0, "boom")
    promoting = Trial("new", Phase.PROMOTING, 1, 3.0)
    turns = [
        (None, start),
        (start, runs),
        (runs, runs),
        (runs, back),
        (runs, promoting),
        (promoting, None),
        (back, None),
    ]
    told = [news(before, after, CANARY) for before, after in turns]
    assert [item and item.reason for item in told] == [
        "CanaryStarted", "CanaryStep", None, "CanaryRolledBack", "CanaryPromoting", "CanaryPromoted", None,
    ]  # fmt: skip
    rolled_back = told[3]
    assert rolled_back is not None
    assert rolled_back.warning
    assert "boom" in rolled_back.message


def page(requests: int, errors: int, track: str = "canary") -> Any:
    labels = f'model="chat",namespace="team",track="{track}"'
    return parse_page(
        f"octavo_gateway_track_requests_total{{{labels}}} {requests}\n"
        f"octavo_gateway_track_errors_total{{{labels}}} {errors}\n"
        f'octavo_gateway_track_first_byte_seconds_bucket{{{labels},le="0.5"}} {requests}\n'
        f"octavo_gateway_track_first_byte_seconds_count{{{labels}}} {requests}\n"
        f"octavo_gateway_track_first_byte_seconds_sum{{{labels}}} {requests / 10}\n",
        0.0,
    )


def test_counts_are_summed_over_gateways_and_survive_their_restarts_and_silence() -> None:
    meter = CanaryMeter()
    meter.begin("new", 0)
    for pages in (
        {"a": page(100, 9), "b": page(50, 0)},  # from before the step: not counted
        {"a": page(110, 10), "b": page(60, 0)},
        {"b": page(65, 2)},  # a does not answer
        {"a": page(120, 10), "b": page(3, 1)},  # b has restarted
    ):
        meter.add(pages, "chat", "team")
    assert (meter.canary.requests, meter.canary.errors) == (10 + 10 + 5 + 10 + 3, 1 + 0 + 2 + 0 + 1)
    assert meter.canary.first_byte.count == 38
    assert meter.stable.requests == 0
    meter.begin("new", 1)
    assert meter.canary.requests == 0
    meter.add({"a": page(121, 10)}, "chat", "team")
    assert meter.canary.requests == 1
