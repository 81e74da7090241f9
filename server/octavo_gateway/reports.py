"""Reads each replica's metrics page for queue depth, running requests and KV use, whatever runtime it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Mapping

from octavo_gateway.load import LoadBook, LoadReport
from octavo_gateway.registry import Endpoint, EndpointState, Registry, Snapshot
from octavo_gateway.upstream import UpstreamError, UpstreamPool

log = logging.getLogger("octavo.gateway.reports")

MAX_PAGE_BYTES = 4 * 1024 * 1024
STALE_AFTER_S = 5.0

# Per signal, the names of octavo, vLLM, SGLang, TGI, TensorRT-LLM and Ray Serve LLM in turn; the first present counts.
WAITING = (
    "octavo_requests_waiting",
    "vllm:num_requests_waiting",
    "sglang:num_queue_reqs",
    "tgi_queue_size",
    "trtllm_num_requests_waiting",
    "ray_vllm_num_requests_waiting",
)
RUNNING = (
    "octavo_requests_running",
    "vllm:num_requests_running",
    "sglang:num_running_reqs",
    "tgi_batch_current_size",
    "trtllm_num_requests_running",
    "ray_vllm_num_requests_running",
)
KV_CACHE_UTILIZATION = (
    "octavo_kv_cache_utilization",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "trtllm_kv_cache_utilization",
    "ray_vllm_kv_cache_usage_perc",
)
CAPACITY = ("octavo_max_num_seqs",)
GENERATED_TOKENS = (
    "octavo_generation_tokens_total",
    "vllm:generation_tokens_total",
    "sglang:generation_tokens_total",
    "ray_vllm_generation_tokens_total",
)

_CACHE_INFO = re.compile(rb"^vllm:cache_config_info\{([^\n]*)\}", re.MULTILINE)
_LABEL = re.compile(rb'(\w+)="([^"]*)"')
_NAMES = (*WAITING, *RUNNING, *KV_CACHE_UTILIZATION, *CAPACITY, *GENERATED_TOKENS)
_SAMPLE = re.compile(
    rb"^(" + b"|".join(re.escape(name).encode() for name in _NAMES) + rb")(?:\{[^\n]*\})?[ \t]+([0-9.eE+-]+)",
    re.MULTILINE,
)


def parse_report(page: bytes, now: float) -> LoadReport | None:
    """A metrics page in Prometheus' text format as a `LoadReport`; None when it tells no queue of any known runtime.

    Series of one name (one per model or data-parallel rank) are summed, utilizations averaged.
    """
    samples: dict[str, list[float]] = {}
    for name, value in _SAMPLE.findall(page):
        with contextlib.suppress(ValueError):
            samples.setdefault(name.decode(), []).append(float(value))
    waiting, running = _first(samples, WAITING), _first(samples, RUNNING)
    if waiting is None and running is None:
        return None
    kv = _first(samples, KV_CACHE_UTILIZATION)
    capacity = _first(samples, CAPACITY)
    generated = _first(samples, GENERATED_TOKENS)
    return LoadReport(
        waiting=sum(waiting or ()),
        running=sum(running or ()),
        kv_cache_utilization=sum(kv) / len(kv) if kv else 0.0,
        at=now,
        capacity=sum(capacity) if capacity else None,
        generated_tokens=sum(generated) if generated else None,
        kv_cache_tokens=_kv_cache_tokens(page),
    )


def _kv_cache_tokens(page: bytes) -> float | None:
    """Blocks times block size, which vLLM and octavo tell in the labels of one series."""
    info = _CACHE_INFO.search(page)
    if info is None:
        return None
    labels = dict(_LABEL.findall(info[1]))
    blocks, size = labels.get(b"num_gpu_blocks", b""), labels.get(b"block_size", b"")
    return float(blocks) * float(size) if blocks.isdigit() and size.isdigit() else None


def _first(samples: Mapping[str, list[float]], names: tuple[str, ...]) -> list[float] | None:
    return next((samples[name] for name in names if name in samples), None)


class ReportPoller:
    """Asks every ready replica for its metrics once per interval, and a newly ready one at once."""

    def __init__(
        self,
        registry: Registry,
        loads: LoadBook,
        pool: UpstreamPool,
        *,
        interval_s: float,
        clock: Callable[[], float],
        on_report: Callable[[], None],
        on_restart: Callable[[str], None],
        on_cache_size: Callable[[str, float], None],
    ) -> None:
        self._registry = registry
        self._loads = loads
        self._pool = pool
        self._interval_s = interval_s
        self._clock = clock
        self._on_report = on_report
        self._on_restart = on_restart
        self._on_cache_size = on_cache_size
        self._ready: set[str] = set()
        self._newly_ready = asyncio.Event()
        registry.subscribe(self._on_change)

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            self._newly_ready.clear()
            await self.poll()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._newly_ready.wait(), self._interval_s)

    async def poll(self) -> None:
        """One round over all replicas that take or finish requests."""
        endpoints = {
            e.id: e
            for entry in self._registry.snapshot.models.values()
            for e in entry.endpoints
            if e.state is not EndpointState.STARTING
        }
        self._ready = set(endpoints)
        await asyncio.gather(*(self._ask(endpoint) for endpoint in endpoints.values()))
        if endpoints:
            self._on_report()

    async def _ask(self, endpoint: Endpoint) -> None:
        load = self._loads[endpoint.id]
        in_flight = load.in_flight
        try:
            async with asyncio.timeout(max(self._interval_s, 1.0)):
                status, page = await self._pool.get(endpoint, "/metrics", MAX_PAGE_BYTES)
        except (UpstreamError, TimeoutError) as error:
            if load.report is not None and self._clock() - load.report.at > STALE_AFTER_S:
                log.warning("replica %s: no load report for %g s (%s)", endpoint.id, STALE_AFTER_S, error or "timeout")
                load.forget_report(expects_reports=True)
            return
        report = parse_report(page, self._clock()) if status == 200 else None
        if report is not None:
            if load.restarted(report):
                log.info("replica %s was restarted: nothing is cached there", endpoint.id)
                self._on_restart(endpoint.id)
            if report.kv_cache_tokens is not None:
                self._on_cache_size(endpoint.id, report.kv_cache_tokens)
            load.update(report, in_flight)
        elif load.report is not None or load.expects_reports:
            log.warning("replica %s: its metrics page tells no load; routing by this gateway's own count", endpoint.id)
            load.forget_report(expects_reports=False)

    def _on_change(self, snapshot: Snapshot) -> None:
        ready = {e.id for entry in snapshot.models.values() for e in entry.ready}
        if ready - self._ready:
            self._newly_ready.set()
