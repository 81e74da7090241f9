"""Waiting for an engine's health to turn bad."""

from __future__ import annotations

import asyncio
import time

from octavo_engine.client import EngineClient
from octavo_engine.errors import EngineDeadError

DEATH_S = 10.0


async def death_of(client: EngineClient) -> str:
    """What health says once it is bad; fails when that takes longer than `DEATH_S`."""
    deadline = time.monotonic() + DEATH_S
    while time.monotonic() < deadline:
        try:
            client.check_health()
        except EngineDeadError as error:
            return str(error)
        await asyncio.sleep(0.05)
    raise AssertionError(f"the engine still counts as healthy {DEATH_S} s after a part of it was killed")
