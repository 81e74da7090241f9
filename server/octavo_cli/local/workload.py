"""One workload of a Plan on this machine: its processes, what the autoscaler knows of it, and how others see it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import aiohttp

from octavo_cli.local.process import Launch
from octavo_cli.local.replica_set import Phase, ReplicaPolicy
from octavo_cli.local.supervisor import Member, Supervisor
from octavo_cli.local.table import ReplicaRow, ServiceRow
from octavo_gateway.registry import (
    Endpoint,
    EndpointState,
    HoldPolicy,
    ModelEntry,
    RetryPolicy,
    Saturation,
    Strategy,
)
from octavo_gateway.signals import GatewaySignals
from octavo_operator.autoscale.decide import Decision, decide
from octavo_operator.autoscale.history import History
from octavo_operator.autoscale.observer import Observer
from octavo_operator.plan import Workload

SCRAPE_TIMEOUT_S = 5.0
_STATES = {Phase.READY: EndpointState.READY, Phase.DRAINING: EndpointState.DRAINING}


class LocalWorkload:
    """Runs the replicas of `workload`; `on_change` is called when the set of ready ones has changed."""

    def __init__(self, workload: Workload, log_dir: Path, on_change: Callable[[], None]) -> None:
        self.workload = workload
        self.decision: Decision | None = None
        self._log_dir = log_dir
        self._created = int(time.time())
        self._observer = Observer(workload.metrics, time.time())
        self._history = History(started_at=time.time())
        self.supervisor = Supervisor(
            workload.name,
            self._launch,
            desired=workload.replicas.initial,
            policy=replica_policy(workload),
            on_endpoints=lambda _: on_change(),
        )

    @property
    def log_dir(self) -> Path:
        """Where the replicas' logs are."""
        return self._log_dir

    async def scrape(self, http: aiohttp.ClientSession) -> None:
        """Read the metrics page of every ready replica."""
        await asyncio.gather(*(self._scrape_one(http, address) for address in self._ready_addresses()))

    def scale(self, gateway: GatewaySignals) -> Decision:
        """Decide how many replicas there should be, and tell the supervisor."""
        now = time.time()
        members = self.supervisor.members
        signals = self._observer.signals(
            current=self.supervisor.desired,
            ready=self._ready_addresses(),
            pending=sum(m.replica.phase is Phase.STARTING for m in members),
            now=now,
            held=gateway.held,
            arrivals=float(gateway.arrivals_total),
        )
        self.decision = decide(signals, self.workload.scaling, self._history, now)
        self._history = self.decision.history
        if self.decision.replicas != self.supervisor.desired:
            self.supervisor.set_replicas(self.decision.replicas)
        return self.decision

    def stop(self) -> None:
        """Drain every replica."""
        self.decision = None
        self.supervisor.stop()

    def entry(self) -> ModelEntry:
        """The workload as the gateway knows it."""
        routing = self.workload.routing
        return ModelEntry(
            name=self.workload.model_name,
            endpoints=tuple(self._endpoint(m) for m in self.supervisor.members if m.process is not None),
            aliases=self.workload.model_names[1:],
            adapters=tuple(self.workload.adapters),
            namespace=self.workload.namespace,
            created=self._created,
            strategy=Strategy(routing.strategy),
            session_header=routing.session_header or "x-session-id",
            saturation=Saturation(routing.saturation_queue_depth, routing.saturation_kv_cache_utilization),
            hold=HoldPolicy(routing.max_held_requests, routing.hold_timeout_s),
            retry=RetryPolicy(routing.retry_attempts, routing.retry_per_try_timeout_s),
            scale_to_zero=self.workload.scaling.idle_s is not None,
            desired_replicas=self.supervisor.desired,
            scaling_reason=self.decision.message if self.decision else "",
        )

    def row(self, held: int) -> ServiceRow:
        """The workload as the table shows it."""
        bounds = self.workload.scaling
        return ServiceRow(
            name=self.workload.name,
            model=self.workload.model_name,
            desired=self.supervisor.desired,
            min_replicas=bounds.min_replicas,
            max_replicas=bounds.max_replicas,
            held=held,
            decision=self.decision.message if self.decision else "",
            replicas=[self._replica_row(member) for member in self.supervisor.members],
        )

    def _launch(self, index: int) -> Launch:
        return launch(self.workload, self._log_dir / f"{self.workload.name}-{index}.log")

    def _ready_addresses(self) -> list[str]:
        members = self.supervisor.members
        return [m.process.address for m in members if m.process is not None and m.replica.phase is Phase.READY]

    async def _scrape_one(self, http: aiohttp.ClientSession, address: str) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):  # a stale sample tells the autoscaler
            timeout = aiohttp.ClientTimeout(total=SCRAPE_TIMEOUT_S)
            async with http.get(address + self.workload.metrics.path, timeout=timeout) as response:
                if response.status == 200:
                    sample = self._observer.add_page(address, await response.text(), time.time())
                    self.supervisor.set_running(address, int(sample.running))

    def _endpoint(self, member: Member) -> Endpoint:
        process = member.process
        assert process is not None  # noqa: S101 - the caller filters
        return Endpoint(
            id=f"{self.workload.name}-{member.replica.index}-{process.pid}",
            url=process.address,
            state=_STATES.get(member.replica.phase, EndpointState.STARTING),
            cache_events=process.cache_events,
        )

    def _replica_row(self, member: Member) -> ReplicaRow:
        address = member.process.address if member.process else ""
        sample = self._observer.sample(address)
        row = ReplicaRow(
            index=member.replica.index,
            phase=member.replica.phase,
            address=address,
            pid=member.process.pid if member.process else None,
            age_s=time.monotonic() - member.replica.since,
            restarts=member.replica.restarts,
            detail=member.detail or (member.crash if member.replica.phase is Phase.BACK_OFF else ""),
        )
        if sample is None:
            return row
        return replace(
            row,
            waiting=int(sample.waiting),
            running=int(sample.running),
            kv=sample.kv_utilization or 0.0,
            tokens_per_s=self._observer.tokens_per_s(address),
        )


def launch(workload: Workload, log_path: Path) -> Launch:
    """The back end for processes: a workload's argv, environment and probes as one child process."""
    return Launch(
        argv=workload.argv,
        env=workload.env,
        ready_path=workload.probes.readiness.path,
        live_path=workload.probes.liveness.path,
        log_path=log_path,
        tells_kv_events=workload.routing.kv_events,
    )


def replica_policy(workload: Workload) -> ReplicaPolicy:
    """The times of a workload's probes and drain, as the supervisor takes them."""
    readiness, liveness = workload.probes.readiness, workload.probes.liveness
    return ReplicaPolicy(
        startup_timeout_s=workload.probes.startup_timeout_s,
        drain_timeout_s=workload.drain.grace_period_s,
        not_live_timeout_s=liveness.period_s * liveness.failure_threshold,
        probe_period_s=readiness.period_s,
        probe_timeout_s=readiness.timeout_s,
    )
