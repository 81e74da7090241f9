"""Who asks, how urgently and until when: read from the headers that the gateway sets."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from opentelemetry.context import Context
from starlette.requests import Request

from octavo_server.errors import ApiError, bad_request
from octavo_server.limits import LIMITS
from octavo_server.prompt_prefix import NO_PREFIX, PREFIX_HEADER, PromptPrefix, prefix_from
from octavo_server.telemetry import context_from
from octavo_server.usage_log import Consumption

TENANT_HEADER = "x-octavo-tenant"
PRIORITY_HEADER = "x-octavo-priority"
DEADLINE_HEADER = "x-octavo-deadline-ms"
RESUMABLE_HEADER = "x-octavo-resumable"
_INTEGER = re.compile(r"[+-]?\d{1,12}")


@dataclass(frozen=True, slots=True)
class Caller:
    """One request's origin. `priority`: lower runs earlier; None leaves it to the body. `arrived_at`: monotonic s.

    `deadline_s` counts from arrival. `consumed` is where its tokens are counted.
    """

    tenant: str = ""
    priority: int | None = None
    deadline_s: float | None = None
    arrived_at: float = 0.0
    trace_context: Context | None = None
    prefix: PromptPrefix = NO_PREFIX
    may_resume: bool = False  # whoever forwards this answer goes on elsewhere if this replica dies
    consumed: Consumption = field(default_factory=Consumption, compare=False)

    def cache_salt(self, own_salt: str | None) -> str:
        """Salt of this request's prefix-cache keys: never equal for two tenants, whatever salt they choose."""
        if not self.tenant and not own_salt:
            return ""
        return hashlib.sha256(f"{len(self.tenant)}:{self.tenant}:{own_salt or ''}".encode()).hexdigest()[:32]


def caller_of(request: Request) -> Caller:
    """Read the caller's headers; raises a 400 naming the header that is malformed."""
    state = request.scope.get("state", {})
    return caller_from(request.headers, state.get("arrived_at"), state.get("trace_context"), state.get("consumed"))


def caller_from(
    headers: Mapping[str, str],
    arrived_at: float | None = None,
    trace_context: Context | None = None,
    consumed: Consumption | None = None,
) -> Caller:
    """The same from headers or gRPC metadata with lower-case names."""
    tenant = headers.get(TENANT_HEADER, "")
    if len(tenant) > LIMITS.identifier_chars:
        raise bad_request(f"{TENANT_HEADER}: at most {LIMITS.identifier_chars} characters", TENANT_HEADER)
    deadline_ms = _integer(headers.get(DEADLINE_HEADER), DEADLINE_HEADER, 10**12)
    if deadline_ms is not None and deadline_ms <= 0:
        raise ApiError(504, "The request's deadline had passed when it arrived.", reason="deadline")
    return Caller(
        tenant=tenant,
        priority=_integer(headers.get(PRIORITY_HEADER), PRIORITY_HEADER, LIMITS.priority),
        deadline_s=None if deadline_ms is None else deadline_ms / 1_000,
        arrived_at=time.monotonic() if arrived_at is None else arrived_at,
        trace_context=trace_context or context_from(headers),
        prefix=prefix_from(headers.get(PREFIX_HEADER)),
        may_resume=headers.get(RESUMABLE_HEADER) == "1",
        consumed=consumed or Consumption(),
    )


def _integer(text: str | None, header: str, bound: int) -> int | None:
    if text is None:
        return None
    if not _INTEGER.fullmatch(text) or abs(int(text)) > bound:
        raise bad_request(f"{header}: must be an integer of at most {bound} in size, got {text[:40]!r}", header)
    return int(text)
