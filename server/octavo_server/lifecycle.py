"""The life of a replica as its callers see it: starting, ready, draining, refusing, failed; and who is in flight."""

from __future__ import annotations

import asyncio
import enum

from octavo_server.errors import ApiError, unavailable


class Phase(enum.StrEnum):
    """Where the replica stands. Only READY answers readiness with 200; READY and DRAINING take new requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    REFUSING = "refusing"
    FAILED = "failed"


class InFlight:
    """One request being served. `stop()` ends it from outside, with an error that its face still delivers."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.stop_cause: ApiError | None = None
        self._task: asyncio.Task[None] | None = None

    def bind(self, task: asyncio.Task[None]) -> None:
        """Name the task that serves this request."""
        self._task = task

    def stop(self, cause: ApiError | None) -> None:
        """Cancel the request; `cause` None means nobody listens any more."""
        if self._task is None or self._task.done():
            return
        self.stop_cause = self.stop_cause or cause
        self._task.cancel()


class Lifecycle:
    """Phase and in-flight requests of one replica; used from one event loop."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.failure: str | None = None
        self._in_flight: set[InFlight] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def admit(self, request: InFlight) -> None:
        """Count `request` in; raises a retryable 503 when this replica takes no new work."""
        match self.phase:
            case Phase.STARTING:
                raise unavailable("The model is still loading; retry shortly.", 5.0, "starting")
            case Phase.REFUSING:
                raise unavailable("This replica is shutting down; retry on another replica.", 1.0, "draining")
            case Phase.FAILED:
                raise unavailable("The engine of this replica stopped; retry on another replica.", 5.0, "engine_dead")
        self._in_flight.add(request)
        self._idle.clear()

    def release(self, request: InFlight) -> None:
        """Count `request` out; harmless for one that was never admitted."""
        self._in_flight.discard(request)
        if not self._in_flight:
            self._idle.set()

    def become_ready(self) -> None:
        if self.phase is Phase.STARTING:
            self.phase = Phase.READY

    def fail(self, message: str) -> None:
        """The engine is gone for good."""
        self.phase = Phase.FAILED
        self.failure = message

    async def drain(self, propagation_s: float, timeout_s: float) -> bool:
        """Stop taking work and wait for what runs; True when everything finished by itself.

        For `propagation_s` new requests are still served while readiness already says no, so that load balancers
        learn of it first. Then new requests get a retryable 503, and whatever still runs after `timeout_s` is
        ended with an explicit error.
        """
        if self.phase is Phase.READY:
            self.phase = Phase.DRAINING
            await asyncio.sleep(propagation_s)
        if self.phase is not Phase.FAILED:
            self.phase = Phase.REFUSING
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            await self._stop_all()
            return False
        return True

    async def _stop_all(self) -> None:
        cause = unavailable("The replica shut down before this request finished; retry it.", 1.0, "drain_timeout")
        for request in list(self._in_flight):
            request.stop(cause)
        try:
            await asyncio.wait_for(self._idle.wait(), 5.0)
        except TimeoutError:
            return
