"""Fields a request leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes.fake_engine import FakeEngine

Serve = Callable[..., Any]


@pytest.mark.parametrize(("setting", "expected"), [("auto", (0.6, 20)), ("none", (1.0, 0))])
async def test_the_checkpoints_defaults_apply_unless_switched_off(
    serve: Serve, tmp_path: Path, setting: str, expected: tuple[float, int]
) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20}')
    server = await serve(FakeEngine(path=str(tmp_path)), generation_config=setting)

    await server.post("/v1/completions", {"prompt": "a"})
    await server.post("/v1/completions", {"prompt": "a", "temperature": 0, "top_k": -1})

    first, second = (received.sampling for received in server.engine.received.values())
    assert (first.temperature, first.top_k) == expected
    assert (second.temperature, second.top_k) == (0.0, 0)
