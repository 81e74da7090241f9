"""Every test here runs on each instruction set that this processor has, from portable C++ up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from octavo_kernels import registry

# Without the library the modules here cannot even be imported; the fallback has its tests in kernels/reference.
collect_ignore_glob = [] if registry.load_backend("cpu").available else ["test_native_*.py"]


def _instruction_sets() -> tuple[str, ...]:
    if not registry.load_backend("cpu").available:
        return ()
    from octavo_kernels import cpu

    return cpu.available_instruction_sets()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", _instruction_sets() or ("none",), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set in use during the test, on a team of three threads."""
    status = registry.load_backend("cpu")
    if not status.available:
        pytest.skip(f"native CPU kernels: {status.detail}")
    from octavo_kernels import cpu

    threads = cpu.num_threads()
    cpu.set_num_threads(3)  # more than most machines of a test run: barriers and stealing under pressure
    yield cpu.select_instruction_set(request.param)
    cpu.select_instruction_set("")
    cpu.set_num_threads(threads)


@pytest.fixture
def native() -> None:
    """The native library is there."""
    status = registry.load_backend("cpu")
    if not status.available:
        pytest.skip(f"native CPU kernels: {status.detail}")
