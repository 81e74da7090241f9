"""The Helm chart: its values against their schema, and what it renders where `helm` is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from octavo_operator.controller.client import Kind
from octavo_operator.controller.engine_room import OWN_KINDS
from octavo_operator.controller.kinds import (
    CHILDREN,
    INFERENCE_SERVICE,
    INFERENCE_TENANT,
    LEASE,
    MODEL_CACHE,
    OPTIONAL_CHILDREN,
)

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts" / "octavo"
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
EVERYTHING = (
    "gateway.tenants.enabled=true,gateway.ingress.enabled=true,monitoring.serviceMonitor.enabled=true,"
    "monitoring.prometheusRule.enabled=true,monitoring.dashboards.enabled=true,gateway.workers=2,"
    "gateway.ledger.secretName=ledger,gateway.redis.secretName=redis,gateway.admin.secretName=admin,"
    "gateway.prices.small.input=1,gateway.prices.small.output=4"  # --set makes text of 0.1; a values file does not
)
needs_helm = pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed: the chart is not rendered")


def helm_template(values: str = "", *flags: str) -> list[dict[str, Any]]:
    command = ["helm", "template", "octavo", str(CHART), "-n", "octavo-system", *flags]
    if values:
        command += ["--set", values]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [document for document in yaml.safe_load_all(output) if document]


def test_the_default_values_are_valid_and_unknown_ones_are_refused() -> None:
    jsonschema.validate(VALUES, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**VALUES, "operater": {}}, SCHEMA)


def test_the_schema_knows_exactly_the_values_there_are() -> None:
    def known(schema: dict[str, Any], path: str = "") -> set[str]:
        while "$ref" in schema:
            schema = SCHEMA["definitions"][schema["$ref"].rsplit("/", 1)[1]]
        found = {path}
        for name, child in schema.get("properties", {}).items():
            found |= known(child, f"{path}.{name}")
        return found

    def sections(value: Any, path: str = "") -> set[str]:
        if not isinstance(value, dict):
            return set()
        below = {f"{path}.{k}" for k in value}
        return below | {deep for k, v in value.items() for deep in sections(v, f"{path}.{k}")}

    free = (".nodeSelector.", ".resources.", ".labels.", ".annotations.", ".podAnnotations.", ".affinity.")
    missing = {p for p in sections(VALUES) - known(SCHEMA) if not any(word in p + "." for word in free)}
    assert missing == set()


def test_alert_rules_are_complete() -> None:
    (group,) = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= rule["annotations"].keys()


@needs_helm
def test_the_chart_passes_lint() -> None:
    subprocess.run(["helm", "lint", "--strict", str(CHART)], check=True, capture_output=True)


@needs_helm
def test_the_default_install_needs_no_crds_of_others() -> None:
    groups = {document["apiVersion"].partition("/")[0] for document in helm_template()}
    assert groups <= {"v1", "apps", "policy", "rbac.authorization.k8s.io", "networking.k8s.io", "apiextensions.k8s.io"}


@needs_helm
def test_crds_are_installed_kept_and_can_be_left_out() -> None:
    crds = [d for d in helm_template() if d["kind"] == "CustomResourceDefinition"]
    assert len(crds) == 5
    assert all(c["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for c in crds)
    assert [d for d in helm_template("crds.install=false") if d["kind"] == "CustomResourceDefinition"] == []


@needs_helm
@pytest.mark.parametrize("values", ["", EVERYTHING, "operator.namespaces={a,b}"])
def test_no_role_has_wildcards_escalation_or_cluster_wide_secrets(values: str) -> None:
    for document in helm_template(values):
        if document["kind"] not in ("Role", "ClusterRole"):
            continue
        for rule in document["rules"]:
            words = {*rule.get("resources", []), *rule["verbs"], *rule.get("apiGroups", [])}
            assert not words & {"*", "escalate", "bind", "impersonate"}, document["metadata"]["name"]
            if "secrets" in rule.get("resources", []):
                assert document["kind"] == "Role"
                assert document["metadata"]["namespace"] == "octavo-system"


@needs_helm
def test_a_namespaced_install_has_no_cluster_role_that_writes() -> None:
    for document in helm_template("operator.namespaces={a,b},gateway.enabled=false"):
        if document["kind"] == "ClusterRole" and "aggregate" not in json.dumps(document["metadata"]):
            verbs = {verb for rule in document["rules"] for verb in rule["verbs"]}
            assert verbs <= {"get", "list", "watch"}


@needs_helm
def test_pods_are_restricted_and_limited() -> None:
    for document in helm_template(EVERYTHING):
        if document["kind"] == "Deployment":
            spec = document["spec"]["template"]["spec"]
        elif document["kind"] == "Pod":
            spec = document["spec"]
        else:
            continue
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


@needs_helm
def test_the_gateway_outlives_its_drain() -> None:
    (gateway,) = [d for d in helm_template() if d["kind"] == "Deployment" and "gateway" in d["metadata"]["name"]]
    spec = gateway["spec"]["template"]["spec"]
    sleep = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > sleep + VALUES["gateway"]["drainSeconds"]


@needs_helm
def test_a_misspelled_value_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        helm_template("operator.replica=3")
    assert "replica" in refused.value.stderr


@needs_helm
@pytest.mark.parametrize("component", ["operator", "gateway"])
def test_arguments_are_ones_the_command_knows(component: str) -> None:
    from typer.main import get_command

    from octavo_cli.main import build_app

    command = get_command(build_app(component)).commands[component]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for document in helm_template(EVERYTHING + ",operator.namespaces={a}"):
        if document["kind"] == "Deployment" and document["metadata"]["name"].endswith(component):
            args = document["spec"]["template"]["spec"]["containers"][0]["args"]
            assert {arg.partition("=")[0] for arg in args} <= known


@needs_helm
def test_the_gateway_gets_its_secrets_as_environment_and_a_bounded_spool() -> None:
    (deployment,) = [
        document
        for document in helm_template(EVERYTHING)
        if document["kind"] == "Deployment" and "gateway" in document["metadata"]["name"]
    ]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    by_name = {entry["name"]: entry for entry in container["env"]}

    for name, secret in (("LEDGER_URL", "ledger"), ("REDIS_URL", "redis"), ("ADMIN_TOKEN", "admin")):
        assert by_name[f"OCTAVO_GATEWAY_{name}"]["valueFrom"]["secretKeyRef"]["name"] == secret
    assert int(by_name["OCTAVO_GATEWAY_LEDGER_SPOOL_BYTES"]["value"]) == 2 * 2**30 * 9 // 20
    assert {"--workers=2", "--ledger=/spool", "--admin-port=9091"} <= set(container["args"])
    assert {"name": "spool", "emptyDir": {"sizeLimit": "2Gi"}} in pod["volumes"]
    assert {"--config=/etc/octavo/gateway.yaml"} <= set(container["args"])
    assert not any("url" in argument for argument in container["args"])


@needs_helm
def test_one_gateway_alone_keeps_files_and_batches() -> None:
    (deployment,) = [
        document
        for document in helm_template("gateway.batches.claimName=batches,gateway.replicas=1")
        if document["kind"] == "Deployment" and "gateway" in document["metadata"]["name"]
    ]
    pod = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}, "a volume of one node is not shared while it moves"
    assert "--batch-folder=/batches" in pod["containers"][0]["args"]
    assert {"name": "batches", "persistentVolumeClaim": {"claimName": "batches"}} in pod["volumes"]
    assert {"name": "batches", "mountPath": "/batches"} in pod["containers"][0]["volumeMounts"]
    assert pod["securityContext"]["fsGroup"]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        helm_template("gateway.batches.claimName=batches,gateway.replicas=2")
    assert "set gateway.replicas to 1" in refused.value.stderr


@needs_helm
def test_the_webhook_is_off_unless_asked_for_and_then_trusts_the_certificate_it_serves() -> None:
    assert not any("webhook" in json.dumps(d["metadata"]["name"]) for d in helm_template())
    by_kind = {d["kind"]: d for d in helm_template("webhook.enabled=true") if "webhook" in d["metadata"]["name"]}
    secret, configuration = by_kind["Secret"], by_kind["ValidatingWebhookConfiguration"]
    (webhook,) = configuration["webhooks"]
    assert webhook["failurePolicy"] == "Ignore"
    assert webhook["clientConfig"]["caBundle"] == secret["data"]["ca.crt"]
    assert webhook["clientConfig"]["service"]["name"] == by_kind["Service"]["metadata"]["name"]
    (operator,) = [
        d
        for d in helm_template("webhook.enabled=true")
        if d["kind"] == "Deployment" and "operator" in d["metadata"]["name"]
    ]
    (volume,) = [v for v in operator["spec"]["template"]["spec"]["volumes"] if v["name"] == "webhook"]
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]


@needs_helm
def test_a_certificate_of_ones_own_takes_the_place_of_the_charts() -> None:
    own = "webhook.enabled=true,webhook.tls.secretName=mine,webhook.tls.caBundle=Q0E=,webhook.failurePolicy=Fail"
    documents = helm_template(own)
    assert not [d for d in documents if d["kind"] == "Secret" and "webhook" in d["metadata"]["name"]]
    (configuration,) = [d for d in documents if d["kind"] == "ValidatingWebhookConfiguration"]
    assert configuration["webhooks"][0]["clientConfig"]["caBundle"] == "Q0E="
    assert configuration["webhooks"][0]["failurePolicy"] == "Fail"


def _granted(documents: list[dict[str, Any]], name: str) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of every role of this name or whose name begins with it."""
    return {
        (group, resource, verb)
        for document in documents
        if document["kind"] in ("Role", "ClusterRole") and document["metadata"]["name"].startswith(name)
        for rule in document["rules"]
        for group in rule["apiGroups"]
        for resource in rule.get("resources", [])
        for verb in rule["verbs"]
    }


@needs_helm
@pytest.mark.parametrize("values", ["", "operator.namespaces={a}"])
def test_the_operator_may_do_all_that_it_does(values: str) -> None:
    granted = _granted(helm_template(values), "octavo-operator")

    def group(kind: Kind) -> str:
        return kind.api_version.rpartition("/")[0]

    wanted = {
        (group(kind), kind.plural, verb)
        for kind in (*CHILDREN, *OPTIONAL_CHILDREN)
        for verb in ("list", "watch", "patch", "create", "delete")
    }
    wanted |= {(group(kind), kind.plural, verb) for kind in OWN_KINDS for verb in ("list", "watch")}
    wanted |= {("", "pods", verb) for verb in ("list", "watch", "patch", "delete")}
    wanted |= {(group(kind), f"{kind.plural}/status", "patch") for kind in (INFERENCE_SERVICE, MODEL_CACHE)}
    wanted |= {("", "events", "create")} | {(group(LEASE), LEASE.plural, verb) for verb in ("get", "create", "update")}
    if not values:
        wanted.add((group(INFERENCE_TENANT), "inferencetenants/status", "patch"))
    assert wanted - granted == set()
