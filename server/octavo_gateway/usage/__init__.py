"""Usage: what each request consumed, counted by the engine, priced, and kept exactly once."""

from octavo_gateway.usage.ledger import Ledger
from octavo_gateway.usage.meter import UsageMeter
from octavo_gateway.usage.prices import Price, PriceTable
from octavo_gateway.usage.record import Begun, UsageRecord, interrupted
from octavo_gateway.usage.report import GROUPS, UsageRow, read_tenants, read_usage
from octavo_gateway.usage.store import LedgerAwayError, LedgerError

__all__ = [
    "GROUPS",
    "Begun",
    "Ledger",
    "LedgerAwayError",
    "LedgerError",
    "Price",
    "PriceTable",
    "UsageMeter",
    "UsageRecord",
    "UsageRow",
    "interrupted",
    "read_tenants",
    "read_usage",
]
