"""What is said of the gateway as a whole, whichever of its workers is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from octavo_gateway.signals import GatewaySignals
from octavo_gateway.workers.merging import merge_pages, merge_signals
from octavo_gateway.workers.peers import METRICS, Peers
from octavo_gateway.workers.seat import Seat

SIGNALS = "signals"
RUNNING = "running"


class Whole:
    """`page`, `signals` and `running` tell of this process alone; without a seat it is all there is."""

    def __init__(
        self,
        seat: Seat | None,
        *,
        page: Callable[[], bytes],
        signals: Callable[[], Sequence[GatewaySignals]],
        running: Callable[[], dict[str, int]],
    ) -> None:
        self._page = page
        self._signals = signals
        self._running = running
        encode = msgspec.msgpack.encode
        answers = {METRICS: page, SIGNALS: lambda: encode(signals()), RUNNING: lambda: encode(running())}
        self._peers = None if seat is None else Peers(seat, answers)

    async def start(self) -> None:
        if self._peers is not None:
            await self._peers.start()

    async def close(self) -> None:
        if self._peers is not None:
            await self._peers.close()

    async def metrics_page(self) -> bytes:
        """The text page of /metrics."""
        if self._peers is None:
            return self._page()
        return merge_pages(await self._peers.ask(METRICS), self._peers.last_words())

    async def signals(self) -> Callable[[str], GatewaySignals]:
        """Held and flying requests and rates, by model."""
        told: dict[str, list[GatewaySignals]] = {}
        if self._peers is None:
            told = {part.model: [part] for part in self._signals()}
        else:
            for answer in await self._peers.ask(SIGNALS):
                for part in msgspec.msgpack.decode(answer, type=list[GatewaySignals]):
                    told.setdefault(part.model, []).append(part)
        return lambda model: merge_signals(told.get(model) or [GatewaySignals(model=model)])

    async def running_by_tenant(self) -> dict[str, int]:
        """Requests not settled of each tenant."""
        if self._peers is None:
            return self._running()
        running: Counter[str] = Counter()
        for answer in await self._peers.ask(RUNNING):
            running.update(msgspec.msgpack.decode(answer, type=dict[str, int]))
        return running
