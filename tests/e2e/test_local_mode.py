"""`octavo up` as a user runs it: the real model, replicas as processes, the gateway, the official OpenAI client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil
import pytest

MANIFEST = """
apiVersion: serving.octavo.dev/v1alpha1
kind: InferenceService
metadata: {{name: tiny}}
spec:
  model: {{storageUri: "file://{model}", maxModelLen: 2048, dtype: Float32}}
  resources: {{limits: {{cpu: "1", memory: 2Gi}}}}
  engine: {{maxNumSeqs: {seqs}, kvCacheMemory: 256Mi}}
  drain: {{propagationSeconds: 5, timeoutSeconds: 60}}
  {scaling}
"""
PROMPT = [{"role": "user", "content": "Tell me a story about a lighthouse keeper and a whale."}]
START_TIMEOUT_S = 180.0
EXAMPLE = Path(__file__).parents[2] / "examples" / "smollm2.yaml"


@dataclass
class Up:
    """A running `octavo up`, its printed lines, and a client of its address."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    grew: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            async with self.grew:
                self.lines.append(line.decode().rstrip())
                self.grew.notify_all()

    async def line(self, pattern: str, after: int = 0, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """The first line from number `after` on that matches; fails with all output when none comes."""

        def found() -> re.Match[str] | None:
            return next((m for line in self.lines[after:] if (m := re.search(pattern, line))), None)

        try:
            async with asyncio.timeout(timeout_s), self.grew:
                await self.grew.wait_for(found)
        except TimeoutError:
            pytest.fail(f"no line matches {pattern!r}:\n" + "\n".join(self.lines))
        match = found()
        assert match is not None
        return match

    async def client(self) -> openai.AsyncOpenAI:
        address = (await self.line(r"OpenAI API\s+(http\S+)"))[1]
        return openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=240.0)

    def replicas(self) -> list[psutil.Process]:
        """The replica processes (not their engine processes)."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "serve" in child.cmdline()]


@contextlib.asynccontextmanager
async def octavo_up(manifest: Path, *flags: str) -> AsyncIterator[Up]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "octavo_cli.main", "up", "-f", str(manifest), "--port", "0", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "XDG_STATE_HOME": str(manifest.parent), "COLUMNS": "200"},
    )
    up = Up(process)
    reading = asyncio.create_task(up.read())
    try:
        yield up
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 60)
            except TimeoutError:
                process.kill()
        await reading


def write_manifest(folder: Path, model: Path, *, scaling: str, seqs: int = 32) -> Path:
    path = folder / "service.yaml"
    path.write_text(MANIFEST.format(model=model, scaling=scaling, seqs=seqs))
    return path


async def stream(client: openai.AsyncOpenAI, max_tokens: int) -> str:
    chunks = await client.chat.completions.create(
        model="tiny",
        messages=PROMPT,
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])


@pytest.mark.usefixtures("smollm2_gguf")
async def test_the_demo_answers_its_question_and_ends(tmp_path: Path) -> None:
    manifest = tmp_path / "smollm2.yaml"
    manifest.write_bytes(EXAMPLE.read_bytes())
    async with octavo_up(manifest, "--ask", "What is the capital of France?", "--once") as up:
        assert await asyncio.wait_for(up.process.wait(), START_TIMEOUT_S) == 0
    assert "Paris" in "\n".join(up.lines)


async def test_32_concurrent_streams_equal_a_lone_run(tmp_path: Path, smollm2_gguf: Path) -> None:
    manifest = write_manifest(tmp_path, smollm2_gguf, scaling="replicas: 1")
    async with octavo_up(manifest) as up, await up.client() as client:
        lone = await stream(client, 32)
        together = await asyncio.gather(*(stream(client, 32) for _ in range(32)))
    assert len(lone) > 100
    assert set(together) == {lone}


async def test_a_killed_replica_costs_nobody_else_a_request_and_returns(tmp_path: Path, smollm2_gguf: Path) -> None:
    manifest = write_manifest(tmp_path, smollm2_gguf, scaling="replicas: 2")
    async with octavo_up(manifest) as up, await up.client() as client:
        await up.line("replica 0: Ready")
        await up.line("replica 1: Ready")
        lone = await stream(client, 64)
        streams = [asyncio.create_task(stream(client, 64)) for _ in range(8)]
        await asyncio.sleep(0.5)
        seen = len(up.lines)
        victim = up.replicas()[0]
        victim.kill()
        ended = await asyncio.gather(*streams, return_exceptions=True)
        complete = [text for text in ended if isinstance(text, str)]
        failed = [error for error in ended if isinstance(error, BaseException)]
        assert set(complete) <= {lone}
        assert complete, failed
        assert all(isinstance(error, openai.APIError) for error in failed), failed
        killed = (await up.line(r"replica (\d): BackOff", after=seen))[1]
        await up.line(f"replica {killed}: Ready", after=seen)
        assert await stream(client, 64) == lone


async def test_a_queue_brings_a_second_replica(tmp_path: Path, smollm2_gguf: Path) -> None:
    metrics = "[{type: QueueDepth, target: '1'}, {type: Concurrency, target: '1'}]"
    scaling = f"autoscaling: {{minReplicas: 1, maxReplicas: 2, metrics: {metrics}}}"
    manifest = write_manifest(tmp_path, smollm2_gguf, scaling=scaling, seqs=1)
    async with octavo_up(manifest) as up, await up.client() as client:
        streams = [asyncio.create_task(stream(client, 200)) for _ in range(10)]
        await up.line("1 -> 2 replicas", timeout_s=60)
        await up.line("replica 1: Ready")
        assert len(set(await asyncio.gather(*streams))) == 1


async def test_sigterm_finishes_what_runs_and_leaves_no_process(tmp_path: Path, smollm2_gguf: Path) -> None:
    manifest = write_manifest(tmp_path, smollm2_gguf, scaling="replicas: 1")
    async with octavo_up(manifest) as up, await up.client() as client:
        children = psutil.Process(up.process.pid).children(recursive=True)
        running = asyncio.create_task(stream(client, 64))
        await asyncio.sleep(0.5)
        up.process.send_signal(signal.SIGTERM)
        assert len(await running) > 100
        assert await asyncio.wait_for(up.process.wait(), 30) == 0
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []


async def test_bad_manifests_name_every_field_and_exit_2(tmp_path: Path) -> None:
    manifest = tmp_path / "bad.yaml"
    manifest.write_text(
        "apiVersion: serving.octavo.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: a}\n"
        "spec: {model: {storageUri: 'file:///x', maxModelLn: 3, quantization: {weights: Int3}}}\n"
    )
    async with octavo_up(manifest) as up:
        assert await asyncio.wait_for(up.process.wait(), 60) == 2
    output = "\n".join(up.lines)
    assert "spec.model.maxModelLn" in output
    assert "did you mean maxModelLen" in output
    assert "spec.model.quantization.weights" in output
    assert "Int8" in output
