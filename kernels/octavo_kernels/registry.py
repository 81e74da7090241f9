"""How an op finds its implementation: one `Op` object per op, one list of backends per device.

The shape of it, for whoever adds a backend:

* `octavo_kernels/ops.py` declares every op once: `rms_norm = Op(norm.rms_norm)`. The reference function is the
  definition of truth; the op inherits its signature and docstring.
* A backend is a package `octavo_kernels.<name>` (`cpu`, `triton`). It is imported at the first dispatch on a device
  that lists it in `BACKENDS_BY_DEVICE`. At import it registers what it has:

      from octavo_kernels import ops
      from octavo_kernels.registry import BackendUnavailableError, describe_backend

      @ops.rms_norm.register("cpu", supports=lambda x, weight, eps: x.dtype in (torch.float32, torch.bfloat16))
      def rms_norm(x, weight, eps): ...

      describe_backend("cpu", "avx512_vnni, 2 threads")

  A backend that cannot work here (no compiled library, no CUDA) raises `BackendUnavailableError(reason)` at import;
  the reason is logged once and shown by `status()`.
* `supports(*args, **kwargs)` is asked at every call with the op's own arguments and must be cheap; without it the
  implementation takes everything. The first backend in order that supports the call runs it, `reference` at last.
* The device is that of the first argument, which therefore has a `.device` attribute in every op.
* `OCTAVO_KERNELS_BACKEND=reference` (or `triton,reference`, ...) overrides the order on every device;
  `use_backends("reference")` does so in a `with` block.
* A whole decoder step can be taken over too: see `octavo_kernels.step`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., Any])

REFERENCE = "reference"
BACKENDS_BY_DEVICE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("triton",)}
ENV_BACKEND = "OCTAVO_KERNELS_BACKEND"

_log = logging.getLogger(__name__)
_lock = threading.RLock()
_statuses: dict[str, BackendStatus] = {}
_ops: dict[str, Op[Any, Any]] = {}
_override: tuple[str, ...] | None = None


class BackendUnavailableError(Exception):
    """Raised by a backend's import when it cannot work on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Whether a backend is in use, and what it says about itself (or why it is not)."""

    name: str
    available: bool
    detail: str


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One line of `octavo doctor`: `state` is ok, warn or fail; `hint` says what to do about the latter two."""

    name: str
    state: str
    detail: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class OpChoice:
    """That `op` ran on `device` with `backend` at least once in this process."""

    op: str
    device: str
    backend: str


@dataclass(frozen=True, slots=True)
class _Implementation:
    backend: str
    function: Callable[..., Any]
    supports: Callable[..., bool] | None


class Op(Generic[P, R]):
    """One operation: its reference, the implementations of the backends, and the choice between them."""

    def __init__(self, reference: Callable[P, R]) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self._implementations: dict[str, _Implementation] = {}
        self._candidates: dict[str, tuple[_Implementation, ...]] = {}
        self._used: set[tuple[str, str]] = set()
        if self.name in _ops:
            raise ValueError(f"op {self.name!r} is declared twice")
        _ops[self.name] = self

    def register(self, backend: str, *, supports: Callable[..., bool] | None = None) -> Callable[[F], F]:
        """Decorator: the decorated function implements this op for `backend`."""

        def add(function: F) -> F:
            with _lock:
                self._implementations[backend] = _Implementation(backend, function, supports)
                self._candidates.clear()
            return function

        return add

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        chosen = self._choose(*args, **kwargs)
        used = (cast(Any, args[0]).device.type, chosen.backend)
        if used not in self._used:
            self._used.add(used)
            _log.info("op %s on %s runs on backend %s", self.name, *used)
        return cast(R, chosen.function(*args, **kwargs))

    def backend_for(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The backend that would run this call; nothing is computed."""
        return self._choose(*args, **kwargs).backend

    def _choose(self, *args: P.args, **kwargs: P.kwargs) -> _Implementation:
        device = cast(Any, args[0]).device.type
        candidates = self._candidates.get(device)
        if candidates is None:
            candidates = self._candidates[device] = self._order(device)
        for candidate in candidates:
            if candidate.supports is None or candidate.supports(*args, **kwargs):
                return candidate
        return candidates[-1]

    def _order(self, device: str) -> tuple[_Implementation, ...]:
        names = [name for name in backend_order(device) if name != REFERENCE and load_backend(name).available]
        found = [self._implementations[name] for name in names if name in self._implementations]
        return (*found, _Implementation(REFERENCE, self.reference, None))


def backend_order(device: str) -> tuple[str, ...]:
    """Backends tried on a device type, best first; the reference is always the last resort."""
    if _override is not None:
        return _override
    chosen = os.environ.get(ENV_BACKEND, "").strip()
    if chosen:
        return tuple(name.strip() for name in chosen.split(",") if name.strip())
    return BACKENDS_BY_DEVICE.get(device, ())


def load_backend(name: str) -> BackendStatus:
    """Import a backend once; a backend that cannot work is reported, never raised."""
    with _lock:
        known = _statuses.get(name)
        if known is not None and known.detail != _LOADING:
            return known
        if known is not None:  # the backend's own import dispatches an op: it is not there yet
            return BackendStatus(name, False, _LOADING)
        _statuses[name] = BackendStatus(name, True, _LOADING)
        status = _import_backend(name)
        _statuses[name] = status
        _log.info("kernel backend %s: %s (%s)", name, "loaded" if status.available else "not used", status.detail)
        return status


_LOADING = "loading"


def _import_backend(name: str) -> BackendStatus:
    module = f"{__package__}.{name}"
    if name == REFERENCE or importlib.util.find_spec(module) is None:
        available = name == REFERENCE
        return BackendStatus(name, available, "plain torch" if available else f"there is no package {module}")
    try:
        importlib.import_module(module)
    except BackendUnavailableError as error:
        return BackendStatus(name, False, str(error))
    except ImportError as error:
        return BackendStatus(name, False, f"cannot be imported: {error}")
    described = _statuses[name].detail
    return BackendStatus(name, True, "loaded" if described == _LOADING else described)


def describe_backend(name: str, detail: str) -> None:
    """Say what a backend chose on this machine (instruction set, threads); shown by `status()`."""
    with _lock:
        _statuses[name] = BackendStatus(name, True, detail)


def status(device: str) -> list[BackendStatus]:
    """The backends a device would use, in order, loading them if need be."""
    return [load_backend(name) for name in dict.fromkeys((*backend_order(device), REFERENCE))]


def describe_backends() -> list[BackendRow]:
    """Every backend this machine's devices would use and why another is not used, in order of preference."""
    devices = [device for device in BACKENDS_BY_DEVICE if device != "cuda" or torch.cuda.is_available()]
    return [_row(device, found) for device in devices for found in status(device)]


def _row(device: str, found: BackendStatus) -> BackendRow:
    name = f"{found.name} ({device})"
    if found.available:
        return BackendRow(name, "ok", found.detail)
    return BackendRow(name, "warn", found.detail, _HINTS.get(found.name, "") + "models still run, on slower kernels")


_HINTS = {
    "cpu": "reinstall Octavo where CMake and a C++ compiler are present; ",
    "triton": "pip install 'octavo[gpu]'; ",
}


def choices() -> list[OpChoice]:
    """Which backend each op has run on so far, sorted."""
    return sorted(
        (OpChoice(op.name, device, backend) for op in _ops.values() for device, backend in op._used),
        key=lambda choice: (choice.op, choice.device, choice.backend),
    )


def operations() -> dict[str, Op[Any, Any]]:
    """Every declared op by name."""
    return dict(_ops)


@contextlib.contextmanager
def use_backends(*names: str) -> Iterator[None]:
    """Try only these backends (then the reference) on every device inside the block. Not for concurrent use."""
    global _override
    previous, _override = _override, names
    _forget_candidates()
    try:
        yield
    finally:
        _override = previous
        _forget_candidates()


def _forget_candidates() -> None:
    for op in _ops.values():
        op._candidates.clear()
