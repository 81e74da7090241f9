"""Servers that end with the test."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from fakes.fake_engine import FakeEngine
from fakes.running_server import RunningServer, running_server


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    """Start servers that end with the test: `server = await serve(FakeEngine(...), max_body_bytes=...)`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(engine: FakeEngine | None = None, **settings: Any) -> RunningServer:
            return await stack.enter_async_context(running_server(engine or FakeEngine(), **settings))

        yield start
