"""The usage ledger on a real PostgreSQL: shared by gateways, through outages and crashes, each request once."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from fakes.gateway_door import HELLO, entry, open_door
from fakes.openai_replica import OpenAIReplica
from fakes.postgres import AVAILABLE, WHY_NOT, Postgres, postgres
from fakes.usage_lines import begun, ended
from octavo_gateway.usage import Ledger, LedgerAwayError, LedgerError, UsageRow, read_usage
from octavo_gateway.usage import ledger as ledger_module

pytestmark = pytest.mark.skipif(not AVAILABLE, reason=WHY_NOT)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture
def url(server: Postgres) -> Iterator[str]:
    """An empty database of the test's own."""
    name = f"ledger_{random.getrandbits(48):012x}"
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    yield server.url.replace("/postgres", f"/{name}")
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def wait_for(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def by_outcome(url: str) -> dict[str, int]:
    return {row.group[0]: row.requests for row in read_usage(url, ("outcome",))}


def spooled(folder: Path, kind: str) -> int:
    return sum(path.read_text().count(f'"{kind}"') for path in folder.glob("journal-*"))


def test_two_gateways_write_into_one_ledger_and_it_sums_as_sqlite_does(url: str, tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path / name, url) for name in "ab"]
    file = Ledger(tmp_path / "file")
    for number in range(40):
        for ledger in (ledgers[number % 2], file):
            ledger.write(begun(number))
            ledger.write(ended(number, tenant="x" if number < 25 else "y", outcome="ok" if number % 3 else "failed"))
    for ledger in (*ledgers, file):
        ledger.close()

    for groups in (("tenant",), ("key", "outcome"), ("day", "month"), ("model", "adapter", "tenant")):
        found: list[UsageRow] = read_usage(url, groups)
        assert found == read_usage(tmp_path / "file" / "usage.sqlite", groups)
    assert by_outcome(url) == {"failed": 14, "ok": 26}


def test_a_segment_sent_twice_counts_once(url: str, tmp_path: Path) -> None:
    first = Ledger(tmp_path / "a", url)
    for number in range(20):
        first.write(begun(number))
        first.write(ended(number))
    with first._flushing:
        shutil.copytree(tmp_path / "a", tmp_path / "copy")  # as if it died after the commit, before the delete
    first.close()
    Ledger(tmp_path / "copy", url).close()

    assert by_outcome(url) == {"ok": 20}


def test_records_survive_an_outage_of_the_database(tmp_path: Path) -> None:
    with postgres() as server:
        ledger = Ledger(tmp_path, server.url)
        ledger.write(begun(0))
        ledger.write(ended(0))
        wait_for(lambda: by_outcome(server.url) == {"ok": 1})
        server.kill()
        for number in range(1, 200):
            ledger.write(begun(number))
            ledger.write(ended(number))
        wait_for(lambda: ledger.failures > 0)
        waiting = ledger.spool_bytes
        server.start()
        wait_for(lambda: by_outcome(server.url) == {"ok": 200})
        wait_for(lambda: ledger.spool_bytes == 0)
        ledger.close()

    assert waiting > 0
    assert list(tmp_path.glob("journal-*")) == []


def test_a_gateway_starts_and_ends_while_the_database_is_away_and_the_next_one_delivers(tmp_path: Path) -> None:
    with postgres() as server:
        server.kill()
        first = Ledger(tmp_path, server.url)
        first.write(begun(1))
        first.write(ended(1))
        first.write(begun(2))  # never ends
        first.close()
        left = list(tmp_path.glob("journal-*"))
        server.start()
        second = Ledger(tmp_path, server.url)
        second.write(begun(3))
        second.write(ended(3))
        second.close()
        found = by_outcome(server.url)

    assert left
    assert found == {"ok": 2, "interrupted": 1}


def test_what_a_vanished_gateway_left_open_is_ended_by_another(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk is gone with it, and later it turns out to have been only cut off: then its own word counts."""
    gone = Ledger(tmp_path / "gone", url)
    gone.write(begun(1))
    gone.write(begun(2))
    gone.flush()
    monkeypatch.setattr(ledger_module, "SILENT_S", -5.0)  # everything that was ever seen is silent
    Ledger(tmp_path / "heir", url).close()
    given_up = by_outcome(url)
    monkeypatch.undo()
    gone.write(ended(2))
    gone.close()

    assert given_up == {"interrupted": 2}
    assert by_outcome(url) == {"interrupted": 1, "ok": 1}


def test_many_gateways_migrate_an_empty_database_at_once(url: str, tmp_path: Path) -> None:
    opened: list[Ledger] = []
    starts = [threading.Thread(target=lambda n=n: opened.append(Ledger(tmp_path / str(n), url))) for n in range(8)]
    for thread in starts:
        thread.start()
    for thread in starts:
        thread.join()
    for number, ledger in enumerate(opened):
        ledger.write(begun(number))
        ledger.write(ended(number))
        ledger.close()

    assert by_outcome(url) == {"ok": 8}


def test_a_user_without_the_right_to_change_the_schema_is_enough_later(url: str, tmp_path: Path) -> None:
    Ledger(tmp_path / "owner", url).close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS writer")
        connection.execute("CREATE ROLE writer LOGIN")
        connection.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO writer")
    weak = Ledger(tmp_path / "writer", url.replace("octavo:secret-word", "writer"))
    weak.write(begun(1))
    weak.write(ended(1))
    weak.close()

    assert by_outcome(url) == {"ok": 1}


def test_a_newer_schema_is_refused_and_no_message_holds_the_password(url: str, tmp_path: Path) -> None:
    Ledger(tmp_path / "a", url).close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE ledger_schema SET version = 99")
    with pytest.raises(LedgerError, match="newer version"):
        Ledger(tmp_path / "b", url)
    with pytest.raises(LedgerAwayError) as away:
        read_usage(re.sub(r":\d+/", ":1/", url), ("tenant",))

    assert "secret-word" not in str(away.value)


async def test_a_full_spool_refuses_new_requests_instead_of_forgetting_them(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "postgresql://nobody@127.0.0.1:1/none", spool_bytes=2_000)
    async with OpenAIReplica("r").serve() as replica, open_door(entry(replica), ledger=ledger) as door:
        answers = [await door.read(HELLO) for _ in range(10)]
        page = door.server.app.metrics.page().decode()
    ledger.close()
    statuses = [status for status, _, _ in answers]

    assert statuses[0] == 200
    assert statuses[-1] == 503
    assert json.loads(answers[-1][1])["error"]["code"] == "ledger_full"
    assert spooled(tmp_path, "ended") == statuses.count(200)
    assert "octavo_gateway_ledger_spool_bytes" in page


def test_the_command_reads_it(url: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, url)
    ledger.write(begun(1))
    ledger.write(ended(1))
    ledger.close()
    command = [
        sys.executable,
        "-c",
        "from octavo_cli.main import main; main()",
        "usage",
        "--by",
        "tenant,day",
        "--json",
    ]
    environment = os.environ | {"OCTAVO_GATEWAY_LEDGER_URL": url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)

    assert json.loads(done.stdout)[0] | {"cost": 0} == {
        "tenant": "t",
        "day": "2026-11-21",
        "requests": 1,
        "prompt_tokens": 10,
        "cached_tokens": 2,
        "output_tokens": 10,
        "estimated_requests": 0,
        "cost": 0,
    }


WRITER = """
import sys
from pathlib import Path
from fakes.usage_lines import begun, ended
from octavo_gateway.usage import Ledger
ledger = Ledger(Path(sys.argv[1]), sys.argv[2])
start = int(sys.argv[3])
for number in range(start, start + 1_000_000):
    ledger.write(begun(number))
    ledger.write(ended(number))
    print(number, flush=True)
"""


def test_a_killed_gateway_loses_nothing_it_had_told(url: str, tmp_path: Path) -> None:
    told: set[int] = set()
    rng = random.Random(5)
    for generation in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), url, str(generation * 1_000_000)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert process.stdout is not None
        wanted = rng.randrange(500, 3_000)
        for line in process.stdout:
            told.add(int(line))
            wanted -= 1
            if wanted == 0:
                process.kill()
        process.wait()
    Ledger(tmp_path, url).close()
    found = by_outcome(url)

    assert len(told) <= found["ok"] <= len(told) + 3
    assert found.get("interrupted", 0) <= 3
