"""Asks replicas what requests consumed whose answers did not tell: clients that left, failures, gateways that died."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

import msgspec

from octavo_gateway.registry import Endpoint
from octavo_gateway.upstream import UpstreamError, UpstreamPool

FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 1.0
REACH_FOR_S = 5.0
"""How long a replica that cannot be reached is asked again."""

END_FOR_S = 30.0
"""How long a replica may take to notice that a request was given up."""

ARRIVE_FOR_S = 1.0
"""How long a request that was sent may be unknown before it counts as never received."""

ASK_TIMEOUT_S = 2.0
IDS_AT_ONCE = 100
MAX_REPORT_BYTES = 64 * 1024


class Consumed(msgspec.Struct, frozen=True):
    """Tokens of one request, as its replica counted them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class _Report(msgspec.Struct, frozen=True):
    ended: dict[str, Consumed]
    running: list[str]
    uptime_s: float


class _Question:
    """One request at one replica. Times on the caller's clock."""

    def __init__(self, began_at: float, asked_at: float) -> None:
        self.began_at = began_at
        self.asked_at = asked_at
        self.answer: asyncio.Future[Consumed | None] = asyncio.get_running_loop().create_future()

    def settle(self, consumed: Consumed | None) -> None:
        if not self.answer.done():
            self.answer.set_result(consumed)


class UsageCollector:
    """One per gateway; asks each replica for many requests at once."""

    def __init__(self, pool: UpstreamPool, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._clock = clock
        self._open: dict[str, dict[str, _Question]] = {}  # by endpoint id, then by usage id
        self._asking: set[asyncio.Task[None]] = set()

    async def consumed(self, endpoint: Endpoint, usage_id: str, began_at: float) -> Consumed | None:
        """The replica's count once the request has ended there; None when it cannot tell."""
        questions = self._open.get(endpoint.id)
        if questions is None:
            questions = self._open[endpoint.id] = {}
            task = asyncio.create_task(self._ask(endpoint, questions))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        question = questions.setdefault(usage_id, _Question(began_at, self._clock()))
        return await asyncio.shield(question.answer)

    async def _ask(self, endpoint: Endpoint, questions: dict[str, _Question]) -> None:
        """Ask until every question is settled."""
        wait_s = FIRST_WAIT_S
        try:
            while questions:
                await asyncio.sleep(wait_s)
                before = len(questions)
                asked = list(questions)
                for start in range(0, len(asked), IDS_AT_ONCE):
                    ids = asked[start : start + IDS_AT_ONCE]
                    self._take(questions, ids, await self._report(endpoint, ids))
                wait_s = FIRST_WAIT_S if len(questions) < before else min(wait_s * 2, LONGEST_WAIT_S)
        finally:
            del self._open[endpoint.id]
            for question in questions.values():
                question.settle(None)

    async def _report(self, endpoint: Endpoint, ids: Sequence[str]) -> _Report | None:
        """None when it was not to be had now; one that knows nothing from a runtime that keeps no such counts."""
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                status, body = await self._pool.get(endpoint, f"/usage?ids={','.join(ids)}", MAX_REPORT_BYTES)
            if status != 200:
                return _Report({}, [], -math.inf)
            return msgspec.json.decode(body, type=_Report)
        except (UpstreamError, TimeoutError):
            return None
        except msgspec.MsgspecError:
            return _Report({}, [], -math.inf)

    def _take(self, questions: dict[str, _Question], ids: Sequence[str], report: _Report | None) -> None:
        now = self._clock()
        for id_ in ids:
            question = questions[id_]
            waited_s = now - question.asked_at
            if report is None:
                over, answer = waited_s > REACH_FOR_S, None
            elif id_ in report.ended:
                over, answer = True, report.ended[id_]
            elif id_ in report.running:
                over, answer = waited_s > END_FOR_S, None
            elif report.uptime_s < now - question.began_at:  # another process than the one it was sent to
                over, answer = True, None
            else:
                over, answer = waited_s > ARRIVE_FOR_S, Consumed()
            if over:
                question.settle(answer)
                del questions[id_]
