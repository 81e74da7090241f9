"""Pure planning: a service and its runtime in, the processes to run out, for a cluster and for a laptop alike."""

from octavo_operator.plan.local import local_refusals
from octavo_operator.plan.planner import plan
from octavo_operator.plan.values import Facts, Plan, Unplannable, Workload

__all__ = ["Facts", "Plan", "Unplannable", "Workload", "local_refusals", "plan"]
