"""LoRA adapters on running replicas: what to load and unload where, and what to say of it. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

RETRY_FIRST_S = 5.0
RETRY_MAX_S = 300.0
_NOTHING: Mapping[str, str] = MappingProxyType({})


class AdapterState(enum.StrEnum):
    """How far an adapter is."""

    PENDING = "Pending"
    LOADED = "Loaded"
    FAILED = "Failed"


@dataclass(frozen=True)
class AdapterView:
    """One adapter over all replicas."""

    name: str
    state: AdapterState
    ready_replicas: int = 0
    message: str = ""


@dataclass(frozen=True)
class Holding:
    """What one ready replica holds. `ours` are paths by name that the operator once loaded there."""

    replica: str
    loaded: frozenset[str]
    ours: Mapping[str, str] = field(default_factory=lambda: _NOTHING)

    @property
    def current(self) -> Mapping[str, str]:
        """Paths by name of what the operator loaded and the engine still has: a restarted engine has nothing."""
        return {name: path for name, path in self.ours.items() if name in self.loaded}


class Action(enum.StrEnum):
    LOAD = "load"
    UNLOAD = "unload"


@dataclass(frozen=True)
class Step:
    """One call to one replica."""

    replica: str
    action: Action
    name: str
    path: str


def adapter_steps(wanted: Mapping[str, str], holdings: Iterable[Holding]) -> tuple[Step, ...]:
    """What brings every replica to hold exactly the wanted adapters; `wanted` are paths by name.

    An adapter that somebody else loaded, such as one from the command line, is neither unloaded nor replaced. One
    whose path changed is unloaded first.
    """
    steps: list[Step] = []
    for holding in holdings:
        current = holding.current
        for name, path in current.items():
            if wanted.get(name) != path:
                steps.append(Step(holding.replica, Action.UNLOAD, name, path))
        for name, path in wanted.items():
            if current.get(name) != path and (name in current or name not in holding.loaded):
                steps.append(Step(holding.replica, Action.LOAD, name, path))
    return tuple(steps)


@dataclass(frozen=True)
class Failure:
    """The last failed attempt of a step. `refused` when the engine said no, not merely nothing."""

    count: int
    again_at: float
    message: str
    refused: bool


@dataclass
class Attempts:
    """Which steps failed, so that they are tried later and later; what is no longer to do is forgotten."""

    failures: dict[Step, Failure] = field(default_factory=dict)

    def due(self, steps: Sequence[Step], now: float) -> tuple[Step, ...]:
        """The steps to try now; a replica's load waits for the unload of the same name."""
        self.failures = {step: failure for step, failure in self.failures.items() if step in steps}
        late = {(step.replica, step.name) for step, failure in self.failures.items() if failure.again_at > now}
        return tuple(step for step in steps if (step.replica, step.name) not in late)

    def failed(self, step: Step, now: float, message: str, *, refused: bool) -> None:
        """Remember a failure; the next attempt comes twice as late as the one before."""
        before = self.failures.get(step)
        count = before.count + 1 if before else 1
        pause_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** (count - 1))
        self.failures[step] = Failure(count, now + pause_s, message, refused)

    def succeeded(self, step: Step) -> None:
        self.failures.pop(step, None)


def adapter_views(
    wanted: Mapping[str, str], holdings: Sequence[Holding], ready: int, failures: Mapping[Step, Failure]
) -> tuple[AdapterView, ...]:
    """Every wanted adapter over the ready replicas; replicas that did not say what they hold count as without."""
    views = []
    for name, path in wanted.items():
        holders = sum(holding.current.get(name) == path or _is_foreign(name, holding) for holding in holdings)
        troubles = [(step, failure) for step, failure in failures.items() if step.name == name]
        refusal = next((f"{step.replica}: {f.message}" for step, f in troubles if f.refused), "")
        trouble = next((f"{step.replica}: {f.message}" for step, f in troubles), "")
        if refusal:
            state = AdapterState.FAILED
        else:
            state = AdapterState.LOADED if ready and holders == ready else AdapterState.PENDING
        views.append(AdapterView(name, state, holders, refusal or trouble))
    return tuple(views)


def _is_foreign(name: str, holding: Holding) -> bool:
    """Whether the replica has an adapter of this name that the operator did not load."""
    return name in holding.loaded and name not in holding.ours
