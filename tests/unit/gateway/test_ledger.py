"""The usage ledger: each request exactly once, whatever crashes."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.usage_lines import begun, ended
from octavo_gateway.usage import Ledger, LedgerError, read_tenants, read_usage


def totals(path: Path) -> dict[str, tuple[int, int]]:
    return {row.group[0]: (row.requests, row.output_tokens) for row in read_usage(path, ("outcome",))}


def test_records_are_summed_by_what_is_asked(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in range(10):
        ledger.write(begun(number))
        ledger.write(ended(number, tenant="a" if number < 4 else "b"))
    ledger.close()
    rows = {row.group: row for row in read_usage(tmp_path / "usage.sqlite", ("tenant", "day"))}

    assert set(rows) == {("a", "2026-11-21"), ("b", "2026-11-21")}
    row = rows[("a", "2026-11-21")]
    assert (row.requests, row.prompt_tokens, row.cached_tokens, row.output_tokens, row.cost) == (4, 40, 8, 40, 2.0)
    assert read_tenants(tmp_path / "usage.sqlite", datetime(2026, 11, 1, tzinfo=UTC)) == {
        "a": (80, 2.0),
        "b": (120, 3.0),
    }
    assert read_usage(tmp_path / "usage.sqlite", since=datetime(2026, 11, 22, tzinfo=UTC)) == []
    assert list(tmp_path.glob("journal-*")) == []


def test_a_request_that_never_ended_is_kept_as_interrupted_at_the_next_start(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "a")
    for number in range(3):
        first.write(begun(number))
    first.write(ended(1))
    first.flush()
    first.write(begun(7))  # still in the journal only
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # what a killed process leaves
    first.close()
    Ledger(tmp_path / "b").close()

    assert totals(tmp_path / "b" / "usage.sqlite") == {"interrupted": (3, 0), "ok": (1, 10)}


def test_two_gateways_cannot_share_a_folder(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(LedgerError, match="another gateway"):
        Ledger(tmp_path)
    ledger.close()
    Ledger(tmp_path).close()


def test_a_newer_or_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "usage.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(LedgerError, match=r"usage\.sqlite"):
        Ledger(tmp_path)


def test_a_missing_ledger_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no file"):
        read_usage(tmp_path / "usage.sqlite")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "begin", "end", "end", "flush", "crash"]), st.integers(0, 30)), max_size=40
    )
)
def test_any_mix_of_crashes_leaves_each_request_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    generation = 0
    ledger = Ledger(folder / "0")
    seen_open: set[int] = set()
    seen_ended: set[int] = set()
    for step, number in steps:
        if step == "begin" and number not in seen_open | seen_ended:
            ledger.write(begun(number))
            seen_open.add(number)
        elif step == "end" and number in seen_open:
            ledger.write(ended(number))
            seen_open.discard(number)
            seen_ended.add(number)
        elif step == "flush":
            ledger.flush()
        elif step == "crash":
            generation += 1
            copy = folder / str(generation)
            with ledger._flushing:
                shutil.copytree(folder / str(generation - 1), copy)
            ledger.close()
            with (copy / "journal-999999999999.jsonl").open("wb") as torn:
                torn.write(b'{"type":"ended","id":"id-1", "req')  # cut while written
            ledger = Ledger(copy)
            seen_open.clear()  # recorded as interrupted
    ledger.close()
    rows = read_usage(folder / str(generation) / "usage.sqlite", ("outcome",))
    found = {row.group[0]: row.requests for row in rows}

    assert found.get("ok", 0) == len(seen_ended)


WRITER = """
import sys, random
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fakes.usage_lines import begun, ended
from octavo_gateway.usage import Ledger
ledger = Ledger(Path(sys.argv[1]))
start = int(sys.argv[3])
for number in range(start, start + 1_000_000):
    ledger.write(begun(number))
    ledger.write(ended(number))
    print(number, flush=True)
"""


def test_a_killed_process_loses_nothing_it_had_told(tmp_path: Path) -> None:
    """Three writers in turn are killed without warning; every request they reported as ended is in the ledger once."""
    told: set[int] = set()
    rng = random.Random(5)
    for generation in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parents[2]), str(generation * 1_000_000)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        wanted = rng.randrange(500, 3_000)
        for line in process.stdout:
            told.add(int(line))
            wanted -= 1
            if wanted == 0:
                process.kill()
        process.wait()
    Ledger(tmp_path).close()
    found = totals(tmp_path / "usage.sqlite")

    ok, interrupted = found.get("ok", (0, 0))[0], found.get("interrupted", (0, 0))[0]
    assert len(told) <= ok <= len(told) + 3
    assert interrupted <= 3
