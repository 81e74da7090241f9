"""Names and labels that tie what is rendered to its service."""

from __future__ import annotations

from octavo_operator.api.base import GROUP
from octavo_operator.plan.values import Workload

SERVICE_LABEL = f"{GROUP}/inferenceservice"
TRACK_LABEL = f"{GROUP}/track"  # on pods of a revision that is on trial
CANARY = "canary"
REVISION_ANNOTATION = f"{GROUP}/revision"  # of the pod template that a workload was rendered with
ADAPTERS_ANNOTATION = f"{GROUP}/adapters"  # on a pod: paths by name of the LoRA adapters that were loaded there
COMPONENT = "app.kubernetes.io/component"
MANAGED_BY = "app.kubernetes.io/managed-by"
PART_OF = "app.kubernetes.io/part-of"
GROUP_LABEL = f"{GROUP}/group"  # on pods of replicas that span nodes: which replica they belong to
WORKER = "engine-worker"  # component of the pods of such replicas that do not serve
MANAGER = "octavo"
ENGINE_CONTAINER = "engine"
HTTP_PORT, GRPC_PORT = "http", "grpc"
KV_EVENTS_PORTS = {"kv-events": 5557, "kv-replay": 5558}  # by name; the numbers that vLLM's documents use


def selector(service: str) -> dict[str, str]:
    """Labels that select exactly the pods of a service. They can never change, since a Deployment's cannot."""
    return {SERVICE_LABEL: service, COMPONENT: "engine"}


def labels(workload: Workload) -> dict[str, str]:
    """Labels of every object of a service."""
    return {
        **selector(workload.service),
        "app.kubernetes.io/name": "octavo-engine",
        "app.kubernetes.io/instance": workload.service,
        MANAGED_BY: MANAGER,
        PART_OF: "octavo",
    }


def metadata(workload: Workload, name: str) -> dict[str, object]:
    """Metadata of an object of a service."""
    return {"name": name, "namespace": workload.namespace, "labels": labels(workload)}
