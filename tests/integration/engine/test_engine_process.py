"""The engine in a real child process: start-up, streaming, cancellation, bounds, death and hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio

from fake_runner import CRASH, EXIT, HANG, SLOW, greedy, load_fake
from octavo_engine.config import EngineConfig
from octavo_engine.errors import (
    ConfigError,
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    ModelLoadError,
    QueueFullError,
)
from octavo_engine.messages import FinishReason
from octavo_engine.process import EngineProcessClient
from octavo_engine.sampling_params import SamplingParams


def config(**settings: object) -> EngineConfig:
    defaults = {"model": "fake", "block_size": 4, "num_kv_blocks": 64, "max_num_seqs": 8, "num_threads": 1}
    return EngineConfig(**{**defaults, **settings})


@asynccontextmanager
async def running(**settings: object) -> AsyncIterator[EngineProcessClient]:
    client = EngineProcessClient(config(**settings), load_fake)
    await client.start()
    try:
        yield client
    finally:
        await client.shutdown(timeout_s=5.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[EngineProcessClient]:
    """One engine for the tests that leave it as they found it."""
    async with running(step_timeout_s=2.0) as shared:
        yield shared


async def collect(client: EngineProcessClient, name: str, prompt: list[int], max_tokens: int = 8) -> list[int]:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    tokens: list[int] = []
    async for output in client.generate(request_id=name, prompt_token_ids=prompt, sampling=sampling):
        tokens.extend(output.token_ids)
    return tokens


async def until(condition: object, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.02)


def fail_to_load(_config: object, _on_progress: object) -> None:
    raise ModelLoadError("weights: file model.safetensors ends early; download it again")


def refuse_config(_config: object, _on_progress: object) -> None:
    raise ConfigError("dtype: this device has no float16")


def break_while_loading(_config: object, _on_progress: object) -> None:
    os._exit(3)


@pytest.mark.asyncio(loop_scope="module")
async def test_concurrent_requests_stream_what_each_gets_alone(client: EngineProcessClient) -> None:
    prompts = {f"r{i}": [i + 1, 2, 3] for i in range(20)}
    results = await asyncio.gather(*(collect(client, name, prompt) for name, prompt in prompts.items()))
    assert results == [greedy(prompt, 8) for prompt in prompts.values()]
    assert client.model.name == "fake"
    assert client.progress is None
    client.check_health()
    await until(lambda: client.stats.kv_blocks_used == 0)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_slow_reader_gets_everything_in_fewer_messages(client: EngineProcessClient) -> None:
    sampling = SamplingParams(max_tokens=50, temperature=0.0)
    stream = client.generate(request_id="a", prompt_token_ids=[1, 2], sampling=sampling)
    first = await anext(stream)
    await until(lambda: client.stats.num_running == 0)
    rest = [output async for output in stream]
    assert len(rest) == 1
    assert first.token_ids + rest[0].token_ids == greedy([1, 2], 50)
    assert rest[0].finish_reason is FinishReason.LENGTH


@pytest.mark.asyncio(loop_scope="module")
async def test_closing_a_stream_frees_its_blocks(client: EngineProcessClient) -> None:
    sampling = SamplingParams(max_tokens=240, temperature=0.0)
    stream = client.generate(request_id="a", prompt_token_ids=[SLOW, 2], sampling=sampling)
    await anext(stream)
    await stream.aclose()
    await until(lambda: client.stats.num_running == 0 and client.stats.kv_blocks_used == 0)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_snapshot_tells_where_each_sequence_stands(client: EngineProcessClient) -> None:
    sampling = SamplingParams(max_tokens=240, temperature=0.0)
    stream = client.generate(request_id="a", prompt_token_ids=[SLOW, 2], sampling=sampling, tenant="t", priority=3)
    await anext(stream)
    (taken,) = await client.snapshot(request_id="snapshot")
    await stream.aclose()

    (seq,) = taken.sequences
    assert (seq.request_id, seq.tenant, seq.state, seq.priority) == ("a", "t", "running", 3)
    assert seq.num_prompt == 2
    assert seq.num_output >= 1
    assert (taken.num_running, taken.num_waiting, taken.num_left_out) == (1, 0, 0)
    assert taken.kv_blocks_free == taken.kv_blocks_total - seq.num_blocks
    assert taken.virtual_tokens["t"] > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_cancelling_the_consumer_frees_its_blocks(client: EngineProcessClient) -> None:
    task = asyncio.create_task(collect(client, "a", [1, 2], max_tokens=250))
    await until(lambda: client.stats.generation_tokens > 0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: client.stats.num_running == 0 and client.stats.kv_blocks_used == 0)


@pytest.mark.asyncio(loop_scope="module")
async def test_embeddings_come_back_as_vectors(client: EngineProcessClient) -> None:
    output = await client.embed(request_id="e", prompt_token_ids=[1, 2])
    assert output.embedding == [3.0, 2.0, 0.0, 1.0]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_thousand_random_cancels_leave_nothing_behind(client: EngineProcessClient) -> None:
    rng = Random(0)

    async def one(number: int) -> None:
        prompt = [1, 2, 3, 4, 5, 6, 7, number % 80]
        sampling = SamplingParams(max_tokens=rng.randint(1, 12), temperature=0.0)
        leave_after = rng.choice([0, 1, 3, 100])
        tokens: list[int] = []
        stream = client.generate(request_id=f"cancel{number}", prompt_token_ids=prompt, sampling=sampling)
        try:
            async with asyncio.timeout(rng.choice([0.001, 0.05, 60.0])):
                async for output in stream:
                    tokens.extend(output.token_ids)
                    if len(tokens) > leave_after:
                        break
        except TimeoutError:
            pass
        finally:
            await stream.aclose()
        assert tokens == greedy(prompt, sampling.max_tokens)[: len(tokens)]

    for start in range(0, 1_000, 50):
        await asyncio.gather(*(one(number) for number in range(start, start + 50)))
    await until(lambda: client.stats.num_running == 0 and client.stats.num_waiting == 0)
    assert client.stats.kv_blocks_used == 0
    client.check_health()


async def test_a_full_queue_refuses_and_names_a_time() -> None:
    async with running(max_num_seqs=1, max_num_batched_tokens=8, max_queued_requests=2) as client:
        tasks = [asyncio.create_task(collect(client, f"r{i}", [SLOW, i + 1], 20)) for i in range(8)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFullError)]
        served = [result for result in results if isinstance(result, list)]
        assert len(refused) + len(served) == 8
        assert len(refused) >= 4
        assert all(error.retry_after_s >= 1.0 for error in refused)
        client.check_health()


async def test_what_the_queue_cannot_hold_is_refused_while_the_engine_is_in_a_step() -> None:
    async with running(max_num_seqs=1, max_queued_requests=2) as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)  # a step that takes as long as this test wants
        try:
            tasks = [asyncio.create_task(collect(client, f"r{i}", [i + 1])) for i in range(5)]
            done, waiting = await asyncio.wait(tasks, timeout=2.0)
            assert [type(task.exception()) for task in done] == [QueueFullError] * 2
            with pytest.raises(QueueFullError):
                client.check_room()
        finally:
            os.kill(client.pid, signal.SIGCONT)
        assert len(await asyncio.gather(*waiting)) == 3  # two of the queue, one of the batch
        await until(lambda: not client.stats.num_running)
        client.check_room()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_the_engine_refuses_raises_and_names_the_field(client: EngineProcessClient) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await collect(client, "a", [5_000])
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match="at most 255 fit"):
        await collect(client, "b", [1] * 300)
    with pytest.raises(InvalidRequestError, match="between 0 and 96"):
        await collect(client, "c", [2**70])
    with pytest.raises(InvalidRequestError, match="cannot be sent"):
        await collect(client, "\ud800", [1])
    sampling = SamplingParams(temperature=float("nan"))
    with pytest.raises(InvalidRequestError, match="temperature"):
        await anext(client.generate(request_id="d", prompt_token_ids=[1], sampling=sampling))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_that_crashes_the_model_ends_alone(client: EngineProcessClient) -> None:
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    good = asyncio.create_task(collect(client, "good", [1, 2], 100))
    outputs = [
        output async for output in client.generate(request_id="bad", prompt_token_ids=[CRASH], sampling=sampling)
    ]
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert await good == greedy([1, 2], 100)
    client.check_health()


async def test_a_killed_engine_ends_every_request_within_seconds() -> None:
    async with running() as client:
        tasks = [asyncio.create_task(collect(client, f"r{i}", [i + 1], 250)) for i in range(4)]
        await until(lambda: client.stats.generation_tokens > 0)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        async with asyncio.timeout(5.0):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            client.check_health()
        with pytest.raises(EngineDeadError):
            await collect(client, "late", [1])


async def test_what_is_asked_of_an_engine_killed_a_moment_ago_ends_with_the_cause() -> None:
    async with running() as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        time.sleep(0.5)  # noqa: ASYNC251  (the socket has lost its peer, and this loop has not heard of the end)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await collect(client, "a", [1, 2])


async def test_an_engine_that_exits_is_reported_with_its_code() -> None:
    async with running() as client:
        with pytest.raises(EngineDeadError, match="exit code 7"):
            await collect(client, "a", [EXIT])


async def test_a_hung_step_is_seen_and_the_process_ended() -> None:
    async with running(step_timeout_s=1.0) as client:
        pid = client.pid
        assert pid is not None
        with pytest.raises(EngineDeadError, match="no progress"):
            await collect(client, "a", [HANG])
        with pytest.raises(EngineDeadError, match="no progress"):
            client.check_health()
        await until(lambda: not _alive(pid))


async def test_a_stopped_idle_engine_is_unhealthy() -> None:
    async with running(step_timeout_s=2.0) as client:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await until(lambda: not _healthy(client))


@pytest.mark.asyncio(loop_scope="module")
async def test_an_idle_engine_stays_healthy_and_keeps_reporting(client: EngineProcessClient) -> None:
    before = client.stats.time
    await asyncio.sleep(3.5)
    client.check_health()
    assert client.stats.time > before


@pytest.mark.parametrize(
    ("load", "error", "match"),
    [
        (fail_to_load, ModelLoadError, "ends early"),
        (refuse_config, ConfigError, "float16"),
        (break_while_loading, EngineDeadError, "exit code 3"),
    ],
)
async def test_a_failing_start_says_why(load: object, error: type[Exception], match: str) -> None:
    client = EngineProcessClient(config(), load)  # type: ignore[arg-type]
    with pytest.raises(error, match=match):
        await client.start()
    with pytest.raises(EngineDeadError):
        _ = client.model


async def test_shutdown_ends_the_process_and_removes_its_sockets() -> None:
    client = EngineProcessClient(config(), load_fake)
    await client.start()
    directory = client.socket_directory
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    pid = client.pid
    assert pid is not None
    await client.shutdown(timeout_s=5.0)
    assert not _alive(pid)
    assert not _exists(directory)
    with pytest.raises(EngineDrainingError):
        await collect(client, "a", [1])


async def test_shutdown_kills_an_engine_that_does_not_answer() -> None:
    client = EngineProcessClient(config(), load_fake)
    await client.start()
    hung = asyncio.create_task(collect(client, "a", [HANG]))
    await asyncio.sleep(0.3)
    await client.shutdown(timeout_s=0.5)
    assert client.pid is not None
    assert not _alive(client.pid)
    with pytest.raises(EngineDeadError):
        await hung


@pytest.mark.asyncio(loop_scope="module")
async def test_interrupting_the_process_group_leaves_the_engine_to_its_parent(client: EngineProcessClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGINT)
    os.kill(client.pid, signal.SIGTERM)
    assert await collect(client, "a", [1, 2]) == greedy([1, 2], 8)


@pytest.mark.parametrize("ending", ["killed", "returns", "raises"])
def test_the_engine_dies_with_its_parent(ending: str) -> None:
    script = textwrap.dedent(
        """
        import asyncio, sys, time
        from fake_runner import load_fake
        from octavo_engine.config import EngineConfig
        from octavo_engine.process import EngineProcessClient

        async def main():
            client = EngineProcessClient(EngineConfig(model="fake", block_size=4, num_kv_blocks=8), load_fake)
            await client.start()
            print(client.pid, flush=True)
            if sys.argv[1] == "raises":
                raise RuntimeError("a bug in the server")
            if sys.argv[1] == "killed":
                await asyncio.sleep(600)

        if __name__ == "__main__":
            asyncio.run(main())
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, ending]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    try:
        assert parent.stdout is not None
        engine_pid = int(parent.stdout.readline())
        if ending == "killed":
            assert _alive(engine_pid)
            parent.kill()
        parent.wait(timeout=20)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5.0
    while _alive(engine_pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(engine_pid)


def _healthy(client: EngineProcessClient) -> bool:
    try:
        client.check_health()
    except EngineDeadError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _exists(path: str) -> bool:
    return Path(path).exists()
