"""What the hub says of hf:// models: their commit, the size of their weights, their shape."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from octavo_operator.api.model import ModelSpec
from octavo_operator.controller.bounded_read import read_up_to
from octavo_operator.controller.store import Key
from octavo_operator.plan.shape import shape_of
from octavo_operator.plan.values import ModelFacts

log = logging.getLogger("octavo.operator.hub")
TIMEOUT_S = 5.0
KEPT_S = 6 * 3_600.0
RETRY_AFTER_S = 600.0
MAX_ANSWER_BYTES = 8 * 1024 * 1024
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?")
_Model = tuple[str, str]  # repository, revision

NOT_ASKED = "no hub is asked for the model's shape (operator.hubEndpoint)"
NOT_HUB = "only models at hf://ORG/NAME are looked up"
ASKING = "the hub is being asked"


@dataclass(frozen=True)
class _Known:
    facts: ModelFacts
    until: float


class HubFacts:
    """Knows what was asked; what was not is asked by `run`. The operator sends no token: of models that need one
    nothing is known."""

    def __init__(self, endpoint: str, now: Callable[[], float] = time.time) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._now = now
        self._known: dict[_Model, _Known] = {}
        self._asked: asyncio.Queue[_Model] = asyncio.Queue()
        self._waiting: dict[_Model, set[Key]] = {}

    def facts(self, model: ModelSpec, key: Key) -> ModelFacts:
        """What is known of a model now; `key` is told to look again when more is."""
        name = repository(model)
        if not self._endpoint:
            return ModelFacts(unknown=NOT_ASKED)
        if name is None:
            return ModelFacts(unknown=NOT_HUB)
        known = self._known.get(name)
        if known is None or known.until < self._now():
            if name not in self._waiting:
                self._asked.put_nowait(name)
            self._waiting.setdefault(name, set()).add(key)
        return known.facts if known else ModelFacts(unknown=ASKING)

    async def run(self, on_known: Callable[[Key], None]) -> None:
        """Ask, one model after another, until cancelled; `on_known` hears of every service that waited."""
        async with aiohttp.ClientSession() as http:
            while True:
                name = await self._asked.get()
                facts = await self.ask(name, http)
                kept_s = KEPT_S if facts.shape else RETRY_AFTER_S
                before = self._known.get(name)
                self._known[name] = _Known(facts, self._now() + kept_s)
                waiting = self._waiting.pop(name, set())
                if before is None or before.facts != facts:
                    for key in waiting:
                        on_known(key)

    async def ask(self, name: _Model, http: aiohttp.ClientSession) -> ModelFacts:
        """What the hub says; never raises: a hub that does not answer leaves the model unknown."""
        repo, revision = name
        try:
            info = await self._get(f"/api/models/{repo}/revision/{revision}?blobs=true", http)
            commit = str(info["sha"])
            config = await self._get(f"/{repo}/resolve/{commit}/config.json", http)
            shape = shape_of(config, _weight_bytes(info["siblings"]))
        except aiohttp.ClientResponseError as error:
            return ModelFacts(unknown=f"the hub answered {error.status} for {repo}")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError) as error:
            log.info("hub: %s: %s", repo, error or type(error).__name__)
            return ModelFacts(unknown=f"the hub told nothing of {repo}")
        if shape is None or not shape.weight_bytes:
            return ModelFacts(revision=commit, unknown=f"{repo} holds no model whose memory can be estimated")
        return ModelFacts(shape=shape, revision=commit, unknown="")

    async def _get(self, path: str, http: aiohttp.ClientSession) -> Any:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with http.get(self._endpoint + path, timeout=timeout, raise_for_status=True) as answer:
            return json.loads(await read_up_to(answer, MAX_ANSWER_BYTES))


async def ask_hub(endpoint: str, models: Mapping[str, ModelSpec]) -> dict[str, ModelFacts]:
    """What a hub says of these models now, by the names they are given under."""
    hub = HubFacts(endpoint)
    async with aiohttp.ClientSession() as http:
        return {name: await _ask_one(hub, model, http) for name, model in models.items()}


async def _ask_one(hub: HubFacts, model: ModelSpec, http: aiohttp.ClientSession) -> ModelFacts:
    name = repository(model)
    return ModelFacts(unknown=NOT_HUB) if name is None else await hub.ask(name, http)


def repository(model: ModelSpec) -> _Model | None:
    """Repository and revision of a model on the hub; None for one that is elsewhere, or a single file."""
    match = _ADDRESS.fullmatch(model.storage_uri)
    return (match[1], match[2] or model.revision or "main") if match else None


def _weight_bytes(files: list[dict[str, Any]]) -> int:
    """Bytes of the weights that an engine loads: a repository may hold them a second time under another name."""
    sizes = {
        str(f["rfilename"]): int(f.get("size") or 0) for f in files if str(f["rfilename"]).endswith(".safetensors")
    }
    own = {name: size for name, size in sizes.items() if "/" not in name and not name.startswith("consolidated")}
    return sum((own or sizes).values())
