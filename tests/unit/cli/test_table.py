from __future__ import annotations

import pytest
from rich.console import Console

from octavo_cli.local.replica_set import Phase
from octavo_cli.local.table import ReplicaRow, ServiceRow, duration, render


def shown(*services: ServiceRow) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render(services, "http://127.0.0.1:8000"))
    return capture.get()


def service(*replicas: ReplicaRow) -> ServiceRow:
    return ServiceRow("smollm2", "smollm2", 2, 1, 3, 4, "2 replicas: queue 9 > 4 per replica", replicas)


def test_every_replica_shows_its_state_and_load() -> None:
    text = shown(
        service(
            ReplicaRow(0, Phase.READY, "http://127.0.0.1:9001", 7, 3, 2, 0.5, 41.6, 75.0),
            ReplicaRow(1, Phase.BACK_OFF, restarts=2, detail="exit code -9"),
        )
    )
    assert "1/2 ready" in text
    assert "127.0.0.1:9001" in text
    assert "50%" in text
    assert "BackOff" in text
    assert "exit code -9" in text


def test_the_queue_counts_what_the_gateway_holds_too() -> None:
    text = shown(service(ReplicaRow(0, Phase.READY, waiting=3)))
    (line,) = [line for line in text.splitlines() if "1/2 ready" in line]
    assert line.split()[3] == "7", line


def test_the_latest_decision_and_the_address_are_shown() -> None:
    text = shown(service())
    assert "queue 9 > 4 per replica" in text
    assert "http://127.0.0.1:8000" in text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m"), (7_300, "2h"), (200_000, "2d")])
def test_ages_read_as_in_kubectl(seconds: float, text: str) -> None:
    assert duration(seconds) == text
