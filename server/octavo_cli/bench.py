"""`octavo bench`: load any OpenAI-compatible endpoint and report latencies, throughput and goodput."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from octavo_cli.load_report import GOODPUT_METRICS, METRICS, Sample, summarize
from octavo_cli.openai_client import EndpointError, list_models, open_session, stream_events

# Common words that are one token each in most vocabularies, so that a prompt's length is about its number of words.
_TEXT = (
    "the of and to in is was for that on with as are at be this have from or had by not but what all were when we"
    " there can an your which their said if do will each about how up out them then she many some so these would"
    " other into has more her two like him see time could no make than first been its who now people my made over"
    " did down only way find use may water long little very after words called just where most know"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Load:
    """What to send and how fast."""

    model: str
    num_prompts: int
    input_len: int
    output_len: int
    prefix_len: int
    request_rate: float  # requests a second; infinite sends all at once
    burstiness: float
    max_concurrency: int | None
    seed: int
    ignore_eos: bool
    chat: bool
    temperature: float


def bench(
    url: Annotated[
        str, typer.Option("--url", envvar="OCTAVO_URL", help="Address of a replica or the gateway.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option("--model", "-m", help="The endpoint's first one if left out.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OCTAVO_API_KEY", help="Sent as a bearer token.")
    ] = None,
    endpoint: Annotated[str, typer.Option("--endpoint", help="chat or completions.")] = "chat",
    num_prompts: Annotated[int, typer.Option("--num-prompts", "-n", min=1, help="Requests in all.")] = 100,
    input_len: Annotated[int, typer.Option("--input-len", min=1, help="Words per prompt, about one token each.")] = 128,
    output_len: Annotated[int, typer.Option("--output-len", min=1, help="Tokens per answer.")] = 64,
    prefix_len: Annotated[
        int, typer.Option("--prefix-len", min=0, help="Words of the prompt that all requests share.")
    ] = 0,
    request_rate: Annotated[
        float, typer.Option("--request-rate", help="Arrivals a second, whatever the server does; inf: all at once.")
    ] = float("inf"),
    burstiness: Annotated[
        float, typer.Option("--burstiness", min=0.01, help="1: Poisson; below: burstier; above: more even.")
    ] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option("--max-concurrency", "-c", min=1, help="Most requests at a time.")
    ] = None,
    num_warmups: Annotated[int, typer.Option("--num-warmups", min=0, help="Requests sent before, not counted.")] = 1,
    goodput: Annotated[
        list[str] | None,
        typer.Option("--goodput", help="Limit in ms that a good request keeps, as ttft:200; repeatable."),
    ] = None,
    percentiles: Annotated[str, typer.Option("--percentiles", help="Comma-separated.")] = "50,90,99",
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--no-ignore-eos", help="Always generate --output-len tokens.")
    ] = True,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2)] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and arrivals.")] = 0,
    output: Annotated[str, typer.Option("--output", "-o", help="text or json.")] = "text",
    result: Annotated[Path | None, typer.Option("--result", help="Write the report as JSON to this file too.")] = None,
) -> None:
    """Load an endpoint and report time to first token, time per token, latency, throughput and goodput.

    Arrivals are open-loop: a slow server does not slow them down, so its queueing shows in the latencies.
    """
    _check(request_rate > 0, "--request-rate", "must be above 0")
    _check(endpoint in ("chat", "completions"), "--endpoint", "must be chat or completions")
    _check(output in ("text", "json"), "--output", "must be text or json")
    _check(prefix_len <= input_len, "--prefix-len", "must not exceed --input-len")
    limits, ranks = _goodput(goodput or []), _percentiles(percentiles)
    base_url = url.rstrip("/").removesuffix("/v1")

    async def run() -> dict[str, Any]:
        async with open_session(api_key) as http:
            name = model or next(iter(await list_models(http, base_url)), None)
            if name is None:
                raise EndpointError(f"{base_url} serves no model")
            load = Load(
                name, num_prompts, input_len, output_len, prefix_len, request_rate, burstiness, max_concurrency, seed,
                ignore_eos, endpoint == "chat", temperature,
            )  # fmt: skip
            await _warm_up(http, base_url, load, num_warmups)
            samples, duration_s = await run_load(http, base_url, load, show_progress=output == "text")
            summary = summarize(samples, duration_s, percentiles=ranks, goodput=limits)
            return {**_setup(base_url, load), **summary, "errors": _errors(samples)}

    try:
        report = asyncio.run(run())
    except EndpointError as error:
        typer.echo(f"octavo bench: {error}", err=True)
        raise typer.Exit(1) from error
    if result is not None:
        result.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if output == "json":
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report, ranks)
    raise typer.Exit(0 if report["completed"] else 1)


async def run_load(
    http: aiohttp.ClientSession, base_url: str, load: Load, *, show_progress: bool
) -> tuple[list[Sample], float]:
    """Send everything at its time; returns one sample per request and the seconds it took."""
    gate = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else contextlib.nullcontext()
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show_progress) as progress:
        bar = progress.add_task("requests", total=load.num_prompts)

        async def one(prompt: str) -> Sample:
            async with gate:
                sample = await send(http, base_url, load, prompt, started)
            progress.advance(bar)
            return sample

        started = time.perf_counter()
        tasks = []
        for prompt, at_s in zip(prompts(load), arrivals(load), strict=False):
            delay = at_s - (time.perf_counter() - started)
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(one(prompt)))
        samples = list(await asyncio.gather(*tasks))
        return samples, time.perf_counter() - started


def prompts(load: Load) -> Iterator[str]:
    """`num_prompts` texts of random words after a shared prefix; the same seed gives the same texts."""
    generator = random.Random(load.seed)  # noqa: S311  (no secrets here)
    prefix = generator.choices(_WORDS, k=load.prefix_len)
    for _ in range(load.num_prompts):
        yield " ".join([*prefix, *generator.choices(_WORDS, k=load.input_len - load.prefix_len)])


def arrivals(load: Load) -> Iterator[float]:
    """Seconds from the start at which each request is sent: gamma-distributed gaps of mean 1/rate."""
    generator = random.Random(load.seed + 1)  # noqa: S311
    at_s = 0.0
    for _ in range(load.num_prompts):
        yield at_s
        if load.request_rate != float("inf"):
            at_s += generator.gammavariate(load.burstiness, 1 / (load.request_rate * load.burstiness))


async def send(
    http: aiohttp.ClientSession, base_url: str, load: Load, prompt: str, load_started: float | None = None
) -> Sample:
    """One streamed request, timed; `load_started`: when the load began, by `time.perf_counter`."""
    body: dict[str, Any] = {
        "model": load.model,
        "max_tokens": load.output_len,
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    if load.chat:
        path, body["messages"] = "chat/completions", [{"role": "user", "content": prompt}]
    else:
        path, body["prompt"] = "completions", prompt
    started = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    try:
        async for event in stream_events(http, f"{base_url}/v1/{path}", body):
            usage = event.get("usage") or usage
            if any(_has_text(choice) for choice in event.get("choices", ())):
                times.append(time.perf_counter())
    except EndpointError as error:
        return Sample(ok=False, error=str(error)[:200], status=error.status)
    ended = time.perf_counter()
    first = times[0] if times else ended
    details = usage.get("prompt_tokens_details") or {}
    return Sample(
        ok=True,
        started_s=0.0 if load_started is None else started - load_started,
        input_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", len(times)),
        ttft_s=first - started,
        e2e_s=(times[-1] if times else ended) - started,
        itl_s=[after - before for before, after in itertools.pairwise(times)],
        cached_tokens=details.get("cached_tokens", 0),
    )


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content"))


async def _warm_up(http: aiohttp.ClientSession, base_url: str, load: Load, count: int) -> None:
    """Requests that are not counted; the first failure is the user's to know before the load starts."""
    for _ in range(count):
        sample = await send(http, base_url, load, "Hello")
        if not sample.ok:
            raise EndpointError(f"the warm-up request failed: {sample.error}")


def _setup(base_url: str, load: Load) -> dict[str, Any]:
    kind = "openai-chat" if load.chat else "openai"
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": kind,
        "backend": kind,
        "base_url": base_url,
        "model_id": load.model,
        "num_prompts": load.num_prompts,
        "input_len": load.input_len,
        "output_len": load.output_len,
        "prefix_len": load.prefix_len,
        "request_rate": "inf" if load.request_rate == float("inf") else load.request_rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.max_concurrency,
        "seed": load.seed,
    }


def _errors(samples: list[Sample]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in samples:
        if not sample.ok:
            counts[sample.error] = counts.get(sample.error, 0) + 1
    return counts


def _print(report: dict[str, Any], ranks: list[float]) -> None:
    console = Console()
    console.print(
        f"[bold]{report['model_id']}[/] at {report['base_url']}: {report['completed']} of {report['num_prompts']} "
        f"requests in {report['duration']:.2f} s, {report['request_throughput']:.2f} requests/s, "
        f"{report['output_throughput']:.1f} output tokens/s, {report['total_token_throughput']:.1f} tokens/s in all"
    )
    if "request_goodput" in report:
        console.print(
            f"goodput {report['request_goodput']:.2f} requests/s ({report['good_request_fraction']:.0%} of requests)"
        )
    table = Table("ms", "mean", *(f"p{rank:g}" for rank in ranks))
    for name in METRICS:
        values = [report[f"mean_{name}_ms"], *(report[f"p{rank:g}_{name}_ms"] for rank in ranks)]
        table.add_row(name, *(f"{value:.1f}" for value in values))
    console.print(table)
    for message, count in report["errors"].items():
        console.print(f"[red]{count} failed:[/] {message}")


def _check(holds: bool, flag: str, message: str) -> None:
    if not holds:
        raise typer.BadParameter(message, param_hint=flag)


def _goodput(entries: list[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for entry in entries:
        name, _, limit = entry.partition(":")
        _check(name in GOODPUT_METRICS, "--goodput", f"must begin with {', '.join(GOODPUT_METRICS)}, got {entry!r}")
        try:
            limits[name] = float(limit)
        except ValueError:
            raise typer.BadParameter(f"needs milliseconds, as {name}:200", param_hint="--goodput") from None
    return limits


def _percentiles(text: str) -> list[float]:
    try:
        ranks = [float(rank) for rank in text.split(",")]
    except ValueError:
        raise typer.BadParameter("must be numbers, as 50,99", param_hint="--percentiles") from None
    _check(all(0 <= rank <= 100 for rank in ranks), "--percentiles", "must be between 0 and 100")
    return ranks
