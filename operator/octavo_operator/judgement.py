"""What is known of a service when its status is written. Plain values."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo_operator.adapters import AdapterView
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.autoscale.decide import Decision
from octavo_operator.autoscale.observer import Capacity
from octavo_operator.canary import Trial
from octavo_operator.observation import Observation
from octavo_operator.plan import Plan, Unplannable
from octavo_operator.routes import RouteView


@dataclass(frozen=True)
class Scaling:
    """One change of the number of replicas; `time` is Unix seconds."""

    time: float
    before: int
    after: int
    reason: str


@dataclass(frozen=True)
class Judgement:
    """What is known when a status is written. `plan` is None when the service could not be planned."""

    service: InferenceService
    plan: Plan | None
    refusal: Unplannable | None
    observation: Observation
    now: float
    gateway_url: str = ""
    decision: Decision | None = None
    apply_error: str = ""
    runtime_kind: str = "ClusterServingRuntime"
    scalings: tuple[Scaling, ...] = ()  # those since the operator started, newest first
    route: RouteView | None = None  # None until the gateways were asked
    capacity: Capacity = field(default_factory=Capacity)
    revision: str = ""  # of the pods that are wanted
    adapters: tuple[AdapterView, ...] | None = None  # None until the replicas were asked
    trial: Trial | None = None
    wanted: int | None = None  # replicas of the whole service; what its Deployment says when None

    def known_capacity(self) -> dict[str, Any]:
        """What was measured of these very pods, also before a restart of the operator; pods of another revision say
        nothing about them."""
        before: Mapping[str, Any] = self.previous().get("capacity") or {}
        if before.get("revision") != self.revision:
            before = {}
        capacity = {name: before[name] for name in ("kvTokensPerReplica", "maxConcurrencyAtMaxLen") if name in before}
        measured = self.capacity
        if measured.kv_tokens is not None:
            capacity["kvTokensPerReplica"] = measured.kv_tokens
            if self.max_model_len:
                capacity["maxConcurrencyAtMaxLen"] = measured.kv_tokens // self.max_model_len
        peak = max(measured.peak_tokens_per_minute, int(before.get("peakTokensPerMinute") or 0))
        if peak:
            capacity["peakTokensPerMinute"] = peak
        return {**capacity, "revision": self.revision} if capacity else {}

    @property
    def max_model_len(self) -> int | None:
        """Longest prompt plus answer of a request, in tokens; None where neither spec nor engine tells."""
        return self.service.spec.model.max_model_len or self.capacity.max_model_len

    def previous(self) -> Mapping[str, Any]:
        """The status that was written last."""
        if self.service.status is None:
            return {}
        return self.service.status.model_dump(by_alias=True, exclude_none=True, mode="json")


def timestamp(now: float) -> str:
    """Unix seconds as Kubernetes writes times."""
    return dt.datetime.fromtimestamp(int(now), tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
