"""What the gateways count of a service's two revisions, summed over gateways from the beginning of a step. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo_operator.api.serving_runtime import MetricSource
from octavo_operator.autoscale.metrics import Histogram, Page, read_histogram
from octavo_operator.canary import TrackCounts, TrialView
from octavo_operator.faults import find_fault
from octavo_operator.observation import Observation

TRACK_METRICS = "octavo_gateway_track_"
REQUESTS, ERRORS = f"{TRACK_METRICS}requests_total", f"{TRACK_METRICS}errors_total"
FIRST_BYTE = f"{TRACK_METRICS}first_byte_seconds"
STABLE, CANARY = "stable", "canary"


@dataclass
class CanaryMeter:
    """Adds up what each gateway counted between two of its pages, so that one which restarts, goes or does not
    answer loses nothing but its own news."""

    step: tuple[str, int] = ("", -1)  # revision and step that the counts belong to
    stable: TrackCounts = field(default_factory=TrackCounts)
    canary: TrackCounts = field(default_factory=TrackCounts)
    _last: dict[str, Mapping[str, TrackCounts]] = field(default_factory=dict)

    def begin(self, revision: str, step: int) -> None:
        """Count anew for another step."""
        if self.step != (revision, step):
            self.step = (revision, step)
            self.stable = self.canary = TrackCounts()

    def add(self, pages: Mapping[str, Page], model: str, namespace: str) -> None:
        """Take up the newest pages, by gateway."""
        for gateway, page in pages.items():
            now = {track: _read(page, model, namespace, track) for track in (STABLE, CANARY)}
            before = self._last.get(gateway)
            if before is not None:
                self.stable = self.stable.plus(_since(now[STABLE], before[STABLE]))
                self.canary = self.canary.plus(_since(now[CANARY], before[CANARY]))
            self._last[gateway] = now


def trial_view(observation: Observation, wanted: str, replicas: int, meter: CanaryMeter) -> TrialView:
    """What a trial is judged by; `wanted` is the revision of the spec, `replicas` what the whole service wants."""
    deployment, ready = observation.deployment, observation.ready
    return TrialView(
        wanted=wanted,
        stable=deployment.revision if deployment else "",
        replicas=replicas,
        stable_ready=sum(not pod.canary for pod in ready),
        canary_ready=sum(pod.canary for pod in ready),
        fault=_fault(observation),
        promoted=deployment is not None and deployment.revision == wanted and not deployment.rolling,
        stable_counts=meter.stable,
        canary_counts=meter.canary,
    )


def _fault(observation: Observation) -> str:
    """Why the canary's pods will not serve without something changing; empty while they may."""
    canary = observation.canary
    if canary is not None and canary.deadline_exceeded:
        return "its replicas made no progress within spec.rollout.progressDeadlineSeconds"
    broken = tuple(pod for pod in observation.pods if pod.canary and pod.counts and pod.failing)
    fault = find_fault(Observation(canary, broken)) if broken else None
    if fault is None or all(pod.waiting_reason == "ErrImagePull" for pod in broken):  # the first try says little
        return ""
    return f"{fault.reason}: {fault.message}"


def _read(page: Page, model: str, namespace: str, track: str) -> TrackCounts:
    labels = {"model": model, "namespace": namespace, "track": track}

    def total(name: str) -> float:
        return sum(sample.value for sample in page.find(name, labels))

    first_byte = read_histogram([MetricSource(histogram=FIRST_BYTE, labels=labels)], page)
    return TrackCounts(total(REQUESTS), total(ERRORS), first_byte or Histogram())


def _since(now: TrackCounts, before: TrackCounts) -> TrackCounts:
    """What was added; everything, if the gateway began to count anew."""
    if now.requests < before.requests:
        return now
    return TrackCounts(
        now.requests - before.requests, max(0.0, now.errors - before.errors), now.first_byte.since(before.first_byte)
    )
