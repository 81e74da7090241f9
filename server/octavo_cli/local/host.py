"""Everything that `octavo up` runs: the gateway, the workloads' processes, and the loop that scales them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

from octavo_cli.local.replica_set import Phase
from octavo_cli.local.table import ServiceRow
from octavo_cli.local.workload import LocalWorkload
from octavo_gateway.discovery import LocalDiscovery
from octavo_gateway.registry import Registry
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.usage import PriceTable
from octavo_operator.plan import Workload

SCRAPE_INTERVAL_S = 1.0
DECIDE_INTERVAL_S = 5.0
GIVE_UP_AFTER_RESTARTS = 2


class StartFailedError(Exception):
    """A service's replicas keep failing before one was ever ready; the message says why."""


class LocalHost:
    """The services of some manifests on this machine. `run` serves until `stop` has drained everything."""

    def __init__(
        self, workloads: Sequence[Workload], settings: GatewaySettings, prices: PriceTable, log_dir: Path
    ) -> None:
        self._registry = Registry()
        self._discovery = LocalDiscovery(self._registry)
        self.gateway = GatewayServer.from_settings(settings, self._registry, prices=prices)
        self.workloads = [LocalWorkload(workload, log_dir, self._publish) for workload in workloads]
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()

    async def run(self, on_picture: Callable[[list[ServiceRow]], None], refresh_s: float = 0.5) -> None:
        """Serve. Raises the gateway's `ConfigError` when its address is taken."""
        self._publish()
        await self.gateway.start()
        loops = [asyncio.create_task(self._scale()), asyncio.create_task(self._show(on_picture, refresh_s))]
        supervisors = [asyncio.create_task(w.supervisor.run()) for w in self.workloads]
        try:
            await self._until_stopped([*loops, *supervisors])
            loops[0].cancel()  # no decision may start a replica again
            await self.gateway.stop(max(w.workload.drain.timeout_s for w in self.workloads))
            for workload in self.workloads:
                workload.stop()
            await asyncio.gather(*supervisors)
        finally:
            for task in (*loops, *supervisors):
                task.cancel()
            await asyncio.gather(*loops, *supervisors, return_exceptions=True)

    def stop(self) -> None:
        """Refuse new requests, finish the running ones, then end the replicas."""
        self._stopping.set()

    def kill(self) -> None:
        """End everything at once."""
        self._stopping.set()
        for workload in self.workloads:
            workload.supervisor.kill()

    async def until_ready(self) -> None:
        """Return when every service that should have replicas has one ready; raises `StartFailedError`."""
        while not all(self._is_up(w) for w in self.workloads):
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), SCRAPE_INTERVAL_S)

    def rows(self) -> list[ServiceRow]:
        """What the table shows."""
        return [w.row(self.gateway.app.signals(w.workload.model_name).held) for w in self.workloads]

    def _is_up(self, workload: LocalWorkload) -> bool:
        members = workload.supervisor.members
        if workload.supervisor.desired == 0 or any(m.replica.phase is Phase.READY for m in members):
            return True
        for member in members:
            if member.replica.restarts > GIVE_UP_AFTER_RESTARTS:
                log = workload.log_dir / f"{workload.workload.name}-{member.replica.index}.log"
                raise StartFailedError(f"{workload.workload.name} does not start: {member.crash}\nIts log: {log}")
        return False

    async def _until_stopped(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in done - {stopping}:
            task.result()  # nothing but an error ends one of these before the stop

    async def _scale(self) -> None:
        """Read the replicas' metrics every second, decide every five."""
        loop = asyncio.get_running_loop()
        decide_at = loop.time()
        async with aiohttp.ClientSession() as http:
            while True:
                await asyncio.gather(*(w.scrape(http) for w in self.workloads))
                if loop.time() >= decide_at or self._activation_wanted():
                    decide_at = loop.time() + DECIDE_INTERVAL_S
                    for workload in self.workloads:
                        workload.scale(self.gateway.app.signals(workload.workload.model_name))
                self._publish()
                await asyncio.sleep(SCRAPE_INTERVAL_S)

    def _activation_wanted(self) -> bool:
        """Whether somebody waits for a service that has no replica at all."""
        return any(
            w.supervisor.desired == 0 and self.gateway.app.signals(w.workload.model_name).held for w in self.workloads
        )

    async def _show(self, on_picture: Callable[[list[ServiceRow]], None], refresh_s: float) -> None:
        while True:
            on_picture(self.rows())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), refresh_s)
            if self._stopping.is_set():
                await asyncio.sleep(refresh_s)

    def _publish(self) -> None:
        self._discovery.set_models([w.entry() for w in self.workloads])
        self._changed.set()
