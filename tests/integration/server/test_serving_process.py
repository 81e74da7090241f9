"""A replica as a process: start, signals, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

TESTS = Path(__file__).parents[2]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
Start = Callable[..., Any]


class ReplicaProcess:
    """The process, its address and what it wrote to stderr."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            line = raw.decode()
            self.lines.append(line)
            found = re.search(r"listening on (http://\S+)", line)
            if found and not self._listening.done():
                self._listening.set_result(found[1])

    async def url(self) -> str:
        return await asyncio.wait_for(asyncio.shield(self._listening), 20)

    async def exit_code(self) -> int:
        code = await asyncio.wait_for(self.process.wait(), 20)
        await self._reading
        return code


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    processes: list[asyncio.subprocess.Process] = []

    async def start_one(engine: dict[str, Any] | None = None, **settings: Any) -> ReplicaProcess:
        arguments = [json.dumps(engine or {}), json.dumps({"port": 0, "drain_propagation": 0.2, **settings})]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fakes.fake_replica", *arguments, cwd=TESTS, stderr=asyncio.subprocess.PIPE
        )
        processes.append(process)
        return ReplicaProcess(process)

    yield start_one
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(20):
        while True:
            async with http.get(f"{url}/health/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.02)


async def test_it_listens_before_the_model_is_loaded(start: Start, http: aiohttp.ClientSession) -> None:
    replica = await start({"load_s": 60})
    url = await replica.url()

    async with http.get(f"{url}/health/live") as live, http.get(f"{url}/health/ready") as readiness:
        assert live.status == 200
        assert readiness.status == 503
        assert (await readiness.json())["progress"]["phase"] == "weights"

    replica.process.send_signal(signal.SIGTERM)
    assert await replica.exit_code() == 0


async def test_a_model_that_cannot_be_loaded_ends_it_with_one_clear_line(start: Start) -> None:
    replica = await start({"load_error": "model: no file at /models/x;\nname an existing one"}, log_level="error")

    assert await replica.exit_code() == 1
    assert replica.lines == ["octavo serve: model: no file at /models/x; name an existing one\n"]


async def test_a_port_in_use_ends_it_with_one_clear_line(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        replica = await start(port=taken.getsockname()[1], log_level="error")

        assert await replica.exit_code() == 1
    assert len(replica.lines) == 1
    assert "--port" in replica.lines[0]


async def test_sigterm_finishes_running_streams_then_exits_zero(start: Start, http: aiohttp.ClientSession) -> None:
    replica = await start({"step_s": 0.03})
    url = await replica.url()
    await ready(http, url)

    async with http.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        await response.content.readany()
        replica.process.send_signal(signal.SIGTERM)
        rest = await response.text()

    assert rest.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"stop"' in rest
    assert await replica.exit_code() == 0


async def test_what_outlasts_the_drain_is_ended_with_an_error_event(start: Start, http: aiohttp.ClientSession) -> None:
    replica = await start({"step_s": 0.05}, drain_timeout=0.3)
    url = await replica.url()
    await ready(http, url)

    body = {**CHAT, "stream": True, "ignore_eos": True, "max_tokens": 2_000}
    async with http.post(f"{url}/v1/chat/completions", json=body) as response:
        await response.content.readany()
        replica.process.send_signal(signal.SIGTERM)
        events = (await response.text()).strip().split("\n\n")

    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == 503
    assert events[-1] == "data: [DONE]"
    assert await replica.exit_code() == 0


async def test_a_second_signal_leaves_at_once(start: Start, http: aiohttp.ClientSession) -> None:
    replica = await start({"step_s": 0.05}, drain_propagation=60, drain_timeout=60)
    url = await replica.url()
    await ready(http, url)

    replica.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    replica.process.send_signal(signal.SIGTERM)

    assert await replica.exit_code() == 128 + signal.SIGTERM


async def octavo(*arguments: str, **environment: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "octavo_cli.main", *arguments, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT, env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment},
    )  # fmt: skip
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--port", "99999"], "--port"),
        (["--port", "http"], "--port"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--kv-cache-memory-fraction", "1.5"], "--kv-cache-memory-fraction"),
        (["--dtype", "int3"], "--dtype"),
        (["--drain-timeout", "-1"], "--drain-timeout"),
        (["--chat-template", "/nowhere.jinja"], "--chat-template"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--model", "other"], "model"),
    ],
    ids=lambda value: str(value),
)
async def test_bad_values_exit_2_and_name_the_flag(flags: list[str], named: str) -> None:
    code, output = await octavo("serve", "model", *flags)

    assert code == 2
    assert named in output


async def test_without_a_model_it_says_how_to_name_one() -> None:
    code, output = await octavo("serve")

    assert code == 2
    assert "octavo serve pypi://" in output


async def test_a_model_that_does_not_exist_exits_1(tmp_path: Path) -> None:
    code, output = await octavo("serve", str(tmp_path / "nothing.gguf"), "--port", "0", "--log-level", "error")

    assert code == 1
    assert output.strip().splitlines()[-1].startswith("octavo serve: ")
    assert "nothing.gguf" in output
    assert "Traceback" not in output
