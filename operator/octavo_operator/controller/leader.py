"""Leader election by a Lease: one operator works, the others wait, and whoever loses the lease stops at once."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import math
import time
from typing import Any

from octavo_operator.controller.client import ApiError, KubeClient
from octavo_operator.controller.kinds import LEASE, SELF_REVIEW
from octavo_operator.controller.settings import OperatorSettings

log = logging.getLogger("octavo.operator.leader")


class LeaderElection:
    """Holds or awaits the lease. Time is measured on our own clock only: clocks of other machines are not trusted."""

    def __init__(self, client: KubeClient, settings: OperatorSettings) -> None:
        self._client = client
        self._settings = settings
        self._seen: tuple[str, Any] = ("", None)  # holder and renewTime last seen
        self._seen_at = 0.0
        self._renewed_at = -math.inf

    async def acquire(self) -> None:
        """Return when this operator leads."""
        while not await self._try():  # noqa: ASYNC110 - it asks the API server
            await asyncio.sleep(self._settings.lease_renew_s)
        log.info("%s leads", self._settings.identity)

    def leads(self) -> bool:
        """Whether the lease was renewed lately enough to write; no one else can have taken it until then."""
        return time.monotonic() - self._renewed_at <= self._settings.lease_duration_s * 2 / 3

    async def hold(self) -> None:
        """Renew until the lease is lost; then return. A lease that cannot be renewed in time counts as lost."""
        while True:
            await asyncio.sleep(self._settings.lease_renew_s)
            held = await self._try()
            if held is False or not self.leads():
                log.error("the lease is lost; this operator stops")
                return

    async def release(self) -> None:
        """Give the lease back, so that another takes over at once."""
        try:
            lease = await self._client.get(LEASE, self._settings.own_namespace, self._settings.lease_name)
            if lease["spec"].get("holderIdentity") == self._settings.identity:
                lease["spec"]["holderIdentity"] = ""
                await self._client.update(LEASE, lease)
        except ApiError as error:
            log.info("the lease was not given back: %s", error)

    async def _try(self) -> bool | None:
        """True: we hold it. False: another does. None: the API server did not say."""
        try:
            lease = await self._client.get(LEASE, self._settings.own_namespace, self._settings.lease_name)
        except ApiError as error:
            if not error.is_missing:
                log.warning("the lease cannot be read: %s", error)
                return None
            return await self._write(None)
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if holder and holder != self._settings.identity and not self._is_expired(holder, spec):
            return False
        return await self._write(lease)

    def _is_expired(self, holder: str, spec: dict[str, Any]) -> bool:
        """Whether the holder has not renewed for a whole duration since we first saw this very renewal."""
        seen = (holder, spec.get("renewTime"))
        now = time.monotonic()
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
        return now - self._seen_at > float(spec.get("leaseDurationSeconds") or self._settings.lease_duration_s)

    async def _write(self, lease: dict[str, Any] | None) -> bool | None:
        """Take or renew; the resourceVersion makes sure that only one of several succeeds."""
        began = time.monotonic()
        time_now = dt.datetime.now(tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        metadata = lease["metadata"] if lease else await self._metadata()
        spec = dict((lease or {}).get("spec") or {})
        if spec.get("holderIdentity") != self._settings.identity:
            spec["acquireTime"] = time_now
            spec["leaseTransitions"] = int(spec.get("leaseTransitions") or 0) + 1
        spec |= {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": round(self._settings.lease_duration_s),
            "renewTime": time_now,
        }
        body = {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": metadata, "spec": spec}
        try:
            await (self._client.update(LEASE, body) if lease else self._client.create(LEASE, body))
        except ApiError as error:
            if error.is_conflict:
                return False
            log.warning("the lease cannot be written: %s", error)
            return None
        self._renewed_at = began
        return True

    async def _metadata(self) -> dict[str, Any]:
        """Of a new lease. It belongs to our service account, so that it goes when the installation goes."""
        metadata: dict[str, Any] = {"name": self._settings.lease_name, "namespace": self._settings.own_namespace}
        try:
            review = await self._client.create(
                SELF_REVIEW, {"apiVersion": SELF_REVIEW.api_version, "kind": SELF_REVIEW.kind, "metadata": {}}
            )
        except ApiError as error:
            log.info("the lease gets no owner: %s", error)
            return metadata
        user = (review.get("status") or {}).get("userInfo") or {}
        prefix, name = f"system:serviceaccount:{self._settings.own_namespace}:", str(user.get("username", ""))
        if name.startswith(prefix):
            owner = {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "name": name.removeprefix(prefix),
                "uid": user["uid"],
            }
            metadata["ownerReferences"] = [owner]
        return metadata
