"""What the operator remembers of a service between looks; all of it can be lost without harm."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo_operator.adapters import AdapterView
from octavo_operator.autoscale.decide import Decision
from octavo_operator.autoscale.observer import Capacity
from octavo_operator.canary import News, Trial
from octavo_operator.canary_meter import CanaryMeter
from octavo_operator.groups import GroupMemory
from octavo_operator.judgement import Scaling
from octavo_operator.plan import Plan
from octavo_operator.routes import RouteView
from octavo_operator.status import HISTORY_LENGTH


@dataclass
class ServiceState:
    """Set by the reconciler and the loops beside it."""

    plan: Plan | None = None
    decision: Decision | None = None
    replicas: int | None = None  # the autoscaler's number
    scalings: tuple[Scaling, ...] = ()  # newest first
    untold_scalings: int = 0
    told_numbers: tuple[object, ...] = ()  # of decision and capacity that the status was last asked to show
    revision: str = ""  # of the pods that are wanted
    capacity: Capacity = field(default_factory=Capacity)
    route: RouteView | None = None
    adapters: tuple[AdapterView, ...] | None = None  # None until the replicas were asked
    adapters_loading: bool = False
    trial: Trial | None = None
    meter: CanaryMeter = field(default_factory=CanaryMeter)
    wanted: int | None = None  # replicas of the whole service, those of a canary among them
    untold: tuple[News, ...] = ()
    groups: GroupMemory = field(default_factory=GroupMemory)
    status_written: float = 0.0
    conditions: dict[str, tuple[str, str]] = field(default_factory=dict)  # type to (status, reason) last told

    def scaled(self, scaling: Scaling) -> None:
        """Remember a change for the status, and that its Event is still to be written."""
        self.scalings = (scaling, *self.scalings)[:HISTORY_LENGTH]
        self.untold_scalings = min(self.untold_scalings + 1, HISTORY_LENGTH)
