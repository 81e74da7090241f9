"""A real Kubernetes control plane on loopback, from the binaries of `KUBEBUILDER_ASSETS` (the envtest convention).

kube-apiserver and etcd must be there; with kube-controller-manager pods are made and garbage is collected, with
kube-scheduler pods are scheduled. A fake node makes pods ready without running them.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from octavo_operator.controller.client import ApiError, Kind, KubeClient

TOKEN = "e2e-admin-token"
NODE = Kind("v1", "Node", "nodes", namespaced=False)
POD = Kind("v1", "Pod", "pods")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
START_TIMEOUT_S = 60.0
RENEW_EVERY_S = 10.0


def missing_reason(*more: str) -> str:
    """Why no control plane can be started here, or which of `more` programs is absent; empty if all is there."""
    folder = os.environ.get("KUBEBUILDER_ASSETS")
    if not folder:
        return "KUBEBUILDER_ASSETS is not set: no Kubernetes API server to test against (see CONTRIBUTING.md)"
    absent = [name for name in ("etcd", "kube-apiserver", *more) if not program(name)]
    if absent:
        return f"KUBEBUILDER_ASSETS={folder} lacks {', '.join(absent)}"
    return "" if shutil.which("openssl") else "openssl is not installed"


def program(name: str) -> str | None:
    """Where a program is: in KUBEBUILDER_ASSETS, else on the path."""
    return shutil.which(name, path=os.environ["KUBEBUILDER_ASSETS"]) or shutil.which(name)


@dataclass
class ControlPlane:
    """Running processes and how to reach them."""

    root: Path
    kubeconfig: Path
    server: str
    has_controllers: bool
    has_scheduler: bool
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def start(
    root: Path, prepare: Callable[[ControlPlane], None], address: str = "127.0.0.1", controllers: bool = True
) -> ControlPlane:
    """Start everything and wait until it answers.

    `prepare` installs CRDs before the controllers start: garbage collection then knows them from the beginning.
    `address` is where the API server listens; a real node's pods reach it there.
    """
    assets = Path(os.environ["KUBEBUILDER_ASSETS"])
    etcd_port, peer_port, api_port = _free_port(), _free_port(), _free_port()
    server = f"https://{address}:{api_port}"
    kubeconfig = _write_config(root, server)
    plane = ControlPlane(
        root,
        kubeconfig,
        server,
        has_controllers=controllers and (assets / "kube-controller-manager").exists(),
        has_scheduler=controllers and (assets / "kube-scheduler").exists(),
    )
    try:
        _start_etcd(plane, assets, etcd_port, peer_port)
        _run(plane, [assets / "kube-apiserver", *_api_server_flags(root, etcd_port, address, api_port)])
        _wait(f"{server}/readyz", plane)
        prepare(plane)
        common = ["--kubeconfig", str(kubeconfig), "--leader-elect=false", "--secure-port"]
        if plane.has_controllers:
            keys = [f"--service-account-private-key-file={root}/sa.key", "--use-service-account-credentials=false"]
            _run(plane, [assets / "kube-controller-manager", *common, str(_free_port()), *keys])
        if plane.has_scheduler:
            _run(plane, [assets / "kube-scheduler", *common, str(_free_port())])
    except BaseException:
        plane.stop()
        raise
    return plane


def _write_config(root: Path, server: str) -> Path:
    (root / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
    key, public = root / "sa.key", root / "sa.pub"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    subprocess.run(["openssl", "rsa", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "e2e", "cluster": {"server": server, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "admin", "user": {"token": TOKEN}}],
        "contexts": [{"name": "e2e", "context": {"cluster": "e2e", "user": "admin"}}],
        "current-context": "e2e",
    }
    path = root / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


def _start_etcd(plane: ControlPlane, assets: Path, port: int, peer: int) -> None:
    """etcd with its usual flags; small builds of the embedded server take DATA PORT PEER instead."""
    client_url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer}"
    data = plane.root / "etcd"
    flags = [
        f"--data-dir={data}",
        f"--listen-client-urls={client_url}",
        f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}",
        f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=default={peer_url}",
        "--unsafe-no-fsync",
    ]
    process = _run(plane, [assets / "etcd", *flags])
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
        plane.processes.remove(process)
        _run(plane, [assets / "etcd", str(data), str(port), str(peer)])
    _wait(f"{client_url}/health", plane)


def _api_server_flags(root: Path, etcd_port: int, address: str, port: int) -> list[str]:
    return [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--bind-address={address}",
        f"--advertise-address={address}",
        f"--secure-port={port}",
        f"--cert-dir={root}/certs",
        f"--token-auth-file={root}/tokens.csv",
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.0.0.0/16",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={root}/sa.pub",
        f"--service-account-signing-key-file={root}/sa.key",
        "--authorization-mode=RBAC",
        "--allow-privileged=false",
        "--disable-admission-plugins=ServiceAccount",
    ]


def _run(plane: ControlPlane, command: list[Any]) -> subprocess.Popen[bytes]:
    words = [str(word) for word in command]
    log = (plane.root / f"{Path(words[0]).name}.log").open("ab")
    process = subprocess.Popen(words, stdout=log, stderr=log, cwd=plane.root)
    log.close()
    plane.processes.append(process)
    return process


def _wait(url: str, plane: ControlPlane) -> None:
    context = ssl._create_unverified_context()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=2, context=context) as answer:
                if answer.status == 200:
                    return
        except OSError as error:
            if time.monotonic() > deadline or any(p.poll() is not None for p in plane.processes):
                raise RuntimeError(f"{url} does not answer: {error}; logs are in {plane.root}") from error
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def connect(plane: ControlPlane) -> KubeClient:
    """A client as administrator; call it within the loop that uses it."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=False), headers={"Authorization": f"Bearer {TOKEN}"}
    )
    return KubeClient(plane.server, session)


class FakeNode:
    """A node in a thread of its own: pods bound to it become Running and Ready, deleted ones go.

    Annotations on a pod steer it: `fake/status` is merged into its status (JSON) instead of becoming ready.
    """

    def __init__(self, plane: ControlPlane, gpus: int = 2) -> None:
        self._plane = plane
        self._gpus = gpus
        self._renewed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.faults: dict[str, dict[str, Any]] = {}  # InferenceService to the status its pods shall show
        self.pod_faults: dict[str, dict[str, Any]] = {}  # the same by the uid of a pod
        self.canary_faults: dict[str, dict[str, Any]] = {}  # the same for pods of a revision on trial
        self.canary_annotations: dict[str, dict[str, str]] = {}  # the same for pods of a revision on trial
        self.annotations: dict[str, dict[str, str]] = {}  # InferenceService to annotations its pods shall carry

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)

    async def _run(self) -> None:
        client = connect(self._plane)
        try:
            await self._register(client)
            while not self._stop.is_set():
                with contextlib.suppress(ApiError):
                    await self._renew(client)
                    for pod in (await client.list_objects(POD))["items"]:
                        await self._tend(client, pod)
                await asyncio.sleep(0.2)
        finally:
            await client.close()

    async def _register(self, client: KubeClient) -> None:
        labels = {"kubernetes.io/hostname": "fake-0", "kubernetes.io/os": "linux"}
        with contextlib.suppress(ApiError):
            await client.create(
                NODE, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "fake-0", "labels": labels}}
            )
        capacity = {"cpu": "64", "memory": "512Gi", "pods": "250", "nvidia.com/gpu": str(self._gpus)}
        conditions = [
            {"type": "Ready", "status": "True", "reason": "Fake", "message": "", "lastHeartbeatTime": _now()},
        ]
        status = {"capacity": capacity, "allocatable": capacity, "conditions": conditions}
        await client.patch_status(NODE, None, "fake-0", status)
        node = await client.get(NODE, None, "fake-0")
        if node["spec"].get("taints"):
            await client.patch(NODE, None, "fake-0", {"spec": {"taints": None}})
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "fake-0", "namespace": "kube-node-lease"},
            "spec": {"holderIdentity": "fake-0", "leaseDurationSeconds": 40, "renewTime": _micro_now()},
        }
        with contextlib.suppress(ApiError):
            await client.create(LEASE, lease)

    async def _renew(self, client: KubeClient) -> None:
        """Without this the node counts as lost after some 40 s, and its pods as not ready."""
        if time.monotonic() - self._renewed >= RENEW_EVERY_S:
            await client.patch(LEASE, "kube-node-lease", "fake-0", {"spec": {"renewTime": _micro_now()}})
            self._renewed = time.monotonic()

    async def _tend(self, client: KubeClient, pod: dict[str, Any]) -> None:
        metadata, spec = pod["metadata"], pod["spec"]
        namespace, name = metadata["namespace"], metadata["name"]
        if not spec.get("nodeName"):
            if not self._plane.has_scheduler:
                body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name, "namespace": namespace},
                        "target": {"apiVersion": "v1", "kind": "Node", "name": "fake-0"}}  # fmt: skip
                binding = Kind("v1", "Binding", f"pods/{name}/binding")
                await client.create(binding, body)
            return
        if metadata.get("deletionTimestamp"):
            path = POD.path(namespace, name)
            await client._call("DELETE", path, body={"gracePeriodSeconds": 0})
            return
        service = (metadata.get("labels") or {}).get("serving.octavo.dev/inferenceservice", "")
        on_trial = (metadata.get("labels") or {}).get("serving.octavo.dev/track") == "canary"
        wanted = (on_trial and self.canary_annotations.get(service)) or self.annotations.get(service, {})
        if wanted and not wanted.items() <= (metadata.get("annotations") or {}).items():
            await client.patch(POD, namespace, name, {"metadata": {"annotations": wanted}})
        fault = self.pod_faults.get(metadata["uid"]) or (on_trial and self.canary_faults.get(service))
        status = fault or self.faults.get(service) or _running(pod)
        if any((pod.get("status") or {}).get(k) != v for k, v in status.items() if k == "containerStatuses"):
            await client.patch_status(POD, namespace, name, {**(pod.get("status") or {}), **status})


def _running(pod: dict[str, Any]) -> dict[str, Any]:
    since = pod["metadata"]["creationTimestamp"]
    containers = [
        {
            "name": c["name"],
            "image": c["image"],
            "imageID": "",
            "ready": True,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": since}},
            "lastState": {},
        }
        for c in pod["spec"]["containers"]
    ]
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": _now()}
        for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    ]
    return {
        "phase": "Running",
        "podIP": "198.51.100.7",
        "podIPs": [{"ip": "198.51.100.7"}],
        "startTime": since,
        "containerStatuses": containers,
        "conditions": conditions,
    }


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _micro_now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
