"""What the HTTP face costs: tokens a second through a real socket with an engine that costs nothing.

    python benchmarks/server_overhead.py [--streams 1 32 256] [--tokens 400] [--json results/x.json]

The server runs in a process of its own; the client counts events and does not parse them. One token is one event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import aiohttp
import uvloop

Row = dict[str, float]
TESTS = Path(__file__).parents[1] / "tests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    process = start_server()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows = runner.run(measure(process, arguments.streams, arguments.tokens, arguments.rounds))
    finally:
        process.kill()
    print(f"{'streams':>8} {'tokens/s':>10} {'us/token':>9} {'server CPU us/token':>20}")
    for row in rows:
        print(
            f"{row['streams']:>8} {row['tokens_per_s']:>10.0f} {row['us_per_token']:>9.1f} "
            f"{row['server_cpu_us_per_token']:>20.1f}"
        )
    if arguments.json is not None:
        report = {**setting(), "tokens_per_stream": arguments.tokens, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def setting() -> dict[str, object]:
    """Where and with what this was measured; a busy machine shows in the load."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "octavo": version("octavo"),
    }


def start_server() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fakes.fake_replica", "{}", json.dumps({"port": 0, "log_level": "info"})]
    return subprocess.Popen(command, cwd=TESTS, stderr=subprocess.PIPE, text=True)


async def measure(process: subprocess.Popen[str], streams: list[int], tokens: int, rounds: int) -> list[Row]:
    url = listening_url(process)
    threading.Thread(target=process.stderr.read, daemon=True).start()  # type: ignore[union-attr]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await wait_until_ready(session, url)
        await run_streams(session, url, 4, 50)
        return [await best_of(session, url, process.pid, count, tokens, rounds) for count in streams]


async def wait_until_ready(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        async with session.get(f"{url}/health/ready") as response:
            if response.status == 200:
                return
        await asyncio.sleep(0.05)


def listening_url(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"listening on (http://\S+)", line)
        if found:
            return found[1]
    raise SystemExit("the server did not start")


async def best_of(session: aiohttp.ClientSession, url: str, pid: int, streams: int, tokens: int, rounds: int) -> Row:
    """The fastest of several rounds: the others met noise."""
    results = []
    for _ in range(rounds):
        cpu_before, started = cpu_seconds(pid), time.perf_counter()
        total = await run_streams(session, url, streams, tokens)
        elapsed = time.perf_counter() - started
        results.append(
            {
                "streams": streams,
                "tokens_per_s": total / elapsed,
                "us_per_token": elapsed / total * 1e6,
                "server_cpu_us_per_token": (cpu_seconds(pid) - cpu_before) / total * 1e6,
            }
        )
    return max(results, key=lambda row: row["tokens_per_s"])


async def run_streams(session: aiohttp.ClientSession, url: str, streams: int, tokens: int) -> int:
    return sum(await asyncio.gather(*(run_stream(session, url, tokens) for _ in range(streams))))


async def run_stream(session: aiohttp.ClientSession, url: str, tokens: int) -> int:
    """Number of events with text."""
    body = {
        "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": tokens, "ignore_eos": True,
    }  # fmt: skip
    count = 0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for chunk in response.content.iter_any():
            count += chunk.count(b"data: ")
    return count - 2  # the role's event and [DONE]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    main()
