"""The live table of `octavo up`: services, their replicas and what the autoscaler last decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from octavo_cli.local.replica_set import Phase


@dataclass(frozen=True)
class ReplicaRow:
    """A replica. `kv` is a fraction; `tokens_per_s` counts generated tokens; `age_s` is time in the phase."""

    index: int
    phase: Phase
    address: str = ""
    pid: int | None = None
    waiting: int = 0
    running: int = 0
    kv: float = 0.0
    tokens_per_s: float = 0.0
    age_s: float = 0.0
    restarts: int = 0
    detail: str = ""


@dataclass(frozen=True)
class ServiceRow:
    """One InferenceService as shown; `held` counts requests the gateway keeps for it."""

    name: str
    model: str
    desired: int
    min_replicas: int
    max_replicas: int
    held: int
    decision: str
    replicas: Sequence[ReplicaRow]

    @property
    def ready(self) -> int:
        return sum(r.phase is Phase.READY for r in self.replicas)


_STYLE = {
    Phase.READY: "green",
    Phase.STARTING: "cyan",
    Phase.UNREADY: "yellow",
    Phase.DRAINING: "blue",
    Phase.BACK_OFF: "red",
}


def render(services: Sequence[ServiceRow], footer: str) -> RenderableType:
    """The whole picture: one table of all services and replicas, the latest decisions, a footer line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("service / replica", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for column in ("queue", "running", "KV use", "tokens/s", "age", "restarts"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", overflow="ellipsis", no_wrap=True, max_width=48)
    for service in services:
        _add_service(table, service)
    decisions = [Text(f"{s.name}: {s.decision}", style="dim", overflow="fold") for s in services if s.decision]
    return Group(table, *decisions, Text(footer, style="dim"))


def _add_service(table: Table, service: ServiceRow) -> None:
    ready = [r for r in service.replicas if r.phase is Phase.READY]
    kv = sum(r.kv for r in ready) / len(ready) if ready else 0.0
    style = "green" if service.ready >= service.desired else "yellow"
    table.add_row(
        Text(service.name, style="bold"),
        Text(f"{service.ready}/{service.desired} ready", style=style),
        str(service.held + sum(r.waiting for r in service.replicas)),
        str(sum(r.running for r in service.replicas)),
        f"{kv:.0%}",
        f"{sum(r.tokens_per_s for r in service.replicas):.0f}",
        "",
        "",
        Text(f"model {service.model}, {service.min_replicas} to {service.max_replicas} replicas", style="dim"),
    )
    for replica in service.replicas:
        table.add_row(
            f"  {replica.index}  {replica.address.removeprefix('http://')}",
            Text(replica.phase, style=_STYLE[replica.phase]),
            str(replica.waiting),
            str(replica.running),
            f"{replica.kv:.0%}",
            f"{replica.tokens_per_s:.0f}",
            duration(replica.age_s),
            str(replica.restarts) if replica.restarts else "",
            Text(replica.detail, style="dim"),
        )


def duration(seconds: float) -> str:
    """Seconds as kubectl shows ages: 45s, 12m, 3h, 2d."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"
