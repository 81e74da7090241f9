"""What `octavo up` shows: a live table on a terminal, one line for each change elsewhere (logs, CI)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live

from octavo_cli.local.table import ServiceRow, render

REFRESH_PER_S = 4


class Screen:
    """Shows the newest picture; `live` puts the table under everything printed, otherwise changes are lines."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=REFRESH_PER_S, transient=True) if live else None
        self._services: Sequence[ServiceRow] = ()
        self._paused = False

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to somebody else's text, such as an answer that streams; news wait."""
        if self._live is not None:
            self._live.stop()
        self._paused = True
        try:
            yield
        finally:
            self._paused = False
            if self._live is not None:
                self._live.start()

    def show(self, services: Sequence[ServiceRow], footer: str) -> None:
        """Take up a new picture."""
        if self._paused:
            return
        if self._live is not None:
            self._live.update(render(services, footer))
        else:
            for line in changes(self._services, services):
                self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._services = services


def changes(before: Sequence[ServiceRow], after: Sequence[ServiceRow]) -> list[str]:
    """What a reader of a log wants told: replicas that changed state or start-up phase, decisions that changed."""
    lines: list[str] = []
    old_services = {s.name: s for s in before}
    for service in after:
        old = old_services.get(service.name)
        old_replicas = {r.index: r for r in old.replicas} if old else {}
        for replica in service.replicas:
            was = old_replicas.pop(replica.index, None)
            news = (replica.phase, _phase_word(replica.detail))
            if was is None or news != (was.phase, _phase_word(was.detail)):
                detail = f" ({replica.detail})" if replica.detail else ""
                lines.append(f"{service.name} replica {replica.index}: {replica.phase}{detail}")
        lines.extend(f"{service.name} replica {index}: gone" for index in sorted(old_replicas))
        if old and service.desired != old.desired and service.decision:
            lines.append(f"{service.name}: {old.desired} -> {service.desired} replicas ({service.decision})")
    return lines


def _phase_word(detail: str) -> str:
    """`weights` of `weights 40%`: progress within a phase is no news in a log."""
    return detail.partition(" ")[0] if detail.endswith("%") else detail
