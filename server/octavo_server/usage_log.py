"""What each request consumed, however it ended: told to the gateway on asking, and summed up for /metrics.

An answer that is read to its end carries its own usage. This is for the others: clients that left, deadlines, failures.
A prompt counts once its first token was generated, as in the engine's own counters.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from dataclasses import dataclass

import msgspec

USAGE_ID_HEADER = b"x-octavo-usage-id"
MAX_KEPT = 20_000
KEEP_S = 900.0
_ID = re.compile(rb"[0-9a-f]{32}")


@dataclass(slots=True)
class Consumption:
    """Tokens of one request so far, counted where sequences run, whatever face asked for them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class UsageReport(msgspec.Struct, frozen=True):
    """Answer to a list of ids: those that ended, those under way; an id in neither was never received, or is forgotten.

    `uptime_s` is the age of this process: what it was asked before that, it does not know.
    """

    ended: dict[str, Consumption]
    running: list[str]
    uptime_s: float


class UsageLog:
    """Keeps the newest ended requests that came with an id, and totals of all."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self._running: set[str] = set()
        self._ended: OrderedDict[str, tuple[float, Consumption]] = OrderedDict()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0

    def begin(self, usage_id: str | None) -> None:
        if usage_id is not None:
            self._running.add(usage_id)

    def end(self, usage_id: str | None, consumed: Consumption) -> None:
        """Nothing is added to `consumed` after this."""
        self.prompt_tokens += consumed.prompt_tokens
        self.cached_tokens += consumed.cached_tokens
        self.output_tokens += consumed.output_tokens
        if usage_id is None:
            return
        self._running.discard(usage_id)
        now = time.monotonic()
        self._ended[usage_id] = (now, consumed)
        while self._ended and (len(self._ended) > MAX_KEPT or next(iter(self._ended.values()))[0] < now - KEEP_S):
            self._ended.popitem(last=False)

    def report(self, usage_ids: list[str]) -> UsageReport:
        return UsageReport(
            ended={id_: self._ended[id_][1] for id_ in usage_ids if id_ in self._ended},
            running=[id_ for id_ in usage_ids if id_ in self._running],
            uptime_s=time.monotonic() - self._started_at,
        )


def usage_id_of(header: bytes | None) -> str | None:
    """The gateway's id of a request; what has another shape is nobody's."""
    return header.decode() if header is not None and _ID.fullmatch(header) else None
