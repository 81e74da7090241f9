"""Run the operator: wait for the lease, run kopf in a thread of its own, stop both in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

import kopf

from octavo_operator.controller.credentials import connect, find_cluster
from octavo_operator.controller.engine_room import EngineRoom
from octavo_operator.controller.handlers import build_registry
from octavo_operator.controller.health import HealthServer
from octavo_operator.controller.leader import LeaderElection
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.webhook import Webhook

log = logging.getLogger("octavo.operator")
STOP_WITHIN_S = 20.0


class Operator:
    """kopf in a thread with its own loop: kopf cancels every foreign task of the loop it stops in."""

    def __init__(self, settings: OperatorSettings, may_write: Callable[[], bool] = lambda: True) -> None:
        self._settings = settings
        self._may_write = may_write
        self._stop = threading.Event()
        self.ready = threading.Event()
        self.room: EngineRoom | None = None
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = STOP_WITHIN_S) -> None:
        """Stop and wait; writes that began are finished."""
        self._stop.set()
        self._thread.join(timeout_s)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            kopf.run(
                registry=build_registry(self._settings, self._take_room, self._may_write),
                standalone=True,
                clusterwide=not self._settings.namespaces,
                namespaces=self._settings.namespaces,
                stop_flag=self._stop,
                ready_flag=self.ready,
            )
        except Exception as error:  # told to the main thread, which ends the process
            log.exception("kopf ended")
            self.failure = error

    def _take_room(self, room: EngineRoom) -> None:
        self.room = room


async def run(settings: OperatorSettings) -> int:
    """Run until told to stop; returns the exit code. Raises `NoCluster`, or `WebhookUnusable`."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    client = connect(find_cluster())
    election = LeaderElection(client, settings)
    health = HealthServer(settings)
    webhook = None if settings.webhook_port is None else Webhook(client, settings)
    try:
        await health.start()
        if webhook is not None:
            await webhook.start()
        if settings.leader_election and not await _first(stopping.wait(), election.acquire()):
            return 0
        operator = Operator(settings, election.leads if settings.leader_election else lambda: True)
        health.watch(operator)
        operator.start()
        code = await _lead(operator, election, stopping, settings)
        await asyncio.to_thread(operator.stop)
        if settings.leader_election and code == 0:
            await election.release()
        return code
    finally:
        if webhook is not None:
            await webhook.stop()
        await health.stop()
        await client.close()


async def _lead(
    operator: Operator, election: LeaderElection, stopping: asyncio.Event, settings: OperatorSettings
) -> int:
    """Wait for a reason to stop; 0 only when told to."""
    reasons = {asyncio.create_task(stopping.wait()): 0, asyncio.create_task(_ended(operator)): 1}
    if settings.leader_election:
        reasons[asyncio.create_task(election.hold())] = 1
    done, rest = await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    return max(reasons[task] for task in done)


async def _ended(operator: Operator) -> None:
    while operator.running:  # noqa: ASYNC110 - a thread has no event of this loop
        await asyncio.sleep(0.5)


async def _first(stop: object, work: object) -> bool:
    """Whether the work finished before the stop came."""
    stop_task, work_task = asyncio.ensure_future(stop), asyncio.ensure_future(work)  # type: ignore[call-overload]
    await asyncio.wait({stop_task, work_task}, return_when=asyncio.FIRST_COMPLETED)
    for task in (stop_task, work_task):
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    return bool(work_task.done() and not work_task.cancelled() and work_task.exception() is None)
