"""The chart on a real API server with the real helm: installed, upgraded, used with its own roles, and gone."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import control_plane
from e2e.cluster import ROOT, SMOLLM2, is_gone, reaches, until
from e2e.control_plane import ControlPlane, FakeNode
from octavo_operator.controller.client import Kind, KubeClient
from octavo_operator.controller.kinds import DEPLOYMENT, LEASE
from octavo_operator.controller.run import Operator
from octavo_operator.controller.settings import OperatorSettings

MISSING = control_plane.missing_reason("kube-controller-manager", "kube-scheduler", "kubectl", "helm")
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
CHART = ROOT / "charts" / "octavo"
RELEASE = "octavo"
OURS = "app.kubernetes.io/part-of=octavo"
CRD = Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False)
SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
MONITORING = ("ServiceMonitor", "PrometheusRule", "PodMonitor")


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """Without our CRDs: the chart brings them."""
    plane = control_plane.start(tmp_path_factory.mktemp("control-plane"), lambda started: None)
    yield plane
    plane.stop()


class Helm:
    """helm and kubectl in one namespace; both fail with what they said."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self._config = ["--kubeconfig", str(plane.kubeconfig), "--namespace", namespace]

    def helm(self, *words: str) -> str:
        return self._run("helm", *words)

    def kubectl(self, *words: str, stdin: str = "") -> str:
        return self._run("kubectl", *words, stdin=stdin)

    def left(self) -> set[str]:
        """KIND/NAME of everything in the cluster that carries the release's labels."""
        kinds = self.kubectl("api-resources", "--verbs=list", "-o", "name").split()
        selector = f"app.kubernetes.io/instance={RELEASE},{OURS}"
        found = self.kubectl("get", ",".join(kinds), "-A", "-l", selector, "-o", "name", "--ignore-not-found")
        return set(found.split())

    def crds(self) -> list[str]:
        """Our CRDs that exist."""
        return self.kubectl("get", "crd", "-l", OURS, "-o", "name").split()

    def _run(self, name: str, *words: str, stdin: str = "") -> str:
        command = [str(control_plane.program(name)), *self._config, *words]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def helm(plane: ControlPlane, namespace: str, node: FakeNode) -> Iterator[Helm]:
    helm = Helm(plane, namespace)
    yield helm
    helm.helm("uninstall", RELEASE, "--ignore-not-found", "--wait")
    helm.kubectl("delete", "crd", "-l", OURS, "--ignore-not-found")


def values(**flags: str) -> list[str]:
    return [word for name, value in flags.items() for word in ("--set", f"{name.replace('__', '.')}={value}")]


EVERYTHING = values(
    gateway__tenants__enabled="true",
    gateway__ingress__enabled="true",
    monitoring__serviceMonitor__enabled="true",
    monitoring__prometheusRule__enabled="true",
    monitoring__dashboards__enabled="true",
)


async def test_it_is_installed_upgraded_and_removed_and_leaves_what_it_says(helm: Helm, client: KubeClient) -> None:
    for kind in MONITORING:
        await client.apply(CRD, _foreign_crd(kind))
    helm.helm("install", RELEASE, str(CHART), "--wait", "--timeout", "120s")
    helm.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(SMOLLM2))
    made = _of_helm(helm.left())
    helm.helm("upgrade", RELEASE, str(CHART), *EVERYTHING, "--wait", "--timeout", "120s")
    assert {name.partition("/")[0] for name in _of_helm(helm.left()) - made} >= {
        "servicemonitor.monitoring.coreos.com",
        "prometheusrule.monitoring.coreos.com",
        "ingress.networking.k8s.io",
    }
    helm.helm("rollback", RELEASE, "1", "--wait", "--timeout", "120s")
    assert _of_helm(helm.left()) == made
    assert "smollm2" in helm.kubectl("get", "oisvc", "-o", "name")
    helm.helm("uninstall", RELEASE, "--wait")
    assert _of_helm(helm.left()) == set()
    assert len(helm.crds()) == 5
    assert "smollm2" in helm.kubectl("get", "oisvc", "-o", "name"), "services outlive the chart"


async def test_without_keeping_crds_nothing_at_all_remains(helm: Helm) -> None:
    helm.helm("install", RELEASE, str(CHART), *values(crds__keep="false"), "--wait", "--timeout", "120s")
    helm.helm("uninstall", RELEASE, "--wait")

    async def empty() -> bool:
        return not helm.left() and not helm.crds()

    await until(empty, "every object of the release is gone")


@pytest.mark.parametrize("scope", ["cluster", "namespace"])
async def test_the_charts_roles_are_all_that_the_operator_needs(
    helm: Helm,
    client: KubeClient,
    namespace: str,
    plane: ControlPlane,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    scope: str,
) -> None:
    """With the token of its service account the operator reconciles, scales, tells Events, and is refused nothing."""
    flags = values(**{"operator__namespaces[0]": namespace}) if scope == "namespace" else []
    helm.helm("install", RELEASE, str(CHART), *flags, "--wait", "--timeout", "120s")
    token = helm.kubectl("create", "token", f"{RELEASE}-operator").strip()
    config = yaml.safe_load(plane.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    settings = OperatorSettings(
        namespaces=(namespace,) if scope == "namespace" else (), own_namespace=namespace, scaling_interval_s=0.5
    )
    operator = Operator(settings)
    operator.start()
    try:
        assert await asyncio.to_thread(operator.ready.wait, 20)
        helm.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(SMOLLM2))
        await reaches(client, namespace, "Ready", "True", "MinimumReplicasAvailable")
        helm.kubectl("patch", "oisvc", "smollm2", "--type=merge", "-p", json.dumps({"spec": {"suspend": True}}))
        await reaches(client, namespace, "Ready", "False", "Suspended")
        helm.kubectl("delete", "oisvc", "smollm2")
        await until(lambda: is_gone(client, DEPLOYMENT, namespace, "smollm2"), "the Deployment is collected")
        assert operator.room is not None
        await until(_relisted(operator), "every kind can be listed")
    finally:
        operator.stop()
    assert "orbidden" not in caplog.text


async def test_the_lease_goes_with_the_installation(helm: Helm, client: KubeClient, namespace: str) -> None:
    """Made by the operator, not by helm; its owner is the operator's service account."""
    helm.helm("install", RELEASE, str(CHART), "--wait", "--timeout", "120s")
    account = await client.get(SERVICE_ACCOUNT, namespace, f"{RELEASE}-operator")
    owner = {"apiVersion": "v1", "kind": "ServiceAccount", "name": account["metadata"]["name"],
             "uid": account["metadata"]["uid"]}  # fmt: skip
    lease = {"apiVersion": LEASE.api_version, "kind": LEASE.kind,
             "metadata": {"name": "octavo-operator", "namespace": namespace, "ownerReferences": [owner]}}  # fmt: skip
    await client.create(LEASE, lease)
    helm.helm("uninstall", RELEASE, "--wait")
    await until(lambda: is_gone(client, LEASE, namespace, "octavo-operator"), "the lease is collected")


def _of_helm(names: set[str]) -> set[str]:
    """Without what Kubernetes' own controllers make of the release's objects, and collect in their own time."""
    made = ("pod", "replicaset.apps", "endpoints", "endpointslice.discovery.k8s.io")
    return {name for name in names if name.partition("/")[0] not in made}


def _relisted(operator: Operator) -> Callable[[], Any]:
    async def check() -> bool:
        room = operator.room
        assert room is not None
        return room.silence_s() < 90

    return check


def _foreign_crd(kind: str) -> dict[str, Any]:
    """The CRD of another project, open to any content."""
    plural = f"{kind.lower()}s"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": CRD.api_version,
        "kind": CRD.kind,
        "metadata": {"name": f"{plural}.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }
