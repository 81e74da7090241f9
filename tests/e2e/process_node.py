"""A node that runs each pod's engine as a process at a loopback address of its own: real engines behind a real API
server, with neither root nor containers. Probes, preStop, grace period and restarts are those that the pod asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from e2e.cluster import POD
from e2e.control_plane import ControlPlane, FakeNode
from octavo_operator.controller.client import ApiError, KubeClient

TESTS = Path(__file__).parents[1]
RESTART_AFTER_S = 1.0
LOOK_EVERY_S = 0.1
LOG_TAIL = 2_048
COMMANDS = {"octavo": [sys.executable, "-m", "octavo_cli.main"], "python": [sys.executable]}
# Addresses of this process alone, so that several may test at once.
SUBNET = f"127.{20 + os.getpid() % 200}.{os.getpid() // 200 % 250}"


class ProcessNode(FakeNode):
    """Runs what is bound to it until stopped; `folder` takes the logs, one a pod."""

    def __init__(self, plane: ControlPlane, folder: Path) -> None:
        super().__init__(plane)
        self._folder = folder
        self._pods: dict[str, _Pod] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._addresses = itertools.count(1)

    async def _run(self) -> None:
        try:
            await super()._run()
        finally:
            for life in self._lives:
                life.cancel()
            await asyncio.gather(*self._lives, return_exceptions=True)

    async def _tend(self, client: KubeClient, pod: dict[str, Any]) -> None:
        if not pod["spec"].get("nodeName"):
            await super()._tend(client, pod)
            return
        uid = pod["metadata"]["uid"]
        if uid in self._pods:
            self._pods[uid].raw = pod
            return
        address = f"{SUBNET}.{next(self._addresses)}"
        self._pods[uid] = _Pod(client, pod, address, self._folder / f"{pod['metadata']['name']}.log")
        life = asyncio.create_task(self._pods[uid].live())
        self._lives.add(life)
        life.add_done_callback(self._lives.discard)


class _Pod:
    """One pod's process. `raw` is the pod as the API server last showed it."""

    def __init__(self, client: KubeClient, raw: dict[str, Any], address: str, log: Path) -> None:
        self.raw = raw
        self._client = client
        self._address = address
        self._log = log
        self._container = raw["spec"]["containers"][0]
        self._started = False
        self._ready = False
        self._restarts = 0
        self._ended: dict[str, Any] | None = None  # the last end, as a container's terminated state
        self._told: dict[str, Any] | None = None
        self._failures = 0
        self._next_probe = 0.0

    async def live(self) -> None:
        """Run the process, again whenever it ends, until the pod is deleted."""
        async with aiohttp.ClientSession() as http:
            while not self._deleted:
                await self._once(http)
        await self._forget()

    @property
    def _deleted(self) -> bool:
        return bool(self.raw["metadata"].get("deletionTimestamp"))

    async def _once(self, http: aiohttp.ClientSession) -> None:
        self._started = self._ready = not self._container.get("startupProbe")
        began = _now()
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._argv(), stdout=log, stderr=log, env=self._environment(), cwd=TESTS, start_new_session=True
            )
        try:
            while process.returncode is None and not self._deleted:
                await self._probe(http)
                await self._tell({"running": {"startedAt": began}})
                await asyncio.sleep(LOOK_EVERY_S)
            if process.returncode is None:
                await self._end(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        self._started = self._ready = False
        self._ended = self._terminated(process.returncode or 0, began)
        if not self._deleted:
            self._restarts += 1
            await self._tell({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}})
            await asyncio.sleep(RESTART_AFTER_S)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """As a kubelet does: preStop, SIGTERM, and SIGKILL when the grace period is over."""
        grace_s = float(self.raw["metadata"].get("deletionGracePeriodSeconds") or 0)
        hook = ((self._container.get("lifecycle") or {}).get("preStop") or {}).get("sleep") or {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await asyncio.sleep(float(hook.get("seconds") or 0))
                process.terminate()
                await process.wait()

    async def _probe(self, http: aiohttp.ClientSession) -> None:
        probe = self._container.get("readinessProbe" if self._started else "startupProbe")
        if probe is None or time.monotonic() < self._next_probe:
            return
        self._next_probe = time.monotonic() + probe.get("periodSeconds", 10)
        passed = await self._asks(http, probe)
        self._failures = 0 if passed else self._failures + 1
        if not self._started:
            self._started = self._ready = passed
        elif passed or self._failures >= probe.get("failureThreshold", 3):
            self._ready = passed

    async def _asks(self, http: aiohttp.ClientSession, probe: dict[str, Any]) -> bool:
        wish, ports = probe["httpGet"], {p["name"]: p["containerPort"] for p in self._container.get("ports") or []}
        url = f"http://{self._address}:{ports.get(wish['port'], wish['port'])}{wish['path']}"
        try:
            async with http.get(url, timeout=aiohttp.ClientTimeout(total=probe.get("timeoutSeconds", 1))) as answer:
                return answer.status < 400
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def _tell(self, state: dict[str, Any]) -> None:
        """Write the pod's status if it says something new."""
        metadata = self.raw["metadata"]
        engine = {
            "name": self._container["name"],
            "image": self._container["image"],
            "imageID": "",
            "ready": self._ready,
            "started": self._started,
            "restartCount": self._restarts,
            "state": state,
            "lastState": {"terminated": self._ended} if self._ended else {},
        }
        if engine == self._told:
            return
        ready = "True" if self._ready else "False"
        values = {"PodScheduled": "True", "Initialized": "True", "ContainersReady": ready, "Ready": ready}
        status = {
            "phase": "Running",
            "podIP": self._address,
            "podIPs": [{"ip": self._address}],
            "startTime": metadata["creationTimestamp"],
            "containerStatuses": [engine],
            "conditions": [{"type": t, "status": s, "lastTransitionTime": _now()} for t, s in values.items()],
        }
        with contextlib.suppress(ApiError):  # gone, or told next time
            await self._client.patch_status(POD, metadata["namespace"], metadata["name"], status)
            self._told = engine

    async def _forget(self) -> None:
        path = POD.path(self.raw["metadata"]["namespace"], self.raw["metadata"]["name"])
        with contextlib.suppress(ApiError):
            await self._client._call("DELETE", path, body={"gracePeriodSeconds": 0})

    def _terminated(self, code: int, began: str) -> dict[str, Any]:
        tail = self._log.read_bytes()[-LOG_TAIL:].decode(errors="replace")
        reason = "Error" if code else "Completed"
        code = 128 - code if code < 0 else code  # as a shell counts signals
        return {"exitCode": code, "reason": reason, "message": tail, "startedAt": began, "finishedAt": _now()}

    def _argv(self) -> list[str]:
        first, *rest = [*(self._container.get("command") or []), *(self._container.get("args") or [])]
        return [*COMMANDS.get(first, [first]), *(word.replace("0.0.0.0", self._address) for word in rest)]

    def _environment(self) -> dict[str, str]:
        """The host's, and the pod's; caches stay those of the host, so that models are downloaded once."""
        asked = {e["name"]: e["value"] for e in self._container.get("env") or [] if "value" in e}
        own = {name: value for name, value in asked.items() if not value.startswith("/var/cache/")}
        return {**os.environ, **own, "POD_NAME": self.raw["metadata"]["name"], "POD_IP": self._address}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
