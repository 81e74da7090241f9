"""A real node: kubelet, containerd and runc in a network of their own, beside a control plane in the same network.

Needs root and the packages containerd, runc, containernetworking-plugins and iproute2. Images are imported, never
pulled; there is no kube-proxy and no DNS, so pods are reached at their addresses, and NetworkPolicies bind nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from e2e.control_plane import ControlPlane, program
from e2e.python_image import write_image
from e2e.serving import IMAGE

NODE = "node1"
NODE_ADDRESS = "10.99.0.1"
POD_SUBNET = "10.99.1.0/24"
PLUGINS = Path("/usr/lib/cni")
PAUSE_IMAGE = "localhost/pause:e2e"
CGROUPS = ("kubepods", "k8s.io")
CLONE_NEWNET = 0x40000000
START_TIMEOUT_S = 60.0
# The kubelet sets these for the whole machine; they are put back.
SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops")


def missing_reason() -> str:
    """Why no real node can run here; empty if one can."""
    if os.geteuid() != 0:
        return "a real node needs root"
    absent = [name for name in ("containerd", "ctr", "runc", "ip", "kubelet") if not program(name)]
    absent += [str(PLUGINS / name) for name in ("bridge", "host-local") if not (PLUGINS / name).exists()]
    return f"a real node needs {', '.join(absent)}" if absent else ""


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """A network namespace for this thread and all that it starts, with loopback and the node's address."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as outside:
        if libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "no network namespace of our own")
        try:
            for command in (
                "link set lo up",
                "link add node0 type bridge",
                f"addr add {NODE_ADDRESS}/24 dev node0",
                "link set node0 up",
            ):
                subprocess.run(["ip", *command.split()], check=True)
            yield
        finally:
            libc.setns(outside.fileno(), CLONE_NEWNET)


class RealNode:
    """containerd and a kubelet; `root` takes their state and logs."""

    def __init__(self, plane: ControlPlane, root: Path) -> None:
        self._plane = plane
        self._root = root
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sysctls: dict[str, str] = {}

    def start(self, image: Path) -> None:
        """Start both, import the archive `image`, and wait until the node is ready."""
        self._sysctls = {name: Path("/proc/sys", name).read_text() for name in SYSCTLS}
        self._write_configuration()
        self._run("containerd", "--config", str(self._root / "containerd.toml"))
        self._wait("containerd", self._ctr("version"))
        subprocess.run(self._ctr("images", "import", str(image)), check=True, capture_output=True)
        kubelet = ["--config", str(self._root / "kubelet.yaml"), "--kubeconfig", str(self._plane.kubeconfig)]
        folders = ["--root-dir", str(self._root / "kubelet"), "--cert-dir", str(self._root / "pki")]
        self._run("kubelet", *kubelet, *folders, "--node-ip", NODE_ADDRESS, "--hostname-override", NODE)
        self._wait("the node", [*self._kubectl(), "wait", f"node/{NODE}", "--for=condition=Ready", "--timeout=1s"])

    def stop(self) -> None:
        """Stop the kubelet, every container and containerd; leave no mount, cgroup or setting behind."""
        if len(self._processes) == 2:
            _end(self._processes.pop())
        tasks = subprocess.run(self._ctr("tasks", "ls", "-q"), capture_output=True, text=True).stdout.split()
        for task in tasks:
            subprocess.run(self._ctr("tasks", "delete", "-f", task), capture_output=True)
        for process in self._processes:
            _end(process)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted((m for m in mounts if m.startswith(f"{self._root}/")), reverse=True):
            subprocess.run(["umount", "-l", mount], capture_output=True)
        for name, value in self._sysctls.items():
            Path("/proc/sys", name).write_text(value)
        for group in Path("/sys/fs/cgroup").glob("*/"):
            for ours in CGROUPS:
                for folder in sorted((group / ours).rglob("*/"), reverse=True) if (group / ours).exists() else ():
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                with contextlib.suppress(OSError):
                    (group / ours).rmdir()

    def _write_configuration(self) -> None:
        network = {
            "cniVersion": "0.4.0",
            "name": "octavo",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": True,
                    "hairpinMode": True,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(self._root / "addresses"),
                        "ranges": [[{"subnet": POD_SUBNET}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                }
            ],
        }
        folder = self._root / "cni"
        folder.mkdir(parents=True)
        (folder / "10.conflist").write_text(json.dumps(network))
        (self._root / "containerd.toml").write_text(CONTAINERD.format(root=self._root, plugins=PLUGINS))
        (self._root / "kubelet.yaml").write_text(json.dumps(self._kubelet()))

    def _kubelet(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_ADDRESS,
            "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}},
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "makeIPTablesUtilChains": False,
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "podLogsDir": str(self._root / "pod-logs"),
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"},
            "crashLoopBackOff": {"maxContainerRestartPeriod": "5s"},
            "featureGates": {"KubeletCrashLoopBackOffMax": True},
        }

    @property
    def _socket(self) -> Path:
        return self._root / "containerd.sock"

    def _ctr(self, *words: str) -> list[str]:
        return ["ctr", "-a", str(self._socket), "-n", "k8s.io", *words]

    def _kubectl(self) -> list[str]:
        return [str(program("kubectl")), "--kubeconfig", str(self._plane.kubeconfig)]

    def _run(self, name: str, *flags: str) -> None:
        with (self._root / f"{name}.log").open("ab") as log:
            self._processes.append(subprocess.Popen([str(program(name)), *flags], stdout=log, stderr=log))

    def _wait(self, what: str, command: list[str]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while subprocess.run(command, capture_output=True).returncode:
            if time.monotonic() > deadline or any(p.poll() is not None for p in self._processes):
                raise RuntimeError(f"{what} does not come up; logs are in {self._root}")
            time.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()


CONTAINERD = """version = 2
root = "{root}/containerd"
state = "{root}/state"
[grpc]
  address = "{root}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:e2e"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{root}/cni"
"""


def make_image(folder: Path) -> Path:
    """The archive with octavo's image, which is every pod's pause image too."""
    path = folder / "octavo.tar"
    write_image(path, [IMAGE, PAUSE_IMAGE])
    return path


def remove(folder: Path) -> None:
    """Give the space of the node's images back."""
    shutil.rmtree(folder, ignore_errors=True)
