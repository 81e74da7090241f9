"""Lines of a usage ledger."""

from __future__ import annotations

from datetime import UTC, datetime

from octavo_gateway.usage import Begun, UsageRecord

AT = datetime(2026, 11, 21, tzinfo=UTC).timestamp()


def begun(number: int, tenant: str = "t") -> Begun:
    return Begun(
        id=f"id-{number}",
        request_id="r",
        tenant=tenant,
        key="k",
        model="m",
        adapter="",
        path="/v1",
        started_at=AT,
        prompt_tokens=3,
    )


def ended(number: int, tenant: str = "t", tokens: int = 10, outcome: str = "ok") -> UsageRecord:
    return UsageRecord(
        id=f"id-{number}", request_id="r", tenant=tenant, key="k", model="m", adapter="", path="/v1", started_at=AT,
        duration_s=1.0, time_to_first_byte_s=0.1, outcome=outcome, status=200, prompt_tokens=tokens, cached_tokens=2,
        output_tokens=tokens, estimated=False, cost=0.5,
    )  # fmt: skip
