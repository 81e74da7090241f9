"""ModelCache: a model downloaded once per cluster and shared by every replica."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from octavo_operator.api.base import API_VERSION, Observed, Part, Rule
from octavo_operator.api.inference_service_status import Int64, Time
from octavo_operator.api.kubernetes import Condition, ObjectMeta, SecretKeyRef
from octavo_operator.api.model import StorageUri, storage_rules
from octavo_operator.api.operations import Scheduling
from octavo_operator.api.quantity import Quantity


class CacheStorage(Part):
    """The volume that holds the model."""

    size: Quantity
    """Size of the volume."""
    storage_class_name: Annotated[str, Field(max_length=253)] | None = None
    """StorageClass; the cluster's default when omitted."""
    access_mode: Annotated[str, Field(pattern="^(ReadWriteOnce|ReadWriteMany|ReadWriteOncePod)$")] = "ReadWriteMany"
    """ReadWriteMany for replicas on several nodes; ReadWriteOnce keeps them on one."""


class ModelCacheSpec(Part):
    """Which model is kept, and where."""

    rules = (
        *storage_rules("storageUri", lambda m: m.storage_uri),
        Rule(
            "self.storageUri == oldSelf.storageUri && self.revision == oldSelf.revision",
            "storageUri and revision cannot be changed; make another ModelCache",
            None,
            field="storageUri",
        ),
        Rule(
            "!self.storageUri.startsWith('pvc://')",
            "a model that is already on a volume needs no cache",
            lambda m: not m.storage_uri.startswith("pvc://"),
            field="storageUri",
        ),
    )

    storage_uri: StorageUri
    """Where the model is stored, such as hf://ORG/NAME."""
    revision: Annotated[str, Field(max_length=128)] = ""
    """Branch, tag or commit; the default branch when empty."""
    credentials_secret_ref: SecretKeyRef | None = None
    """Token or key to read the storage with."""
    storage: CacheStorage
    """The volume that holds the model."""
    scheduling: Scheduling = Scheduling()
    """On which nodes the download runs."""
    ttl_seconds_after_failure: Annotated[int, Field(ge=60, le=604_800)] = 600
    """Seconds after which a failed download is tried again."""


class ModelCacheStatus(Observed):
    """How far the download is."""

    observed_generation: Int64 | None = None
    """Generation that this status speaks of."""
    phase: str = "Pending"
    """Pending, Downloading, Ready or Failed."""
    claim_name: str = ""
    """PersistentVolumeClaim that holds the model."""
    path: str = ""
    """Path of the model within the volume."""
    bytes_total: Int64 | None = None
    """Size of the model's files."""
    bytes_done: Int64 | None = None
    """Bytes downloaded so far."""
    completion_time: Time | None = None
    """When the download finished."""
    conditions: Annotated[list[Condition], Field(max_length=8, json_schema_extra={"x-list-map-keys": ["type"]})] = []
    """Ready, and why not."""


class ModelCache(Part):
    """ModelCache downloads a model once and shares it with every replica of the services that refer to it."""

    api_version: Literal["serving.octavo.dev/v1alpha1"] = API_VERSION  # type: ignore[assignment]
    kind: Literal["ModelCache"] = "ModelCache"
    metadata: ObjectMeta
    spec: ModelCacheSpec
    """Which model is kept, and where."""
    status: ModelCacheStatus | None = None
    """How far the download is."""
