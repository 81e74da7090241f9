"""`octavo batch`: run a file of OpenAI batch requests against an endpoint; a stopped run can be started again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from octavo_batches.lines import BatchFileError, BatchRequest, finished_ids, read_request, result
from octavo_cli.openai_client import open_session

_RETRIED = (408, 429, 502, 503, 504)
_LONGEST_WAIT_S = 30.0


@dataclass
class Tally:
    """How the requests of this run ended."""

    succeeded: int = 0
    failed: int = 0


def batch(
    input_file: Annotated[Path, typer.Argument(help="JSON lines with custom_id, method, url and body.")],
    output_file: Annotated[Path, typer.Argument(help="Where results are appended, one line each.")],
    url: Annotated[
        str, typer.Option("--url", envvar="OCTAVO_URL", help="Address of a replica or the gateway.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="OCTAVO_API_KEY", help="Sent as a bearer token.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Replaces the model that the lines name.")] = None,
    max_concurrency: Annotated[
        int, typer.Option("--max-concurrency", "-c", min=1, help="Most requests at a time.")
    ] = 32,
    max_attempts: Annotated[
        int, typer.Option("--max-attempts", min=1, help="Tries per request while the endpoint is busy or away.")
    ] = 8,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run again what an earlier run recorded as failed.")
    ] = False,
) -> None:
    """Run a file of OpenAI batch requests and append each result as soon as it is there.

    Requests whose results the output already holds are skipped, so a run that was stopped can be started again.
    Exits 1 when requests failed.
    """
    try:
        requests = list(read_requests(input_file, model))
        done = finished_ids(output_file, retry_failed=retry_failed)
    except BatchFileError as error:
        typer.echo(f"octavo batch: {error}", err=True)
        raise typer.Exit(2) from error
    pending = [request for request in requests if request.custom_id not in done]
    typer.echo(f"{len(requests)} requests, {len(requests) - len(pending)} already done", err=True)
    base_url = url.rstrip("/").removesuffix("/v1")
    tally = asyncio.run(_run(base_url, api_key, pending, output_file, max_concurrency, max_attempts))
    typer.echo(f"{tally.succeeded} succeeded, {tally.failed} failed", err=True)
    raise typer.Exit(1 if tally.failed else 0)


def read_requests(path: Path, model: str | None = None) -> Iterator[BatchRequest]:
    """Every request of the file; raises `BatchFileError` before anything is sent."""
    seen: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BatchFileError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            request = read_request(line)
        except BatchFileError as error:
            raise BatchFileError(f"{where}: {error}") from error
        if request.custom_id in seen:
            raise BatchFileError(f"{where}: custom_id {request.custom_id!r} is used twice")
        seen.add(request.custom_id)
        if model is not None:
            request.body["model"] = model
        yield request


async def _run(
    base_url: str, api_key: str | None, requests: list[BatchRequest], output: Path, concurrency: int, attempts: int
) -> Tally:
    tally = Tally()
    queue = iter(requests)
    columns = (TextColumn("batch"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        output.open("a", encoding="utf-8") as sink,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("batch", total=len(requests))

        async def worker(http: aiohttp.ClientSession) -> None:
            for request in queue:
                line = await _send(http, base_url, request, attempts)
                sink.write(json.dumps(line, ensure_ascii=False) + "\n")
                sink.flush()
                tally.succeeded += line["error"] is None
                tally.failed += line["error"] is not None
                progress.advance(bar)

        async with open_session(api_key) as http:
            await asyncio.gather(*(worker(http) for _ in range(min(concurrency, len(requests)))))
    return tally


async def _send(http: aiohttp.ClientSession, base_url: str, request: BatchRequest, attempts: int) -> dict[str, Any]:
    """The result line; a busy or absent endpoint is tried again, as it asks or with growing waits."""
    status, body, request_id = 0, "", ""
    for attempt in range(attempts):
        wait_s = min(_LONGEST_WAIT_S, 0.5 * 2**attempt)
        try:
            async with http.post(base_url + request.url, json=request.body) as response:
                status, body = response.status, await response.text()
                request_id = response.headers.get("x-request-id", "")
                wait_s = min(_LONGEST_WAIT_S, _seconds(response.headers.get("retry-after"), wait_s))
        except (aiohttp.ClientError, TimeoutError) as error:
            status, body = 0, f"the connection failed: {error or type(error).__name__}"
        if status not in (0, *_RETRIED):
            break
        if attempt + 1 < attempts:
            await asyncio.sleep(wait_s)
    return result(request, status, body, request_id)


def _seconds(text: str | None, default: float) -> float:
    try:
        return default if text is None else max(0.0, float(text))
    except ValueError:
        return default
