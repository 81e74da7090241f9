"""Outlier ejection: a replica that keeps failing gets no traffic for a while, then one request to prove itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from octavo_gateway.registry import Endpoint


@dataclass(frozen=True, slots=True)
class OutlierPolicy:
    """Eject after so many failures in a row, for `base_s` doubled per ejection up to `max_s`."""

    consecutive_failures: int = 3
    base_s: float = 2.0
    max_s: float = 60.0


@dataclass(slots=True)
class _Record:
    failures: int = 0
    ejections: int = 0
    ejected_until: float = 0.0
    probing: bool = False


class OutlierDetector:
    """Circuit breaker per endpoint. Pure: time comes in as an argument."""

    def __init__(self, policy: OutlierPolicy | None = None) -> None:
        self._policy = policy or OutlierPolicy()
        self._records: dict[str, _Record] = {}

    def success(self, endpoint_id: str) -> None:
        """The replica answered (any status that is its own decision counts: 2xx, 4xx, 429, 503 draining)."""
        self._records.pop(endpoint_id, None)

    def failure(self, endpoint_id: str, now: float) -> bool:
        """The replica could not be reached, broke off, timed out or answered 5xx. True when it gets ejected by this."""
        record = self._records.setdefault(endpoint_id, _Record())
        record.failures += 1
        was_out = now < record.ejected_until
        if record.failures < self._policy.consecutive_failures and not record.probing:
            return False
        if not was_out:
            record.ejected_until = now + min(self._policy.base_s * 2**record.ejections, self._policy.max_s)
            record.ejections = min(record.ejections + 1, 16)
        record.probing = False
        return not was_out

    def abandoned(self, endpoint_id: str) -> None:
        """A request ended without telling anything about the replica (its client left): another may probe."""
        record = self._records.get(endpoint_id)
        if record is not None:
            record.probing = False

    def chosen(self, endpoint_id: str) -> None:
        """A request goes to this endpoint; after an ejection it is the one probe."""
        record = self._records.get(endpoint_id)
        if record is not None and record.ejections:
            record.probing = True

    def ejected(self, endpoint_id: str, now: float) -> bool:
        """True while no request should go there."""
        record = self._records.get(endpoint_id)
        return record is not None and (now < record.ejected_until or record.probing)

    def filter(self, endpoints: Sequence[Endpoint], now: float) -> Sequence[Endpoint]:
        """The endpoints not ejected, or all of them if every one is: ejection must not cause an outage by itself."""
        if not self._records:
            return endpoints
        healthy = [e for e in endpoints if not self.ejected(e.id, now)]
        return healthy or endpoints

    def retain(self, endpoint_ids: set[str]) -> None:
        """Forget endpoints that are gone."""
        for gone in [i for i in self._records if i not in endpoint_ids]:
            del self._records[gone]
