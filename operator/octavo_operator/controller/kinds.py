"""The kinds that the operator reads and writes."""

from __future__ import annotations

from octavo_operator.api.base import API_VERSION
from octavo_operator.controller.client import Kind
from octavo_operator.render.groups import LEADER_WORKER_SET_VERSION

INFERENCE_SERVICE = Kind(API_VERSION, "InferenceService", "inferenceservices")
SERVING_RUNTIME = Kind(API_VERSION, "ServingRuntime", "servingruntimes")
CLUSTER_SERVING_RUNTIME = Kind(API_VERSION, "ClusterServingRuntime", "clusterservingruntimes", namespaced=False)
MODEL_CACHE = Kind(API_VERSION, "ModelCache", "modelcaches")
INFERENCE_TENANT = Kind(API_VERSION, "InferenceTenant", "inferencetenants", namespaced=False)

DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
CONTROLLER_REVISION = Kind("apps/v1", "ControllerRevision", "controllerrevisions")
STATEFUL_SET = Kind("apps/v1", "StatefulSet", "statefulsets")
LEADER_WORKER_SET = Kind(LEADER_WORKER_SET_VERSION, "LeaderWorkerSet", "leaderworkersets")
POD = Kind("v1", "Pod", "pods")
EVENT = Kind("v1", "Event", "events")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
SELF_REVIEW = Kind("authentication.k8s.io/v1", "SelfSubjectReview", "selfsubjectreviews", namespaced=False)
POD_MONITOR = Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors")
JOB = Kind("batch/v1", "Job", "jobs")
CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")

# What a service owns and the operator keeps as rendered; watched by label.
CHILDREN = (
    Kind("v1", "ServiceAccount", "serviceaccounts"),
    Kind("v1", "ConfigMap", "configmaps"),
    Kind("v1", "Service", "services"),
    Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    DEPLOYMENT,
    STATEFUL_SET,
    CONTROLLER_REVISION,
    CLAIM,
    JOB,
)
OPTIONAL_CHILDREN = (LEADER_WORKER_SET,)  # kinds that a cluster need not have
_BY_NAME = {(k.api_version, k.kind): k for k in (*CHILDREN, *OPTIONAL_CHILDREN, POD_MONITOR)}


def kind_of(obj: dict[str, object]) -> Kind:
    """The kind of a rendered object."""
    return _BY_NAME[(str(obj["apiVersion"]), str(obj["kind"]))]
