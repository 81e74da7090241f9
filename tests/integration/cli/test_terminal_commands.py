"""`octavo chat` and `octavo bench` against a server on a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from fakes.fake_engine import FakeEngine
from fakes.running_server import RunningServer, running_server


@pytest.fixture
async def server() -> AsyncIterator[RunningServer]:
    async with running_server(FakeEngine(reply=lambda prompt: f"You said {prompt}")) as running:
        yield running


async def octavo(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "octavo_cli.main", *arguments, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_chat_answers_one_question(server: RunningServer) -> None:
    code, out, err = await octavo("chat", "--url", server.url, "-s", "Be brief", "Hello", "there")

    assert (code, err) == (0, "")
    assert out == "You said <system>Be brief<user>Hello there<assistant>\n"


async def test_chat_takes_a_question_from_a_pipe(server: RunningServer) -> None:
    code, out, _ = await octavo("chat", "--url", f"{server.url}/v1", "-m", "alias", stdin="piped")

    assert code == 0
    assert "<user>piped" in out


async def test_chat_says_what_went_wrong(server: RunningServer) -> None:
    unknown = await octavo("chat", "--url", server.url, "-m", "other", "Hi")
    unreachable = await octavo("chat", "--url", "http://127.0.0.1:9", "Hi")

    assert unknown[0] == unreachable[0] == 1
    assert "other" in unknown[2]
    assert "cannot reach http://127.0.0.1:9" in unreachable[2]


async def test_bench_reports_in_the_fields_of_vllm_bench_serve(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    code, out, _ = await octavo(
        "bench", "--url", server.url, "-n", "12", "--input-len", "20", "--output-len", "7", "--request-rate", "200",
        "--goodput", "ttft:60000", "-o", "json", "--result", str(path),
    )  # fmt: skip

    report = json.loads(out)
    assert code == 0
    assert report == json.loads(path.read_text())
    assert report["completed"] == 12
    assert report["total_output_tokens"] == 84
    assert report["good_request_fraction"] == 1.0
    assert {"request_throughput", "mean_ttft_ms", "p99_tpot_ms", "median_itl_ms", "p90_e2el_ms"} <= report.keys()


async def test_bench_refuses_impossible_flags() -> None:
    for flags in (["--goodput", "speed:1"], ["--request-rate", "0"], ["--percentiles", "101"], ["--prefix-len", "999"]):
        code, _, err = await octavo("bench", *flags)
        assert code == 2
        assert flags[0] in err


async def test_batch_runs_every_request_and_resumes(server: RunningServer, tmp_path: Path) -> None:
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    bodies = [chat] * 5 + [{**chat, "temperature": 9}]
    source.write_text(
        "".join(
            json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}) + "\n"
            for i, body in enumerate(bodies)
        )
    )

    first, _, err = await octavo("batch", str(source), str(sink), "-c", "1", "--url", server.url)
    lines = sink.read_text().splitlines()
    sink.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    second, _, resumed = await octavo("batch", str(source), str(sink), "-c", "1", "--url", server.url)
    results = {result["custom_id"]: result for result in map(json.loads, sink.read_text().splitlines())}

    assert first == second == 1
    assert "5 succeeded, 1 failed" in err
    assert "3 already done" in resumed
    assert sorted(results) == [f"r{i}" for i in range(6)]
    assert "temperature" in results["r5"]["error"]["message"]
    assert results["r5"]["response"]["status_code"] == 400
    assert results["r0"]["response"]["body"]["choices"][0]["message"]["content"].startswith("You said")


async def test_a_conversation_keeps_its_turns_and_survives_ctrl_c() -> None:
    slow = FakeEngine(reply=lambda prompt: f"[{prompt.count('<user>')}] " + "x" * 400, step_s=0.01)
    async with running_server(slow) as server:
        terminal, own = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "octavo_cli.main", "chat", "--url", server.url, "--max-tokens", "100",
            stdin=own, stdout=own, stderr=own, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
        )  # fmt: skip
        os.close(own)
        screen = ""

        async def until(text: str) -> None:
            nonlocal screen
            async with asyncio.timeout(30):
                while text not in screen:
                    screen += (await asyncio.to_thread(os.read, terminal, 4_096)).decode()
            screen = screen.split(text, 1)[1]

        try:
            await until("> ")
            os.write(terminal, b"first\n")
            await until("[1] xxx")
            await until("> ")
            os.write(terminal, b"second\n")
            await until("[2] ")
            process.send_signal(signal.SIGINT)
            await until("> ")
            process.send_signal(signal.SIGINT)
            await until("Ctrl-D leaves")
            os.write(terminal, b"/exit\n")
            assert await asyncio.wait_for(process.wait(), 10) == 0
        finally:  # a reader that still waits for the screen would keep the loop from ending
            if process.returncode is None:
                process.kill()
                await process.wait()
            os.close(terminal)
