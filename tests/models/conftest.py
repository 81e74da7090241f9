"""These tests are about the definition of truth: plain torch, whatever faster kernels this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from octavo_kernels.registry import use_backends


@pytest.fixture(autouse=True, scope="module")
def plain_torch() -> Iterator[None]:
    """Run every op on the reference backend."""
    with use_backends("reference"):
        yield
