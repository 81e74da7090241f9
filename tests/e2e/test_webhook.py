"""The validating webhook, asked by a real API server over TLS: it refuses, lets pass, and fails open or closed."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from e2e import control_plane
from e2e.cluster import ROOT, is_gone, manifest, until
from e2e.control_plane import ControlPlane
from octavo_operator.controller.client import ApiError, Kind, KubeClient
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.settings import OperatorSettings
from octavo_operator.controller.webhook import PATH, Webhook, WebhookUnusable

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(control_plane.missing_reason()), reason=control_plane.missing_reason()),
]

CONFIGURATION = Kind(
    "admissionregistration.k8s.io/v1",
    "ValidatingWebhookConfiguration",
    "validatingwebhookconfigurations",
    namespaced=False,
)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate for 127.0.0.1 that is its own authority."""
    folder = tmp_path_factory.mktemp("webhook")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=webhook"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    run(command)
    return folder


class Served:
    """The webhook, registered for one namespace."""

    def __init__(self, client: KubeClient, namespace: str, certificate: Path) -> None:
        self.client = client
        self.namespace = namespace
        self.certificate = certificate
        self.webhook = Webhook(client, OperatorSettings(webhook_port=0, webhook_cert_dir=str(certificate)))

    async def register(self, policy: str) -> None:
        authority = base64.b64encode((self.certificate / "tls.crt").read_bytes()).decode()
        rule = {"apiGroups": ["serving.octavo.dev"], "apiVersions": ["v1alpha1"], "operations": ["CREATE", "UPDATE"]}
        webhook = {
            "name": "inferenceservices.serving.octavo.dev",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "timeoutSeconds": 5,
            "failurePolicy": policy,
            "clientConfig": {"url": f"https://127.0.0.1:{self.webhook.port}{PATH}", "caBundle": authority},
            "rules": [{**rule, "resources": ["inferenceservices"]}],
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}},
        }
        document = {
            "apiVersion": CONFIGURATION.api_version,
            "kind": CONFIGURATION.kind,
            "metadata": {"name": f"octavo-{self.namespace}"},
            "webhooks": [webhook],
        }
        await self.client.apply(CONFIGURATION, document)

    async def try_to_create(self, **spec: Any) -> str:
        """Empty when it would be taken, else why not."""
        path = INFERENCE_SERVICE.path(self.namespace)
        try:
            await self.client._call("POST", path, params={"dryRun": "All"}, body=manifest(self.namespace, **spec))
        except ApiError as error:
            return error.message
        return ""


@pytest.fixture
async def served(client: KubeClient, namespace: str, certificate: Path) -> AsyncIterator[Served]:
    served = Served(client, namespace, certificate)
    await served.webhook.start()
    yield served
    await served.webhook.stop()
    await client.delete(CONFIGURATION, None, f"octavo-{namespace}")


REFUSED = {"podTemplate": {"spec": {"hostNetwork": True}}}


async def test_kubectl_hears_at_once_what_cannot_run(served: Served) -> None:
    assert await served.try_to_create(**REFUSED) == "", "the schema alone does not see it"
    await served.register("Fail")

    async def refused() -> str:
        return await served.try_to_create(**REFUSED)

    message = await until(refused, "the webhook is in force")
    assert "spec.podTemplate.spec.hostNetwork: is not allowed" in message
    assert await served.try_to_create() == ""
    created = await served.client.create(INFERENCE_SERVICE, manifest(served.namespace))
    assert created["metadata"]["name"] == "smollm2"
    with pytest.raises(ApiError, match="hostNetwork"):
        await served.client.patch(INFERENCE_SERVICE, served.namespace, "smollm2", {"spec": REFUSED})
    await served.client.patch(INFERENCE_SERVICE, served.namespace, "smollm2", {"metadata": {"labels": {"a": "b"}}})


async def test_while_nobody_answers_the_policy_decides(served: Served) -> None:
    await served.register("Fail")

    async def refused() -> str:
        return await served.try_to_create(**REFUSED)

    await until(refused, "the webhook is in force")
    await served.webhook.stop()
    assert "failed calling webhook" in await served.try_to_create()
    await served.register("Ignore")

    async def open_again() -> bool:
        return await served.try_to_create(**REFUSED) == ""

    await until(open_again, "services are taken unchecked")


async def test_without_a_certificate_it_says_so(client: KubeClient, tmp_path: Path) -> None:
    webhook = Webhook(client, OperatorSettings(webhook_port=0, webhook_cert_dir=str(tmp_path)))
    with pytest.raises(WebhookUnusable, match="no certificate in"):
        await webhook.start()


def run(command: list[str], given: bytes = b"") -> str:
    """What a command prints; fails with what it complained of."""
    done = subprocess.run(command, input=given, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.skipif(bool(control_plane.missing_reason("helm")), reason=control_plane.missing_reason("helm") or "-")
async def test_the_charts_certificate_is_kept_through_upgrades_and_goes_with_the_chart(
    client: KubeClient, namespace: str, plane: ControlPlane
) -> None:
    helm = [str(control_plane.program("helm")), "--kubeconfig", str(plane.kubeconfig), "-n", namespace]
    values = ["--set", "webhook.enabled=true,crds.install=false,gateway.enabled=false,webhook.failurePolicy=Ignore"]
    chart, release = str(ROOT / "charts" / "octavo"), f"r{namespace[-6:]}"
    name = f"{release}-octavo-operator-webhook"
    secrets = Kind("v1", "Secret", "secrets")
    run([*helm, "install", release, chart, *values])
    try:
        first = await client.get(secrets, namespace, name)
        configuration = await client.get(CONFIGURATION, None, f"{name}.{namespace}")
        assert configuration["webhooks"][0]["clientConfig"]["caBundle"] == first["data"]["ca.crt"]
        run([*helm, "upgrade", release, chart, *values, "--set", "operator.logLevel=debug"])
        assert (await client.get(secrets, namespace, name))["data"] == first["data"]
        certificate = base64.b64decode(first["data"]["tls.crt"])
        shown = run(["openssl", "x509", "-noout", "-ext", "subjectAltName"], certificate)
        assert f"{name}.{namespace}.svc" in shown
    finally:
        run([*helm, "uninstall", release])
    assert await is_gone(client, secrets, namespace, name)
    assert await is_gone(client, CONFIGURATION, "", f"{name}.{namespace}")
