"""An op finds the first backend that takes the call, and says which one ran."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from octavo_kernels import registry
from octavo_kernels.registry import Op, describe_backends, use_backends


@pytest.fixture
def doubled() -> Iterator[Op[[torch.Tensor], str]]:
    """A throw-away op that says who ran it."""

    def throwaway(x: torch.Tensor) -> str:
        return "reference"

    op = Op(throwaway)
    yield op
    del registry._ops[op.name]


@pytest.fixture
def fast_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry._statuses, "fast", registry.BackendStatus("fast", True, "made up"))
    return "fast"


def test_the_reference_runs_where_nobody_else_can(doubled: Op[[torch.Tensor], str]) -> None:
    assert doubled(torch.zeros(1)) == "reference"
    assert doubled.backend_for(torch.zeros(1)) == "reference"


def test_a_backend_that_supports_the_call_runs_it(doubled: Op[[torch.Tensor], str], fast_backend: str) -> None:
    doubled.register(fast_backend, supports=lambda x: x.dtype == torch.float32)(lambda x: "fast")

    with use_backends(fast_backend):
        assert doubled(torch.zeros(1)) == "fast"
        assert doubled(torch.zeros(1, dtype=torch.int8)) == "reference"
        assert doubled.backend_for(torch.zeros(1)) == "fast"
    assert doubled(torch.zeros(1)) == "reference"


def test_which_backend_ran_is_remembered(doubled: Op[[torch.Tensor], str]) -> None:
    doubled(torch.zeros(1))

    assert registry.OpChoice("throwaway", "cpu", "reference") in registry.choices()


def test_the_environment_overrides_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_override", None)
    monkeypatch.setenv(registry.ENV_BACKEND, "triton, reference")

    assert registry.backend_order("cpu") == ("triton", "reference")


def test_an_unknown_backend_is_reported_and_never_raised() -> None:
    status = registry.load_backend("abacus")

    assert not status.available
    assert "abacus" in status.detail


def test_declaring_an_op_twice_is_refused(doubled: Op[[torch.Tensor], str]) -> None:
    with pytest.raises(ValueError, match="declared twice"):
        Op(doubled.reference)


def test_every_backend_of_this_machine_is_described() -> None:
    rows = describe_backends()

    assert any(row.name == "reference (cpu)" and row.state == "ok" for row in rows)
    assert all(row.state in ("ok", "warn", "fail") for row in rows)
    assert all(row.hint for row in rows if row.state != "ok")
