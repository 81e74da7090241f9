"""The words every routing policy speaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from octavo_gateway.load import EndpointLoad
from octavo_gateway.registry import Endpoint


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that may take the request, with its load."""

    endpoint: Endpoint
    load: EndpointLoad

    @property
    def score(self) -> float:
        return self.load.score(self.endpoint.weight)


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """What a policy may look at: never the prompt itself, only its chained block hashes.

    `prompt_tokens` is estimated, and 0 where the end of prefill cannot be seen (answers that do not stream).
    """

    model: str
    prefix: tuple[int, ...] = ()
    session: str | None = None
    adapter: str | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The endpoint chosen, and why, in words for the debug header. `matched_blocks`: prefix blocks expected there."""

    endpoint: Endpoint
    reason: str
    matched_blocks: int = 0


class Policy(Protocol):
    """Chooses among at least one candidate. Deterministic given its state and its random source."""

    def choose(self, candidates: Sequence[Candidate], request: RouteRequest) -> Choice: ...
