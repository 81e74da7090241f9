"""The two lines the ledger knows of a request: that it began, and how it ended."""

from __future__ import annotations

import msgspec


class Begun(msgspec.Struct, frozen=True, kw_only=True, tag="begun"):
    """A request was sent to a replica. Without its `UsageRecord` the gateway died meanwhile."""

    id: str  # the gateway's own, never the client's
    request_id: str
    tenant: str
    key: str
    model: str
    adapter: str
    path: str
    started_at: float  # Unix seconds
    prompt_tokens: int  # estimated


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    """How a request ended. `estimated`: the engine's own count did not arrive (cancelled, cut off)."""

    id: str
    request_id: str
    tenant: str
    key: str
    model: str
    adapter: str
    path: str
    started_at: float
    duration_s: float
    time_to_first_byte_s: float
    outcome: str  # ok, refused, failed, cancelled, interrupted
    status: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    estimated: bool
    cost: float


def interrupted(begun: Begun) -> UsageRecord:
    """The end of a request of which nothing more can be known."""
    return UsageRecord(
        id=begun.id,
        request_id=begun.request_id,
        tenant=begun.tenant,
        key=begun.key,
        model=begun.model,
        adapter=begun.adapter,
        path=begun.path,
        started_at=begun.started_at,
        duration_s=0.0,
        time_to_first_byte_s=0.0,
        outcome="interrupted",
        status=0,
        prompt_tokens=begun.prompt_tokens,
        cached_tokens=0,
        output_tokens=0,
        estimated=True,
        cost=0.0,
    )
