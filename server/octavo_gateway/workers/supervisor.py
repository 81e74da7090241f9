"""The parent of a gateway's workers: forks them, replaces those that die, drains them on a signal.

It opens the sockets and nothing else: no event loop, no thread, so that forking stays safe at any time. Each worker
has a listening socket of its own on the shared port. The parent holds all of them, so that a connection to a worker
that has just died waits for the next one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from octavo_gateway.listeners import Listeners
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.workers.peers import metrics_file, pid_file
from octavo_gateway.workers.seat import Seat

log = logging.getLogger("octavo.gateway.workers")

SHORT_LIFE_S = 5.0
PAUSE_S = 1.0
"""How long after its birth a worker that lived for less than `SHORT_LIFE_S` is replaced."""

HUNG_S = 30.0
"""How long a worker may go without keeping its metrics, which it does every two seconds, before it is replaced."""

BEYOND_DRAIN_S = 20.0
TICK_S = 0.5

Serve = Callable[[Seat], int]


def run_workers(settings: GatewaySettings, serve: Serve, say: Callable[[str], None]) -> int:
    """Run `serve(seat)` in `settings.workers` processes until a signal; returns the exit code.

    The first signal drains them, a second one ends them at once. Raises `ConfigError` for an address that is taken.
    """
    folder = Path(tempfile.mkdtemp(prefix="octavo-gateway-"))
    try:
        return _Supervisor(settings, Listeners.bind_for_workers(settings), folder, serve, say).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Supervisor:
    def __init__(
        self,
        settings: GatewaySettings,
        listeners: list[Listeners],
        folder: Path,
        serve: Serve,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._folder = folder
        self._serve = serve
        self._say = say
        self._life = os.pipe()  # nobody writes; workers see its end when this process is gone
        self._news = os.pipe()
        self._wakeup = os.pipe()
        self._seats: dict[int, int] = {}  # index by pid
        self._born: dict[int, float] = {}  # by index
        self._due: dict[int, float] = {}  # when the worker of an index is to be started
        self._signals = 0
        self._num_ready = 0
        self._kill_at: float | None = None
        self._exit_code = 0

    def run(self) -> int:
        for end in (*self._news, *self._wakeup):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only wakes the loop
        self._due = dict.fromkeys(range(self._settings.workers), 0.0)
        with selectors.DefaultSelector() as selector:
            for end in (self._news[0], self._wakeup[0]):
                selector.register(end, selectors.EVENT_READ)
            while self._due or self._seats:
                self._start_due()
                for key, _ in selector.select(TICK_S):
                    self._read(key.fd)
                self._reap()
                self._end_hung()
                if self._kill_at is not None and time.monotonic() >= self._kill_at:
                    self._send(signal.SIGKILL)
        return self._exit_code

    def _start_due(self) -> None:
        for index in [index for index, at in self._due.items() if at <= time.monotonic()]:
            del self._due[index]
            self._start(index)

    def _start(self, index: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_worker(index)
        self._seats[pid] = index
        self._born[index] = time.monotonic()
        pid_file(self._folder, index).write_text(str(pid), encoding="ascii")
        if self._signals:  # one came while it was born
            self._send(signal.SIGTERM)

    def _become_worker(self, index: int) -> None:
        """In the child; does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.close(self._life[1])
            for other in self._listeners:
                if other is not self._listeners[index]:
                    other.public.close()
            own = Seat(index, len(self._listeners), self._folder, self._listeners[index], self._life[0], self._news[1])
            code = self._serve(own)
        except BaseException:
            log.exception("worker %d failed", index)
        finally:
            logging.shutdown()
            os._exit(code)

    def _read(self, end: int) -> None:
        with contextlib.suppress(BlockingIOError):
            found = os.read(end, 4_096)
            if end == self._news[0]:
                before, self._num_ready = self._num_ready, self._num_ready + len(found)
                if before < self._settings.workers <= self._num_ready:
                    self._introduce()

    def _introduce(self) -> None:
        first = self._listeners[0]
        self._say(f"octavo gateway listens at {first.address} with {self._settings.workers} workers")
        if first.admin_address:
            self._say(f"admin API at {first.admin_address}")

    def _reap(self) -> None:
        while self._seats:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            index = self._seats.pop(pid)
            pid_file(self._folder, index).unlink(missing_ok=True)
            self._on_end(index, os.waitstatus_to_exitcode(status))

    def _end_hung(self) -> None:
        for pid, index in self._seats.items():
            with contextlib.suppress(OSError):  # it has not kept any yet
                silent_s = time.time() - metrics_file(self._folder, pid).stat().st_mtime
                if silent_s > HUNG_S:
                    log.error("worker %d has done nothing for %.0f s; ending it", index, silent_s)
                    os.kill(pid, signal.SIGKILL)

    def _on_end(self, index: int, code: int) -> None:
        if self._signals:
            self._exit_code = self._exit_code or (code if code > 0 else 0)
            return
        if self._num_ready < self._settings.workers:  # what is wrong at the start does not mend by itself
            self._exit_code = code if code > 0 else 1
            self._stop()
            return
        lived_s = time.monotonic() - self._born[index]
        log.error("worker %d ended with %d after %.0f s; starting another", index, code, lived_s)
        self._due[index] = time.monotonic() + (PAUSE_S if lived_s < SHORT_LIFE_S else 0.0)

    def _on_signal(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self._signals += 1
        self._due.clear()
        settings = self._settings
        if self._signals == 1:
            self._kill_at = time.monotonic() + settings.drain_propagation + settings.drain_timeout + BEYOND_DRAIN_S
            self._send(signal.SIGTERM)
        else:
            self._exit_code = 130
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for pid in self._seats:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
