"""The admin API on a port of its own: metrics for the operator, tenants, usage and fresh keys for administrators."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from urllib.parse import parse_qs

from octavo_gateway.app import Gateway
from octavo_gateway.asgi import HTML, TEXT, Receive, Scope, Send, header, respond
from octavo_gateway.errors import AuthenticationError, BadRequestError, GatewayError, RouteNotFoundError
from octavo_gateway.exchange import error_body, error_headers
from octavo_gateway.tenancy import hash_key, new_key
from octavo_gateway.tenancy.keys import format_hash
from octavo_gateway.tenancy.tenant import Tenant
from octavo_gateway.usage import GROUPS
from octavo_gateway.web import PAGE_HEADERS, page
from octavo_gateway.web.usage import usage_rows

log = logging.getLogger("octavo.gateway.audit")

Page = Callable[[dict[str, str]], Awaitable[bytes]]


class AdminApi:
    """ASGI application. /metrics, /health and /tenants, which the operator reads, need no token: network policy guards
    the port. The rest needs it, and without one there is nothing else. At / is the web page, which asks for the token
    and shows all tenants.
    """

    def __init__(self, gateway: Gateway, token: str | None) -> None:
        self._gateway = gateway
        self._token = token.encode() if token else None
        self._pages: dict[tuple[str, str], Page] = {
            ("GET", "/admin/tenants"): self._tenants,
            ("GET", "/admin/usage"): self._usage,
            ("GET", "/admin/state"): self._state,
            ("GET", "/api/state"): self._state,
            ("GET", "/api/usage"): self._usage_this_month,
            ("POST", "/admin/keys"): self._key,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        if method == "GET" and path == "/metrics":
            await respond(send, 200, await self._gateway.whole.metrics_page(), TEXT)
            return
        if method == "GET" and path == "/tenants":
            await respond(send, 200, self._readings())
            return
        if method == "GET" and path.startswith("/health"):
            ready = path != "/health/ready" or (self._gateway.synced and not self._gateway.leaving)
            await respond(send, 200 if ready else 503, b"{}")
            return
        if method == "GET" and path == "/" and self._token is not None:
            await respond(send, 200, page(admin=True), HTML, PAGE_HEADERS)
            return
        try:
            body = await self._page(scope)
        except GatewayError as error:
            await respond(send, error.status, error_body(error), headers=error_headers(error))
        else:
            await respond(send, 200, body, headers=[(b"cache-control", b"no-store")])

    async def _page(self, scope: Scope) -> bytes:
        given = header(scope["headers"], b"authorization") or b""
        allowed = self._token is not None and hmac.compare_digest(given, b"Bearer " + self._token)
        if not (allowed and scope["path"].startswith("/api/")):  # the page asks for these every second
            log.info("admin %s %s: %s", scope["method"], scope["path"][:200], "allowed" if allowed else "refused")
        if not allowed:
            raise AuthenticationError
        page = self._pages.get((scope["method"], scope["path"]))
        if page is None:
            raise RouteNotFoundError(f"There is no {scope['method']} {scope['path'][:200]} here.")
        query = {name: values[-1] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
        return await page(query)

    def _readings(self) -> bytes:
        """How each InferenceTenant was read, for its status; names and counts, no key and no hash of one."""
        directory = self._gateway.accounts.directory
        readings = directory.readings if directory is not None else ()
        told = [{"name": r.name, "generation": r.generation, "keys": r.keys, "problem": r.problem} for r in readings]
        return json.dumps({"enforced": directory is not None, "tenants": told}).encode()

    async def _tenants(self, query: dict[str, str]) -> bytes:
        directory = self._gateway.accounts.directory
        tenants = sorted(directory.tenants.values(), key=lambda t: t.name) if directory is not None else []
        running = await self._gateway.whole.running_by_tenant()
        return json.dumps({"tenants": [_tenant(tenant, running.get(tenant.name, 0)) for tenant in tenants]}).encode()

    async def _usage(self, query: dict[str, str]) -> bytes:
        by = tuple(query.get("by", "tenant").split(","))
        for name in by:
            if name not in GROUPS:
                raise BadRequestError(f"by: must be out of {', '.join(GROUPS)}, got {name[:40]!r}.", param="by")
        since, until = _time(query, "since"), _time(query, "until")

        ledger = self._gateway.accounts.ledger
        rows = await usage_rows(ledger, by, since=since, until=until, tenant=query.get("tenant"))
        return json.dumps({"by": list(by), "rows": rows}).encode()

    async def _usage_this_month(self, query: dict[str, str]) -> bytes:
        return await self._gateway.usage_this_month.document(None)

    async def _state(self, query: dict[str, str]) -> bytes:
        return await self._gateway.state()

    async def _key(self, query: dict[str, str]) -> bytes:
        """A fresh key and the hash to put into the tenant's Secret. Nothing is stored here."""
        key = new_key()
        return json.dumps({"key": key, "hash": format_hash(hash_key(key))}).encode()


def _tenant(tenant: Tenant, num_running: int) -> dict[str, object]:
    limits = {name: getattr(tenant.limits, name) for name in tenant.limits.__slots__}
    return {
        "name": tenant.name,
        "display_name": tenant.display_name,
        "suspended": tenant.suspended,
        "allowed_models": list(tenant.allowed_models),
        "weight": tenant.weight,
        "priority": tenant.priority,
        "keys": sorted(key.name for key in tenant.keys),
        "limits": {name: value for name, value in limits.items() if value is not None},
        "concurrent_requests": num_running,
    }


def _time(query: dict[str, str], name: str) -> datetime | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise BadRequestError(
            f"{name}: must be a date or time such as 2026-11-01, got {text[:40]!r}.", param=name
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
