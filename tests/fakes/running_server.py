"""A replica on a real socket, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai
import uvicorn

from fakes.byte_tokenizer import ByteTokenizer
from octavo_server.app import build_app
from octavo_server.http_protocol import BoundedHeadProtocol
from octavo_server.replica import Replica
from octavo_server.settings import ServeSettings


@dataclass
class RunningServer:
    """A served replica and clients for it."""

    replica: Replica
    engine: Any
    url: str
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any, Any]:
        """Status, parsed body and headers."""
        async with self.http.post(self.url + path, json=body, **kwargs) as response:
            return response.status, await response.json(content_type=None), response.headers


@contextlib.asynccontextmanager
async def running_server(
    engine: Any,
    *,
    load: bool = True,
    load_tokenizer: Callable[[str], Any] = lambda path: ByteTokenizer(),
    **settings: Any,
) -> AsyncIterator[RunningServer]:
    replica = Replica(
        ServeSettings(model="fake", served_model_names=("fake-model", "alias"), **settings),
        engine,
        load_tokenizer,
    )
    config = uvicorn.Config(
        build_app(replica), port=0, http=BoundedHeadProtocol, ws="none", lifespan="off", log_config=None,
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    if load:
        await replica.start()
    async with (
        aiohttp.ClientSession() as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        try:
            yield RunningServer(replica, engine, url, http, client)
        finally:
            server.should_exit = True
            server.force_exit = True
            await serving
            await replica.close(0)
