"""A new revision on trial beside the one that serves: when it gets more, when it takes over, when it goes. Pure.

Each step begins once its replicas are ready, lasts its pause, and is judged all along. What is known is small enough
for the status, so a trial survives the operator.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace

from octavo_operator.api.operations import Canary, CanaryAnalysis
from octavo_operator.autoscale.metrics import Histogram

MIN_FIRST_BYTES = 50  # of each revision, before their medians are compared
CONFIDENCE_Z = 1.96


class Phase(enum.StrEnum):
    """Where a trial is."""

    STARTING = "Starting"  # the replicas of the step are not ready yet
    RUNNING = "Running"
    PROMOTING = "Promoting"  # the service's own replicas are being replaced
    ROLLED_BACK = "RolledBack"


@dataclass(frozen=True)
class Trial:
    """One revision on trial. `since` is when the phase began, in Unix seconds."""

    revision: str
    phase: Phase
    step: int
    since: float
    failing: str = ""  # why it does not go on


@dataclass(frozen=True)
class TrackCounts:
    """How one revision fared since the step began."""

    requests: float = 0.0
    errors: float = 0.0
    first_byte: Histogram = field(default_factory=Histogram)

    def plus(self, other: TrackCounts) -> TrackCounts:
        """Both together."""
        return TrackCounts(
            self.requests + other.requests, self.errors + other.errors, self.first_byte.plus(other.first_byte)
        )


@dataclass(frozen=True)
class TrialView:
    """What is seen. `replicas` is the number that the whole service wants; `fault` says why the canary cannot run."""

    wanted: str
    stable: str
    replicas: int
    stable_ready: int
    canary_ready: int = 0
    fault: str = ""
    promoted: bool = False  # every replica of the service is of the wanted revision
    stable_counts: TrackCounts = field(default_factory=TrackCounts)
    canary_counts: TrackCounts = field(default_factory=TrackCounts)


def advance(trial: Trial | None, view: TrialView, canary: Canary, now: float) -> Trial | None:
    """The trial after this look; None when there is none, or it is over."""
    if trial is None or trial.revision != view.wanted:
        return _begin(view, now)
    if trial.phase is Phase.PROMOTING:
        return None if view.promoted else trial
    if view.stable in ("", view.wanted):
        return None  # the spec went back to what serves, or that is gone
    if trial.phase is Phase.ROLLED_BACK:
        return trial
    failing = view.fault or (judge(view, canary.analysis) if trial.phase is Phase.RUNNING else "")
    if failing and canary.rollback_on_failure:
        return Trial(trial.revision, Phase.ROLLED_BACK, trial.step, now, failing)
    step = min(trial.step, len(canary.steps) - 1)  # the spec may have fewer steps by now
    trial = replace(trial, step=step, failing=failing)
    if trial.phase is Phase.STARTING:
        ready = view.replicas > 0 and view.canary_ready >= canary_replicas(canary.steps[step].weight, view.replicas)
        return replace(trial, phase=Phase.RUNNING, since=now) if ready else trial
    if view.replicas == 0:
        return replace(trial, phase=Phase.STARTING, since=now)  # asleep: nothing can be learned
    if failing or now - trial.since < canary.steps[step].pause_seconds:
        return trial
    if step + 1 == len(canary.steps):
        return replace(trial, phase=Phase.PROMOTING, since=now)
    return replace(trial, phase=Phase.STARTING, step=step + 1, since=now)


def _begin(view: TrialView, now: float) -> Trial | None:
    """A trial of the wanted revision; none without a revision that serves and could be compared with."""
    if view.stable in ("", view.wanted) or not view.stable_ready or not view.replicas:
        return None
    return Trial(view.wanted, Phase.STARTING, 0, now)


def canary_weight(trial: Trial, canary: Canary) -> int:
    """Percent of requests for the revision on trial: a step's weight counts once its replicas are ready."""
    last = len(canary.steps) - 1
    match trial.phase:
        case Phase.STARTING:
            return canary.steps[min(trial.step, last + 1) - 1].weight if trial.step else 0
        case Phase.RUNNING:
            return canary.steps[min(trial.step, last)].weight
        case Phase.PROMOTING:
            return canary.steps[last].weight
        case Phase.ROLLED_BACK:
            return 0


def canary_replicas(weight: int, replicas: int) -> int:
    """Replicas for that percent of a service of so many."""
    return max(1, math.ceil(weight * replicas / 100)) if replicas else 0


def split_replicas(trial: Trial, canary: Canary, replicas: int) -> tuple[int, int]:
    """(of the service itself, of the canary). The former shrinks only with the requests that it gets."""
    weight = canary_weight(trial, canary)
    if trial.phase is Phase.ROLLED_BACK:
        return replicas, 0
    if trial.phase is Phase.PROMOTING:
        return replicas, canary_replicas(weight, replicas)
    coming = canary.steps[min(trial.step, len(canary.steps) - 1)].weight
    stable = max(1, math.ceil((100 - weight) * replicas / 100)) if replicas else 0
    return stable, canary_replicas(coming, replicas)


def judge(view: TrialView, analysis: CanaryAnalysis) -> str:
    """Why the revision on trial is worse than allowed; empty when it is not, or too little is known to say.

    The error rate must be above its limit with 95 % confidence (lower bound of Wilson's interval), so that one early
    failure ends no trial.
    """
    counts = view.canary_counts
    limit = float(analysis.max_error_rate)
    if counts.requests and _lower_bound(counts.errors, counts.requests) > limit:
        rate = counts.errors / counts.requests
        return f"{rate:.1%} of {counts.requests:.0f} requests failed; analysis.maxErrorRate is {limit:.1%}"
    new, old = counts.first_byte, view.stable_counts.first_byte
    if new.count < MIN_FIRST_BYTES or old.count < MIN_FIRST_BYTES:
        return ""
    new_median, old_median = new.quantile(0.5), old.quantile(0.5)
    ratio = float(analysis.max_ttft_ratio)
    if new_median and old_median and new_median > ratio * old_median:
        return (
            f"the median time to the first byte is {new_median:.3f} s beside {old_median:.3f} s; "
            f"analysis.maxTTFTRatio is {ratio:g}"
        )
    return ""


def _lower_bound(errors: float, requests: float) -> float:
    """Lower end of Wilson's score interval for a share."""
    z2 = CONFIDENCE_Z**2
    share = errors / requests
    centre = share + z2 / (2 * requests)
    spread = CONFIDENCE_Z * math.sqrt(share * (1 - share) / requests + z2 / (4 * requests**2))
    return (centre - spread) / (1 + z2 / requests)


@dataclass(frozen=True)
class News:
    """Something that people should hear of a trial."""

    reason: str
    message: str
    warning: bool = False


def news(before: Trial | None, after: Trial | None, canary: Canary | None) -> News | None:
    """What happened between two looks."""
    if after is None or canary is None:
        if before is None or before.phase is Phase.ROLLED_BACK:
            return None
        done = before.phase is Phase.PROMOTING
        reason = "CanaryPromoted" if done else "CanaryEnded"
        return News(reason, f"revision {before.revision} " + ("has taken over" if done else "is on trial no longer"))
    if before is not None and (before.revision, before.phase, before.step) == (after.revision, after.phase, after.step):
        return None
    match after.phase:
        case Phase.STARTING if after.step == 0:
            return News("CanaryStarted", f"revision {after.revision} starts beside the one that serves")
        case Phase.RUNNING:
            weight = canary_weight(after, canary)
            return News("CanaryStep", f"revision {after.revision} gets {weight} % of the requests")
        case Phase.PROMOTING:
            return News("CanaryPromoting", f"revision {after.revision} has passed every step and takes over")
        case Phase.ROLLED_BACK:
            return News("CanaryRolledBack", f"revision {after.revision} is taken back: {after.failing}", warning=True)
    return None
