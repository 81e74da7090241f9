"""Discovery from a file: what it says, what it refuses, and how it follows edits and readiness."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fakes.gateway_door import until
from fakes.openai_replica import OpenAIReplica
from octavo_gateway.discovery import StaticDiscovery, load_static
from octavo_gateway.errors import ConfigError
from octavo_gateway.registry import EndpointState, Registry, Strategy
from octavo_gateway.upstream import UpstreamPool

FULL = """
settings: {port: 0}
models:
  - name: llama
    aliases: [small]
    adapters: [sql]
    readyPath: /health
    endpoints:
      - {url: "http://127.0.0.1:1", id: one, weight: 2.0, adapters: [sql]}
    routing:
      strategy: LeastLoaded
      sessionHeader: X-Chat
      saturation: {queueDepth: 7, kvCacheUtilization: 0.5}
      retry: {attempts: 3, perTryTimeoutSeconds: 9}
    coldStart: {maxHeldRequests: 11, holdTimeoutSeconds: 12}
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    return path


async def test_every_field_of_the_file_reaches_the_registry(tmp_path: Path) -> None:
    registry = Registry()
    task = asyncio.create_task(StaticDiscovery(write(tmp_path, FULL), registry, UpstreamPool()).run())
    await until(lambda: registry.synced)
    task.cancel()

    entry = registry.snapshot.models["llama"]
    assert (entry.aliases, entry.adapters, entry.strategy) == (("small",), ("sql",), Strategy.LEAST_LOADED)
    assert (entry.session_header, entry.saturation.queue_depth) == ("x-chat", 7)
    assert entry.saturation.kv_cache_utilization == 0.5
    assert (entry.retry.attempts, entry.retry.per_try_timeout_s) == (3, 9)
    assert (entry.hold.max_held_requests, entry.hold.hold_timeout_s) == (11, 12)
    (endpoint,) = entry.endpoints
    assert (endpoint.id, endpoint.weight, endpoint.state) == ("one", 2.0, EndpointState.STARTING)


async def test_it_follows_readiness_and_edits_and_keeps_the_last_good_view(tmp_path: Path) -> None:
    registry = Registry()

    def names() -> set[str]:
        return set(registry.snapshot.models)

    async with OpenAIReplica().serve() as replica:
        line = f'  - {{name: NAME, endpoints: [{{url: "{replica.url}"}}]}}\n'
        path = write(tmp_path, "models:\n" + line.replace("NAME", "a"))
        task = asyncio.create_task(StaticDiscovery(path, registry, UpstreamPool()).run())
        await until(lambda: names() == {"a"} and bool(registry.snapshot.models["a"].ready))

        replica.ready = False
        await until(lambda: not registry.snapshot.models["a"].ready)
        replica.ready = True

        path.write_text("models:\n" + line.replace("NAME", "a") + line.replace("NAME", "b"))
        await until(lambda: names() == {"a", "b"})
        path.write_text("models: [{name: broken}]")
        await asyncio.sleep(1.2)
        assert names() == {"a", "b"}
        task.cancel()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [", ["no valid YAML"]),
        ("modells: []", ["unknown field", "modells"]),
        ("models: [{name: a, endpoints: [], colour: red}]", ["models[0]", "colour"]),
        ("models: [{name: a, endpoints: [{url: 'ftp://x'}]}]", ["models[0].endpoints[0].url", "ftp://x"]),
        ("models: [{name: a, endpoints: [{url: 'http://x/path'}]}]", ["without a path"]),
        ("models: [{name: a, endpoints: [{url: 'http://x', weight: 0}]}]", ["weight", "above 0"]),
        ("models: [{name: a, endpoints: []}, {name: b, aliases: [a], endpoints: []}]", ["models[1]", "'a'", "twice"]),
        ("models: [{name: a, endpoints: [], routing: {strategy: Best}}]", ["routing.strategy", "Best"]),
    ],
)
def test_a_wrong_file_is_refused_with_the_field(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_static(write(tmp_path, text))

    for word in [*words, "gateway.yaml"]:
        assert word in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_static(tmp_path / "nowhere.yaml")
