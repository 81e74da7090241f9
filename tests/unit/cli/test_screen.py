from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from octavo_cli.local.replica_set import Phase
from octavo_cli.local.screen import Screen, changes
from octavo_cli.local.table import ReplicaRow, ServiceRow

STARTING = ReplicaRow(0, Phase.STARTING, detail="weights 10%")


def service(*replicas: ReplicaRow, desired: int = 1, decision: str = "") -> ServiceRow:
    return ServiceRow("smollm2", "smollm2", desired, 1, 3, 0, decision, replicas)


def test_a_new_replica_is_news() -> None:
    assert changes([], [service(STARTING)]) == ["smollm2 replica 0: Starting (weights 10%)"]


def test_progress_within_a_phase_is_no_news_but_the_next_phase_is() -> None:
    before = [service(STARTING)]
    assert changes(before, [service(replace(STARTING, detail="weights 90%"))]) == []
    assert changes(before, [service(replace(STARTING, detail="warmup 0%"))]) == [
        "smollm2 replica 0: Starting (warmup 0%)"
    ]


def test_load_alone_is_no_news() -> None:
    ready = ReplicaRow(0, Phase.READY)
    assert changes([service(ready)], [service(replace(ready, running=7, waiting=3, tokens_per_s=9.0))]) == []


def test_a_replica_that_left_and_the_decision_behind_it_are_told() -> None:
    two = service(ReplicaRow(0, Phase.READY), ReplicaRow(1, Phase.READY), desired=2)
    one = service(ReplicaRow(0, Phase.READY), desired=1, decision="idle")
    assert changes([two], [one]) == ["smollm2 replica 1: gone", "smollm2: 2 -> 1 replicas (idle)"]


def test_without_a_terminal_the_same_picture_is_printed_once() -> None:
    out = io.StringIO()
    with Screen(Console(file=out), live=False) as screen:
        screen.show([service(STARTING)], "")
        screen.show([service(STARTING)], "")
    assert out.getvalue() == "smollm2 replica 0: Starting (weights 10%)\n"


def test_on_a_terminal_the_table_is_drawn_and_leaves_no_trace_of_itself() -> None:
    out = io.StringIO()
    with Screen(Console(file=out, force_terminal=True, width=120), live=True) as screen:
        screen.show([service(STARTING)], "address")
    assert "weights 10%" in out.getvalue()
