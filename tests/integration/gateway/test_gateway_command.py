"""`octavo gateway` as a user runs it: a process with a file, a port and signals."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from fakes.gateway_door import HELLO
from fakes.openai_replica import OpenAIReplica

COMMAND = [sys.executable, "-c", "from octavo_cli.main import main; main()", "gateway"]


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *COMMAND, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )


async def address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while line := (await process.stderr.readline()).decode():
            if "listens at http" in line and "{" not in line:
                return line.split()[-1]
    raise AssertionError("the gateway never said where it listens")


async def test_it_serves_a_file_and_finishes_a_stream_on_sigterm(tmp_path: Path) -> None:
    async with OpenAIReplica("r", tokens=20, token_delay=0.05).serve() as replica:
        path = tmp_path / "gateway.yaml"
        path.write_text(f'models: [{{name: m, endpoints: [{{url: "{replica.url}"}}]}}]')
        process = await start("--config", str(path), "--port", "0")
        url = await address(process)
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{url}/v1/chat/completions", json=HELLO | {"stream": True}) as response,
        ):
            await response.content.readuntil(b"data: ")
            process.send_signal(signal.SIGTERM)
            text = await response.text()
        _, stderr = await asyncio.wait_for(process.communicate(), 30)

    assert text.endswith("data: [DONE]\n\n")
    assert process.returncode == 0, stderr.decode()
    assert "finishing 1 requests" in stderr.decode()


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("models: [{name: a}]", [], ["octavo gateway:", "gateway.yaml", "endpoints"]),
        ("{models: [], settings: {prot: 1}}", [], ["prot", "did you mean port?"]),
        ("models: []", ["--idle-timeout", "0"], ["idle_timeout", "above 0"]),
    ],
)
async def test_a_wrong_setting_ends_with_exit_code_2_and_a_message(
    tmp_path: Path, content: str, flags: list[str], words: list[str]
) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(content)
    process = await start("--config", str(path), *flags)
    _, stderr = await asyncio.wait_for(process.communicate(), 30)

    assert process.returncode == 2
    for word in words:
        assert word in stderr.decode()
    assert "Traceback" not in stderr.decode()
