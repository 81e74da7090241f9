"""Batch-invariant mode: a token's result does not depend, bit for bit, on what else is in the batch.

Off by default because it gives up splitting over keys and the fastest matrix products. On with
`OCTAVO_KERNELS_BATCH_INVARIANT=1`, or inside `batch_invariant_mode()`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

ENV_BATCH_INVARIANT = "OCTAVO_KERNELS_BATCH_INVARIANT"

_batch_invariant = os.environ.get(ENV_BATCH_INVARIANT, "") in ("1", "true")


def batch_invariant() -> bool:
    """Whether kernels must sum every row in an order that depends on the row alone."""
    return _batch_invariant


@contextlib.contextmanager
def batch_invariant_mode(on: bool = True) -> Iterator[None]:
    """Switch the mode inside a `with` block. Not for concurrent use."""
    global _batch_invariant
    previous, _batch_invariant = _batch_invariant, on
    try:
        yield
    finally:
        _batch_invariant = previous
